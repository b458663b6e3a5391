//! Benchmarks of training. Operation counts include only the work that every implementation must do.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Instant;

use advxl_cuda::Gpu;
use burn::tensor::Tensor;
use serde_json::{Value, json};

use crate::attack::{Norm, Pgd, Start, input_gradient};
use crate::data::{Augmentation, Batch, Dataset, Planes, SentImages, Spec, Split};
use crate::distributed::gpus::Gpus;
use crate::distributed::{Comm, Parallel, Reduce, Zero};
use crate::error::{Error, Result};
use crate::loss::{Targets, cross_entropy};
use crate::model::{Model, ModelConfig, Pass, Pool, Position};
use crate::objective::ExtraParameters;
use crate::ops::{
    AttackPrecision, Device, DeviceName, Numerics, Precision, Uploads, from_vec, hardware, mean,
    peak_flops, to_vec, usable_in_attacks,
};
use crate::optim::{OptimizerConfig, OptimizerKind};
use crate::plan::{DeviceEngine, Devices, GpuConstants, Plan};
use crate::recipe::{
    Checkpoints, Data, Head, Log, ObjectiveConfig, Phase, Recipe, Stage, TrainImages,
    TrainingAttack,
};
use crate::rng::{Rng, Stream};
use crate::schedule::{Decay, Schedule};
use crate::train;
use crate::train::state::StageOptimizer;
use crate::train::{PhaseContext, State, StepError};
use crate::weights::Outputs;

/// An adversarial training step to time.
pub struct StepWork {
    /// The model.
    pub model: ModelConfig,
    /// Image size in pixels.
    pub image_size: usize,
    /// Batch size.
    pub batch: usize,
    /// Attack steps.
    pub attack_steps: u64,
    /// Number of classes of the head.
    pub classes: usize,
    /// Number of timed steps.
    pub repeats: usize,
    /// Precision of the step.
    pub precision: Precision,
    /// Precision of the attack; that of the step if None.
    pub attack_precision: Option<AttackPrecision>,
    /// Whether to time only the attack: forward passes and input gradients.
    pub attack_only: bool,
    /// Whether to recompute activations in backward passes instead of keeping them.
    pub recompute: bool,
    /// Whether to time each kernel of one extra step individually, on an NVIDIA GPU.
    pub profile: bool,
}

impl StepWork {
    fn attack_word(&self) -> Option<&'static str> {
        self.attack_precision.map(|precision| precision.word())
    }

    fn attack_numerics(&self, device: &Device) -> Result<Numerics> {
        let (numerics, _) = usable_in_attacks(self.attack_precision, self.precision, device)?;
        Ok(numerics)
    }

    /// Returns the predicted time of a step, if `advxl bench device` has measured this GPU.
    fn predicted_seconds(&self, device: &Device) -> Option<f64> {
        let path = GpuConstants::path(&device.gpu()?.facts().name)?;
        let gpu = GpuConstants::load(path.to_str()?).ok()?;
        if self.attack_only {
            return None;
        }
        let (recipe, devices) = (recipe(self), self.devices(device));
        let plan = Plan::on_gpus(&recipe, self.classes, self.precision, devices, &gpu).ok()?;
        Some(plan.phases[0].update.compute)
    }

    fn devices(&self, device: &Device) -> Devices {
        Devices {
            count: 1,
            tflops: 1.0,
            price: None,
            link: None,
            engine: DeviceEngine::of(device),
        }
    }

    /// Returns the plan of a step on a device, including its memory.
    pub fn plan(&self, device: &Device) -> Plan {
        let devices = self.devices(device);
        Plan::new(&recipe(self), self.classes, self.precision, devices)
    }
}

