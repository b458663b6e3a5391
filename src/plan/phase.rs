//! The cost of one phase.

use serde::Serialize;

use super::link::UpdatePlan;

/// Cost of a phase.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PhasePlan {
    /// Name of the stage.
    pub stage: String,
    /// Image size in pixels.
    pub image_size: u64,
    /// Tokens per image, including the class token; None for a ConvNeXt.
    pub tokens: Option<u64>,
    /// Number of images seen.
    pub samples: u64,
    /// Attack steps.
    pub attack_steps: u64,
    /// Multiply-adds of one forward pass on one image.
    pub forward_macs: u64,
    /// Multiply-adds of the phase, as counted in the paper.
    pub paper_macs: f64,
    /// Floating-point operations per image, for attack and update.
    pub flops_per_sample: f64,
    /// Time of one update.
    pub update: UpdatePlan,
}
