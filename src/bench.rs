//! How fast this machine does the work of training. Counts only what any program must do.

use std::time::Instant;

use burn::tensor::{DType, Device, Tensor};
use serde_json::{Value, json};

use crate::attack::{Norm, Pgd, Start, input_gradient};
use crate::distributed::{Group, Parallel, Reduce};
use crate::error::Result;
use crate::loss::{Targets, cross_entropy};
use crate::model::{Model, ModelConfig, Pass, Pool, Position};
use crate::ops::{Precision, from_vec, hardware, to_vec};
use crate::optim::{Optimizer, OptimizerConfig, OptimizerKind, norm};
use crate::rng::{Purpose, Rng};
use crate::settings::Words;
use crate::train::Exchange;

/// One adversarial training step to be timed.
pub struct StepWork {
    /// The model.
    pub model: ModelConfig,
    /// Pixels on a side.
    pub image_size: usize,
    /// Images in a step.
    pub batch: usize,
    /// Steps of the attack.
    pub attack_steps: u64,
    /// Classes of the head.
    pub classes: usize,
    /// Steps that are timed.
    pub repeats: usize,
    /// Arithmetic.
    pub precision: Precision,
    /// Whether the attack is all that is timed: forward passes and gradients of the input.
    pub attack_only: bool,
    /// Whether activations are computed again in backward passes instead of kept.
    pub recompute: bool,
}

/// Times the exchange of an update between the processes of a group: gradients added up, weights put together again.
///
/// Besides, one message of the smallest size, for the least that a message takes.
/// Errors: the parameters cannot be dealt to so many processes.
pub fn exchange(
    group: &Group,
    parameters: usize,
    repeats: usize,
    device: &Device,
) -> Result<Value> {
    /// Of one tensor, near to those of a block of a ViT-S.
    const TENSOR: usize = 1 << 20;
    let parallel = Parallel {
        shards: group.size() as u64,
        reduce: Reduce::Fast,
    };
    let exchange = Exchange::new(group, parallel)?;
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
            // All begin together.
            group.gather(());
            let begun = Instant::now();
            work();
            begun.elapsed().as_secs_f64()
        };
        middle((0..repeats + 1).map(timed).skip(1).collect())
    };
    let message = median(Box::new(|| {
        let values = vec![1.0; group.size()];
        group.start_all_to_all(values).wait();
    }));
    let mut gradients: Vec<_> = (0..repeats + 1).map(|_| wholes()).collect();
    let mut parts = Vec::new();
    let adding = median(Box::new(|| {
        parts = exchange.add_up(gradients.pop().expect("as many as repeats"));
    }));
    let putting = median(Box::new(|| {
        exchange.each_whole(&parts, &lengths, drop);
    }));
    Ok(json!({
        "processes": group.size(),
        "parameters": parameters,
        "message_us": rounded(message * 1e6, 1),
        "add_up_seconds": rounded(adding, 4),
        "put_together_seconds": rounded(putting, 4),
        "seconds": rounded(adding + putting, 4),
    }))
}

