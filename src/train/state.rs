//! The training state: everything that training changes and a checkpoint contains. Independent of the run.

use std::collections::BTreeMap;

use burn::tensor::Tensor;

use crate::distributed::Zero;
use crate::model::{Model, Parameter};
use crate::objective::ExtraParameters;
use crate::ops::Moments;
use crate::optim::{AverageConfig, Now, Optimizer, OptimizerConfig, Rule};
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
        let trained = weights.filter(|part| !part.is_frozen());
        let own: Vec<_> = trained.map(|part| zero.part(&part.value)).collect();
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

    /// Returns the parameters that are not frozen, in the order of gradients and moments.
    pub fn trained(&self) -> impl Iterator<Item = &Parameter> {
        let parameters = self.parameters().into_iter();
        parameters.filter(|part| !part.is_frozen())
    }

    /// Returns the number of elements of each parameter that is not frozen.
    pub fn lengths(&self) -> Vec<usize> {
        self.trained().map(|part| part.value.dims()[0]).collect()
    }

    /// Iterates over all parameters, each with this rank's part of its optimizer state unless it is frozen.
    pub fn with_moments(&self) -> impl Iterator<Item = (&Parameter, Option<&Moments>)> {
        let mut moments = self.optimizer.moments.iter();
        let parameters = self.parameters().into_iter();
        parameters.map(move |part| {
            let moments = (!part.is_frozen()).then(|| moments.next().expect("one for each"));
            (part, moments)
        })
    }

    /// Like [`Self::with_moments`], mutably.
    pub fn with_moments_mut(
        &mut self,
    ) -> impl Iterator<Item = (&mut Parameter, Option<&mut Moments>)> {
        let mut moments = self.optimizer.moments.iter_mut();
        let parameters = self.model.parameters_mut().into_iter();
        let parameters = parameters.chain(self.extra.parameters_mut());
        parameters.map(move |part| {
            let moments = (!part.is_frozen()).then(|| moments.next().expect("one for each"));
            (part, moments)
        })
    }

    /// Enters a stage: weights and their EMA carry over, except for a new head; the optimizer's moments start at zero.
    ///
    /// `extra` are the initial parameters of the stage's objective. The temperature carries over from one contrastive
    /// stage to the next, but a text tower starts with its stage. `set_rates` sets the learning-rate factors of the
    /// stage; a tensor that it freezes gets the value of its average. Collective.
    pub fn enter(
        &mut self,
        optimizer: StageOptimizer,
        head: NewHead,
        extra: ExtraParameters,
        set_rates: impl FnOnce(&mut Model),
        zero: &Zero,
    ) {
        let averages = self.averages();
        let trained = self.model.parameters().into_iter();
        let trained = trained.filter(|part| !part.is_frozen());
        // This rank's parts of the model's averages, by name.
        let mut averages = averages.map(|averages| {
            let names = trained.map(|part| part.name.clone());
            names.zip(averages).collect::<BTreeMap<_, _>>()
        });
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
            if let Some(averages) = &mut averages {
                averages.retain(|name, _| self.model.head().iter().all(|part| part.name != *name));
            }
        }
        set_rates(&mut self.model);
        let before = std::mem::replace(&mut self.extra, extra);
        if let (Some(scale), Some(before)) = (&mut self.extra.log_scale, before.log_scale) {
            scale.value = before.value;
        }
        // The average of a new head, of a tensor that was frozen and of the objective's parameters starts at their values.
        let averages = averages.map(|mut known| {
            let mut averages = Vec::new();
            for parameter in self.model.parameters_mut() {
                let average = known.remove(&parameter.name);
                if !parameter.is_frozen() {
                    averages.push(average.unwrap_or_else(|| zero.part(&parameter.value)));
                } else if let Some(average) = average {
                    let length = parameter.value.dims()[0];
                    let whole = zero.all_gather(&[average], &[length]);
                    parameter.value = whole.into_iter().next().expect("one for one");
                }
            }
            let of_objective = self.extra.parameters();
            averages.extend(of_objective.map(|part| zero.part(&part.value)));
            averages
        });
        let weights: Vec<_> = self.trained().map(|part| zero.part(&part.value)).collect();
        self.stage = optimizer.stage;
        let run_step = self.optimizer.run_step;
        self.optimizer = optimizer.build(&weights, averages, run_step);
    }

    /// Applies a step: each rank updates its part of the weights, followed by an all-gather.
    ///
    /// `gradients` are this rank's parts of the summed gradients.
    pub fn apply(&mut self, zero: &Zero, gradients: Vec<Tensor<1>>, now: &Now) {
        let rules = self.trained().map(|part| Rule {
            decays: part.decays,
            rate: part.rate,
        });
        let rules: Vec<_> = rules.collect();
        let lengths = self.lengths();
        let parameters = self.model.parameters_mut().into_iter();
        let parameters = parameters.chain(self.extra.parameters_mut());
        let trained = parameters.filter(|part| !part.is_frozen());
        let mut weights: Vec<_> = trained.map(|part| &mut part.value).collect();
        let optimizer = &mut self.optimizer;
        if zero.comm().world_size() == 1 {
            optimizer.update(weights, &rules, gradients, now);
        } else {
            let mut own: Vec<_> = weights.iter().map(|whole| zero.part(whole)).collect();
            let parts = own.iter_mut().collect();
            optimizer.update(parts, &rules, gradients, now);
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
                let parameters = self.model.parameters();
                let of_model = parameters.iter().filter(|part| !part.is_frozen()).count();
                let lengths = &self.lengths()[..of_model];
                let averages = zero.all_gather(&averages[..of_model], lengths);
                let mut averages = averages.into_iter();
                let values = parameters.iter().map(|part| match part.is_frozen() {
                    true => part.value.clone(),
                    false => averages.next().expect("one for each"),
                });
                let values: Vec<_> = values.collect();
                self.model.with_values(values)
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
