//! Estimates the communication of several devices: gradients, weights and embeddings, and the time of checkpoints.
//!
//! A simple model of [`crate::distributed::zero`]. In the reduce-scatter of the gradients and the all-gather of the
//! weights each device sends `2 (D - 1) / D` of the weights' bytes, in messages of `BUCKET` elements for all devices.
//! Each message takes `D - 1` rounds. Communication is not overlapped with computation. `HANDLED` and `LATENCY_US`
//! were measured between processes on one machine, and the whole model between network namespaces with slow links
//! (docs/guides/several_processes.md).

use serde::Serialize;

use crate::distributed::BUCKET;
use crate::ops::Device;
use crate::recipe::{Recipe, Stage};

/// Bytes of weights per second that a process can handle: packing, summing and forwarding gradients, and reassembling
/// the weights.
const HANDLED: f64 = 1.0e9;
/// Sequential messages per round: announcement, go-ahead and data.
const WAYS: f64 = 3.0;
/// Latency of a message over TCP within a machine, in microseconds.
pub const LATENCY_US: f64 = 15.0;
/// Write speed of a checkpoint including its hash, in 10^9 bytes per second.
pub const DISK: f64 = 0.37;

/// The connection between devices, and the disk of the first one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Link {
    /// Bandwidth of one device in each direction, in 10^9 bits per second.
    pub gbits: f64,
    /// Latency of a message, in microseconds.
    pub latency_us: f64,
    /// Write speed of the first device to the run's folder, in 10^9 bytes per second.
    pub disk: f64,
}

impl Link {
    /// Returns the seconds in which each device sends a total of `bytes` to the others, in `messages` for all devices.
    fn seconds(&self, bytes: f64, messages: u64, devices: u64) -> f64 {
        let rounds = messages * (devices - 1);
        bytes * 8.0 / (self.gbits * 1e9) + rounds as f64 * WAYS * self.latency_us * 1e-6
    }
}

/// Bytes of an f32.
pub(crate) const FLOAT: u64 = 4;

/// The devices of a planned run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Devices {
    /// Number of devices. Each holds all weights and its share of the batch.
    pub count: u64,
    /// Achieved rate of one device, in 10^12 floating-point operations per second.
    pub tflops: f64,
    /// Price per device hour.
    pub price: Option<f64>,
    /// Connection between the devices. If absent, communication and checkpoints take no time.
    pub link: Option<Link>,
    /// Engine that computes on them, which determines how memory is counted.
    pub engine: DeviceEngine,
}

/// The engine that computes on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceEngine {
    /// The CPU kernels.
    Cpu,
    /// The CUDA engine.
    Cuda,
}

impl DeviceEngine {
    /// Returns the engine of a device. GPUs through Burn count like the CPU.
    pub fn of(device: &Device) -> Self {
        match device.gpu() {
            Some(_) => Self::Cuda,
            None => Self::Cpu,
        }
    }
}

/// Time of one update, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct UpdatePlan {
    /// Attack, forward and backward passes and update, which the devices share.
    pub compute: f64,
    /// Communication of gradients and weights.
    pub exchange: f64,
    /// All-gather of the embeddings for contrastive losses, and the losses, which each device computes for the full
    /// batch.
    pub contrast: f64,
}

impl UpdatePlan {
    /// Estimates the time of an update. `outputs` is the number of the model's outputs.
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
        // One set of messages each for the reduce-scatter and the all-gather.
        let buckets = 2 * parameters.div_ceil(BUCKET as u64);
        let exchange = bytes / HANDLED + link.seconds(2.0 * to_others * bytes, buckets, devices);
        let contrast = match stage.objective.uses_captions() {
            false => 0.0,
            true => {
                let passes = stage.attack_steps() + 1;
                let embeddings = (stage.batch * outputs * FLOAT) as f64;
                // Similarity of every image with every text, and the gradient of the image embeddings.
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

    /// Returns the total time.
    pub fn total(&self) -> f64 {
        self.compute + self.exchange + self.contrast
    }

    /// Returns the share of an update in which devices wait for each other or do redundant work.
    pub fn bubble(&self) -> f64 {
        1.0 - self.compute / self.total()
    }
}

/// Checkpoints of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CheckpointPlan {
    /// Number of checkpoints.
    pub count: u64,
    /// Bytes of one checkpoint: weights, two moments, the weight average.
    pub bytes: u64,
    /// Seconds for which all devices wait for one checkpoint.
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
        // The first device gathers all parts of the moments and averages, tensor by tensor.
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
