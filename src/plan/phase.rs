//! The cost of one phase, and the devices that it runs on.

use serde::Serialize;

use super::link::UpdatePlan;

/// A phase's cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PhasePlan {
    /// The stage.
    pub stage: String,
    /// Pixels on a side.
    pub image_size: u64,
    /// Tokens of an image, class token included; none in a ConvNeXt.
    pub tokens: Option<u64>,
    /// Images seen.
    pub samples: u64,
    /// Steps of the attack.
    pub attack_steps: u64,
    /// Multiply-adds of one forward pass of one image.
    pub forward_macs: u64,
    /// The phase as the paper counts it.
    pub paper_macs: f64,
    /// Floating point operations of one image, attack and update.
    pub flops_per_sample: f64,
    /// Seconds of one update.
    pub update: UpdatePlan,
}
