//! Threat models: the allowed perturbations, with steps and projections.
//!
//! Everything that differs between norms is here, so that an attack is one short loop.
//! Units: pixels in [0, 1]; epsilon in the same unit.

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::draws::Draws;
use super::gradient::select;
use super::l1;
use crate::ops::{
    self, Device, from_vec, l1_start, l1_step, l2_start, l2_step, linf_start, linf_step,
    surface_start, to_vec,
};
use crate::rng::Rng;
use crate::settings::words;

words! {
    /// Norm that bounds the perturbation.
    pub enum Norm {
        /// Largest absolute change of any value.
        Linf = "linf",
        /// Euclidean norm of the change.
        L2 = "l2",
        /// Sum of the absolute changes.
        L1 = "l1",
    }
}

impl Norm {
    /// Returns the norm of a perturbation.
    pub fn length(self, delta: impl Iterator<Item = f64>) -> f64 {
        let sizes = delta.map(f64::abs);
        match self {
            Self::Linf => sizes.fold(0.0, f64::max),
            Self::L2 => sizes.map(|size| size * size).sum::<f64>().sqrt(),
            Self::L1 => sizes.sum(),
        }
    }

    /// Returns the distance between two images.
    pub fn distance(self, image: &[f32], other: &[f32]) -> f64 {
        let pairs = image.iter().zip(other);
        self.length(pairs.map(|(a, b)| f64::from(*a) - f64::from(*b)))
    }

    /// Returns the distance between each pair of images of two batches.
    ///
    /// Shapes: `images` and `others` `[batch, 3, height, width]`; the result `[batch]`.
    pub(crate) fn distances(self, images: &Tensor<4>, others: &Tensor<4>) -> Vec<f64> {
        if let Some(distances) = ops::distances(self.on_device(), images, others) {
            return distances;
        }
        let pixels: usize = images.dims()[1..].iter().product();
        let [images, others] = [images, others].map(|images| to_vec(images.clone()));
        let pairs = images.chunks_exact(pixels).zip(others.chunks_exact(pixels));
        pairs
            .map(|(image, other)| self.distance(image, other))
            .collect()
    }

    /// Returns the dual norm of each gradient: the largest change of the value by a step of length 1.
    ///
    /// Shapes: `gradients` `[batch, 3, height, width]`; the result `[batch]`.
    pub(crate) fn dual_lengths(self, gradients: &Tensor<4>) -> Vec<f64> {
        if let Some(lengths) = ops::dual_lengths(self.on_device(), gradients) {
            return lengths;
        }
        let dual = match self {
            Self::Linf => Self::L1,
            Self::L2 => Self::L2,
            Self::L1 => Self::Linf,
        };
        let pixels: usize = gradients.dims()[1..].iter().product();
        let gradients = to_vec(gradients.clone());
        let lengths = gradients.chunks_exact(pixels);
        lengths
            .map(|gradient| dual.length(gradient.iter().map(|slope| f64::from(*slope))))
            .collect()
    }

    /// Converts to the GPU representation.
    pub(crate) fn on_device(self) -> ops::Norm {
        match self {
            Self::Linf => ops::Norm::Linf,
            Self::L2 => ops::Norm::L2,
            Self::L1 => ops::Norm::L1,
        }
    }

    /// Returns the largest possible distance between two images: every pixel changes from 0 to 1.
    pub fn longest(self, pixels: usize) -> f64 {
        match self {
            Self::Linf => 1.0,
            Self::L2 => (pixels as f64).sqrt(),
            Self::L1 => pixels as f64,
        }
    }

    /// Draws random noise of length 1: uniform in the box for linf, Gaussian for the others.
    pub fn noise(self, rng: &mut Rng, pixels: usize) -> Vec<f32> {
        let mut noise: Vec<f32> = match self {
            Self::Linf => (0..pixels).map(|_| rng.between(-1.0, 1.0)).collect(),
            Self::L2 | Self::L1 => (0..pixels).map(|_| rng.normal()).collect(),
        };
        let length = self.length(noise.iter().map(|value| f64::from(*value)));
        scale(&mut noise, 1.0 / length.max(f64::MIN_POSITIVE));
        noise
    }
}

fn scale(values: &mut [f32], factor: f64) {
    values.iter_mut().for_each(|value| *value *= factor as f32);
}

/// The images within epsilon of given images in a norm, with pixels in [0, 1].
#[derive(Clone, Debug)]
pub struct Ball {
    norm: Norm,
    epsilon: f64,
    center: Tensor<4>,
}

impl Ball {
    /// Creates the ball around each image of a batch.
    ///
    /// The radius is capped at the largest possible distance between images, which keeps numbers in the range of f32.
    pub fn new(norm: Norm, epsilon: f64, center: Tensor<4>) -> Self {
        let pixels = center.dims()[1..].iter().product();
        Self {
            norm,
            epsilon: epsilon.min(norm.longest(pixels)),
            center: center.without_autodiff(),
        }
    }

