//! Training: the method of the paper, stage by stage.
//!
//! "Revisiting Adversarial Training at Scale" (Wang et al., CVPR 2024), equation 1: find the weights
//! that minimise the loss at the worst images near the given ones. A long, cheap stage (small
//! images, weak attack) comes before a short, intensive one (full images, stronger attack).

pub mod captions;
pub mod checkpoint;
mod exchange;
pub mod folder;
mod last;
pub mod monitor;
mod passes;
mod start;
pub mod state;

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::attack::{Attack, Draws, Pgd};
use crate::data::{Batch, Dataset, Loader, Plan, Preprocessing, Share, Split};
use crate::error::{Context, Error, Kind, Result};
use crate::eval::{Done, Evaluation, Images, Observer, Outcome};
use crate::fused::{self, Precision};
use crate::group::{self, Group};
use crate::loss::{Objective, Targets};
use crate::memory;
use crate::model::{DropPath, Pass};
use crate::plan::{self, Devices};
use crate::recipe::{Data, Head, Phase, Recipe, Stage};
use crate::rng::Purpose;
use crate::settings::changes;
use crate::text::zero_shot::by_text;
use crate::units::grouped;

pub use exchange::Exchange;
pub use folder::RunFolder;
pub use last::evaluate_finally;
pub use monitor::Monitor;
pub use state::State;

use captions::Captions;
use exchange::check_equal;
use passes::{Found, Passes};

/// A run that is ready to go: a checked recipe, its folder and its data.
pub struct Run {
    /// What to do.
    pub recipe: Recipe,
    /// Where to keep it.
    pub folder: RunFolder,
    /// The images of each stage.
    pub images: Vec<StageImages>,
    /// What each stage knows of text, if it learns by captions.
    pub captions: Vec<Option<Captions>>,
    /// Where to compute.
    pub device: Device,
    /// In which arithmetic: the recipe's, or f32 where the processor is not faster with bf16.
    pub precision: Precision,
    /// The processes that share it, and how.
    pub exchange: Exchange,
}

/// The images of a stage.
#[derive(Clone)]
pub struct StageImages {
    /// To learn from.
    pub train: Arc<Dataset>,
    /// To measure with.
    pub test: Arc<Dataset>,
}

impl StageImages {
    fn open(data: &Data, captioned: bool, seed: u64) -> Result<Self> {
        let open = |spec, split: Split| {
            let dataset = Dataset::open(spec, split, seed);
            dataset
                .map(Arc::new)
                .context(|| format!("{split} images `{spec}`"))
        };
        let (train, test) = (
            open(&data.train, Split::Train)?,
            open(&data.test, Split::Test)?,
        );
        if !captioned {
            train
                .require_classes()
                .context(|| format!("train images `{}`", data.train))?;
        }
        // Captioned images have no classes, and may be measured with images that have.
        if train.classes() != test.classes() && !captioned {
            let (of_train, of_test) = (train.classes().len(), test.classes().len());
            let message = format!(
                "train and test images do not have the same classes ({of_train} and {of_test})"
            );
            return Err(Error::input(message)
                .hint("both need the same class folders, or class names, in the same order"));
        }
        Ok(Self { train, test })
    }

    /// The names of the classes.
    pub fn classes(&self) -> &[String] {
        self.train.classes()
    }
}

/// The images of all stages; those of the recipe itself are opened once.
fn open_images(recipe: &Recipe) -> Result<Vec<StageImages>> {
    let mut opened: Vec<(&Data, StageImages)> = Vec::new();
    let mut all: Vec<StageImages> = Vec::new();
    for stage in &recipe.stage {
        let data = recipe.data_of(stage);
        let images = match opened.iter().find(|(known, _)| *known == data) {
            Some((_, images)) => images.clone(),
            None => StageImages::open(data, stage.text.is_some(), recipe.seed)
                .context(|| format!("stage `{}`", stage.name))?,
        };
        opened.push((data, images.clone()));
        all.push(images);
    }
    Ok(all)
}