/// Times the communication of one update: reduce-scatter of the gradients and all-gather of the weights.
///
/// Also times a message of minimal size, the latency.
/// Errors: the parameters cannot be divided among the ranks.
pub fn exchange(comm: &Comm, parameters: usize, repeats: usize, device: &Device) -> Result<Value> {
    /// Elements of one tensor, similar to the tensors of a ViT-S block.
    const TENSOR: usize = 1 << 20;
    let parallel = Parallel {
        shards: comm.world_size() as u64,
        reduce: Reduce::Fast,
    };
    let gpus = match (device.gpu(), comm.world_size()) {
        (None, _) | (_, 1) => None,
        (Some(gpu), _) => Gpus::join(comm, gpu, parallel.reduce)?,
    };
    let zero = Zero::new(comm, parallel)?.with_gpus(gpus.as_ref());
    let lengths: Vec<usize> = (0..parameters)
        .step_by(TENSOR)
        .map(|begin| TENSOR.min(parameters - begin))
        .collect();
    let wholes = || -> Vec<Tensor<1>> {
        let tensors = lengths.iter();
        tensors
            .map(|len| from_vec(vec![1.0; *len], [*len], device))
            .collect()
    };
    let median = |mut work: Box<dyn FnMut() + '_>| {
        let timed = |_| {
            // All ranks start together.
            comm.barrier();
            let begun = Instant::now();
            work();
            begun.elapsed().as_secs_f64()
        };
        middle((0..repeats + 1).map(timed).skip(1).collect())
    };
    let message = median(Box::new(|| {
        let values = vec![1.0; comm.world_size()];
        comm.all_to_all_f32(values).wait();
    }));
    let mut gradients: Vec<_> = (0..repeats + 1).map(|_| wholes()).collect();
    let mut parts = Vec::new();
    let reducing = median(Box::new(|| {
        parts = zero.reduce_scatter(gradients.pop().expect("as many as repeats"));
        device.wait();
    }));
    let gathering = median(Box::new(|| {
        zero.all_gather_each(&parts, &lengths, drop);
        device.wait();
    }));
    Ok(json!({
        "processes": comm.world_size(),
        "over_nccl": gpus.is_some(),
        "parameters": parameters,
        "message_us": rounded(message * 1e6, 1),
        "reduce_scatter_seconds": rounded(reducing, 4),
        "all_gather_seconds": rounded(gathering, 4),
        "seconds": rounded(reducing + gathering, 4),
    }))
}

