//! Training: the method of the paper, stage by stage.
//!
//! "Revisiting Adversarial Training at Scale" (Wang et al., CVPR 2024), equation 1: find the weights
//! that minimise the loss at the worst images near the given ones. A long, cheap stage (small
//! images, weak attack) comes before a short, intensive one (full images, stronger attack).

pub mod captions;
pub mod checkpoint;
pub(crate) mod checks;
pub(crate) mod classes;
pub mod final_evaluation;
pub mod folder;
pub(crate) mod measure;
pub mod microbatch;
pub mod monitor;
pub(crate) mod start;
pub mod state;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::attack::{Draws, Pgd};
use crate::data::{
    Batch, ClassMap, Dataset, Loader, ModelClasses, Plan, Share, Split, Subset, match_classes,
};
use crate::distributed::Group;
use crate::distributed::zero::check_equal;
use crate::error::{Context, Error, Kind, Result};
use crate::loss::{Objective, Targets};
use crate::model::{DropPath, Pass};
use crate::ops::Precision;
use crate::plan::phase::Devices;
use crate::recipe::{Data, Phase, Recipe, Stage, TestImages};
use crate::rng::Purpose;
use crate::settings::changes;
use crate::units::grouped;
use crate::{distributed, memory, ops, plan};

use captions::Captions;
use checks::{check, check_folder};
use measure::{Readable, measure};
use microbatch::{Found, Passes};

pub use crate::distributed::zero::Exchange;
pub use final_evaluation::evaluate_finally;
pub use folder::RunFolder;
pub use monitor::Monitor;
pub use state::State;

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
    /// What was found when it was opened, to be told when it begins.
    notices: Vec<String>,
    /// The test images of each stage's evaluations, once they were read.
    test_images: RefCell<BTreeMap<usize, Rc<Readable>>>,
    /// Broken test images that were named.
    named: RefCell<BTreeSet<String>>,
}

/// The images of a stage.
#[derive(Clone)]
pub struct StageImages {
    /// To learn from.
    pub train: Arc<Dataset>,
    /// To measure with.
    pub test: Arc<Dataset>,
    /// Which training classes the test images' labels mean; none where images are learned with captions.
    map: Option<ClassMap>,
}

impl StageImages {
    fn open(data: &Data, seed: u64) -> Result<Self> {
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
        if train.overlaps(&test) && !data.test_on_train {
            let message = format!(
                "the test images `{}` are among the training images",
                data.test
            );
            return Err(Error::input(message).hint(
                "name other images as data.test, or set data.test_on_train = true to measure with these",
            ));
        }
        Ok(Self {
            train,
            test,
            map: None,
        })
    }

    /// The same for a stage that learns from labels: both have classes, the test images' among those of training.
    fn labeled(mut self, data: &Data) -> Result<Self> {
        self.train
            .require_classes()
            .context(|| format!("train images `{}`", data.train))?;
        self.test
            .require_classes()
            .context(|| format!("test images `{}`", data.test))?;
        let trained = ModelClasses {
            count: self.train.classes().len(),
            names: self.train.classes(),
            owner: "the training images",
        };
        self.map = Some(match_classes(
            trained,
            self.test.classes(),
            &data.test.to_string(),
        )?);
        Ok(self)
    }

    /// The test images of an evaluation, with labels as the training images have them.
    ///
    /// Errors: a list that does not fit the images.
    pub fn subset(&self, images: &TestImages) -> Result<Subset> {
        let subset = Subset::choose(&self.test, &images.selection())?;
        Ok(match &self.map {
            Some(map) => subset.mapped(map.clone()),
            None => subset,
        })
    }