/// An error where a stage goes on with a head that is for other classes, or for embeddings of another width.
fn check_outputs(
    recipe: &Recipe,
    images: &[StageImages],
    captions: &[Option<Captions>],
) -> Result<()> {
    for number in 1..recipe.stage.len() {
        let (stage, before) = (&recipe.stage[number], number - 1);
        if stage.head != Head::Keep {
            continue;
        }
        let message = match (&captions[before], &captions[number]) {
            (None, None) if images[before].classes() == images[number].classes() => continue,
            (Some(before), Some(now)) if before.width == now.width => continue,
            (None, None) => format!(
                "stage `{}` has images of other classes than the stage before it ({} and {})",
                stage.name,
                images[number].classes().len(),
                images[before].classes().len()
            ),
            _ => format!(
                "stage `{}` needs another head than the stage before it, which ends in {}",
                stage.name,
                match &captions[before] {
                    Some(captions) => format!("embeddings of {} dimensions", captions.width),
                    None => "classes".to_owned(),
                }
            ),
        };
        return Err(Error::input(message)
            .hint("set head = \"new\" in that stage, or use images of the same classes"));
    }
    Ok(())
}

impl Run {
    /// Numbers that the model gives for an image in a stage: logits, or the dimensions of an embedding.
    pub fn outputs(&self, stage: usize) -> usize {
        match &self.captions[stage] {
            Some(captions) => captions.width,
            None => self.images[stage].classes().len(),
        }
    }

    /// Opens the data sets and the folder of a run.
    ///
    /// Errors: data that cannot be used, a folder that holds another run.
    pub fn open(
        recipe: Recipe,
        folder: &std::path::Path,
        accept_changes: bool,
        device: &Device,
        group: &Group,
    ) -> Result<Self> {
        let differs = |first: &str, other: &str| {
            format!(", 0's -> its\n\n  {}\n", changes(first, other).join("\n  "))
        };
        group.same("recipe", &recipe.to_toml(), differs)?;
        let exchange = Exchange::new(group, recipe.parallel)?;
        let open = || Self::open_here(recipe, folder, accept_changes, device, exchange);
        // The first process writes what the others read.
        match group.is_first() {
            true => {
                let run = group.agree(open())?;
                group.agree(Ok(()))?;
                Ok(run)
            }
            false => {
                group.agree(Ok(()))?;
                group.agree(open())
            }
        }
    }

    fn open_here(
        recipe: Recipe,
        folder: &std::path::Path,
        accept_changes: bool,
        device: &Device,
        exchange: Exchange,
    ) -> Result<Self> {
        let images = open_images(&recipe)?;
        let group = &exchange.group;
        let folder = RunFolder::open(folder, &recipe.to_toml(), accept_changes, group)?;
        let stages = recipe.stage.iter().zip(&images);
        let captions = stages.map(|(stage, images)| match &stage.text {
            None => Ok(None),
            Some(text) => Captions::open(&recipe, text, images, &folder, device)
                .map(Some)
                .context(|| format!("stage `{}`", stage.name)),
        });
        let captions: Vec<_> = captions.collect::<Result<_>>()?;
        check_outputs(&recipe, &images, &captions)?;
        folder.begin(&recipe.to_toml())?;
        Ok(Self {
            precision: fused::usable(recipe.precision, device).0,
            recipe,
            folder,
            images,
            captions,
            device: device.clone(),
            exchange,
        })
    }
}

