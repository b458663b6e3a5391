//! The gradient of a loss for images.

use burn::tensor::Tensor;

use crate::ops::{Device, row_dots, sum, zeros};

/// The gradient of a sum of losses with respect to the images alone.
///
/// Shapes: `images` and the result `[batch, 3, height, width]`; `loss` gives one value an image.
pub fn input_gradient(
    loss: &dyn Fn(Tensor<4>) -> Tensor<1>,
    images: Tensor<4>,
) -> (Tensor<4>, Tensor<1>) {
    let images = images.without_autodiff().autodiff().require_grad();
    let losses = loss(images.clone());
    // The sum, not the mean: an image's gradient must not depend on the size of its batch.
    let mut gradients = sum(losses.clone()).backward();
    let gradient = images.grad_remove(&mut gradients);
    let gradient = gradient.unwrap_or_else(|| zeros(images.dims(), &Device::of(&images)));
    (gradient, losses.without_autodiff())
}

/// The gradient of `<slopes, logits>` with respect to the images that the logits were computed from.
///
/// `None` where the logits do not depend on the images.
/// Shapes: `images` and the result `[batch, 3, height, width]`; `logits` and `slopes` `[batch, classes]`.
pub fn pull(images: &Tensor<4>, logits: Tensor<2>, slopes: Tensor<2>) -> Option<Tensor<4>> {
    let [_, classes] = logits.dims();
    if !logits.is_tracked() || classes == 0 {
        return None;
    }
    let mut gradients = sum(row_dots(logits, &slopes.autodiff())).backward();
    images.grad_remove(&mut gradients)
}

/// Some of the rows of a tensor.
pub(crate) fn select(images: Tensor<4>, kept: &[usize]) -> Tensor<4> {
    if kept.len() == images.dims()[0] {
        return images;
    }
    crate::ops::select(images, kept)
}
