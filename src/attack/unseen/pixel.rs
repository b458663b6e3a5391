//! Pixelation: each block of pixels moves towards the color of its corner.

use super::renderer::{Extent, Renderer};
use crate::rng::Rng;

/// Interpolates, per block and channel, between the pixels of the block and its top left pixel.
///
/// Parameters: `[3, blocks down, blocks across]`, the share of the corner, in [0, 1].
/// Source: the authors' `pixel.py`; their text speaks of the mean of the block, their code reads the corner.
/// Differs from the reference: blocks at the right and lower border are smaller if the image is not a multiple of the
/// block; the reference enlarges the image and cuts off what is beyond its size.
#[derive(Clone, Debug)]
pub struct Pixel {
    /// Size of the image.
    pub extent: Extent,
    /// Side of a block.
    pub size: usize,
}

impl Pixel {
    /// Calls `visit` with each pixel's index, its corner's index and its parameter's index.
    fn visit(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let Extent { height, width } = self.extent;
        let (down, across) = (height.div_ceil(self.size), width.div_ceil(self.size));
        for channel in 0..3 {
            for y in 0..height {
                for x in 0..width {
                    let (row, column) = (y / self.size, x / self.size);
                    let line = channel * height;
                    visit(
                        (line + y) * width + x,
                        (line + row * self.size) * width + column * self.size,
                        (channel * down + row) * across + column,
                    );
                }
            }
        }
    }
}

impl Renderer for Pixel {
    fn count(&self) -> usize {
        let Extent { height, width } = self.extent;
        3 * height.div_ceil(self.size) * width.div_ceil(self.size)
    }

    /// A random point of the positive part of the ball: a direction, and a length uniform up to epsilon.
    fn start(&self, epsilon: f64, rng: &mut Rng) -> Vec<f32> {
        let length = epsilon * f64::from(rng.uniform());
        let draws: Vec<f64> = (0..self.count())
            .map(|_| f64::from(rng.uniform()))
            .collect();
        let norm = draws.iter().map(|draw| draw * draw).sum::<f64>().sqrt();
        let scale = length / norm.max(f64::MIN_POSITIVE);
        draws
            .into_iter()
            .map(|draw| (draw * scale) as f32)
            .collect()
    }

    fn paint(&self, clean: &[f32], parameters: &[f32]) -> Vec<f32> {
        let mut image = clean.to_vec();
        self.visit(|pixel, corner, parameter| {
            let share = parameters[parameter];
            image[pixel] = clean[pixel] * (1.0 - share) + clean[corner] * share;
        });
        image
    }

    fn pull_paint(&self, clean: &[f32], _: &[f32], slopes: &[f32]) -> Vec<f32> {
        let mut pulled = vec![0.0f64; self.count()];
        self.visit(|pixel, corner, parameter| {
            pulled[parameter] += f64::from(slopes[pixel] * (clean[corner] - clean[pixel]));
        });
        pulled.into_iter().map(|slope| slope as f32).collect()
    }
}
