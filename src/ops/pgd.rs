//! A step of projected gradient descent on pixels, in one pass over memory on the CPU.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::{on_kernels, primitive, reference as plain, slice};

/// A step along the gradient's sign, of each image's own length, then to the nearest image within `epsilon` of
/// `centre` in l-infinity and within [0, 1].
///
/// Shapes: images `[batch, 3, height, width]`; `steps` `[batch]`.
/// Source: Madry et al. 2018, section 2.1.
pub fn linf_step(
    images: Tensor<4>,
    gradient: Tensor<4>,
    centre: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    if !on_kernels(&images) {
        return plain::linf_step(images, gradient, centre, steps, epsilon);
    }
    in_place(
        advxl_kernels::pgd::linf_step,
        images,
        gradient,
        centre,
        steps,
        epsilon,
    )
}

/// A step along the gradient's direction, of each image's own length, then scaled to within `epsilon` of `centre` in
/// l2 and clipped to [0, 1], image by image.
///
/// Shapes: images `[batch, 3, height, width]`; `steps` `[batch]`.
/// Source: Madry et al. 2018, section 2.1.
pub fn l2_step(
    images: Tensor<4>,
    gradient: Tensor<4>,
    centre: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    if !on_kernels(&images) {
        return plain::l2_step(images, gradient, centre, steps, epsilon);
    }
    in_place(
        advxl_kernels::pgd::l2_step,
        images,
        gradient,
        centre,
        steps,
        epsilon,
    )
}

/// A step of the kernels on images, gradient and centre.
type Kernel = fn(&mut [f32], &[f32], &[f32], &[f32], f32);

/// Changes the images where they are, or a copy of them if they are shared.
fn in_place(
    kernel: Kernel,
    images: Tensor<4>,
    gradient: Tensor<4>,
    centre: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    let (gradient, centre) = (primitive(gradient), primitive(centre.clone()));
    let mut images: FlexTensor = primitive(images);
    let pixels = images.storage_mut();
    kernel(
        pixels,
        slice(&gradient),
        slice(&centre),
        steps,
        epsilon as f32,
    );
    Tensor::from_primitive::<Flex>(images)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::ops::{from_vec, to_vec};
    use crate::rng::{Purpose, Rng};

    type Step = fn(Tensor<4>, Tensor<4>, &Tensor<4>, &[f32], f64) -> Tensor<4>;

    #[test]
    fn steps_agree_with_their_plain_composition() {
        let mut rng = Rng::new(1, Purpose::Bench, 0, 0);
        let mut draw = |low: f32, high: f32| {
            let values = (0..3 * 3 * 25).map(|_| rng.between(low, high)).collect();
            from_vec(values, [3, 3, 5, 5], &Device::flex())
        };
        let (centre, gradient) = (draw(0.0, 1.0), draw(-1.0, 1.0));
        let images = centre.clone() + draw(-0.02, 0.02);
        let pairs: [(Step, Step, [f32; 3], f64); 2] = [
            (linf_step, plain::linf_step, [0.02, 0.0, 0.1], 0.03),
            (l2_step, plain::l2_step, [0.3, 0.0, 0.1], 0.2),
        ];
        for (step, plain, sizes, epsilon) in pairs {
            let found = to_vec(step(
                images.clone(),
                gradient.clone(),
                &centre,
                &sizes,
                epsilon,
            ));
            let right = to_vec(plain(
                images.clone(),
                gradient.clone(),
                &centre,
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
