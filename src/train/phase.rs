//! One phase of a stage: everything that stays the same between steps.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::state::State;
use crate::attack::{AttackLoss, BatchAttack, Draws};
use crate::data::loader::default_workers;
use crate::data::{Batch, Dataset, Loader, Plan, Share};
use crate::distributed::{self, Zero};
use crate::error::Result;
use crate::loss::Targets;
use crate::model::{DropPath, Model};
use crate::objective::{
    BatchLoss, Captions, LabelLoss, Microbatches, Objective, WeightedLoss, named,
};
use crate::ops::{Device, Numerics, from_vec};
use crate::recipe::{ObjectiveConfig, Phase, Recipe, Stage};
use crate::rng::AttackKind;
use crate::weights::Outputs;

/// A phase with everything that its steps use but do not change.
pub struct PhaseContext<'a> {
    /// The recipe.
    pub recipe: &'a Recipe,
    /// Index of the stage, from 0.
    pub number: usize,
    /// The stage.
    pub stage: &'a Stage,
    /// The phase.
    pub phase: &'a Phase,
    /// Number of samples in the run before the stage.
    pub stage_start: u64,
    /// Number of samples in the run at the end of the phase.
    pub end: u64,
    /// The training images.
    pub dataset: &'a Arc<Dataset>,
    /// The text side, if the stage has one.
    pub captions: Option<&'a Captions>,
    /// What the model outputs.
    pub outputs: Outputs,
    /// The frozen model that the objective compares with, if it does.
    pub reference: Option<&'a Model>,
    /// The ranks and how optimizer state is partitioned over them.
    pub zero: Zero<'a>,
    /// The device to train on.
    pub device: &'a Device,
    /// Precision of updates.
    pub numerics: Numerics,
    /// Precision of the attack's passes.
    pub attack_numerics: Numerics,
}

/// The values that change from step to step.
pub struct Now {
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// The attack at its current strength.
    attack: Option<BatchAttack>,
    /// Stochastic depth.
    pub drop_path: Option<DropPath>,
    /// Number of batches of the stage before this one.
    batch: u64,
    /// Seed of the run.
    seed: u64,
    /// Positions of this rank's images in the run.
    keys: Vec<u64>,
}

impl Now {
    /// Perturbs a batch with the attack, if there is one: the inner maximization, with the weights frozen and the model
    /// in evaluation mode.
    ///
    /// Shapes: `images` and the result `[batch, 3, height, width]`.
    pub fn perturb(&self, objective: &Objective, model: &Model, images: Tensor<4>) -> Tensor<4> {
        let Some(attack) = &self.attack else {
            return images;
        };
        let loss = AttackLoss {
            gradient: &|images| objective.ascent(model, images),
            losses: &|images| objective.attack_losses(model, images),
        };
        let draws = Draws::new(self.seed, &self.keys, AttackKind::Pgd);
        attack.perturb(images, &loss, &draws, self.batch)
    }
}

impl<'a> PhaseContext<'a> {
    /// Returns the image size in pixels per side.
    pub fn image_size(&self) -> usize {
        self.phase.image_size as usize
    }

    /// Returns the batch size over all ranks.
    pub fn batch(&self) -> usize {
        self.stage.batch as usize
    }

    /// Returns whether the stage ends after `samples` of the run.
    pub fn ends_stage(&self, samples: u64) -> bool {
        samples == self.stage_start + self.stage.samples()
    }

    /// Returns the number of shards in this rank's part of a batch, which are processed one by one.
    fn shards(&self) -> usize {
        let world_size = self.zero.comm().world_size();
        self.recipe.parallel.local_shards(world_size)
    }

    /// Returns the position in the run of the first image of this rank's part of a batch.
    fn position(&self, samples: u64, batch: &Batch) -> u64 {
        samples + (self.zero.comm().rank() * batch.first.len()) as u64
    }

    /// Returns the learning rate, attack and random numbers of the step that follows `samples` of the run.
    pub fn at(&self, samples: u64, batch: &Batch) -> Now {
        // Includes the samples of the step itself, so that the first step of a warmup is not wasted on a learning rate
        // of 0.
        let seen = samples + self.stage.batch - self.stage_start;
        let (seed, position) = (self.recipe.seed, self.position(samples, batch));
        Now {
            learning_rate: self.stage.learning_rate.at(seen, self.stage.samples()),
            attack: self.stage.attack_at(seen),
            drop_path: self.stage.drop_path.map(|rate| DropPath {
                rate,
                seed,
                position,
            }),
            batch: (samples - self.stage_start) / self.stage.batch,
            seed,
            keys: (position..position + batch.first.len() as u64).collect(),
        }
    }

