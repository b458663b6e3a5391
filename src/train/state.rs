//! Everything that training changes, and that a checkpoint therefore holds. It knows no run.

use burn::tensor::Tensor;

use crate::distributed::Zero;
use crate::model::{Model, Parameter};
use crate::objective::ExtraParameters;
use crate::ops::Moments;
use crate::optim::{AverageConfig, Now, Optimizer, OptimizerConfig};
use crate::text::TextTower;

/// A run at one moment between two steps.
#[derive(Clone, Debug)]
pub struct State {
    /// The model.
    pub model: Model,
    /// What the objective trains besides the model.
    pub extra: ExtraParameters,
    /// The optimizer of the present stage, with this rank's part of its state.
    pub optimizer: Optimizer,
    /// Number of that stage, from 0.
    pub stage: usize,
    /// Samples seen by the run.
    pub samples: u64,
}

/// What becomes of the head at the beginning of a stage.
pub enum NewHead {
    /// It stays.
    Keep,
    /// Random weights for another number of outputs.
    Random {
        /// Number of outputs.
        outputs: usize,
        /// Seed of the run.
        seed: u64,
        /// Given weight and bias in place of the random ones.
        values: Option<Box<[Tensor<1>; 2]>>,
    },
}

/// How a stage optimizes.
#[derive(Clone, Copy)]
pub struct StageOptimizer<'a> {
    /// Number of the stage, from 0.
    pub stage: usize,
    /// The optimizer.
    pub config: &'a OptimizerConfig,
    /// The average of the weights, if one is kept.
    pub average: Option<&'a AverageConfig>,
}

impl StageOptimizer<'_> {
    /// An optimizer of this rank's parts of the weights.
    fn build(
        &self,
        own: &[Tensor<1>],
        averages: Option<Vec<Tensor<1>>>,
        run_step: u64,
    ) -> Optimizer {
        let weights: Vec<_> = own.iter().collect();
        Optimizer::new(self.config, self.average, &weights, averages, run_step)
    }
}

impl State {
    /// The state at the beginning of a stage.
    pub fn new(
        model: Model,
        extra: ExtraParameters,
        optimizer: StageOptimizer,
        zero: &Zero,
    ) -> Self {
        let weights = model.parameters().into_iter().chain(extra.parameters());
        let own: Vec<_> = weights.map(|part| zero.part(&part.value)).collect();
        Self {
            optimizer: optimizer.build(&own, None, 0),
            model,
            extra,
            stage: optimizer.stage,
            samples: 0,
        }
    }

    /// All parameters: the model's, then the objective's.
    pub fn parameters(&self) -> Vec<&Parameter> {
        let mut parameters = self.model.parameters();
        parameters.extend(self.extra.parameters());
        parameters
    }

    /// Their numbers of elements.
    pub fn lengths(&self) -> Vec<usize> {
        let parameters = self.parameters().into_iter();
        parameters.map(|part| part.value.dims()[0]).collect()
    }

    /// All parameters, to be changed, each with this rank's part of its optimizer state.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = (&mut Parameter, &mut Moments)> {
        let parameters = self.model.parameters_mut().into_iter();
        let parameters = parameters.chain(self.extra.parameters_mut());
        parameters.zip(&mut self.optimizer.moments)
    }

    /// Begins a stage: weights and their average continue, except for a new head; the optimizer's moments start at zero.
    ///
    /// `extra` is what the stage's objective trains at its beginning. A temperature continues from one contrastive stage to
    /// the next; a text tower begins with its stage.
    pub fn enter(
        &mut self,
        optimizer: StageOptimizer,
        head: NewHead,
        extra: ExtraParameters,
        zero: &Zero,
    ) {
        let mut averages = self.averages();
        // Old moments are freed before the new ones exist: at scale both together would be the peak of memory.
        self.optimizer.moments.clear();
        if let NewHead::Random {
            outputs,
            seed,
            values,
        } = head
        {
            let model = self.model.clone();
            self.model = model.with_new_head(outputs, seed, optimizer.stage as u64);
            let head = self.model.head_mut();
            for (part, values) in head
                .iter_mut()
                .zip(values.into_iter().flat_map(|values| *values))
            {
                part.value = values;
            }
            let head = self.model.head();
            let parameters = self.model.parameters().into_iter();
            for (average, parameter) in averages.iter_mut().flatten().zip(parameters) {
                if head.iter().any(|part| part.name == parameter.name) {
                    *average = zero.part(&parameter.value);
                }
            }
        }
        let before = std::mem::replace(&mut self.extra, extra);
        if let (Some(scale), Some(before)) = (&mut self.extra.log_scale, before.log_scale) {
            scale.value = before.value;
        }
        let weights = self.parameters().into_iter();
        let weights: Vec<_> = weights.map(|part| zero.part(&part.value)).collect();
        if let Some(averages) = &mut averages {
            let of_model = self.model.parameters().len();
            averages.truncate(of_model);
            averages.extend_from_slice(&weights[of_model..]);
        }
        self.stage = optimizer.stage;
        let run_step = self.optimizer.run_step;
        self.optimizer = optimizer.build(&weights, averages, run_step);
    }

    /// Applies a step: each rank updates its part of the weights, and all gather the result.
    ///
    /// `gradients` are this rank's parts of the sums.
    pub fn apply(&mut self, zero: &Zero, gradients: Vec<Tensor<1>>, now: &Now) {
        let decays: Vec<bool> = self.parameters().iter().map(|p| p.decays).collect();
        let lengths = self.lengths();
        let parameters = self.model.parameters_mut().into_iter();
        let parameters = parameters.chain(self.extra.parameters_mut());
        let mut weights: Vec<_> = parameters.map(|part| &mut part.value).collect();
        let optimizer = &mut self.optimizer;
        if zero.comm().world_size() == 1 {
            optimizer.update(weights, &decays, gradients, now);
        } else {
            let mut own: Vec<_> = weights.iter().map(|whole| zero.part(whole)).collect();
            let parts = own.iter_mut().collect();
            optimizer.update(parts, &decays, gradients, now);
            let mut old = weights.iter_mut();
            zero.all_gather_each(&own, &lengths, |new| {
                **old.next().expect("one for each") = new;
            });
        }
        self.extra.clamp();
    }

    /// The model that is evaluated and saved: with the average of the weights, if one is kept. A collective.
    pub fn averaged(&self, zero: &Zero) -> Model {
        match self.averages() {
            Some(averages) => {
                let of_model = self.model.parameters().len();
                let lengths = &self.lengths()[..of_model];
                let averages = zero.all_gather(&averages[..of_model], lengths);
                self.model.with_values(averages)
            }
            None => self.model.clone(),
        }
    }

    /// The same of the text tower that is trained, if there is one. A collective.
    pub fn averaged_tower(&self, zero: &Zero) -> Option<TextTower> {
        let tower = self.extra.tower.as_ref()?;
        Some(match self.averages() {
            Some(averages) => {
                let first = averages.len() - tower.parameters().len();
                let lengths = &self.lengths()[first..];
                tower.with_values(zero.all_gather(&averages[first..], lengths))
            }
            None => tower.clone(),
        })
    }

    /// This rank's parts of the averages.
    fn averages(&self) -> Option<Vec<Tensor<1>>> {
        let moments = self.optimizer.moments.iter();
        moments.map(|moments| moments.average.clone()).collect()
    }
}