fn middle(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn rounded(value: f64, digits: i32) -> f64 {
    (value * 10f64.powi(digits)).round() / 10f64.powi(digits)
}

/// Times steps after two that warm up, and tells the median.
///
/// The same work as a plain PyTorch loop would do: class token, learned positions, random start,
/// `attack_steps` input gradients, one full gradient, AdamW. `gflops` counts 2k + 3 forward passes
/// (2k of the attack alone) of matrix products and attention, nothing else. `peak_gflops` is the processor's own rate for
/// products in registers on the same threads, measured right after.
pub fn step(work: &StepWork, device: &Device) -> Value {
    let mut config = work.model.clone();
    if let ModelConfig::Vit(vit) = &mut config {
        vit.pool = Pool::Token;
        vit.position = Position::Learned;
    }
    let mut model = Model::new(&config, work.classes, work.image_size, 0, device);
    let settings = OptimizerConfig {
        kind: OptimizerKind::Adamw,
        weight_decay: 0.01,
        betas: [0.9, 0.999],
        clip_norm: None,
    };
    let weights: Vec<_> = model.parameters().iter().map(|p| &p.value).collect();
    let mut optimizer = Optimizer::new(&settings, None, &weights, None, 0);
    let decays: Vec<bool> = model.parameters().iter().map(|p| p.decays).collect();

    let (batch, size) = (work.batch, work.image_size);
    let (images, goal) = images_and_goal(work, 0, device);
    let keys: Vec<u64> = (0..batch as u64).collect();
    let attack = (work.attack_steps > 0).then(|| Pgd {
        norm: Norm::Linf,
        epsilon: "4/255".parse().expect("a fraction"),
        step_size: "4/255".parse().expect("a fraction"),
        steps: work.attack_steps,
        start: Start::Random,
    });
    let pass = Pass {
        precision: work.precision,
        recompute: work.recompute,
        ..Pass::evaluation()
    };
    let seconds = (0..work.repeats + 2)
        .map(|_| {
            let begun = Instant::now();
            let loss = |x: Tensor<4>| cross_entropy(model.logits(x, &pass), goal.clone());
            let adversarial = match &attack {
                Some(attack) => attack.perturb(images.clone(), &loss, 0, &keys),
                None => images.clone(),
            };
            if work.attack_only {
                wait_for(device);
                return begun.elapsed().as_secs_f64();
            }
            let tracked = model.tracked();
            let loss = cross_entropy(tracked.logits(adversarial, &pass), goal.clone()).mean();
            let gradients = tracked.gradients(&mut loss.backward());
            drop(tracked);
            let length = norm(&gradients);
            let weights = model
                .parameters_mut()
                .into_iter()
                .map(|p| &mut p.value)
                .collect();
            optimizer.update(weights, &decays, gradients, length, 1e-4);
            wait_for(device);
            begun.elapsed().as_secs_f64()
        })
        .skip(2)
        .collect();
    let median = middle(seconds);

    let patches = (size / config.patch()).pow(2);
    let forward = 2.0 * config.forward_macs(size, patches) as f64 * batch as f64;
    let passes = 2 * work.attack_steps + if work.attack_only { 0 } else { 3 };
    let flops = forward * passes as f64;
    let hardware = hardware(device);
    let peak = match &hardware {
        None => advxl_kernels::peak_flops(work.precision),
        Some(_) => product_rate(work.precision, device),
    };
    json!({
        "program": format!("advxl {}", env!("CARGO_PKG_VERSION")),
        "device": hardware.as_deref().unwrap_or("cpu"),
        "precision": work.precision.word(),
        "model": config.size(),
        "image_size": size,
        "batch": batch,
        "attack_steps": work.attack_steps,
        "attack_only": work.attack_only,
        "recompute": work.recompute,
        "threads": rayon::current_num_threads(),
        "seconds_per_step": rounded(median, 5),
        "images_per_second": rounded(batch as f64 / median, 3),
        "gflops": rounded(flops / median / 1e9, 1),
        "peak_gflops": rounded(peak / 1e9, 1),
        "share_of_peak": rounded(flops / median / peak, 3),
        "peak_memory_mib": crate::train::monitor::peak_memory_mib(),
        "device_memory_mib": device.memory_pool_usage().map(|usage| usage.bytes_reserved >> 20),
    })
}

/// Waits until a GPU has done what it was given.
fn wait_for(device: &Device) {
    // What went wrong shows in the numbers that are read from it.
    let _ = device.sync();
}

/// Floating point operations a second of a GPU in products of large square matrices.
fn product_rate(precision: Precision, device: &Device) -> f64 {
    const SIDE: usize = 4096;
    const PRODUCTS: usize = 10;
    let matrix = || {
        let ones = Tensor::<2>::ones([SIDE, SIDE], device);
        match precision {
            Precision::F32 => ones,
            Precision::Bf16 => ones.cast(DType::BF16),
        }
    };
    let (a, b) = (matrix(), matrix());
    let products = || {
        let begun = Instant::now();
        for _ in 0..PRODUCTS {
            std::hint::black_box(a.clone().matmul(b.clone()));
        }
        wait_for(device);
        begun.elapsed().as_secs_f64()
    };
    products();
    2.0 * (SIDE.pow(3) * PRODUCTS) as f64 / products()
}

/// Compares the gradients of a device with those of the processor in f32: of the images, as an attack takes them, and of
/// all weights.
///
/// `cosine` of the two and the largest difference as a share of the largest gradient; of the images also the share of pixels
/// whose gradients have the same sign.
pub fn gradients(work: &StepWork, device: &Device) -> Value {
    let found = gradients_of(work, work.precision, device);
    let right = gradients_of(work, Precision::F32, &Device::flex());
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
    json!({
        "device": hardware(device).as_deref().unwrap_or("cpu"),
        "precision": work.precision.word(),
        "model": work.model.size(),
        "image_size": work.image_size,
        "batch": work.batch,
        "images": compare(&found[0], &right[0]),
        "weights": compare(&found[1], &right[1]),
    })
}

fn gradients_of(work: &StepWork, precision: Precision, device: &Device) -> [Vec<f32>; 2] {
    let model = Model::new(&work.model, work.classes, work.image_size, 0, device);
    let (images, goal) = images_and_goal(work, 1, device);
    let pass = Pass {
        precision,
        recompute: work.recompute,
        ..Pass::evaluation()
    };
    let loss = |images| cross_entropy(model.logits(images, &pass), goal.clone());
    let (of_images, _) = input_gradient(&loss, images.clone());
    let tracked = model.tracked();
    let loss = cross_entropy(tracked.logits(images, &pass), goal.clone()).mean();
    let of_weights = tracked.gradients(&mut loss.backward());
    [
        to_vec(of_images),
        of_weights.into_iter().flat_map(to_vec).collect(),
    ]
}

/// Images drawn at random, and the distributions of as random labels.
fn images_and_goal(work: &StepWork, seed: u64, device: &Device) -> (Tensor<4>, Tensor<2>) {
    let mut rng = Rng::new(seed, Purpose::Bench, 0, 0);
    let (batch, size) = (work.batch, work.image_size);
    let pixels = (0..batch * 3 * size * size).map(|_| rng.uniform());
    let images = from_vec(pixels.collect(), [batch, 3, size, size], device);
    let labels: Vec<u32> = (0..batch).map(|_| rng.below(work.classes) as u32).collect();
    let goal = Targets::classes(&labels).distributions(work.classes, 0.0, device);
    (images, goal)
}
