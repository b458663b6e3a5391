//! What several devices add to a run: gradients and weights exchanged, embeddings exchanged, checkpoints.
//!
//! A small model of what [`crate::distributed::zero`] does. A device sends every other one its part of the gradients, and later its part of
//! the weights: `2 (D - 1) / D` of the weights' bytes go out of each, in messages of `BUCKET` elements for all, of
//! which each takes `D - 1` rounds. Nothing of this is hidden behind other work. `HANDLED` and `LATENCY_US` were measured
//! between processes of one machine, and the whole between network namespaces with slow links (docs/guides/several_processes.md).

use serde::Serialize;

use crate::distributed::BUCKET;
use crate::loss::LossKind;
use crate::ops::Device;
use crate::recipe::{Recipe, Stage};

/// Bytes of weights a second whose gradients a process lays out, adds up and hands on, and whose parts it puts together again.
const HANDLED: f64 = 1.0e9;
/// Messages of a round, one after another: what is to come, whether it may come, and it.
const WAYS: f64 = 3.0;
/// What a message takes at the least, over TCP within a machine, in millionths of a second.
pub const LATENCY_US: f64 = 15.0;
/// What is written of a checkpoint in a second, in 10^9 bytes, with its hash.
pub const DISK: f64 = 0.37;

/// How devices are connected, and where the first of them writes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Link {
    /// What one device sends while it receives as much, in 10^9 bits a second.
    pub gbits: f64,
    /// What a message takes at the least, in millionths of a second.
    pub latency_us: f64,
    /// What the first device writes to the run's folder, in 10^9 bytes a second.
    pub disk: f64,
}

impl Link {
    /// Seconds in which each of some devices sends all others together so many bytes, in messages for all of them.
    fn seconds(&self, bytes: f64, messages: u64, devices: u64) -> f64 {
        let rounds = messages * (devices - 1);
        bytes * 8.0 / (self.gbits * 1e9) + rounds as f64 * WAYS * self.latency_us * 1e-6
    }
}

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
    /// What computes on them, whose memory is counted.
    pub engine: DeviceEngine,
}

/// What computes on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceEngine {
    /// The CPU kernels.
    Cpu,
    /// The CUDA engine.
    Cuda,
}

impl DeviceEngine {
    /// That of a device; GPUs through Burn are counted as the CPU is.
    pub fn of(device: &Device) -> Self {
        match device.gpu() {
            Some(_) => Self::Cuda,
            None => Self::Cpu,
        }
    }
}

/// Seconds of one update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct UpdatePlan {
    /// Attack, passes and update, which the devices share.
    pub compute: f64,
    /// Gradients and weights.
    pub exchange: f64,
    /// Embeddings, which contrastive losses compare with those of all devices, and the losses, which each device computes whole.
    pub contrast: f64,
}

impl UpdatePlan {
    /// Computes what an update takes. `outputs` are the dimensions of the model's result.
    pub(crate) fn new(
        stage: &Stage,
        flops_per_sample: f64,
        [parameters, outputs]: [u64; 2],
        devices: &Devices,
    ) -> Self {
        let (tflops, link) = (devices.tflops, devices.link);
        let devices = devices.count;
        let compute = flops_per_sample * stage.batch as f64 / (devices as f64 * tflops * 1e12);
        let Some(link) = link.filter(|_| devices > 1) else {
            return Self {
                compute,
                ..Self::default()
            };
        };
        let to_others = (devices - 1) as f64 / devices as f64;
        let bytes = (parameters * FLOAT) as f64;
        // To add up, and to put together.
        let buckets = 2 * parameters.div_ceil(BUCKET as u64);
        let exchange = bytes / HANDLED + link.seconds(2.0 * to_others * bytes, buckets, devices);
        let contrast = match stage.loss.kind {
            LossKind::CrossEntropy => 0.0,
            LossKind::Contrastive => {
                let passes = stage.attack_steps() + 1;
                let embeddings = (stage.batch * outputs * FLOAT) as f64;
                // Every image with every text, and the gradient of the images.
                let flops = 4.0 * (stage.batch * stage.batch * outputs) as f64;
                passes as f64
                    * (link.seconds(to_others * embeddings, 1, devices) + flops / (tflops * 1e12))
            }
        };
        Self {
            compute,
            exchange,
            contrast,
        }
    }

    /// All of it.
    pub fn total(&self) -> f64 {
        self.compute + self.exchange + self.contrast
    }

    /// The share of an update in which devices wait for each other or repeat what others do.
    pub fn bubble(&self) -> f64 {
        1.0 - self.compute / self.total()
    }
}

/// Checkpoints of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CheckpointPlan {
    /// How many are written.
    pub count: u64,
    /// Bytes of one: weights, two moments, the average.
    pub bytes: u64,
    /// Seconds in which all wait for one.
    pub seconds: f64,
}

impl CheckpointPlan {
    pub(crate) fn new(
        recipe: &Recipe,
        samples: u64,
        parameters: u64,
        devices: u64,
        link: &Link,
    ) -> Self {
        let parts = 2 + u64::from(recipe.average.is_some());
        let bytes = (1 + parts) * parameters * FLOAT;
        // All devices' parts of moments and averages come to the first one, tensors of the model by tensors.
        let to_others = (devices - 1) as f64 / devices as f64;
        let messages = parts * parameters.div_ceil(BUCKET as u64);
        let coming = to_others * (parts * parameters * FLOAT) as f64;
        let stages = recipe.stage.len() as u64;
        Self {
            count: samples / recipe.checkpoint.every_samples + stages,
            bytes,
            seconds: link.seconds(coming, messages, devices) + bytes as f64 / (link.disk * 1e9),
        }
    }
}