    /// Returns how a batch passes through the model after `samples` of the run.
    fn microbatches(&self, samples: u64, batch: &Batch) -> Microbatches {
        let grid = self.image_size() / self.recipe.model.patch();
        let (count, position) = (batch.first.len(), self.position(samples, batch));
        let masking = self.phase.masking.as_ref();
        Microbatches {
            numerics: self.numerics,
            attack_numerics: self.attack_numerics,
            recompute: self.recipe.recompute,
            kept: masking.map(|masking| masking.choose(self.recipe.seed, position, count, grid)),
            size: self.stage.chunk.map(|chunk| chunk as usize),
            shards: self.shards(),
        }
    }

    /// Returns the objective of a batch, whose clean images are `images`.
    ///
    /// Errors: captions without an embedding.
    pub fn objective(
        &self,
        state: &State,
        batch: &Batch,
        images: &Tensor<4>,
    ) -> Result<Objective<'a>> {
        let (comm, shards) = (self.zero.comm(), self.shards());
        let microbatches = self.microbatches(state.samples, batch);
        let labels = |classes, smoothing| {
            let targets = Targets {
                first: batch.first.clone(),
                second: batch.second.clone(),
                weight: batch.weight.clone(),
            };
            LabelLoss::new(&targets, classes, smoothing, self.device)
        };
        let captions = || self.captions.expect("recipes are checked");
        let contrastive =
            |tower, log_scale| captions().loss(tower, log_scale, self.dataset, batch, shards, comm);
        let config = &self.stage.objective;
        let Some([terms, attack]) = named::terms(config) else {
            let loss: Box<dyn BatchLoss> = match config {
                ObjectiveConfig::CrossEntropy(config) => {
                    Box::new(labels(state.model.classes(), config.label_smoothing))
                }
                _ => {
                    let scale = state.extra.log_scale.as_ref();
                    let scale = scale.expect("contrastive stages have a scale");
                    let tower = state.extra.tower.as_ref();
                    Box::new(contrastive(tower, scale.value.clone())?)
                }
            };
            return Ok(Objective::new(loss, microbatches, comm));
        };
        let mut loss = WeightedLoss {
            terms,
            attack,
            ..WeightedLoss::default()
        };
        match config {
            ObjectiveConfig::Trades(config) => {
                loss.labels = Some(labels(state.model.classes(), config.label_smoothing));
            }
            ObjectiveConfig::GradientNorm(config) => {
                loss.labels = Some(labels(state.model.classes(), config.label_smoothing));
            }
            ObjectiveConfig::Tecoa(config) => {
                let texts = captions().class_head(None)?;
                let texts = texts.expect("checked when the run was opened");
                loss.labels = Some(labels(texts.dims()[0], config.label_smoothing));
                loss.classes = Some((texts, config.scale));
            }
            ObjectiveConfig::Advflyp(config) => {
                let log_scale = from_vec(vec![config.scale.ln() as f32], [1], self.device);
                loss.captions = Some(contrastive(None, log_scale)?);
            }
            _ => {}
        }
        // A reference on clean images is that of the frozen model, or the model's own before the attack.
        loss.reference[0] = match (self.reference, config.attacks_own_outputs()) {
            (_, true) => Some(microbatches.own_outputs(&state.model, images)),
            (Some(reference), _) if loss.uses_clean_reference() => {
                Some(microbatches.reference_outputs(reference, images))
            }
            _ => None,
        };
        let objective = Objective::new(Box::new(loss), microbatches, comm);
        Ok(objective.with_reference(self.reference))
    }

    /// Returns a loader of the batches from `samples` of the run to the end of the phase.
    pub fn batches(&self, samples: u64) -> Result<Loader> {
        let comm = self.zero.comm();
        let data = self.recipe.data_of(self.stage);
        let workers = match data.workers {
            Some(workers) => workers as usize,
            None => default_workers(distributed::threads(), self.device.is_cpu()),
        };
        let plan = Plan {
            seed: self.recipe.seed,
            batch: self.batch(),
            image_size: self.image_size(),
            augmentation: self.stage.augmentation.clone(),
            mixing: self.stage.mixing,
            position: samples,
            samples: self.end.saturating_sub(samples),
            broken_rate: data.broken_rate,
            reduced_decode: data.reduced_decode,
            captions: self.stage.objective.uses_captions()
                && self.captions.is_some_and(Captions::needs_captions),
            share: Share {
                index: comm.rank(),
                of: comm.world_size(),
                shards: self.recipe.parallel.shards as usize,
            },
        };
        Loader::new(Arc::clone(self.dataset), plan, workers)
    }
}
