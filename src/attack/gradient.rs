//! Gradients with respect to images.

use burn::tensor::Tensor;

use crate::ops::{Device, row_dots, sum, zeros};

/// Returns the gradient of the summed losses with respect to the images, and the losses.
///
/// Shapes: `images` and the gradient `[batch, 3, height, width]`; `loss` returns one value per image, `[batch]`.
pub fn input_gradient(
    loss: &dyn Fn(Tensor<4>) -> Tensor<1>,
    images: Tensor<4>,
) -> (Tensor<4>, Tensor<1>) {
    let images = images.without_autodiff().autodiff().require_grad();
    let losses = loss(images.clone());
    // Sum rather than mean, so that an image's gradient does not depend on the batch size.
    let mut gradients = sum(losses.clone()).backward();
    let gradient = images.grad_remove(&mut gradients);
    let gradient = gradient.unwrap_or_else(|| zeros(images.dims(), &Device::of(&images)));
    (gradient, losses.without_autodiff())
}

/// The loss that a training attack maximizes.
pub struct AttackLoss<'a> {
    /// Returns the gradient of the summed losses with respect to the images, and the loss of each image.
    ///
    /// Shapes: images and gradient `[batch, 3, height, width]`, losses `[batch]`.
    pub gradient: &'a dyn Fn(Tensor<4>) -> (Tensor<4>, Tensor<1>),
    /// Returns the loss of each image.
    pub losses: &'a dyn Fn(&Tensor<4>) -> Tensor<1>,
}

/// Returns the gradient of `<slopes, logits>` with respect to the images from which the logits were computed.
///
/// Returns `None` if the logits do not depend on the images.
/// Shapes: `images` and the result `[batch, 3, height, width]`; `logits` and `slopes` `[batch, classes]`.
pub fn pull(images: &Tensor<4>, logits: Tensor<2>, slopes: Tensor<2>) -> Option<Tensor<4>> {
    let [_, classes] = logits.dims();
    if !logits.is_tracked() || classes == 0 {
        return None;
    }
    let mut gradients = sum(row_dots(logits, &slopes.autodiff())).backward();
    images.grad_remove(&mut gradients)
}

/// Selects rows of a tensor.
pub(crate) fn select(images: Tensor<4>, kept: &[usize]) -> Tensor<4> {
    if kept.len() == images.dims()[0] {
        return images;
    }
    crate::ops::select(images, kept)
}
