//! One phase of a stage: what stays the same from step to step.

use std::sync::Arc;

use super::state::State;
use crate::attack::{Draws, Pgd};
use crate::data::loader::default_workers;
use crate::data::{Batch, Dataset, Loader, Plan, Share};
use crate::distributed::{self, Zero};
use crate::error::Result;
use crate::loss::Targets;
use crate::model::DropPath;
use crate::objective::{BatchLoss, Captions, LabelLoss, Microbatches, Objective};
use crate::ops::{Device, Numerics};
use crate::recipe::{Phase, Recipe, Stage};
use crate::rng::AttackKind;

/// A phase with everything that its steps use and do not change.
pub struct PhaseContext<'a> {
    /// The recipe.
    pub recipe: &'a Recipe,
    /// Number of the stage, from 0.
    pub number: usize,
    /// The stage.
    pub stage: &'a Stage,
    /// The phase.
    pub phase: &'a Phase,
    /// Samples of the run before the stage.
    pub stage_start: u64,
    /// Samples of the run at the end of the phase.
    pub end: u64,
    /// The training images.
    pub dataset: &'a Arc<Dataset>,
    /// The text side, where the stage is trained on captions.
    pub captions: Option<&'a Captions>,
    /// The ranks and how optimizer state is partitioned over them.
    pub zero: Zero<'a>,
    /// Where to compute.
    pub device: &'a Device,
    /// Arithmetic of updates.
    pub numerics: Numerics,
    /// Arithmetic of the attack's passes.
    pub attack_numerics: Numerics,
}

/// What changes from step to step.
pub struct Now {
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// The attack at its present strength.
    pub attack: Option<Pgd>,
    /// Stochastic depth.
    pub drop_path: Option<DropPath>,
    /// The run's seed, and the places in the run of this rank's images.
    seed: u64,
    keys: Vec<u64>,
}

impl Now {
    /// The random numbers of the attack.
    pub fn draws(&self) -> Draws<'_> {
        Draws::new(self.seed, &self.keys, AttackKind::Pgd)
    }
}

impl<'a> PhaseContext<'a> {
    /// Pixels on a side.
    pub fn image_size(&self) -> usize {
        self.phase.image_size as usize
    }

    /// Images of a step, over all ranks.
    pub fn batch(&self) -> usize {
        self.stage.batch as usize
    }

    /// Whether a run after so many samples is at the end of the stage.
    pub fn ends_stage(&self, samples: u64) -> bool {
        samples == self.stage_start + self.stage.samples()
    }

    /// Shards of this rank's part of a batch, which pass one by one.
    fn shards(&self) -> usize {
        let world_size = self.zero.comm().world_size();
        self.recipe.parallel.local_shards(world_size)
    }

    /// Place in the run of the first image of this rank's part of a batch.
    fn position(&self, samples: u64, batch: &Batch) -> u64 {
        samples + (self.zero.comm().rank() * batch.first.len()) as u64
    }

    /// Learning rate, attack and random numbers of the step after so many samples of the run.
    pub fn at(&self, samples: u64, batch: &Batch) -> Now {
        // The samples of the step itself count: the first step of a warmup is not wasted on a rate of 0.
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
            seed,
            keys: (position..position + batch.first.len() as u64).collect(),
        }
    }

    /// The objective of a batch.
    ///
    /// Errors: captions without an embedding.
    pub fn objective(&self, state: &State, batch: &Batch) -> Result<Objective<'a>> {
        let (comm, shards) = (self.zero.comm(), self.shards());
        let loss: Box<dyn BatchLoss> = match self.captions {
            None => {
                let targets = Targets {
                    first: batch.first.clone(),
                    second: batch.second.clone(),
                    weight: batch.weight.clone(),
                };
                let smoothing = self.stage.loss.label_smoothing;
                let classes = state.model.classes();
                Box::new(LabelLoss::new(&targets, classes, smoothing, self.device))
            }
            Some(captions) => {
                Box::new(captions.loss(&state.extra, self.dataset, batch, shards, comm)?)
            }
        };
        let grid = self.image_size() / self.recipe.model.patch();
        let (count, position) = (batch.first.len(), self.position(state.samples, batch));
        let masking = self.phase.masking.as_ref();
        let microbatches = Microbatches {
            numerics: self.numerics,
            attack_numerics: self.attack_numerics,
            recompute: self.recipe.recompute,
            kept: masking.map(|masking| masking.choose(self.recipe.seed, position, count, grid)),
            size: self.stage.chunk.map(|chunk| chunk as usize),
            shards,
        };
        Ok(Objective::new(loss, microbatches, comm))
    }

    /// The batches from a place in the run to the end of the phase.
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
            captions: self.captions.is_some_and(Captions::needs_captions),
            share: Share {
                index: comm.rank(),
                of: comm.world_size(),
                shards: self.recipe.parallel.shards as usize,
            },
        };
        Loader::new(Arc::clone(self.dataset), plan, workers)
    }
}
