//! The training state: everything that training changes and a checkpoint contains. Independent of the run.

use burn::tensor::Tensor;

use crate::distributed::Zero;
use crate::model::{Model, Parameter};
use crate::objective::ExtraParameters;
use crate::ops::Moments;
use crate::optim::{AverageConfig, Now, Optimizer, OptimizerConfig};
use crate::text::TextTower;

/// The state of a run between two steps.
#[derive(Clone, Debug)]
pub struct State {
    /// The model.
    pub model: Model,
    /// Trainable parameters of the objective.
    pub extra: ExtraParameters,
    /// The optimizer of the current stage, with this rank's part of its state.
    pub optimizer: Optimizer,
    /// Index of the current stage, from 0.
    pub stage: usize,
    /// Number of samples seen by the run.
    pub samples: u64,
}

/// What to do with the head at the start of a stage.
pub enum NewHead {
    /// Keep it.
    Keep,
    /// Initialize a new head.
    Random {
        /// Number of outputs.
        outputs: usize,
        /// Seed of the run.
        seed: u64,
        /// Weight and bias to use instead of random values.
        values: Option<Box<[Tensor<1>; 2]>>,
    },
}

/// Optimizer settings of a stage.
#[derive(Clone, Copy)]
pub struct StageOptimizer<'a> {
    /// Index of the stage, from 0.
    pub stage: usize,
    /// Settings of the optimizer.
    pub config: &'a OptimizerConfig,
    /// Settings of the EMA, if one is kept.
    pub average: Option<&'a AverageConfig>,
}

impl StageOptimizer<'_> {
    /// Creates an optimizer for this rank's parts of the weights.
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
    /// Creates the state at the start of a stage.
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

    /// Returns all parameters: the model's, then the objective's.
    pub fn parameters(&self) -> Vec<&Parameter> {
        let mut parameters = self.model.parameters();
        parameters.extend(self.extra.parameters());
        parameters
    }

    /// Returns the number of elements of each parameter.
    pub fn lengths(&self) -> Vec<usize> {
        let parameters = self.parameters().into_iter();
        parameters.map(|part| part.value.dims()[0]).collect()
    }

    /// Iterates mutably over all parameters, each with this rank's part of its optimizer state.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = (&mut Parameter, &mut Moments)> {
        let parameters = self.model.parameters_mut().into_iter();
        let parameters = parameters.chain(self.extra.parameters_mut());
        parameters.zip(&mut self.optimizer.moments)
    }

    /// Enters a stage: weights and their EMA carry over, except for a new head; the optimizer's moments start at zero.
    ///
    /// `extra` are the initial parameters of the stage's objective. The temperature carries over from one contrastive
    /// stage to the next, but a text tower starts with its stage.
    pub fn enter(
        &mut self,
        optimizer: StageOptimizer,
        head: NewHead,
        extra: ExtraParameters,
        zero: &Zero,
    ) {
        let mut averages = self.averages();
        // Free the old moments before allocating new ones: for large models, both together would be peak memory.
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

    /// Applies a step: each rank updates its part of the weights, followed by an all-gather.
    ///
    /// `gradients` are this rank's parts of the summed gradients.
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
                **old.next().expect("one tensor for each") = new;
            });
        }
        self.extra.clamp();
    }

    /// Returns the model to evaluate and save: with the EMA of the weights if one is kept. Collective.
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

    /// Returns the trained text tower, if there is one, with the EMA of its weights if one is kept. Collective.
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

    /// Returns this rank's parts of the averages.
    fn averages(&self) -> Option<Vec<Tensor<1>>> {
        let moments = self.optimizer.moments.iter();
        moments.map(|moments| moments.average.clone()).collect()
    }
}
