//! AdamW's update of one tensor, with its running average, in one pass over memory on the CPU.

use burn::backend::Flex;
use burn::tensor::Tensor;

use super::{on_kernels, primitive};

/// The numbers of one update; see [`crate::optim`].
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this update.
    pub learning_rate: f64,
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, multiplied by the learning rate; 0 for tensors without decay.
    pub weight_decay: f64,
    /// Number of this update, from 1, for the correction of the moments' bias.
    pub step: u64,
    /// The gradient is multiplied by this first (clipping).
    pub gradient_scale: f64,
    /// Decay of the running average of the weights, if one is kept.
    pub average_decay: f64,
}

/// What the optimizer keeps for one tensor.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Running mean of the gradient.
    pub first: Tensor<1>,
    /// Running mean of its square.
    pub second: Tensor<1>,
    /// Running average of the weights, if one is kept.
    pub average: Option<Tensor<1>>,
}

/// One update: the new weights and moments.
///
/// Source: Loshchilov and Hutter 2019, algorithm 2, in the order of `torch.optim.AdamW`.
pub fn adamw(
    weights: Tensor<1>,
    gradient: Tensor<1>,
    moments: Moments,
    update: &AdamW,
) -> (Tensor<1>, Moments) {
    if on_kernels(&weights) {
        on_cpu(weights, gradient, moments, update)
    } else {
        plain(weights, gradient, moments, update)
    }
}

fn on_cpu(
    weights: Tensor<1>,
    gradient: Tensor<1>,
    moments: Moments,
    update: &AdamW,
) -> (Tensor<1>, Moments) {
    let [mut weights, gradient, mut first, mut second] =
        [weights, gradient, moments.first, moments.second].map(primitive);
    let mut average = moments.average.map(primitive);
    let settings = advxl_kernels::AdamW {
        learning_rate: update.learning_rate as f32,
        betas: (update.betas[0] as f32, update.betas[1] as f32),
        eps: update.eps as f32,
        weight_decay: update.weight_decay as f32,
        step: update.step,
        gradient_scale: update.gradient_scale as f32,
        average_decay: update.average_decay as f32,
    };
    settings.update(
        weights.storage_mut(),
        gradient.as_slice().expect("contiguous"),
        first.storage_mut(),
        second.storage_mut(),
        average.as_mut().map(|average| average.storage_mut()),
    );
    let tensor = Tensor::from_primitive::<Flex>;
    let moments = Moments {
        first: tensor(first),
        second: tensor(second),
        average: average.map(tensor),
    };
    (tensor(weights), moments)
}

fn plain(
    weights: Tensor<1>,
    gradient: Tensor<1>,
    moments: Moments,
    update: &AdamW,
) -> (Tensor<1>, Moments) {
    let [beta1, beta2] = update.betas;
    let gradient = gradient * update.gradient_scale;
    let first = moments.first * beta1 + gradient.clone() * (1.0 - beta1);
    let second = moments.second * beta2 + gradient.clone() * gradient * (1.0 - beta2);
    let correction1 = 1.0 - beta1.powf(update.step as f64);
    let correction2 = 1.0 - beta2.powf(update.step as f64);
    let denominator = second.clone().sqrt() / correction2.sqrt() + update.eps;
    let decayed = weights * (1.0 - update.learning_rate * update.weight_decay);
    let weights = decayed - first.clone() / denominator * (update.learning_rate / correction1);
    let average = moments.average.map(|average| {
        average * update.average_decay + weights.clone() * (1.0 - update.average_decay)
    });
    (
        weights,
        Moments {
            first,
            second,
            average,
        },
    )
}