/// Trains to the end of the recipe, from the newest whole checkpoint if there is one.
pub fn train(run: &Run, monitor: &mut Monitor) -> Result<State> {
    let recipe = &run.recipe;
    run.exchange.group.stop_on_signals()?;
    if let Some(notice) = fused::usable(recipe.precision, &run.device).1 {
        monitor.line(&format!("note: {notice}"))?;
    }
    let devices = Devices {
        count: run.exchange.group.size() as u64,
        tflops: 1.0,
        price: None,
        link: None,
    };
    let counts = (0..recipe.stage.len()).map(|number| run.outputs(number));
    let classes = counts.max().unwrap_or_default();
    let plan = plan::Plan::new(recipe, classes, run.precision, devices);
    // Of GPUs it is not known what is free.
    let free = memory::available()
        .filter(|_| fused::is_processor(&run.device))
        .map(|free| free / group::processes_here() as u64);
    if let Some(notice) = plan::check_memory(&plan, free)? {
        monitor.warn(&notice)?;
    }
    for images in &run.images {
        for notice in images.train.notices().iter().chain(images.test.notices()) {
            monitor.warn(notice)?;
        }
    }
    let mut state = checkpoint::resume(run, monitor)?;
    let mut stage_start = 0;
    for (number, stage) in recipe.stage.iter().enumerate() {
        let stage_end = stage_start + stage.samples();
        if state.samples < stage_end {
            state.enter(number, run)?;
            monitor.enter_stage(stage, state.samples);
        }
        let mut phase_end = stage_start;
        for phase in &stage.phases {
            phase_end += phase.samples;
            let mut loader = load(run, number, phase, state.samples, phase_end)?;
            monitor.enter_phase();
            // Memory in the sizes of the phase before.
            fused::release_buffers();
            while let Some(batch) = loader.next_batch()? {
                let seen = state.samples + stage.batch - stage_start;
                let learning_rate = stage.learning_rate.at(seen, stage.samples());
                let attack = stage.attack_at(seen);
                let step = Update {
                    run,
                    stage,
                    phase,
                    loader: &loader,
                }
                .make(&mut state, attack, &batch, learning_rate)?;

                monitor.record(stage, phase, &step, learning_rate, state.samples, &loader)?;
                let last = state.samples == stage_end;
                let due = |every: u64| last || state.samples % every < stage.batch;
                if let Some(evaluation) = &recipe.evaluation
                    && due(evaluation.every_samples)
                {
                    measure(run, &state, stage, phase, evaluation, monitor)?;
                }
                if due(recipe.checkpoint.every_samples) || step.stop {
                    // Models first: the checkpoint says that everything up to it is done.
                    run.folder
                        .save_models(run, &state, phase, last.then_some(stage))?;
                    checkpoint::save(run, &state)?;
                }
                if step.stop {
                    return Err(stopped(&state));
                }
            }
        }
        stage_start = stage_end;
    }
    Ok(state)
}

/// What one update tells.
pub struct Step {
    /// Mean loss at the adversarial images.
    pub loss: f64,
    /// Norm of the gradient over all weights, before clipping.
    pub gradient_norm: f64,
    /// Adversarial images classified correctly.
    pub correct: u64,
    /// Broken samples that the phase's loaders met so far, in all processes.
    pub broken: u64,
    /// Whether a process was told to stop.
    pub stop: bool,
}

/// What the processes tell each other at an update.
#[derive(Serialize, Deserialize)]
struct Report {
    checksum: u64,
    losses: Vec<f64>,
    squares: Vec<f64>,
    correct: u64,
    broken: u64,
    stop: bool,
}

fn stopped(state: &State) -> Error {
    let samples = grouped(state.samples);
    let message =
        format!("told to stop after {samples} samples, of which a checkpoint was written");
    let error = Error::new(Kind::TryAgain, message);
    error
        .hint("the same command goes on from there")
        .everywhere()
}

/// What stays the same from update to update.
struct Update<'a> {
    run: &'a Run,
    stage: &'a Stage,
    phase: &'a Phase,
    loader: &'a Loader,
}

