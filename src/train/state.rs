//! Everything that training changes, and that a checkpoint therefore holds.

use burn::tensor::{Device, Tensor};

use crate::model::Vit;
use crate::optim::Optimizer;
use crate::recipe::Recipe;

/// A run at one moment between two updates.
#[derive(Clone, Debug)]
pub struct State {
    /// The model.
    pub model: Vit,
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
    /// The beginning of a run.
    pub fn new(recipe: &Recipe, classes: usize, device: &Device) -> Self {
        let size = recipe.first_image_size();
        let model = Vit::new(&recipe.model, classes, size, recipe.seed, device);
        let optimizer = optimizer(&model, 0, recipe, None, 0);
        Self {
            model,
            optimizer,
            stage: 0,
            samples: 0,
        }
    }

    /// Begins a stage: weights and their average go on, the optimizer's moments start anew.
    ///
    /// Nothing happens when the run is in that stage already, as after a resume.
    pub fn enter(&mut self, stage: usize, recipe: &Recipe) {
        if self.stage == stage {
            return;
        }
        let averages = self.averages();
        // The old moments go before the new ones come: at scale both together would be the run's peak of memory.
        self.optimizer.moments.clear();
        self.optimizer = optimizer(
            &self.model,
            stage,
            recipe,
            averages,
            self.optimizer.run_step,
        );
        self.stage = stage;
    }

    /// Moves the weights against gradients of a norm.
    pub fn step(&mut self, gradients: Vec<Tensor<1>>, norm: f64, learning_rate: f64) {
        let decays: Vec<bool> = self.model.parameters().iter().map(|p| p.decays).collect();
        let weights = self
            .model
            .parameters_mut()
            .into_iter()
            .map(|p| &mut p.value)
            .collect();
        self.optimizer
            .update(weights, &decays, gradients, norm, learning_rate);
    }

    /// The model that is evaluated and saved: with the average of the weights, if one is kept.
    pub fn averaged(&self) -> Vit {
        match self.averages() {
            Some(averages) => self.model.with_values(averages),
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

fn optimizer(
    model: &Vit,
    stage: usize,
    recipe: &Recipe,
    averages: Option<Vec<Tensor<1>>>,
    run_step: u64,
) -> Optimizer {
    let weights: Vec<_> = model.parameters().iter().map(|p| &p.value).collect();
    let config = &recipe.stage[stage].optimizer;
    Optimizer::new(
        config,
        recipe.average.as_ref(),
        &weights,
        averages,
        run_step,
    )
}
