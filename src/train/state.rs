//! Everything that training changes, and that a checkpoint therefore holds.

use burn::tensor::Tensor;

use super::{Run, start};
use crate::distributed::zero::Exchange;
use crate::error::{Context, Error, Result};
use crate::loss::LARGEST_SCALE;
use crate::model::{Model, Parameter};
use crate::ops::Moments;
use crate::optim::Optimizer;
use crate::recipe::{Head, Recipe};
use crate::text::TextTower;

/// A run at one moment between two updates.
#[derive(Clone, Debug)]
pub struct State {
    /// The model.
    pub model: Model,
    /// Logarithm of the factor of similarities, which learns too where the stage's loss is contrastive.
    pub log_scale: Option<Parameter>,
    /// The text tower, where it learns with the images.
    pub text: Option<TextTower>,
    /// The optimizer of the stage that the run is in.
    pub optimizer: Optimizer,
    /// Number of that stage, from 0.
    pub stage: usize,
    /// Samples seen by the run.
    pub samples: u64,
    /// The processes, each of which holds the optimizer's memory of its own part of every weight.
    pub(crate) exchange: Exchange,
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
        let (log_scale, text) = beside(run, stage);
        let exchange = run.exchange.clone();
        let parameters = all(&model, &log_scale, &text);
        let own = parameters.iter().map(|part| exchange.own(&part.value));
        Self {
            optimizer: optimizer(own.collect(), stage, &run.recipe, None, 0),
            model,
            log_scale,
            text,
            stage,
            samples: 0,
            exchange,
        }
    }

    /// Everything that learns: the model's weights, the factor of similarities, the text tower's weights.
    pub fn parameters(&self) -> Vec<&Parameter> {
        all(&self.model, &self.log_scale, &self.text)
    }

    /// Their numbers of elements.
    pub fn lengths(&self) -> Vec<usize> {
        let parameters = self.parameters().into_iter();
        parameters.map(|part| part.value.dims()[0]).collect()
    }

    /// The same, to be changed, each with the optimizer's memory of this process's part of it.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = (&mut Parameter, &mut Moments)> {
        let parameters = all_mut(&mut self.model, &mut self.log_scale, &mut self.text);
        parameters.into_iter().zip(&mut self.optimizer.moments)
    }

    /// Begins a stage: weights and their average go on, but for a head that is made anew; the optimizer's moments
    /// start anew.
    ///
    /// Nothing happens when the run is in that stage already, as after a resume.
    ///
    /// Errors: class names that cannot be embedded, or are not those of the stage.
    pub fn enter(&mut self, stage: usize, run: &Run) -> Result<()> {
        if self.stage == stage {
            return Ok(());
        }
        let by_text = match run.recipe.stage[stage].head {
            Head::Text => Some(self.head_by_text(stage, run)?),
            Head::Keep | Head::New => None,
        };
        let mut averages = self.averages();
        // The old moments go before the new ones come: at scale both together would be the run's peak of memory.
        self.optimizer.moments.clear();
        if run.recipe.stage[stage].head != Head::Keep {
            let (outputs, seed) = (run.outputs(stage), run.recipe.seed);
            let model = self.model.clone();
            self.model = model.with_new_head(outputs, seed, stage as u64);
            let head = self.model.head_mut();
            for (part, values) in head.iter_mut().zip(by_text.into_iter().flatten()) {
                part.value = values;
            }
            let head = self.model.head();
            let parameters = self.model.parameters().into_iter();
            for (average, parameter) in averages.iter_mut().flatten().zip(parameters) {
                if head.iter().any(|part| part.name == parameter.name) {
                    *average = self.exchange.own(&parameter.value);
                }
            }
        }
        // The factor goes on from one loss that has it to the next; a text tower begins with its stage.
        let before = self.log_scale.take();
        (self.log_scale, self.text) = beside(run, stage);
        if let (Some(scale), Some(before)) = (&mut self.log_scale, before) {
            scale.value = before.value;
        }
        let weights = self.parameters().into_iter();
        let weights: Vec<_> = weights.map(|part| self.exchange.own(&part.value)).collect();
        if let Some(averages) = &mut averages {
            let of_model = self.model.parameters().len();
            averages.truncate(of_model);
            averages.extend_from_slice(&weights[of_model..]);
        }
        let step = self.optimizer.run_step;
        self.optimizer = optimizer(weights, stage, &run.recipe, averages, step);
        self.stage = stage;
        Ok(())
    }

    /// Weight and bias of a head for a stage that classifies as the text model of the stage before did.
    ///
    /// Logits by text are `t (W h + b)`, divided by the length of what is in brackets, with the projection `W`, `b`.
    /// Without the division they are linear in `h`, and the largest is the same. Rows have length 1 on average, so that
    /// the first logits are of the order of one.
    fn head_by_text(&self, stage: usize, run: &Run) -> Result<[Tensor<1>; 2]> {
        let captions = run.captions[stage - 1].as_ref();
        let head = match captions {
            Some(captions) => captions.class_head(self.averaged_text().as_ref())?,
            None => None,
        };
        let name = &run.recipe.stage[stage].name;
        let head = head.ok_or_else(|| {
            let message =
                format!("stage `{name}`: there are no names of classes to make its head of");
            Error::input(message).hint("give text.classes in the stage before it")
        })?;
        let [classes, width] = head.dims();
        if classes != run.outputs(stage) {
            let message = format!(
                "stage `{name}` has {} classes, and the stage before it names {classes}",
                run.outputs(stage)
            );
            return Err(
                Error::input(message).hint("measure the stage before it with the same classes")
            );
        }
        let averaged = self.averaged();
        let [weight, bias] = averaged.head();
        let inputs = weight.shape[1];
        let weight = head.clone().matmul(weight.shaped([width, inputs]));
        let bias = head.matmul(bias.shaped([width, 1]));
        let length = (weight.clone() * weight.clone()).sum_dim(1).sqrt().mean();
        let scale = 1.0 / f64::from(length.into_scalar::<f32>()).max(1e-12);
        Ok([
            (weight * scale).reshape([classes * inputs]),
            (bias * scale).reshape([classes]),
        ])
    }

    /// Moves the weights against this process's parts of the gradients, whose norm is that of all together; the other
    /// processes move theirs.
    pub fn step(&mut self, gradients: Vec<Tensor<1>>, norm: f64, learning_rate: f64) {
        let decays: Vec<bool> = self.parameters().iter().map(|p| p.decays).collect();
        let lengths = self.lengths();
        let exchange = &self.exchange;
        let weights = all_mut(&mut self.model, &mut self.log_scale, &mut self.text);
        let mut weights: Vec<_> = weights.into_iter().map(|p| &mut p.value).collect();
        if exchange.group.size() == 1 {
            self.optimizer
                .update(weights, &decays, gradients, norm, learning_rate);
        } else {
            let mut own: Vec<_> = weights.iter().map(|whole| exchange.own(whole)).collect();
            let parts = own.iter_mut().collect();
            self.optimizer
                .update(parts, &decays, gradients, norm, learning_rate);
            let mut old = weights.iter_mut();
            exchange.each_whole(&own, &lengths, |moved| {
                **old.next().expect("one for each") = moved;
            });
        }
        if let Some(scale) = &mut self.log_scale {
            scale.value = scale.value.clone().clamp(0.0, LARGEST_SCALE.ln());
        }
    }

    /// The model that is evaluated and saved: with the average of the weights, if one is kept. All processes must ask.
    pub fn averaged(&self) -> Model {
        match self.averages() {
            Some(averages) => {
                let of_model = self.model.parameters().len();
                let lengths = &self.lengths()[..of_model];
                let averages = self.exchange.put_together(&averages[..of_model], lengths);
                self.model.with_values(averages)
            }
            None => self.model.clone(),
        }
    }

    /// The text tower that learns, if one does, likewise.
    pub fn averaged_text(&self) -> Option<TextTower> {
        let tower = self.text.as_ref()?;
        Some(match self.averages() {
            Some(averages) => {
                let first = averages.len() - tower.parameters().len();
                let lengths = &self.lengths()[first..];
                tower.with_values(self.exchange.put_together(&averages[first..], lengths))
            }
            None => tower.clone(),
        })
    }

    /// This process's parts of the averages.
    fn averages(&self) -> Option<Vec<Tensor<1>>> {
        self.optimizer
            .moments
            .iter()
            .map(|moments| moments.average.clone())
            .collect()
    }
}