impl Update<'_> {
    /// One update: perturb the images, then move the weights against the loss at what was found.
    ///
    /// `batch` is this process's part of the batch.
    ///
    /// Source: the paper's equation 1 with the mechanics of its released attacker: weights frozen and
    /// model in evaluation mode while attacking, the same loss inside and outside.
    fn make(
        &self,
        state: &mut State,
        attack: Option<Pgd>,
        batch: &Batch,
        learning_rate: f64,
    ) -> Result<Step> {
        let Self {
            run,
            stage,
            phase,
            loader,
        } = self;
        let group = &run.exchange.group;
        let (count, size) = (batch.first.len(), phase.image_size as usize);
        let shards = run.recipe.parallel.passes_of(group.size());
        let (seed, position) = (
            run.recipe.seed,
            state.samples + (group.rank() * count) as u64,
        );
        let images = batch.to_device(size, &run.device);
        let targets = Targets {
            first: batch.first.clone(),
            second: batch.second.clone(),
            weight: batch.weight.clone(),
        };
        let (objective, learning) = match &run.captions[state.stage] {
            None => {
                let (classes, smoothing) = (state.model.classes(), stage.loss.label_smoothing);
                let goal = targets.distributions(classes, smoothing, &run.device);
                (Objective::Classes(goal), None)
            }
            Some(captions) => {
                let dataset = &run.images[state.stage].train;
                captions.objective(state, dataset, batch, shards)?
            }
        };
        let grid = size / run.recipe.model.patch();
        let kept = phase
            .masking
            .as_ref()
            .map(|mask| mask.choose(seed, position, count, grid));

        // The worst images near the given ones; weights take no part in differentiation here.
        let passes = |drop_path| Passes {
            model: &state.model,
            pass: Pass {
                precision: run.precision,
                kept: kept.as_ref(),
                drop_path,
                recompute: run.recipe.recompute,
            },
            chunk: stage.chunk.map(|chunk| chunk as usize),
            shards,
            group,
        };
        let keys: Vec<u64> = (position..position + count as u64).collect();
        let adversarial = match attack {
            Some(attack) => {
                let attacking = passes(None);
                let gradient = |images| attacking.input_gradient(images, &objective);
                attack.climb(
                    images,
                    &gradient,
                    &Draws::new(seed, &keys, Purpose::AttackStart),
                )
            }
            None => images,
        };

        // The gradient of the weights there, in training mode.
        let drop_path = stage.drop_path.map(|rate| DropPath {
            rate,
            seed,
            position,
        });
        let whole = stage.batch as usize;
        let Found {
            outputs,
            losses,
            mut gradients,
            beside,
        } = passes(drop_path).weight_gradients(adversarial.clone(), &objective, whole);
        // What all processes find alike is added up once.
        let once = if group.is_first() { 1.0 } else { 0.0 };
        gradients.extend(beside.log_scale.map(|scale| scale * once));
        if let (Some(texts), Some(towards)) = (&learning, beside.texts) {
            let own = towards.narrow(0, group.rank() * count, count);
            gradients.extend(texts.gradients(own));
        }
        let correct = match objective.compares_images() && !group.is_first() {
            true => 0,
            false => objective.count_correct(outputs, &targets.dominant()),
        };

        // After the passes: a weight that changed by itself before or within them is still wrong now.
        let checksum = run
            .exchange
            .checksum(state.parameters().into_iter().map(|part| &part.value));
        let lengths = state.lengths();
        let gradients = run.exchange.add_up(gradients);
        let all = group.gather(Report {
            checksum,
            losses,
            squares: run.exchange.squares(&gradients, &lengths),
            correct,
            broken: loader.broken().len() as u64,
            stop: group.was_told_to_stop(),
        });
        check_equal(&all.iter().map(|told| told.checksum).collect::<Vec<_>>())?;
        let sum = |of: fn(&Report) -> &Vec<f64>| all.iter().flat_map(of).sum::<f64>();
        let loss = sum(|told| &told.losses) / whole as f64;
        let gradient_norm = sum(|told| &told.squares).sqrt();
        if !loss.is_finite() || !gradient_norm.is_finite() {
            let found = state::Diverged {
                loss,
                gradient_norm,
                gradients: &run.exchange.put_together(&gradients, &lengths),
                adversarial: fused::to_vec(adversarial),
            };
            let saved = run.folder.save_crash(run, state, stage, batch, &found);
            return Err(group.agree(saved)?.everywhere());
        }

        state.step(gradients, gradient_norm, learning_rate);
        state.samples += stage.batch;
        Ok(Step {
            loss,
            gradient_norm,
            correct: all.iter().map(|told| told.correct).sum(),
            broken: all.iter().map(|told| told.broken).sum(),
            stop: all.iter().any(|told| told.stop),
        })
    }
}

