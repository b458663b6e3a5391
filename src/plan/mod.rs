//! Estimates the cost of a run before it starts: operations, memory by part, communication, hours and price.
//!
//! Operation counts are exact. Memory is the sum of the buffers of training on a CPU; `IMAGE_COPIES` and `TOKEN_COPIES`
//! are fitted to measured peaks, with the error given in docs/benchmarks/results.md. `gpu_memory` counts the memory of
//! an NVIDIA GPU. Nothing is run and no data is read.

pub(crate) mod gpu_memory;
pub mod gpu_time;
pub(crate) mod link;
pub mod loading;
pub mod memory;
pub mod phase;

pub use gpu_memory::{GPU_CONTEXT, free_memory};
pub use gpu_time::GpuConstants;
pub use link::{CheckpointPlan, DISK, LATENCY_US, Link, UpdatePlan};
pub use link::{DeviceEngine, Devices};
pub use loading::LoadingPlan;
pub use memory::Memory;
pub use phase::PhasePlan;

use serde::Serialize;

use crate::distributed::BUCKET;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::ops::{Numerics, Precision};
use crate::recipe::{Phase, Recipe, Stage};

use gpu_time::{StepShape, step_seconds};
use link::FLOAT;
use memory::LARGEST_PART;

/// Bytes of the program itself.
const PROGRAM: u64 = 16 << 20;

/// Batches of images in flight: prefetched, attacked, cut into patches, and their gradients.
const IMAGE_COPIES: u64 = 14;

/// Batches of tokens besides those kept for the backward pass.
const TOKEN_COPIES: u64 = 15;

/// Cost of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Number of weights of the model with its classification head.
    pub parameters: u64,
    /// Number of classes.
    pub classes: usize,
    /// Phases of all stages.
    pub phases: Vec<PhasePlan>,
    /// Multiply-adds of the run as counted in the paper: attack steps + 1 forward passes per sample.
    pub paper_macs: f64,
    /// Floating-point operations actually computed: 2k + 3 forward passes, with two operations per multiply-add.
    pub flops: f64,
    /// Engine that computes on the devices.
    pub engine: DeviceEngine,
    /// Peak memory of a device.
    pub memory: Memory,
    /// Checkpoints, if the connection between devices is known.
    pub checkpoints: Option<CheckpointPlan>,
    /// Hours on the devices, without data loading and evaluation.
    pub hours: f64,
    /// Share of the time in which devices compute.
    pub efficiency: f64,
    /// Total price.
    pub price: Option<f64>,
}

impl Plan {
    /// Plans a run on devices with a known rate.
    pub fn new(recipe: &Recipe, classes: usize, precision: Precision, devices: Devices) -> Self {
        Self::timed(recipe, classes, precision, devices, None)
    }

    /// Plans a run on NVIDIA GPUs with known constants.
    ///
    /// Errors: the constants lack an entry that the run needs.
    pub fn on_gpus(
        recipe: &Recipe,
        classes: usize,
        precision: Precision,
        devices: Devices,
        gpu: &GpuConstants,
    ) -> Result<Self> {
        let parameters = recipe.model.parameters(classes, recipe.first_image_size());
        let seconds = |stage: &Stage, phase: &Phase| {
            let requested = stage.attack.as_ref().and_then(|attack| attack.precision);
            let step = StepShape {
                model: &recipe.model,
                parameters,
                image_size: phase.image_size as usize,
                tokens: recipe.tokens(phase).unwrap_or_default(),
                batch: stage.batch.div_ceil(devices.count),
                attack_steps: stage.attack_steps(),
                precision,
                attack: Numerics::of_gpu_attack(requested, precision),
                recompute: recipe.recompute,
                drop_path: stage.drop_path.is_some(),
            };
            // Passes of clean images and references cost what the others do.
            let counted = 2 * stage.attack_steps() + 3;
            Ok(step_seconds(&step, gpu)? * stage.passes() as f64 / counted as f64)
        };
        let seconds: Vec<f64> = stages_and_phases(recipe)
            .map(|(stage, phase)| seconds(stage, phase))
            .collect::<Result<_>>()?;
        Ok(Self::timed(
            recipe,
            classes,
            precision,
            devices,
            Some(&seconds),
        ))
    }