fn all<'a>(
    model: &'a Model,
    log_scale: &'a Option<Parameter>,
    text: &'a Option<TextTower>,
) -> Vec<&'a Parameter> {
    let mut parameters = model.parameters();
    parameters.extend(log_scale);
    parameters.extend(text.iter().flat_map(TextTower::parameters));
    parameters
}

fn all_mut<'a>(
    model: &'a mut Model,
    log_scale: &'a mut Option<Parameter>,
    text: &'a mut Option<TextTower>,
) -> Vec<&'a mut Parameter> {
    let mut parameters = model.parameters_mut();
    parameters.extend(log_scale);
    parameters.extend(text.iter_mut().flat_map(TextTower::parameters_mut));
    parameters
}

/// CLIP's first temperature.
const TEMPERATURE: f32 = 0.07;

/// What learns beside the model as a stage begins: with a contrastive loss the factor of similarities, and the text
/// tower if it is a new one.
fn beside(run: &Run, stage: usize) -> (Option<Parameter>, Option<TextTower>) {
    let Some(captions) = &run.captions[stage] else {
        return (None, None);
    };
    let value = vec![(1.0 / TEMPERATURE).ln()];
    let scale = Parameter::new("logit_scale", &[1], false, value, &run.device);
    (Some(scale), captions.new_tower(run.recipe.seed))
}

/// An optimizer of this process's parts of the weights.
fn optimizer(
    own: Vec<Tensor<1>>,
    stage: usize,
    recipe: &Recipe,
    averages: Option<Vec<Tensor<1>>>,
    run_step: u64,
) -> Optimizer {
    let weights: Vec<_> = own.iter().collect();
    let config = &recipe.stage[stage].optimizer;
    Optimizer::new(
        config,
        recipe.average.as_ref(),
        &weights,
        averages,
        run_step,
    )
}
