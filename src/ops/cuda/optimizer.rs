//! AdamW over all tensors in one launch, and the norm of the gradient.

use advxl_cuda::{Gpu, Parameter, Values, fail};
use burn::tensor::Tensor;

use super::values::{tensor, values};
use crate::ops::spec::{AdamW, Moments, TensorUpdate};

/// The new weights and moments, in order. Memory that is not shared is reused.
pub(crate) fn update(
    gpu: &Gpu,
    tensors: Vec<TensorUpdate>,
    adamw: &AdamW,
) -> Vec<(Tensor<1>, Moments)> {
    struct Taken {
        weights: Values,
        gradient: Values,
        first: Values,
        second: Values,
        average: Option<Values>,
        weight_decay: f64,
        rate: f64,
    }
    // A tensor holds on to its values: taken out and dropped, they are the only ones.
    let take = |tensor: Tensor<1>| values(gpu, &tensor);
    let mut taken: Vec<Taken> = tensors
        .into_iter()
        .map(|update| Taken {
            weights: take(update.weights),
            gradient: take(update.gradient),
            first: take(update.moments.first),
            second: take(update.moments.second),
            average: update.moments.average.map(take),
            weight_decay: update.weight_decay,
            rate: update.rate,
        })
        .collect();
    let settings = advxl_cuda::AdamW {
        learning_rate: adamw.learning_rate as f32,
        betas: (adamw.betas[0] as f32, adamw.betas[1] as f32),
        eps: adamw.eps as f32,
        step: adamw.step,
        gradient_scale: adamw.gradient_scale as f32,
        average_decay: adamw.average_decay as f32,
    };
    let parameters = taken.iter_mut().map(|taken| Parameter {
        weights: &mut taken.weights,
        gradient: &taken.gradient,
        first: &mut taken.first,
        second: &mut taken.second,
        average: taken.average.as_mut(),
        weight_decay: taken.weight_decay as f32,
        rate: taken.rate as f32,
        rounded: adamw.rounded,
    });
    settings.update(gpu, &mut parameters.collect::<Vec<_>>());
    let back = |values: Values| {
        let length = values.len();
        tensor(values, [length])
    };
    let moments = |taken: Taken| {
        let moments = Moments {
            first: back(taken.first),
            second: back(taken.second),
            average: taken.average.map(back),
        };
        (back(taken.weights), moments)
    };
    taken.into_iter().map(moments).collect()
}

/// The sum of the squares of all values of all tensors.
pub(crate) fn squares(gpu: &Gpu, tensors: &[Tensor<1>]) -> f64 {
    let all: Vec<Values> = tensors.iter().map(|tensor| values(gpu, tensor)).collect();
    let sum = advxl_cuda::sum_of_squares(gpu, &all.iter().collect::<Vec<_>>());
    sum.unwrap_or_else(|error| fail(error))
}
