//! Gabor noise: a kernel of crossed waves, stamped at random points.

use std::f64::consts::PI;

use super::renderer::{Extent, Renderer, Stamp};
use crate::rng::Rng;

/// Width of the kernel's envelope; the kernel reaches to 0.5, so that it hardly decays.
const SIGMA: f64 = 3.0;
/// Share of the values of an image that are points.
const DENSITY: f64 = 0.1;
/// Side of the kernel.
const SIZE: usize = 23;

/// Adds a Gabor kernel at random points of each channel. The kernel's angle and frequency are drawn for every rendering.
///
/// Parameters: `[points]`, the weight of the kernel at each point.
/// Source: the authors' `gabor.py`, after Co et al. 2019 (arXiv:1906.03455).
/// Differs from the reference: exactly a tenth of the values of each image are points, not of the batch, and each image
/// has a kernel of its own.
#[derive(Clone, Debug)]
pub struct Gabor {
    /// Size of the image.
    pub extent: Extent,
    /// Indices in `[3, height, width]`, one per parameter.
    pub points: Vec<usize>,
    /// Number of crossed waves.
    pub sides: usize,
    /// The kernel.
    pub kernel: Stamp,
}

impl Gabor {
    /// Draws the points.
    pub fn draw(extent: Extent, sides: usize, rng: &mut Rng) -> Self {
        let values = 3 * extent.pixels();
        let count = (DENSITY * values as f64).round() as usize;
        let mut points = rng.permutation(values);
        points.truncate(count.max(1));
        points.sort_unstable();
        Self {
            extent,
            points,
            sides,
            kernel: kernel(SIZE, sides, 0.0, 0.0),
        }
    }

    /// Iterates over channel and place of each point.
    fn places(&self) -> impl Iterator<Item = (usize, [usize; 2])> {
        let (pixels, width) = (self.extent.pixels(), self.extent.width);
        self.points.iter().map(move |point| {
            let at = point % pixels;
            (point / pixels, [at / width, at % width])
        })
    }
}

/// Returns the sum of waves under a Gaussian: one at the given angle, and `sides - 1` more, evenly rotated, divided by
/// `sides`.
///
/// Units: `frequency` in waves per kernel, `angle` in radians.
pub fn kernel(size: usize, sides: usize, frequency: f64, angle: f64) -> Stamp {
    let place = |index: usize| index as f64 / (size.max(2) - 1) as f64 - 0.5;
    let mut values = Vec::with_capacity(size * size);
    for y in (0..size).map(place) {
        for x in (0..size).map(place) {
            let envelope = (-0.5 * (x * x + y * y) / (SIGMA + 1e-3).powi(2)).exp();
            let wave = |side: usize| {
                let angle = angle + PI * side as f64 / sides as f64;
                (2.0 * PI * frequency * (x * angle.cos() + y * angle.sin())).cos()
            };
            let others: f64 = (1..sides).map(wave).sum();
            values.push((envelope * (wave(0) + others / sides as f64)) as f32);
        }
    }
    Stamp::new(size, values)
}

impl Renderer for Gabor {
    fn count(&self) -> usize {
        self.points.len()
    }

    /// All points have the same weight, uniform up to epsilon.
    fn start(&self, epsilon: f64, rng: &mut Rng) -> Vec<f32> {
        vec![(epsilon * f64::from(rng.uniform())) as f32; self.count()]
    }

    fn redraw(&mut self, rng: &mut Rng) {
        let angle = PI * f64::from(rng.uniform());
        let frequency = 3.0 + (SIZE as f64 / 4.0 - 3.0) * f64::from(rng.uniform());
        self.kernel = kernel(SIZE, self.sides, frequency, angle);
    }

    fn paint(&self, clean: &[f32], parameters: &[f32]) -> Vec<f32> {
        let (mut image, pixels) = (clean.to_vec(), self.extent.pixels());
        for ((channel, place), weight) in self.places().zip(parameters) {
            let plane = &mut image[channel * pixels..][..pixels];
            self.kernel.add(plane, self.extent, place, *weight);
        }
        image
    }

    fn pull_paint(&self, _: &[f32], _: &[f32], slopes: &[f32]) -> Vec<f32> {
        let pixels = self.extent.pixels();
        let of_point = |(channel, place): (usize, _)| {
            let slopes = &slopes[channel * pixels..][..pixels];
            self.kernel.pull(slopes, self.extent, place)
        };
        self.places().map(of_point).collect()
    }
}