    /// Plans a run. `computing` gives the compute seconds of an update in each phase; if None, they follow from the
    /// devices' rate.
    fn timed(
        recipe: &Recipe,
        classes: usize,
        precision: Precision,
        devices: Devices,
        computing: Option<&[f64]>,
    ) -> Self {
        let all = stages_and_phases(recipe);
        let parameters = recipe.model.parameters(classes, recipe.first_image_size());
        let sizes = [parameters, classes as u64];
        let mut phases: Vec<PhasePlan> = all
            .clone()
            .map(|(stage, phase)| of_phase(recipe, stage, phase))
            .collect();
        // Total time of all updates, and the part spent computing.
        let mut seconds = [0.0, 0.0];
        for (index, (phase, (stage, _))) in phases.iter_mut().zip(all.clone()).enumerate() {
            phase.update = UpdatePlan::new(stage, phase.flops_per_sample, sizes, &devices);
            if let Some(computing) = computing {
                phase.update.compute = computing[index];
            }
            let updates = phase.samples as f64 / stage.batch as f64;
            seconds[0] += updates * phase.update.total();
            seconds[1] += updates * phase.update.compute;
        }
        let samples = phases.iter().map(|phase| phase.samples).sum();
        let checkpoints = devices
            .link
            .map(|link| CheckpointPlan::new(recipe, samples, parameters, devices.count, &link));
        seconds[0] += checkpoints.map_or(0.0, |plan| plan.count as f64 * plan.seconds);
        let flops = phases
            .iter()
            .map(|phase| phase.flops_per_sample * phase.samples as f64)
            .sum();
        let memories = all.map(|(stage, phase)| {
            let batch = stage.batch.div_ceil(devices.count);
            let at_once =
                batch.div_ceil(recipe.parallel.local_shards(devices.count as usize).max(1) as u64);
            let batch = [
                batch,
                stage.chunk.map_or(at_once, |chunk| chunk.min(at_once)),
            ];
            let of_engine = match devices.engine {
                DeviceEngine::Cpu => memory,
                DeviceEngine::Cuda => gpu_memory::memory,
            };
            of_engine(
                recipe,
                stage,
                phase,
                classes,
                precision,
                batch,
                devices.count,
            )
        });
        let hours = seconds[0] / 3600.0;
        Self {
            parameters,
            classes,
            phases,
            engine: devices.engine,
            paper_macs: recipe.paper_macs(),
            flops,
            memory: memories.max_by_key(Memory::total).unwrap_or_default(),
            checkpoints,
            hours,
            efficiency: seconds[1] / seconds[0],
            price: devices
                .price
                .map(|price| price * hours * devices.count as f64),
        }
    }
}

/// Checks that a run fits into memory, before anything is allocated. Returns an error if it cannot fit, and a notice if
/// it is close.
///
/// Plans were within 15 % of measurements, which is the margin used here.
pub fn check_memory(plan: &Plan, available: Option<u64>) -> Result<Option<String>> {
    let (needed, Some(available)) = (plan.memory.total() as f64, available) else {
        return Ok(None);
    };
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    let (needed_gib, found) = (gib(needed), gib(available as f64));
    let (memory, hint) = match plan.engine {
        DeviceEngine::Cpu => (
            "memory",
            "use a smaller batch, or recompute = true; `advxl plan RECIPE` lists the parts",
        ),
        DeviceEngine::Cuda => (
            "GPU memory",
            "use a smaller batch, chunk, or recompute = true; `advxl plan RECIPE --device cuda` lists the parts",
        ),
    };
    let text =
        format!("training needs about {needed_gib:.1} GiB of {memory} and {found:.1} GiB are free");
    if needed > 1.15 * available as f64 {
        return Err(Error::input(text).hint(hint));
    }
    Ok((needed > 0.85 * available as f64).then(|| format!("{text}: {hint}")))
}

fn stages_and_phases(recipe: &Recipe) -> impl Iterator<Item = (&Stage, &Phase)> + Clone {
    let stages = recipe.stage.iter();
    stages.flat_map(|stage| stage.phases.iter().map(move |phase| (stage, phase)))
}

fn of_phase(recipe: &Recipe, stage: &Stage, phase: &Phase) -> PhasePlan {
    let tokens = recipe.tokens(phase);
    let forward_macs = recipe.forward_macs(phase);
    let attack_steps = stage.attack_steps();
    PhasePlan {
        stage: stage.name.clone(),
        image_size: phase.image_size,
        tokens,
        samples: phase.samples,
        attack_steps,
        forward_macs,
        paper_macs: phase.samples as f64 * (attack_steps + 1) as f64 * forward_macs as f64,
        flops_per_sample: 2.0 * stage.passes() as f64 * forward_macs as f64,
        update: UpdatePlan::default(),
    }
}