    /// What the user should know of the images.
    fn notices(&self) -> impl Iterator<Item = &String> {
        let of_data = self.train.notices().iter().chain(self.test.notices());
        of_data.chain(self.map.iter().flat_map(|map| &map.notice))
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
        let in_stage = || format!("stage `{}`", stage.name);
        let images = match opened.iter().find(|(known, _)| *known == data) {
            Some((_, images)) => images.clone(),
            None => StageImages::open(data, recipe.seed).context(in_stage)?,
        };
        opened.push((data, images.clone()));
        // Captioned images have no classes, and may be measured with images that have.
        all.push(match stage.text {
            Some(_) => images,
            None => images.labeled(data).context(in_stage)?,
        });
    }
    Ok(all)
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
        let group = &exchange.group;
        if group.is_first() {
            check_folder(&recipe, folder)?;
        }
        let images = open_images(&recipe)?;
        let folder = RunFolder::open(folder, &recipe.to_toml(), accept_changes, group)?;
        let stages = recipe.stage.iter().zip(&images);
        let captions = stages.map(|(stage, images)| match &stage.text {
            None => Ok(None),
            Some(text) => Captions::open(&recipe, text, images, &folder, device)
                .map(Some)
                .context(|| format!("stage `{}`", stage.name)),
        });
        let captions: Vec<_> = captions.collect::<Result<_>>()?;
        let notices = check(&recipe, &images, &captions)?;
        Ok(Self {
            notices,
            test_images: RefCell::default(),
            named: RefCell::default(),
            precision: ops::usable(recipe.precision, device).0,
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
    let group = &run.exchange.group;
    group.stop_on_signals()?;
    let precision = ops::usable(recipe.precision, &run.device).1;
    let mut notes: Vec<String> = precision.into_iter().map(str::to_owned).collect();
    let devices = Devices {
        count: group.size() as u64,
        tflops: 1.0,
        price: None,
        link: None,
    };
    let counts = (0..recipe.stage.len()).map(|number| run.outputs(number));
    let classes = counts.max().unwrap_or_default();
    let plan = plan::Plan::new(recipe, classes, run.precision, devices);
    // Of GPUs it is not known what is free.
    let free = memory::available()
        .filter(|_| ops::is_processor(&run.device))
        .map(|free| free / distributed::processes_here() as u64);
    let near = plan::check_memory(&plan, free)?;
    let mut state = checkpoint::resume(run, monitor)?;
    // From here on the folder is this recipe's: everything that could be known to be wrong is not.
    group.agree(run.folder.begin(&recipe.to_toml()))?;
    notes.extend(
        run.folder
            .changes()
            .iter()
            .map(|change| format!("recipe changed: {change}")),
    );
    notes
        .iter()
        .for_each(|note| monitor.line(&format!("note: {note}")));
    let images = distinct(&run.images);
    images
        .iter()
        .flat_map(|images| [&images.train, &images.test])
        .for_each(|dataset| monitor.line(&format!("data: {}", dataset.summary())));
    let of_images = images.iter().flat_map(|images| images.notices());
    let warnings = near.iter().chain(of_images).chain(&run.notices);
    warnings.for_each(|warning| monitor.warn(warning));
    // A run that was killed within an evaluation has the checkpoint from before it.
    if is_evaluated(recipe, state.samples) && !run.folder.was_evaluated(state.samples) {
        measure(run, &state, monitor)?;
    }
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
            ops::release_buffers();
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

                monitor.record(stage, phase, &step, learning_rate, state.samples, &loader);
                let last = state.samples == stage_end;
                let save = |state: &State| {
                    // Models first: the checkpoint says that everything up to it is done.
                    let ended = last.then_some(stage);
                    run.folder.save_models(run, state, phase, ended)?;
                    checkpoint::save(run, state)
                };
                let saved = last
                    || step.stop
                    || is_due(stage, state.samples, recipe.checkpoint.every_samples);
                if saved {
                    save(&state)?;
                }
                if step.stop {
                    return Err(stopped(&state));
                }
                // After the checkpoint: no evaluation costs what was trained.
                if is_evaluated(recipe, state.samples)
                    && let Err(error) = measure(run, &state, monitor)
                {
                    if !saved {
                        save(&state)?;
                    }
                    return Err(match group.is_stopping() {
                        true => stopped(&state),
                        false => error,
                    });
                }
            }
        }
        stage_start = stage_end;
    }
    Ok(state)
}

/// The images of stages, those that several share once.
fn distinct(all: &[StageImages]) -> Vec<&StageImages> {
    let mut found: Vec<&StageImages> = Vec::new();
    for images in all {
        if !found
            .iter()
            .any(|known| Arc::ptr_eq(&known.train, &images.train))
        {
            found.push(images);
        }
    }
    found
}

/// Whether something that is done every so many samples is due after an update.
fn is_due(stage: &Stage, samples: u64, every: u64) -> bool {
    samples % every < stage.batch
}

/// Whether the recipe evaluates the run after so many samples.
fn is_evaluated(recipe: &Recipe, samples: u64) -> bool {
    match (&recipe.evaluation, recipe.update_at(samples)) {
        (Some(evaluation), Some((stage, _, is_last))) => {
            is_last || is_due(stage, samples, evaluation.every_samples)
        }
        _ => false,
    }
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
                adversarial: ops::to_vec(adversarial),
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