    /// Draws a random point of each ball, clipped to [0, 1].
    ///
    /// linf: uniform in the box. l2: Gaussian direction with a length uniform in `[0, epsilon]`. l1: the same with
    /// Laplace noise. Each image has its own stream in `draws`, so the start does not depend on the batch.
    /// Differs from the reference: AdvXL's start is clipped only after the first gradient step.
    pub fn sample(&self, draws: &Draws) -> Tensor<4> {
        let streams = draws.streams(0);
        let on_device = match self.norm {
            Norm::Linf => linf_start(&self.center, &streams, self.epsilon),
            Norm::L2 => l2_start(&self.center, &streams, self.epsilon),
            Norm::L1 => l1_start(&self.center, &streams, self.epsilon),
        };
        if let Some(start) = on_device {
            return start;
        }
        let noise = self.noise(|index, pixels| self.draw(&mut draws.stream(index, 0, 0), pixels));
        (self.center.clone() + noise).clamp(0.0, 1.0)
    }

    /// Draws a random point on the surface of each ball, clipped to [0, 1], as the start of APGD.
    ///
    /// l1: Gaussian noise on every pixel, projected.
    /// Source: Croce and Hein 2020, algorithm 1; 2021, section 4.2; same noise as the reference program.
    pub fn sample_surface(&self, draws: &Draws, run: usize) -> Tensor<4> {
        let (norm, streams) = (self.norm.on_device(), draws.streams(run));
        if let Some(start) = surface_start(norm, &self.center, &streams, self.epsilon) {
            return start;
        }
        let noise = self.noise(|index, pixels| {
            let mut rng = draws.stream(index, run, 0);
            match self.norm {
                Norm::L1 => (0..pixels).map(|_| rng.normal()).collect(),
                norm => {
                    let mut noise = norm.noise(&mut rng, pixels);
                    scale(&mut noise, self.epsilon);
                    noise
                }
            }
        });
        self.project(self.center.clone() + noise)
    }

    /// Builds a tensor with one perturbation per image, from a function of index and number of pixels.
    fn noise(&self, of_image: impl Fn(usize, usize) -> Vec<f32> + Sync) -> Tensor<4> {
        let [batch, channels, height, width] = self.center.dims();
        let pixels = channels * height * width;
        let mut noise = vec![0.0; batch * pixels];
        let images = noise.par_chunks_mut(pixels.max(1)).enumerate();
        images.for_each(|(index, image)| image.copy_from_slice(&of_image(index, pixels)));
        from_vec(noise, self.center.dims(), &Device::of(&self.center))
    }

    /// Draws a random perturbation of one image within epsilon.
    fn draw(&self, rng: &mut Rng, pixels: usize) -> Vec<f32> {
        let mut noise: Vec<f32> = match self.norm {
            Norm::Linf => {
                let epsilon = self.epsilon as f32;
                return (0..pixels)
                    .map(|_| rng.between(-epsilon, epsilon))
                    .collect();
            }
            Norm::L2 => (0..pixels).map(|_| rng.normal()).collect(),
            Norm::L1 => {
                let laplace = |_| {
                    let size = -(1.0 - rng.uniform()).ln();
                    if rng.chance(0.5) { size } else { -size }
                };
                (0..pixels).map(laplace).collect()
            }
        };
        let length = self
            .norm
            .length(noise.iter().map(|value| f64::from(*value)));
        let target = self.epsilon * f64::from(rng.uniform());
        scale(&mut noise, target / length.max(f64::MIN_POSITIVE));
        noise
    }

    /// Takes a steepest-ascent step in the norm, with a step size per image, and projects back into the ball.
    ///
    /// linf: along the sign of the gradient. l2: along the gradient, then scaled to the ball and clipped to [0, 1]; the
    /// result is feasible, since clipping shortens the perturbation, and matches the references, but is not always the
    /// nearest point. l1: equal steps on the steepest 1 % of the pixels that can still move (Tramer and Boneh 2019),
    /// because the exact solution, a step on a single pixel, soon hits the end of that pixel's range; the projection is
    /// exact.
    /// Shapes: `sizes` `[batch]`.
    pub fn step(&self, images: Tensor<4>, gradient: Tensor<4>, sizes: &[f32]) -> Tensor<4> {
        match self.norm {
            Norm::Linf => linf_step(images, gradient, &self.center, sizes, self.epsilon),
            Norm::L2 => l2_step(images, gradient, &self.center, sizes, self.epsilon),
            Norm::L1 => {
                let epsilon = self.epsilon;
                let on_device = l1_step(&images, &gradient, &self.center, sizes, epsilon);
                on_device.unwrap_or_else(|| {
                    let direction = |_, slopes: &mut [f32], at: &[f32]| l1::steepest(slopes, at);
                    self.l1_step(images, gradient, sizes, direction)
                })
            }
        }
    }

