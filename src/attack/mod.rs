//! Attacks: each climbs a loss from given images without leaving a threat model.
//!
//! An attack gets images in [0, 1] and a loss to climb. It knows no model, no mean, no data set.

pub mod l1;
pub mod pgd;
pub mod threat;

pub use pgd::{Pgd, Start};
pub use threat::{Ball, Norm};

use burn::tensor::Tensor;

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
    let mut gradients = losses.clone().sum().backward();
    let gradient = images.grad_remove(&mut gradients);
    let gradient = gradient.unwrap_or_else(|| images.without_autodiff().zeros_like());
    (gradient, losses.without_autodiff())
}
