//! AdamW over all weights of a model, with clipping of the gradient and an average of the weights.
//!
//! Not the schedule ([`crate::schedule`]) and not the arithmetic of one tensor ([`crate::ops`]).

use burn::tensor::Tensor;

use crate::ops;
use crate::ops::{Device, Moments, TensorUpdate};
use crate::settings::{settings, words};

settings! {
    /// The optimizer of a stage: AdamW. Its moments start at zero in each stage.
    #[derive(Clone, Debug, PartialEq)]
    pub struct OptimizerConfig(table) {
        /// Optimizer.
        pub kind: OptimizerKind { example: "\"adamw\"" },
        /// Decoupled weight decay of matrices; biases, norms, position embeddings and the class token have none.
        pub weight_decay: f64 { limits: at_least(0.0), example: "0.05" },
        /// Decay rates of the first and second moments.
        pub betas: [f64; 2] { limits: at_least(0.0).below(1.0), example: "[0.9, 0.95]" },
        /// Largest norm of the gradient over all weights; a longer gradient is scaled down to it.
        pub clip_norm: Option<f64> { limits: above(0.0), example: "1.0" },
    }
}

words! {
    /// Which optimizer.
    pub enum OptimizerKind {
        /// Adam with decoupled weight decay.
        Adamw = "adamw",
    }
}

settings! {
    /// Exponential moving average (EMA) of the weights, which is evaluated and saved in place of the weights.
    #[derive(Clone, Debug, PartialEq)]
    pub struct AverageConfig(table) {
        /// Share of the average kept at each update; it warms up as min(decay, (1 + n) / (10 + n)).
        pub decay: f64 { limits: above(0.0).below(1.0), example: "0.9999" },
    }
}

impl AverageConfig {
    /// The decay of update `number` of the run, from 1: short memory at first, so that the random
    /// initial weights are forgotten (TensorFlow's and timm's warmup of the average).
    fn at(&self, number: u64) -> f64 {
        self.decay.min((1 + number) as f64 / (10 + number) as f64)
    }
}

/// AdamW's memory for every tensor of a model.
#[derive(Clone, Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    average: Option<AverageConfig>,
    /// In the order of the model's parameters.
    pub moments: Vec<Moments>,
    /// Updates of this stage, which Adam's bias correction counts.
    pub step: u64,
    /// Updates of the run, which the average's warmup counts.
    pub run_step: u64,
}

const EPS: f64 = 1e-8;

/// What an update takes from its place in the run.
pub struct Now {
    /// Of all gradients together.
    pub norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Whether the next passes take these weights in bf16.
    pub rounded: bool,
}

impl Optimizer {
    /// Fresh moments for weights, and their average where one is kept.
    ///
    /// `averages` carries the average over from the stage before.
    pub fn new(
        config: &OptimizerConfig,
        average: Option<&AverageConfig>,
        weights: &[&Tensor<1>],
        averages: Option<Vec<Tensor<1>>>,
        run_step: u64,
    ) -> Self {
        let zeros = |weights: &Tensor<1>| ops::zeros(weights.dims(), &Device::of(weights));
        let moments = weights.iter().enumerate().map(|(index, weights)| Moments {
            first: zeros(weights),
            second: zeros(weights),
            average: average.map(|_| match &averages {
                Some(averages) => averages[index].clone(),
                None => (*weights).clone(),
            }),
        });
        Self {
            config: config.clone(),
            average: average.cloned(),
            moments: moments.collect(),
            step: 0,
            run_step,
        }
    }

    /// Moves the weights against the gradients, in place.
    ///
    /// `decays`: whether weight decay applies to each tensor.
    pub fn update(
        &mut self,
        weights: Vec<&mut Tensor<1>>,
        decays: &[bool],
        gradients: Vec<Tensor<1>>,
        now: &Now,
    ) {
        self.step += 1;
        self.run_step += 1;
        // As torch.nn.utils.clip_grad_norm_, which adds 1e-6 to the norm.
        let clip = self
            .config
            .clip_norm
            .map_or(1.0, |most| (most / (now.norm + 1e-6)).min(1.0));
        let average_decay = self.average.as_ref().map_or(0.0, |a| a.at(self.run_step));
        let update = ops::AdamW {
            learning_rate: now.learning_rate,
            betas: self.config.betas,
            eps: EPS,
            step: self.step,
            gradient_scale: clip,
            average_decay,
            rounded: now.rounded,
        };
        // The tensors are moved out and back, so that the update can reuse their memory.
        let mut places = weights;
        let weights = places.iter_mut();
        let weights = weights.map(|place| std::mem::replace(&mut **place, nothing()));
        let moments = std::mem::take(&mut self.moments);
        let all = weights.zip(gradients).zip(moments).zip(decays);
        let tensors = all.map(|(((weights, gradient), moments), decays)| TensorUpdate {
            weights,
            gradient,
            moments,
            weight_decay: if *decays {
                self.config.weight_decay
            } else {
                0.0
            },
        });
        let updated = ops::adamw(tensors.collect(), &update);
        for (place, (weights, moments)) in places.into_iter().zip(updated) {
            *place = weights;
            self.moments.push(moments);
        }
    }
}

/// What stands in for a tensor that is moved out.
fn nothing() -> Tensor<1> {
    ops::zeros([0], &Device::cpu())
}

/// The Euclidean norm of all gradients together, summed in f64 tensor by tensor in a fixed order.
pub fn norm(gradients: &[Tensor<1>]) -> f64 {
    ops::sum_of_squares(gradients.to_vec()).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_forgets_the_initial_weights() {
        let average = AverageConfig { decay: 0.999 };
        assert_eq!(average.at(1), 2.0 / 11.0);
        assert_eq!(average.at(1_000_000), 0.999);
    }
}
