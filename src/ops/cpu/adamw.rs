//! AdamW's update of one tensor, with its running average, in one pass over memory.

use burn::backend::Flex;
use burn::tensor::Tensor;

use super::flex::{primitive, slice};
use crate::ops::spec::{AdamW, Moments, TensorUpdate};

/// See [`crate::ops::adamw`].
pub(crate) fn adamw(tensor: TensorUpdate, update: &AdamW) -> (Tensor<1>, Moments) {
    let TensorUpdate {
        weights,
        gradient,
        moments,
        weight_decay,
        rate,
    } = tensor;
    let [mut weights, gradient, mut first, mut second] =
        [weights, gradient, moments.first, moments.second].map(primitive);
    let mut average = moments.average.map(primitive);
    let update = advxl_kernels::AdamW {
        learning_rate: (update.learning_rate * rate) as f32,
        betas: (update.betas[0] as f32, update.betas[1] as f32),
        eps: update.eps as f32,
        weight_decay: weight_decay as f32,
        step: update.step,
        gradient_scale: update.gradient_scale as f32,
        average_decay: update.average_decay as f32,
    };
    update.update(
        weights.storage_mut(),
        slice(&gradient),
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
