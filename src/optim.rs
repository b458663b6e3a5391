//! AdamW over all weights of a model, with gradient clipping and an exponential moving average (EMA) of the weights.
//!
//! The learning-rate schedule is in [`crate::schedule`], the update of a single tensor in [`crate::ops`].

use burn::tensor::Tensor;

use crate::ops;
use crate::ops::{Device, Moments, TensorUpdate};
use crate::settings::{settings, words};

settings! {
    /// AdamW optimizer of a stage. Its moments start at zero in each stage.
    #[derive(Clone, Debug, PartialEq)]
    pub struct OptimizerConfig(table) {
        /// Type of optimizer.
        pub kind: OptimizerKind { example: "\"adamw\"" },
        /// Decoupled weight decay, applied to matrices but not to biases, norms, position embeddings or the class
        /// token.
        pub weight_decay: f64 { limits: at_least(0.0), example: "0.05" },
        /// Decay rates of Adam's first and second moments.
        pub betas: [f64; 2] { limits: at_least(0.0).below(1.0), example: "[0.9, 0.95]" },
        /// Gradient clipping: maximum L2 norm of the gradient over all weights. A larger gradient is scaled down to it.
        /// If omitted, gradients are not clipped.
        pub clip_norm: Option<f64> { limits: above(0.0), example: "1.0" },
        /// Layer-wise learning-rate decay: each layer's learning rate is this factor times that of the layer after it.
        /// The last is that of the final norm and the head; layers are those of timm's `param_groups_layer_decay`.
        pub layer_decay: Option<f64> { limits: above(0.0).below(1.0), example: "0.75" },
        /// Factor of the head's learning rate.
        pub head_rate: f64 { omit_default: true, limits: above(0.0), example: "10.0" } [= 1.0],
    }
}

words! {
    /// Type of optimizer.
    pub enum OptimizerKind {
        /// AdamW: Adam with decoupled weight decay.
        Adamw = "adamw",
    }
}

settings! {
    /// Exponential moving average (EMA) of the weights, which is evaluated and saved instead of the weights.
    #[derive(Clone, Debug, PartialEq)]
    pub struct AverageConfig(table) {
        /// EMA decay per update. It warms up as min(decay, (1 + n) / (10 + n)) at update n of the run.
        pub decay: f64 { limits: above(0.0).below(1.0), example: "0.9999" },
    }
}

impl AverageConfig {
    /// Returns the decay at update `number` of the run, counted from 1. It starts low so that the random initial
    /// weights are forgotten quickly (the EMA warmup of TensorFlow and timm).
    fn at(&self, number: u64) -> f64 {
        self.decay.min((1 + number) as f64 / (10 + number) as f64)
    }
}

/// Optimizer state for every tensor of a model.
#[derive(Clone, Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    average: Option<AverageConfig>,
    /// In the order of the model's parameters.
    pub moments: Vec<Moments>,
    /// Number of updates in this stage, for Adam's bias correction.
    pub step: u64,
    /// Number of updates in the run, for the EMA warmup.
    pub run_step: u64,
}

const EPS: f64 = 1e-8;

/// How a tensor is updated.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Whether weight decay applies.
    pub decays: bool,
    /// Factor of the learning rate.
    pub rate: f64,
}

/// Values of an update that depend on the step.
pub struct Now {
    /// Global norm of the gradients.
    pub norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Whether the next passes use these weights in bf16.
    pub rounded: bool,
}

impl Optimizer {
    /// Creates an optimizer with zero moments and, if configured, an average of the weights.
    ///
    /// `averages` carries the average over from the previous stage.
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

    /// Updates the weights in place.
    ///
    pub fn update(
        &mut self,
        weights: Vec<&mut Tensor<1>>,
        rules: &[Rule],
        gradients: Vec<Tensor<1>>,
        now: &Now,
    ) {
        self.step += 1;
        self.run_step += 1;
        // Same as torch.nn.utils.clip_grad_norm_, which adds 1e-6 to the norm.
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
        let all = weights.zip(gradients).zip(moments).zip(rules);
        let tensors = all.map(|(((weights, gradient), moments), rule)| TensorUpdate {
            weights,
            gradient,
            moments,
            weight_decay: if rule.decays {
                self.config.weight_decay
            } else {
                0.0
            },
            rate: rule.rate,
        });
        let updated = ops::adamw(tensors.collect(), &update);
        for (place, (weights, moments)) in places.into_iter().zip(updated) {
            *place = weights;
            self.moments.push(moments);
        }
    }
}

/// Placeholder for a tensor that is moved out.
fn nothing() -> Tensor<1> {
    ops::zeros([0], &Device::cpu())
}

/// Returns the global L2 norm of gradients, summed in f64 tensor by tensor in a fixed order.
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
