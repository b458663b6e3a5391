//! The cost of one phase, and the devices that it runs on.

use serde::Serialize;

use super::link::{Link, UpdatePlan};

/// Bytes of an f32.
pub(crate) const FLOAT: u64 = 4;

/// The devices that a run is planned for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Devices {
    /// How many; each holds all weights and its share of the batch.
    pub count: u64,
    /// What one computes in truth, in 10^12 floating point operations a second.
    pub tflops: f64,
    /// Price of an hour of one.
    pub price: Option<f64>,
    /// How they are connected; if absent, exchanges and checkpoints take no time.
    pub link: Option<Link>,
}

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