/// Returns the memory of a device at the end of an update's backward pass.
fn memory(
    recipe: &Recipe,
    stage: &Stage,
    phase: &Phase,
    classes: usize,
    precision: Precision,
    [batch, chunk]: [u64; 2],
    devices: u64,
) -> Memory {
    let model = &recipe.model;
    let parameters = model.parameters(classes, recipe.first_image_size());
    // Operands of bf16 products are kept in bf16.
    let cell = if precision == Precision::Bf16 {
        2
    } else {
        FLOAT
    };
    let tokens = recipe.tokens(phase).unwrap_or_default();
    let layers = layers(model, phase.image_size as usize, tokens, chunk);
    // Absurd recipes overflow 64 bits; capping still rejects them as too large.
    let sum = |of: fn(&Layer) -> u128| -> u64 {
        let all = layers.iter().map(|layer| layer.count * of(layer));
        (all.sum::<u128>()).min(LARGEST_PART) as u64
    };
    let largest = |of: fn(&Layer) -> u128| -> u64 {
        let all = layers.iter().map(of).max().unwrap_or_default();
        all.min(LARGEST_PART) as u64
    };
    let (matrices, kept, between) = (sum(|l| l.matrices), sum(|l| l.kept), sum(|l| l.between));
    let images = batch * 3 * phase.image_size * phase.image_size * FLOAT;
    // Each device stores its own part of the moments and averages.
    let part = (parameters * FLOAT).div_ceil(devices);
    // Sums of 1, 2, 4 ... shards wait for their neighbors while the next gradients arrive.
    let shards = recipe.parallel.local_shards(devices as usize).max(1) as u64;
    let sums = 1 + u64::from(shards.ilog2());
    Memory {
        weights: parameters * FLOAT,
        gradients: sums * parameters * FLOAT,
        moments: 2 * part,
        average: if recipe.average.is_some() { part } else { 0 },
        exchange: match devices {
            1 => 0,
            // Send and receive buffers, two at a time; the device's own part of the sums and of the updated weights.
            _ => (4 * BUCKET as u64 * FLOAT).min(2 * parameters * FLOAT) + 2 * part,
        },
        // Evaluations use the weight average as a separate model.
        packed: 2 * matrices * cell * if recipe.evaluation.is_some() { 2 } else { 1 },
        reference: match stage.objective.reference() {
            Some(_) => parameters * FLOAT + 2 * matrices * cell,
            None => 0,
        },
        activations: stage.passes_at_once()
            * if recipe.recompute {
                between * FLOAT + largest(|l| l.kept) * cell
            } else {
                kept * cell
            },
        base: PROGRAM + IMAGE_COPIES * images + TOKEN_COPIES * largest(|l| l.between) * FLOAT,
    }
}

/// The work done on a batch, for [`batch_memory`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Forward passes.
    Forward,
    /// Forward passes, and backward passes to the images.
    Attack,
    /// An update with its attack.
    Update {
        /// Whether activations are recomputed instead of kept.
        recompute: bool,
    },
}

/// Estimates the bytes that a model and a batch take on a CPU. Returns f64, which does not overflow for any size.
///
/// `image_size` must be allowed by [`ModelConfig::grid`]. Forward passes and attacks match measurements of a ViT-S/16
/// at 224 pixels to 10 %; updates are counted as in [`Plan`].
pub fn batch_memory(
    model: &ModelConfig,
    classes: usize,
    image_size: usize,
    batch: usize,
    work: Work,
) -> f64 {
    let patches = model.grid(image_size).unwrap_or_default().pow(2);
    let tokens = model.tokens(patches).unwrap_or_default();
    let layers = layers(model, image_size, tokens, 1);
    let sum = |of: fn(&Layer) -> u128| -> f64 {
        layers
            .iter()
            .map(|layer| layer.count as f64 * of(layer) as f64)
            .sum()
    };
    let between = layers
        .iter()
        .map(|layer| layer.between)
        .max()
        .unwrap_or_default() as f64;
    let (kept, packed) = (sum(|layer| layer.kept), sum(|layer| layer.matrices));
    let image = 3.0 * (image_size as f64).powi(2);
    let parameters = model.parameters(classes, image_size) as f64;
    let (of_model, of_image) = match work {
        // Attention keeps the scores of one head for each of a few threads.
        Work::Forward => {
            let scores = 2.0 * (tokens as f64).powi(2);
            (parameters + packed + scores, 5.0 * image + 2.0 * between)
        }
        // An attack keeps only the activations of a block that its input gradient needs.
        Work::Attack => (parameters + 2.0 * packed, 8.0 * image + 0.4 * kept),
        Work::Update { recompute } => {
            let kept = match recompute {
                true => sum(|layer| layer.between),
                false => kept,
            };
            let copies = IMAGE_COPIES as f64 * image + TOKEN_COPIES as f64 * between;
            (4.0 * parameters + 2.0 * packed, copies + kept)
        }
    };
    PROGRAM as f64 + FLOAT as f64 * (of_model + batch as f64 * of_image)
}

