//! A step of projected gradient descent on pixels, in one pass over memory.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::flex::{primitive, slice};

/// See [`crate::ops::linf_step`].
pub(crate) fn linf_step(
    images: Tensor<4>,
    gradient: Tensor<4>,
    center: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    let kernel = advxl_kernels::pgd::linf_step;
    in_place(kernel, images, gradient, center, steps, epsilon)
}

/// See [`crate::ops::l2_step`].
pub(crate) fn l2_step(
    images: Tensor<4>,
    gradient: Tensor<4>,
    center: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    let kernel = advxl_kernels::pgd::l2_step;
    in_place(kernel, images, gradient, center, steps, epsilon)
}

/// A step of the kernels on images, gradient and center.
type Kernel = fn(&mut [f32], &[f32], &[f32], &[f32], f32);

/// Changes the images where they are, or a copy of them if they are shared.
fn in_place(
    kernel: Kernel,
    images: Tensor<4>,
    gradient: Tensor<4>,
    center: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    let (gradient, center) = (primitive(gradient), primitive(center.clone()));
    let mut images: FlexTensor = primitive(images);
    let pixels = images.storage_mut();
    kernel(
        pixels,
        slice(&gradient),
        slice(&center),
        steps,
        epsilon as f32,
    );
    Tensor::from_primitive::<Flex>(images)
}

#[cfg(test)]
mod tests {
    use crate::ops::device::Device;

    use super::*;
    use crate::ops::{from_vec, reference, to_vec};
    use crate::rng::{Rng, Stream};

    type Step = fn(Tensor<4>, Tensor<4>, &Tensor<4>, &[f32], f64) -> Tensor<4>;

    #[test]
    fn steps_agree_with_their_reference() {
        let mut rng = Rng::new(1, Stream::Bench);
        let mut draw = |low: f32, high: f32| {
            let values = (0..3 * 3 * 25).map(|_| rng.between(low, high)).collect();
            from_vec(values, [3, 3, 5, 5], &Device::cpu())
        };
        let (center, gradient) = (draw(0.0, 1.0), draw(-1.0, 1.0));
        let images = center.clone() + draw(-0.02, 0.02);
        let pairs: [(Step, Step, [f32; 3], f64); 2] = [
            (linf_step, reference::linf_step, [0.02, 0.0, 0.1], 0.03),
            (l2_step, reference::l2_step, [0.3, 0.0, 0.1], 0.2),
        ];
        for (step, composed, sizes, epsilon) in pairs {
            let found = to_vec(step(
                images.clone(),
                gradient.clone(),
                &center,
                &sizes,
                epsilon,
            ));
            let right = to_vec(composed(
                images.clone(),
                gradient.clone(),
                &center,
                &sizes,
                epsilon,
            ));
            for (found, right) in found.iter().zip(&right) {
                // A few roundings of numbers up to 1.
                assert!((found - right).abs() < 5e-7, "{found} {right}");
            }
        }
    }
}