    /// Takes a step in the l1 ball on the steepest share of the pixels, with one share per image.
    ///
    /// Shapes: `sizes` and `shares` `[batch]`.
    pub fn sparse_step(
        &self,
        images: Tensor<4>,
        gradient: Tensor<4>,
        sizes: &[f32],
        shares: &[f64],
    ) -> Tensor<4> {
        let (center, epsilon) = (&self.center, self.epsilon);
        let on_device = ops::l1_sparse_step(&images, &gradient, center, sizes, shares, epsilon);
        on_device.unwrap_or_else(|| {
            self.l1_step(images, gradient, sizes, |index, slopes, _| {
                l1::steepest_share(slopes, shares[index]);
            })
        })
    }

    /// Projects images into the ball (l2: scaled and clipped, see [`Ball::step`]).
    pub fn project(&self, images: Tensor<4>) -> Tensor<4> {
        // With step size 0 the gradient has no effect.
        let unused = self.center.clone();
        let sizes = vec![0.0; unused.dims()[0]];
        match self.norm {
            Norm::L1 => ops::l1_project(&images, &self.center, self.epsilon)
                .unwrap_or_else(|| self.l1_step(images, unused, &sizes, |_, _, _| ())),
            _ => self.step(images, unused, &sizes),
        }
    }

    /// Takes an l1 step on the host.
    fn l1_step(
        &self,
        images: Tensor<4>,
        gradient: Tensor<4>,
        sizes: &[f32],
        direction: impl Fn(usize, &mut [f32], &[f32]) + Sync,
    ) -> Tensor<4> {
        let (dims, device) = (images.dims(), Device::of(&images));
        let pixels = (dims[1] * dims[2] * dims[3]).max(1);
        let (mut images, mut moves) = (to_vec(images), to_vec(gradient));
        let center = to_vec(self.center.clone());
        let parts = images
            .par_chunks_exact_mut(pixels)
            .zip(moves.par_chunks_exact_mut(pixels))
            .zip(center.par_chunks_exact(pixels));
        parts
            .enumerate()
            .for_each(|(index, ((image, moves), clean))| {
                direction(index, moves, image);
                for (pixel, change) in image.iter_mut().zip(moves) {
                    *pixel += *change * sizes[index];
                }
                l1::project(image, clean, self.epsilon);
            });
        from_vec(images, dims, &device)
    }

    /// Selects the balls of some of the images.
    pub fn select(&self, kept: &[usize]) -> Self {
        Self {
            center: select(self.center.clone(), kept),
            ..self.clone()
        }
    }

    /// Returns the radius.
    pub fn epsilon(&self) -> f64 {
        self.epsilon
    }

    /// Returns the images at the center.
    pub fn center(&self) -> Tensor<4> {
        self.center.clone()
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::ops::Device;
    use crate::rng::{AttackKind, Stream};

    fn images(count: usize, seed: u64) -> Tensor<4> {
        let mut rng = Rng::new(seed, Stream::Bench);
        let values = (0..count * 3 * 8 * 8).map(|_| rng.uniform()).collect();
        from_vec(values, [count, 3, 8, 8], &Device::cpu())
    }

    #[test]
    fn starts_and_projections_are_images_within_epsilon() {
        let clean = images(4, 1);
        let far = images(4, 2) * 3.0 - 1.0;
        for (norm, epsilon) in [(Norm::Linf, 0.03), (Norm::L2, 0.5), (Norm::L1, 12.0)] {
            let ball = Ball::new(norm, epsilon, clean.clone());
            let draws = Draws::new(0, &[0, 1, 2, 3], AttackKind::Pgd);
            let nearest = ball.project(far.clone());
            let surface = ball.sample_surface(&draws, 0);
            for found in [ball.sample(&draws), surface, nearest] {
                let values = to_vec(found.clone());
                assert!(values.iter().all(|value| (0.0..=1.0).contains(value)));
                let clean = to_vec(clean.clone());
                for (found, clean) in values.chunks(192).zip(clean.chunks(192)) {
                    let distance = norm.distance(found, clean);
                    // A pixel is rounded to f32; `sample` does not round l1 towards the center.
                    assert!(distance <= epsilon + 1e-6, "{norm:?} {distance}");
                }
            }
            let inside = to_vec(ball.project(clean.clone()));
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
        let draws = |keys| Draws::new(9, keys, AttackKind::Pgd);
        let all = to_vec(Ball::new(Norm::Linf, 0.1, clean.clone()).sample(&draws(&[5, 6, 7])));
        let last = Ball::new(Norm::Linf, 0.1, clean.narrow(0, 2, 1)).sample(&draws(&[7]));
        assert_eq!(all[2 * 192..], to_vec(last));
    }
}