fn middle(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn rounded(value: f64, digits: i32) -> f64 {
    (value * 10f64.powi(digits)).round() / 10f64.powi(digits)
}

/// Times training steps after two warm-up steps and reports the median.
///
/// This times the training loop's own step, [`train::step`], on one batch: conversion of the images, `attack_steps`
/// input gradients from a random start, one full gradient with its norm and checks, and AdamW. The model has a class
/// token and learned positions; there is no weight average.
///
/// - `gflops` counts the matrix products and attention of 2k + 3 forward passes (2k for the attack alone), nothing
///   else.
/// - `peak_gflops` is the CPU's rate for products in registers on the same threads, or a GPU's rate for large matrices,
///   measured right afterwards.
/// - `seconds_to_queue` is the time in which the host queued the last step's gradients on an NVIDIA GPU. If it is close
///   to the time of the whole step, kernel launches are the bottleneck.
/// - `to_host` is what the last step copied from an NVIDIA GPU. `unplanned` counts reads of tensors by operations
///   without a GPU kernel, and should be 0.
///
/// Errors: the loss or gradient is not finite.
pub fn step(work: &StepWork, device: &Device) -> Result<Value> {
    work.model.check_device(device)?;
    let recipe = recipe(work);
    let comm = Comm::single();
    let (stage, size) = (&recipe.stage[0], work.image_size);
    let spec = recipe.data_of(stage).train.specs()[0];
    let dataset = Dataset::open(spec, Split::Train, 0)?;
    let phase = PhaseContext {
        recipe: &recipe,
        number: 0,
        stage,
        phase: &stage.phases[0],
        stage_start: 0,
        end: stage.samples(),
        dataset: &Arc::new(dataset),
        captions: None,
        outputs: Outputs::Logits,
        reference: None,
        zero: Zero::new(&comm, recipe.parallel)?,
        device,
        numerics: work.precision.into(),
        attack_numerics: work.attack_numerics(device)?,
    };
    let model = Model::new(&recipe.model, work.classes, size, 0, device);
    let optimizer = StageOptimizer {
        stage: 0,
        config: &stage.optimizer,
        average: None,
    };
    let extra = ExtraParameters::default();
    let mut state = State::new(model, extra, optimizer, &phase.zero);
    let batch = random_batch(work, 0);
    // As in the training loop, the next images are uploaded while the device computes.
    let uploads = Uploads::new(device);
    let mut next = SentImages::new(&batch, &uploads);
    let queued = Cell::new(None);
    let mut one = |state: &mut State| {
        let begun = Instant::now();
        let sent = std::mem::take(&mut next);
        let images = sent.to_device(&batch, size, device);
        let mut send = || {
            queued.set(Some(begun.elapsed().as_secs_f64()));
            next = SentImages::new(&batch, &uploads);
        };
        if work.attack_only {
            attack(&phase, state, &batch, images)?;
            send();
            return Ok(());
        }
        match train::step(&phase, state, &batch, images, 0, send) {
            Ok(_) => Ok(()),
            Err(StepError::Failed(error)) => Err(error),
            Err(StepError::Gpu(error)) => Err(Error::of_gpu(&error)),
            Err(StepError::Diverged(found)) => {
                let (loss, norm) = (found.loss, found.gradient_norm);
                let message = format!("the step diverged: loss {loss}, gradient norm {norm}");
                Err(Error::failed(message))
            }
        }
    };
    let (mut seconds, mut to_host) = (Vec::new(), None);
    for _ in 0..work.repeats + 2 {
        let before = device.gpu().map(Gpu::traffic);
        let begun = Instant::now();
        one(&mut state)?;
        device.wait();
        seconds.push(begun.elapsed().as_secs_f64());
        let after = device.gpu().map(Gpu::traffic);
        to_host = before.zip(after).map(|(before, after)| {
            json!({
                "copies": after.fetched.0 - before.fetched.0,
                "bytes": after.fetched.1 - before.fetched.1,
                "unplanned": after.unplanned.0 - before.unplanned.0,
            })
        });
    }
    let median = middle(seconds.split_off(2));
    let profile = match device.gpu().filter(|_| work.profile) {
        None => None,
        Some(gpu) => {
            gpu.start_profile();
            one(&mut state)?;
            Some(rows_of_profile(gpu.end_profile()))
        }
    };

    let patches = (size / recipe.model.patch()).pow(2);
    let forward = 2.0 * recipe.model.forward_macs(size, patches) as f64 * work.batch as f64;
    let passes = 2 * work.attack_steps + if work.attack_only { 0 } else { 3 };
    let flops = forward * passes as f64;
    let hardware = hardware(device);
    let peak = peak_flops(work.precision, device);
    Ok(json!({
        "program": format!("advxl {}", env!("CARGO_PKG_VERSION")),
        "device": hardware.as_deref().unwrap_or("cpu"),
        "precision": work.precision.word(),
        "attack_precision": work.attack_word(),
        "model": recipe.model.size(),
        "image_size": size,
        "batch": work.batch,
        "attack_steps": work.attack_steps,
        "attack_only": work.attack_only,
        "recompute": work.recompute,
        "threads": rayon::current_num_threads(),
        "seconds_per_step": rounded(median, 5),
        "seconds_to_queue": queued.get().filter(|_| device.gpu().is_some()).map(|seconds| rounded(seconds, 5)),
        "images_per_second": rounded(work.batch as f64 / median, 3),
        "gflops": rounded(flops / median / 1e9, 1),
        "peak_gflops": rounded(peak / 1e9, 1),
        "share_of_peak": rounded(flops / median / peak, 3),
        "peak_memory_mib": crate::train::monitor::peak_memory_mib(),
        "to_host": to_host,
        "profile": profile,
        "predicted_seconds_per_step": work.predicted_seconds(device),
        "planned_memory_mib": work.plan(device).memory.total() >> 20,
        "device_memory_mib": device.memory().map(|bytes| bytes >> 20),
    }))
}

/// Returns the kernels and products of a profile, longest first.
fn rows_of_profile(mut profile: Vec<(String, u64, f64)>) -> Vec<Value> {
    profile.sort_by(|(_, _, one), (_, _, two)| two.total_cmp(one));
    let all: f64 = profile.iter().map(|(_, _, seconds)| seconds).sum();
    let row = |(name, count, seconds): (String, u64, f64)| {
        json!({
            "kernel": name,
            "count": count,
            "ms": rounded(seconds * 1e3, 3),
            "share": rounded(seconds / all, 4),
        })
    };
    profile.into_iter().map(row).collect()
}

/// Runs only the attack of a step.
fn attack(phase: &PhaseContext, state: &State, batch: &Batch, images: Tensor<4>) -> Result<()> {
    let now = phase.at(state.samples, batch);
    let objective = phase.objective(state, batch, &images)?;
    now.perturb(&objective, &state.model, images);
    Ok(())
}

/// Returns a recipe with the timed steps.
fn recipe(work: &StepWork) -> Recipe {
    let mut model = work.model.clone();
    if let ModelConfig::Vit(vit) = &mut model {
        vit.pool = Pool::Token;
        vit.position = Position::Learned;
    }
    let fraction = || "4/255".parse().expect("a fraction");
    let data = || Spec::Synthetic {
        count: work.batch,
        image_size: 32,
    };
    let stage = Stage {
        name: "bench".into(),
        data: None,
        head: Head::Keep,
        batch: work.batch as u64,
        chunk: None,
        phases: vec![Phase {
            image_size: work.image_size as u64,
            samples: (work.batch * (work.repeats + 2)) as u64,
            masking: None,
        }],
        attack: (work.attack_steps > 0).then(|| {
            let pgd = Pgd {
                norm: Norm::Linf,
                epsilon: fraction(),
                step_size: fraction(),
                steps: work.attack_steps,
                start: Start::Random,
            };
            TrainingAttack::pgd(pgd, work.attack_precision)
        }),
        attack_warmup_samples: None,
        objective: ObjectiveConfig::cross_entropy(),
        text: None,
        train: Vec::new(),
        optimizer: OptimizerConfig {
            kind: OptimizerKind::Adamw,
            weight_decay: 0.01,
            betas: [0.9, 0.999],
            clip_norm: None,
            layer_decay: None,
            head_rate: 1.0,
        },
        learning_rate: Schedule {
            peak: 1e-4,
            warmup_samples: 0,
            decay: Decay::Constant,
            end: 0.0,
        },
        drop_path: None,
        augmentation: Augmentation::default(),
        mixing: None,
    };
    Recipe {
        schema: 1,
        seed: 0,
        precision: work.precision,
        device: DeviceName::default(),
        recompute: work.recompute,
        parallel: Parallel::default(),
        model,
        start: None,
        data: Some(Data {
            train: TrainImages::One(data()),
            test: data(),
            broken_rate: None,
            reduced_decode: false,
            workers: None,
            test_on_train: true,
        }),
        stage: vec![stage],
        average: None,
        evaluation: None,
        final_evaluation: Vec::new(),
        checkpoint: Checkpoints {
            every_samples: u64::MAX,
            keep: 1,
        },
        log: Log {
            every_samples: u64::MAX,
        },
    }
}

/// Compares the gradients of a device with those of the CPU in f32: input gradients, as used by attacks, and gradients
/// of all weights.
///
/// Reports the cosine similarity, the largest difference as a share of the largest gradient, and the share of elements
/// with the same sign. With an attack precision, the input gradients are computed in it; if it is FP8, they are also
/// compared with the CPU's emulation.
///
/// Errors: the device does not support the attack's precision.
pub fn gradients(work: &StepWork, device: &Device) -> Result<Value> {
    let numerics = match work.attack_precision {
        None => work.precision.into(),
        Some(_) => work.attack_numerics(device)?,
    };
    let found = [
        image_gradients(work, numerics, device),
        weight_gradients(work, work.precision, device),
    ];
    let cpu = Device::cpu();
    let right = [
        image_gradients(work, Numerics::F32, &cpu),
        weight_gradients(work, Precision::F32, &cpu),
    ];
    let compare = |found: &[f32], right: &[f32]| {
        let sum = |a: &[f32], b: &[f32]| {
            let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
            products.sum::<f64>()
        };
        let most =
            |values: &mut dyn Iterator<Item = f32>| values.fold(0f32, |most, v| most.max(v.abs()));
        let off = most(&mut found.iter().zip(right).map(|(a, b)| a - b))
            / most(&mut right.iter().copied());
        let same = found
            .iter()
            .zip(right)
            .filter(|(a, b)| a.signum() == b.signum());
        json!({
            "cosine": sum(found, right) / (sum(found, found) * sum(right, right)).sqrt(),
            "largest_difference": off,
            "same_signs": same.count() as f64 / found.len() as f64,
        })
    };
    let emulated = (numerics == Numerics::AttackFp8 && !device.is_cpu())
        .then(|| compare(&found[0], &image_gradients(work, numerics, &cpu)));
    Ok(json!({
        "device": hardware(device).as_deref().unwrap_or("cpu"),
        "precision": work.precision.word(),
        "attack_precision": work.attack_word(),
        "model": work.model.size(),
        "image_size": work.image_size,
        "batch": work.batch,
        "images": compare(&found[0], &right[0]),
        "images_emulated": emulated,
        "weights": compare(&found[1], &right[1]),
    }))
}

/// A model with a batch, its targets and the pass settings.
struct OneBatch<'a> {
    model: Model,
    images: Tensor<4>,
    goal: Tensor<2>,
    pass: Pass<'a>,
}

