//! Threat models: which images count as near, and how to move among them.
//!
//! Everything that differs between the norms is here, so that an attack is one short loop.
//! Units: pixels in [0, 1]; epsilon in the same unit.

use burn::tensor::Tensor;
use rayon::prelude::*;
use serde::Serialize;

use super::l1;
use crate::fused::{from_vec, l2_step, linf_step, to_vec};
use crate::rng::{Purpose, Rng};

/// The norm that bounds a perturbation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// The largest change of a pixel.
    Linf,
    /// The Euclidean length of the change.
    L2,
    /// The sum of all changes.
    L1,
}

impl Norm {
    /// The words for the norms.
    pub const WORDS: [(&'static str, Norm); 3] =
        [("linf", Norm::Linf), ("l2", Norm::L2), ("l1", Norm::L1)];

    /// The word for this norm.
    pub fn word(self) -> &'static str {
        match self {
            Self::Linf => "linf",
            Self::L2 => "l2",
            Self::L1 => "l1",
        }
    }

    /// The length of each image's perturbation, in f64.
    ///
    /// Shapes: `delta` holds images of `pixels` values; the result has one value an image.
    pub fn lengths(self, delta: &[f32], pixels: usize) -> Vec<f64> {
        let of_image = |image: &[f32]| {
            let sizes = image.iter().map(|value| f64::from(value.abs()));
            match self {
                Self::Linf => sizes.fold(0.0, f64::max),
                Self::L2 => sizes.map(|size| size * size).sum::<f64>().sqrt(),
                Self::L1 => sizes.sum(),
            }
        };
        delta.chunks_exact(pixels).map(of_image).collect()
    }
}

/// The images near to given ones: those within epsilon in a norm that are images, in [0, 1].
#[derive(Clone, Debug)]
pub struct Ball {
    norm: Norm,
    epsilon: f64,
    centre: Tensor<4>,
}

impl Ball {
    /// The ball around each image of a batch.
    pub fn new(norm: Norm, epsilon: f64, centre: Tensor<4>) -> Self {
        Self {
            norm,
            epsilon,
            centre: centre.without_autodiff(),
        }
    }

    /// A random point of each ball, clipped to [0, 1].
    ///
    /// linf: uniform in the box; l2: a random direction, at a length uniform in `[0, epsilon]`; l1:
    /// the same with Laplace noise. Each image has its own stream, keyed by `keys`, so that the
    /// start does not depend on the batch.
    /// Differs from the reference: AdvXL's start is clipped only after the first gradient step.
    pub fn sample(&self, seed: u64, keys: &[u64]) -> Tensor<4> {
        let [batch, channels, height, width] = self.centre.dims();
        assert_eq!(keys.len(), batch, "one key an image");
        let pixels = channels * height * width;
        let mut noise = vec![0.0; batch * pixels];
        let images = noise.par_chunks_mut(pixels.max(1)).zip(keys);
        images.for_each(|(image, key)| {
            self.draw(image, &mut Rng::new(seed, Purpose::AttackStart, *key, 0));
        });
        let noise = from_vec(noise, self.centre.dims(), &self.centre.device());
        (self.centre.clone() + noise).clamp(0.0, 1.0)
    }

    /// A random perturbation of one image within epsilon.
    fn draw(&self, image: &mut [f32], rng: &mut Rng) {
        match self.norm {
            Norm::Linf => {
                let epsilon = self.epsilon as f32;
                image.fill_with(|| rng.between(-epsilon, epsilon));
                return;
            }
            Norm::L2 => image.fill_with(|| rng.normal()),
            Norm::L1 => image.fill_with(|| {
                let size = -(1.0 - rng.uniform()).ln();
                if rng.chance(0.5) { size } else { -size }
            }),
        }
        let length = self.norm.lengths(image, image.len())[0];
        let wanted = self.epsilon * f64::from(rng.uniform());
        let factor = (wanted / length.max(f64::MIN_POSITIVE)) as f32;
        image.iter_mut().for_each(|value| *value *= factor);
    }

    /// The image of the ball that a step along a gradient leads to: a move of length `size` in the norm that climbs
    /// the gradient fastest, then back into the ball.
    ///
    /// linf: along the sign. l2: along the direction; then scaled to the ball and clipped to [0, 1], which is
    /// feasible, since clipping shortens the perturbation, and what the references do, but not always the nearest
    /// point. l1: equal steps on the steepest hundredth of the pixels that still can move (Tramer and Boneh
    /// 2019), since a step on one pixel alone, the exact answer, is soon stopped by the pixel's own range; the
    /// projection is exact.
    pub fn step(&self, images: Tensor<4>, gradient: Tensor<4>, size: f64) -> Tensor<4> {
        match self.norm {
            Norm::Linf => linf_step(images, gradient, &self.centre, size, self.epsilon),
            Norm::L2 => l2_step(images, gradient, &self.centre, size, self.epsilon),
            Norm::L1 => {
                let (dims, device) = (images.dims(), images.device());
                let pixels = dims[1] * dims[2] * dims[3];
                let (mut images, mut moves) = (to_vec(images), to_vec(gradient));
                let centre = to_vec(self.centre.clone());
                let parts = images
                    .chunks_exact_mut(pixels)
                    .zip(moves.chunks_exact_mut(pixels));
                for ((image, moves), clean) in parts.zip(centre.chunks_exact(pixels)) {
                    l1::steepest(moves, image);
                    for (pixel, change) in image.iter_mut().zip(moves) {
                        *pixel += *change * size as f32;
                    }
                    l1::project(image, clean, self.epsilon);
                }
                from_vec(images, dims, &device)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn images(count: usize, seed: u64) -> Tensor<4> {
        let mut rng = Rng::new(seed, Purpose::Bench, 0, 0);
        let values = (0..count * 3 * 8 * 8).map(|_| rng.uniform()).collect();
        from_vec(values, [count, 3, 8, 8], &Device::flex())
    }

    #[test]
    fn starts_and_projections_are_images_within_epsilon() {
        let clean = images(4, 1);
        let far = images(4, 2) * 3.0 - 1.0;
        for (norm, epsilon) in [(Norm::Linf, 0.03), (Norm::L2, 0.5), (Norm::L1, 12.0)] {
            let ball = Ball::new(norm, epsilon, clean.clone());
            let nowhere = far.zeros_like();
            let nearest = ball.step(far.clone(), nowhere.clone(), 0.0);
            for found in [ball.sample(0, &[0, 1, 2, 3]), nearest] {
                let values = to_vec(found.clone());
                assert!(values.iter().all(|value| (0.0..=1.0).contains(value)));
                let lengths = norm.lengths(&to_vec(found - clean.clone()), 192);
                // One rounding of each pixel to f32.
                let most = epsilon + 1e-6 * if norm == Norm::L1 { 12.0 } else { 1.0 };
                assert!(
                    lengths.iter().all(|length| *length <= most),
                    "{norm:?} {lengths:?}"
                );
            }
            let inside = to_vec(ball.step(clean.clone(), nowhere, 0.0));
            assert_eq!(
                inside,
                to_vec(clean.clone()),
                "what is inside stays, {norm:?}"
            );
        }
    }

    #[test]
    fn a_start_does_not_depend_on_the_batch() {
        let clean = images(3, 1);
        let all = to_vec(Ball::new(Norm::Linf, 0.1, clean.clone()).sample(9, &[5, 6, 7]));
        let last = Ball::new(Norm::Linf, 0.1, clean.narrow(0, 2, 1)).sample(9, &[7]);
        assert_eq!(all[2 * 192..], to_vec(last));
    }
}