/// Batches of one phase, from where the run is to the phase's end.
fn load(run: &Run, number: usize, phase: &Phase, position: u64, end: u64) -> Result<Loader> {
    let stage = &run.recipe.stage[number];
    let plan = Plan {
        seed: run.recipe.seed,
        batch: stage.batch as usize,
        image_size: phase.image_size as usize,
        augmentation: stage.augmentation.clone(),
        mixing: stage.mixing,
        position,
        samples: end.saturating_sub(position),
        broken_rate: run.recipe.data_of(stage).broken_rate,
        captions: run.captions[number]
            .as_ref()
            .is_some_and(Captions::needs_captions),
        share: Share {
            index: run.exchange.group.rank(),
            of: run.exchange.group.size(),
            shards: run.recipe.parallel.shards as usize,
        },
    };
    Loader::new(Arc::clone(&run.images[number].train), plan, LOADER_THREADS)
}

/// Threads that prepare batches. Two are enough to keep the kernels fed from small images; the
/// share of time spent waiting is on every line of the log.
const LOADER_THREADS: usize = 2;

/// Clean accuracy and accuracy under the evaluation's attack and under the stage's own.
fn measure(
    run: &Run,
    state: &State,
    stage: &Stage,
    phase: &Phase,
    evaluation: &crate::recipe::Evaluation,
    monitor: &mut Monitor,
) -> Result<()> {
    let begun = Instant::now();
    let test = &run.images[state.stage].test;
    let model = state.averaged();
    // Images that are compared with captions are classified by the names of the classes.
    let head = match &run.captions[state.stage] {
        None => None,
        Some(captions) => match captions.class_head(state.averaged_text().as_ref())? {
            Some(head) => Some(head),
            None => return Ok(()),
        },
    };
    let logits = |images| {
        let outputs = model.logits(images, &Pass::evaluation());
        match &head {
            None => outputs,
            Some(head) => by_text(outputs, head),
        }
    };
    let images = Images::Stored {
        dataset: test,
        preprocessing: Preprocessing::new(phase.image_size as usize),
        count: (evaluation.images as usize).min(test.len()),
    };
    let told = Told(RefCell::new(monitor));
    let accuracies = |attack: &Pgd| {
        let evaluation = Evaluation {
            logits: &logits,
            images: &images,
            attacks: &[Attack::Pgd(attack.clone())],
            batch: stage.batch as usize,
            seed: run.recipe.seed,
            device: &run.device,
            group: &run.exchange.group,
        };
        let outcome = evaluation.run(&told)?;
        Ok((outcome.accuracy_after(0), outcome.accuracy_after(1)))
    };
    let (clean, strong) = accuracies(&evaluation.attack)?;
    let weak = match &stage.attack {
        // By the names of the classes, which is not what training climbs, but as near as it comes.
        Some(attack) => Some(accuracies(attack)?.1),
        None => None,
    };
    let found = monitor::Measured {
        clean,
        strong,
        weak,
        images: images.count(),
        took: begun.elapsed(),
    };
    told.0
        .into_inner()
        .measured(stage, evaluation, &found, state.samples)
}

/// Shows a run's own evaluations.
struct Told<'a, 'b>(RefCell<&'a mut Monitor<'b>>);

impl Observer for Told<'_, '_> {
    fn batch(&self, outcome: &Outcome, done: &Done) -> Result<()> {
        let of = outcome.stages.last().map_or(0, |stage| stage.tried);
        let left = outcome.queue.len();
        self.0.borrow_mut().evaluating(done.attack, of - left, of);
        Ok(())
    }
}