impl OneBatch<'_> {
    fn new(work: &StepWork, numerics: Numerics, device: &Device) -> Self {
        let batch = random_batch(work, 1);
        Self {
            model: Model::new(&work.model, work.classes, work.image_size, 0, device),
            images: batch.to_device(work.image_size, device),
            goal: Targets::classes(&batch.first).distributions(work.classes, 0.0, device),
            pass: Pass {
                numerics,
                recompute: work.recompute,
                ..Pass::evaluation()
            },
        }
    }

    fn losses(&self, model: &Model, images: Tensor<4>) -> Tensor<1> {
        cross_entropy(model.logits(images, &self.pass), self.goal.clone())
    }
}

fn image_gradients(work: &StepWork, numerics: Numerics, device: &Device) -> Vec<f32> {
    let one = OneBatch::new(work, numerics, device);
    let loss = |images| one.losses(&one.model, images);
    to_vec(input_gradient(&loss, one.images.clone()).0)
}

fn weight_gradients(work: &StepWork, precision: Precision, device: &Device) -> Vec<f32> {
    let one = OneBatch::new(work, precision.into(), device);
    let tracked = one.model.tracked();
    let loss = mean(one.losses(&tracked, one.images.clone()));
    let gradients = tracked.gradients(&mut loss.backward());
    gradients.into_iter().flat_map(to_vec).collect()
}

/// Returns a batch of random images and labels.
fn random_batch(work: &StepWork, seed: u64) -> Batch {
    let mut rng = Rng::new(seed, Stream::Bench);
    let (batch, size) = (work.batch, work.image_size);
    let pixels = (0..batch * 3 * size * size).map(|_| rng.below(256) as u8);
    let images = Planes::Bytes(pixels.collect());
    let labels: Vec<u32> = (0..batch).map(|_| rng.below(work.classes) as u32).collect();
    Batch {
        images,
        mixed: Vec::new(),
        first: labels.clone(),
        second: labels,
        weight: vec![1.0; batch],
        samples: (0..batch as u64).collect(),
        epochs: vec![0; batch],
        captions: Vec::new(),
    }
}
