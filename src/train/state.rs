//! Everything that training changes, and that a checkpoint therefore holds.

use burn::tensor::Tensor;

use super::{Run, start};
use crate::error::{Context, Result};
use crate::fused::Moments;
use crate::loss::{LARGEST_SCALE, LossKind};
use crate::model::{Model, Parameter};
use crate::optim::Optimizer;
use crate::recipe::{Head, Recipe};

/// A run at one moment between two updates.
#[derive(Clone, Debug)]
pub struct State {
    /// The model.
    pub model: Model,
    /// Logarithm of the factor of similarities, which learns too where the stage's loss is contrastive.
    pub log_scale: Option<Parameter>,
    /// The optimizer of the stage that the run is in.
    pub optimizer: Optimizer,
    /// Number of that stage, from 0.
    pub stage: usize,
    /// Samples seen by the run.
    pub samples: u64,
}

/// An update that must not be made, and what is known of it.
pub struct Diverged<'a> {
    /// Mean loss.
    pub loss: f64,
    /// Norm of the gradient.
    pub gradient_norm: f64,
    /// The gradient, in the order of the model's parameters.
    pub gradients: &'a [Tensor<1>],
    /// The images at which it arose, flat.
    pub adversarial: Vec<f32>,
}

impl State {
    /// The beginning of a run: random weights, or those that the recipe names.
    ///
    /// Errors: weights that cannot be loaded, or are of another model than the recipe's.
    pub fn new(run: &Run) -> Result<Self> {
        match &run.recipe.start {
            None => Ok(Self::blank(run, 0)),
            Some(start) => {
                let model = start::load(run, start).context(|| {
                    format!("the weights to start with, `{}`", start.weights.display())
                })?;
                Ok(Self::with_model(model, run, 0))
            }
        }
    }

    /// A state of a stage whose values are still to be filled in, as from a checkpoint.
    pub fn blank(run: &Run, stage: usize) -> Self {
        let (recipe, size) = (&run.recipe, run.recipe.first_image_size());
        let outputs = run.outputs(stage);
        let model = Model::new(&recipe.model, outputs, size, recipe.seed, &run.device);
        Self::with_model(model, run, stage)
    }

    fn with_model(model: Model, run: &Run, stage: usize) -> Self {
        let log_scale = log_scale(run, stage);
        Self {
            optimizer: optimizer(&all(&model, &log_scale), stage, &run.recipe, None, 0),
            model,
            log_scale,
            stage,
            samples: 0,
        }
    }

    /// Everything that learns: the model's weights, then the factor of similarities.
    pub fn parameters(&self) -> Vec<&Parameter> {
        all(&self.model, &self.log_scale)
    }

    /// The same, to be changed, each with the optimizer's memory of it.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = (&mut Parameter, &mut Moments)> {
        let mut parameters = self.model.parameters_mut();
        parameters.extend(&mut self.log_scale);
        parameters.into_iter().zip(&mut self.optimizer.moments)
    }

    /// Begins a stage: weights and their average go on, but for a head that is drawn anew; the optimizer's moments
    /// start anew.
    ///
    /// Nothing happens when the run is in that stage already, as after a resume.
    pub fn enter(&mut self, stage: usize, run: &Run) {
        if self.stage == stage {
            return;
        }
        let mut averages = self.averages();
        // The old moments go before the new ones come: at scale both together would be the run's peak of memory.
        self.optimizer.moments.clear();
        if run.recipe.stage[stage].head == Head::New {
            let (outputs, seed) = (run.outputs(stage), run.recipe.seed);
            let model = self.model.clone();
            self.model = model.with_new_head(outputs, seed, stage as u64);
            let head = self.model.head();
            let parameters = self.model.parameters().into_iter();
            for (average, parameter) in averages.iter_mut().flatten().zip(parameters) {
                if head.iter().any(|part| part.name == parameter.name) {
                    *average = parameter.value.clone();
                }
            }
        }
        // The factor goes with the loss that has one; a first one begins as ever.
        let before = std::mem::replace(&mut self.log_scale, log_scale(run, stage));
        if let Some(averages) = &mut averages {
            averages.truncate(self.model.parameters().len());
            averages.extend(self.log_scale.iter().map(|scale| scale.value.clone()));
        }
        if let (Some(scale), Some(before)) = (&mut self.log_scale, before) {
            scale.value = before.value;
        }
        let step = self.optimizer.run_step;
        let weights = all(&self.model, &self.log_scale);
        self.optimizer = optimizer(&weights, stage, &run.recipe, averages, step);
        self.stage = stage;
    }

    /// Moves the weights against gradients of a norm.
    pub fn step(&mut self, gradients: Vec<Tensor<1>>, norm: f64, learning_rate: f64) {
        let decays: Vec<bool> = self.parameters().iter().map(|p| p.decays).collect();
        let mut weights = self.model.parameters_mut();
        weights.extend(&mut self.log_scale);
        let weights = weights.into_iter().map(|p| &mut p.value).collect();
        self.optimizer
            .update(weights, &decays, gradients, norm, learning_rate);
        if let Some(scale) = &mut self.log_scale {
            scale.value = scale.value.clone().clamp(0.0, LARGEST_SCALE.ln());
        }
    }

    /// The model that is evaluated and saved: with the average of the weights, if one is kept.
    pub fn averaged(&self) -> Model {
        match self.averages() {
            Some(mut averages) => {
                averages.truncate(self.model.parameters().len());
                self.model.with_values(averages)
            }
            None => self.model.clone(),
        }
    }

    fn averages(&self) -> Option<Vec<Tensor<1>>> {
        self.optimizer
            .moments
            .iter()
            .map(|moments| moments.average.clone())
            .collect()
    }
}

fn all<'a>(model: &'a Model, log_scale: &'a Option<Parameter>) -> Vec<&'a Parameter> {
    let mut parameters = model.parameters();
    parameters.extend(log_scale);
    parameters
}

/// CLIP's first temperature.
const TEMPERATURE: f32 = 0.07;

/// The factor of similarities as a stage with a contrastive loss begins.
fn log_scale(run: &Run, stage: usize) -> Option<Parameter> {
    let contrastive = run.recipe.stage[stage].loss.kind == LossKind::Contrastive;
    let value = vec![(1.0 / TEMPERATURE).ln()];
    contrastive.then(|| Parameter::new("logit_scale", &[1], false, value, &run.device))
}

fn optimizer(
    parameters: &[&Parameter],
    stage: usize,
    recipe: &Recipe,
    averages: Option<Vec<Tensor<1>>>,
    run_step: u64,
) -> Optimizer {
    let weights: Vec<_> = parameters.iter().map(|p| &p.value).collect();
    let config = &recipe.stage[stage].optimizer;
    Optimizer::new(
        config,
        recipe.average.as_ref(),
        &weights,
        averages,
        run_step,
    )
}
