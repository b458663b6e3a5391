//! Wood: dark concentric rings, whose radii a smooth field displaces.

use std::f64::consts::PI;

use super::renderer::{Extent, Renderer};
use super::sample::{Taps, enlarge, pull_enlarge};
use crate::rng::Rng;

/// Root of the rings' brightness, which makes them thin.
const ROOT: f64 = 8.0;

/// Multiplies the image with `|sin(pi rings (r + field))|^(1/8)`, where r is the distance from the center.
///
/// Parameters: `[resolution, resolution]`, the field, which is enlarged to the image bilinearly; half the image is 1.
/// Source: the authors' `wood.py`.
/// Differs from the reference: the derivative is 0 where the sine is exactly 0, as in the center at the start, where
/// PyTorch has NaN.
#[derive(Clone, Debug)]
pub struct Wood {
    extent: Extent,
    rows: Taps,
    columns: Taps,
    count: usize,
    rings: f64,
}

impl Wood {
    /// Creates the rings with a square field of the given side.
    pub fn new(extent: Extent, resolution: usize, rings: f64) -> Self {
        Self {
            extent,
            rows: Taps::bilinear(resolution, extent.height),
            columns: Taps::bilinear(resolution, extent.width),
            count: resolution * resolution,
            rings,
        }
    }

    /// Returns the phase of the sine at each pixel.
    fn phases(&self, parameters: &[f32]) -> Vec<f64> {
        let Extent { height, width } = self.extent;
        let mut phases = enlarge(parameters, &self.rows, &self.columns);
        let place = |index: usize, length: usize| 2.0 * index as f64 / length as f64 - 1.0;
        for (index, phase) in phases.iter_mut().enumerate() {
            let (x, y) = (place(index % width, width), place(index / width, height));
            *phase = PI * self.rings * (x.hypot(y) + *phase);
        }
        phases
    }
}

impl Renderer for Wood {
    fn count(&self) -> usize {
        self.count
    }

    fn start(&self, _: f64, _: &mut Rng) -> Vec<f32> {
        vec![0.0; self.count]
    }

    fn paint(&self, clean: &[f32], parameters: &[f32]) -> Vec<f32> {
        let phases = self.phases(parameters);
        let light: Vec<f32> = phases
            .iter()
            .map(|phase| phase.sin().abs().powf(1.0 / ROOT) as f32)
            .collect();
        let pixels = clean.iter().zip(light.iter().cycle());
        pixels.map(|(pixel, light)| pixel * light).collect()
    }

    fn pull_paint(&self, clean: &[f32], parameters: &[f32], slopes: &[f32]) -> Vec<f32> {
        let pixels = self.extent.pixels();
        let mut phases = self.phases(parameters);
        for (index, phase) in phases.iter_mut().enumerate() {
            let channels = (0..3).map(|channel| channel * pixels + index);
            let slope: f64 = channels.map(|at| f64::from(slopes[at] * clean[at])).sum();
            let (sine, cosine) = phase.sin_cos();
            let light = match sine {
                0.0 => 0.0,
                sine => sine.signum() * sine.abs().powf(1.0 / ROOT - 1.0) / ROOT,
            };
            *phase = slope * light * cosine * PI * self.rings;
        }
        pull_enlarge(&phases, &self.rows, &self.columns)
    }
}
