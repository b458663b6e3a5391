//! Glitch: each channel is cut into horizontal bars, which are displaced sideways.

use super::renderer::{Extent, Renderer};
use super::sample::{Reading, read, reflect};
use crate::rng::Rng;

/// Displaces horizontal bars, each channel on its own; the image is reflected at its border.
///
/// Parameters: `[3, bars]`, displacement to the left; the image is 2 wide.
/// Source: the authors' `glitch.py`, without greying, as in their settings. As there, positions are half a pixel up and to
/// the left of the pixels, so that undisplaced bars are slightly blurred.
/// Differs from the reference: the number of bars need not divide the height.
#[derive(Clone, Debug)]
pub struct Glitch {
    /// Size of the image.
    pub extent: Extent,
    /// Number of bars.
    pub bars: usize,
}

impl Glitch {
    /// Calls `visit` with each pixel's index, its parameter's index, and its reading with the derivative of the position.
    fn visit(
        &self,
        clean: &[f32],
        parameters: &[f32],
        mut visit: impl FnMut(usize, usize, Reading, f64),
    ) {
        let Extent { height, width } = self.extent;
        for (number, channel) in clean.chunks_exact(self.extent.pixels()).enumerate() {
            for row in 0..height {
                let parameter = number * self.bars + row * self.bars / height;
                let (y, _) = reflect(row as f64 - 0.5, height);
                let by = f64::from(parameters[parameter]) * width as f64 / 2.0;
                for column in 0..width {
                    let (x, slope) = reflect(column as f64 - 0.5 + by, width);
                    let index = (number * height + row) * width + column;
                    let reading = read(channel, self.extent, x, y);
                    visit(index, parameter, reading, slope * width as f64 / 2.0);
                }
            }
        }
    }
}

impl Renderer for Glitch {
    fn count(&self) -> usize {
        3 * self.bars
    }

    fn start(&self, epsilon: f64, rng: &mut Rng) -> Vec<f32> {
        let draws = (0..self.count()).map(|_| (epsilon * f64::from(rng.uniform())) as f32);
        draws.collect()
    }

    fn paint(&self, clean: &[f32], parameters: &[f32]) -> Vec<f32> {
        let mut image = vec![0.0; clean.len()];
        self.visit(clean, parameters, |index, _, reading, _| {
            image[index] = reading.value as f32
        });
        image
    }

    fn pull_paint(&self, clean: &[f32], parameters: &[f32], slopes: &[f32]) -> Vec<f32> {
        let mut pulled = vec![0.0f64; self.count()];
        self.visit(clean, parameters, |index, parameter, reading, slope| {
            pulled[parameter] += f64::from(slopes[index]) * reading.along_x * slope;
        });
        pulled.into_iter().map(|slope| slope as f32).collect()
    }
}