/// A group of identical blocks, in elements per block.
struct Layer {
    count: u128,
    /// Packed weights.
    matrices: u128,
    /// Activations kept for the backward pass.
    kept: u128,
    /// Activations passed between blocks.
    between: u128,
}

fn layers(model: &ModelConfig, image_size: usize, tokens: u64, batch: u64) -> Vec<Layer> {
    match model {
        ModelConfig::Vit(vit) => {
            let (width, hidden) = (vit.width as u128, vit.hidden as u128);
            let tokens = u128::from(tokens);
            let rows = u128::from(batch) * tokens;
            vec![Layer {
                count: vit.depth as u128,
                matrices: 4 * width * width + 2 * width * hidden,
                // Two norms; queries, keys and values; the attention output; the hidden layer; attention probabilities.
                kept: rows * (6 * width + hidden + vit.heads as u128 * tokens),
                between: rows * width,
            }]
        }
        ModelConfig::ConvNext(convnext) => {
            let stages = convnext.widths.iter().zip(convnext.depths).enumerate();
            let layer = |(stage, (width, depth)): (usize, (&usize, usize))| {
                let side = (image_size / convnext.patch) >> stage;
                let rows = u128::from(batch) * (side * side) as u128;
                let width = *width as u128;
                Layer {
                    count: depth as u128,
                    matrices: 8 * width * width,
                    // The input, the norm output, the hidden layer.
                    kept: rows * 6 * width,
                    between: rows * width,
                }
            };
            stages.map(layer).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(overrides: &[&str]) -> Plan {
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        let text = include_str!("../../recipes/cifar10_micro.toml");
        let recipe = Recipe::parse(text, &overrides).unwrap();
        let devices = Devices {
            count: 1,
            tflops: 1.0,
            price: Some(2.0),
            link: None,
            engine: DeviceEngine::Cpu,
        };
        Plan::new(&recipe, 10, Precision::F32, devices)
    }

    #[test]
    fn a_plan_adds_up() {
        let plan = plan(&[]);
        let first = &plan.phases[0];
        assert_eq!((first.tokens, first.attack_steps), (Some(16), 1));
        // One attack step: the paper counts two forward passes; actually five of two operations each.
        assert_eq!(first.flops_per_sample, 10.0 * first.forward_macs as f64);
        let paper: f64 = plan.phases.iter().map(|phase| phase.paper_macs).sum();
        assert_eq!(paper, plan.paper_macs);
        assert!((plan.hours / (plan.flops / 3.6e15) - 1.0).abs() < 1e-12);
        assert_eq!((plan.efficiency, plan.checkpoints), (1.0, None));
        assert_eq!(plan.price, Some(2.0 * plan.hours));
        assert_eq!(plan.memory.moments, 2 * plan.memory.weights);
    }

    #[test]
    fn batch_memory_grows_with_the_work_and_stays_finite_for_absurd_sizes() {
        let model = ModelConfig::named("vit_s16").unwrap();
        let bytes = |batch, work| batch_memory(&model, 1000, 224, batch, work);
        let update = |recompute| bytes(16, Work::Update { recompute });
        assert!(bytes(16, Work::Forward) < bytes(16, Work::Attack));
        assert!(bytes(16, Work::Attack) < update(false) && update(true) < update(false));
        // Measured: 549 MB at 64 images in forward passes, 694 MB at 16 in attacks, data included.
        let near = |found: f64, megabytes: f64| (found / 1e6 - megabytes).abs() < 0.25 * megabytes;
        assert!(
            near(bytes(64, Work::Forward), 549.0),
            "{}",
            bytes(64, Work::Forward)
        );
        assert!(
            near(bytes(16, Work::Attack), 694.0),
            "{}",
            bytes(16, Work::Attack)
        );
        let absurd = batch_memory(&model, 1000, 4096, usize::MAX, Work::Attack);
        assert!(absurd.is_finite() && absurd > 1e25);
    }

    #[test]
    fn a_run_that_cannot_fit_is_rejected_before_it_starts() {
        let plan = plan(&[]);
        let needed = plan.memory.total();
        assert!(check_memory(&plan, Some(2 * needed)).unwrap().is_none());
        assert!(check_memory(&plan, None).unwrap().is_none());
        let near = check_memory(&plan, Some(needed)).unwrap().unwrap();
        assert!(near.contains("GiB are free: use a smaller batch"), "{near}");
        let error = check_memory(&plan, Some(needed / 2)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(
            error.to_string().contains("training needs about"),
            "{error}"
        );
    }

    #[test]
    fn optimizer_memory_is_sharded_and_shards_are_processed_one_by_one() {
        let text = include_str!("../../recipes/cifar10_micro.toml");
        let shards = ["parallel={ shards = 4, reduce = \"exact\" }".to_owned()];
        let recipe = Recipe::parse(text, &shards).unwrap();
        let memory = |count| {
            let devices = Devices {
                count,
                tflops: 1.0,
                price: None,
                link: None,
                engine: DeviceEngine::Cpu,
            };
            Plan::new(&recipe, 10, Precision::F32, devices).memory
        };
        let (one, four, whole) = (memory(1), memory(4), plan(&[]).memory);
        assert_eq!(one.moments, 4 * four.moments);
        assert_eq!(one.gradients, 3 * four.gradients);
        assert_eq!(one.activations, four.activations);
        assert_eq!(whole.activations, 4 * one.activations);
        assert_eq!((one.exchange, whole.gradients), (0, whole.weights));
    }

    #[test]
    fn communication_time_follows_from_bandwidth_and_number_of_messages() {
        let text = include_str!("../../recipes/cifar10_micro.toml");
        let recipe = Recipe::parse(text, &[]).unwrap();
        let plan = |count, gbits, latency_us| {
            let link = Some(Link {
                gbits,
                latency_us,
                disk: 1.0,
            });
            let devices = Devices {
                count,
                tflops: 1.0,
                price: None,
                link,
                engine: DeviceEngine::Cpu,
            };
            Plan::new(&recipe, 10, Precision::F32, devices)
        };
        let exchange = |count, gbits, latency_us| {
            let plan = plan(count, gbits, latency_us);
            plan.phases[0].update.exchange
        };
        // With two devices each sends half of all gradients and half of all weights, in two messages.
        let bytes = 4.0 * plan(1, 1.0, 0.0).parameters as f64;
        let slower = exchange(2, 1.0, 0.0) - exchange(2, 2.0, 0.0);
        assert!((slower / (bytes * 8.0 / 2e9) - 1.0).abs() < 1e-9);
        let later = exchange(4, 1.0, 1000.0) - exchange(4, 1.0, 0.0);
        // Two exchanges with each of three other devices, with three messages each.
        assert!((later - 2.0 * 3.0 * 3.0 * 1e-3).abs() < 1e-9, "{later}");

        let (one, two) = (plan(1, 1.0, 10.0), plan(2, 1.0, 10.0));
        assert_eq!(one.phases[0].update.bubble(), 0.0);
        assert!(two.efficiency < one.efficiency && one.efficiency < 1.0);
        let [one, two] = [one, two].map(|plan| plan.checkpoints.unwrap());
        assert_eq!(
            (one.count, one.bytes as f64),
            (
                two.count,
                bytes * 3.0 + bytes * f64::from(recipe.average.is_some())
            )
        );
        assert_eq!(one.seconds, one.bytes as f64 / 1e9);
        assert!(two.seconds > one.seconds);
    }

    #[test]
    fn recomputing_and_more_devices_take_less_memory() {
        let whole = plan(&[]).memory;
        let recomputed = plan(&["recompute=true"]).memory;
        assert!(recomputed.activations * 3 < whole.activations);
        assert_eq!(recomputed.weights, whole.weights);
    }
}
