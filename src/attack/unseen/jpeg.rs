//! Noise in the frequencies of JPEG.

use std::sync::LazyLock;

use super::renderer::{Extent, Renderer};
use crate::rng::Rng;

/// Side of a block.
const SIDE: usize = 8;
/// Values of a block.
const BLOCK: usize = SIDE * SIDE;

/// Rows of YCbCr to RGB: the weights of Y, Cb and Cr in red, green and blue.
const COLORS: [[f32; 3]; 3] = [
    [1.0, 0.0, 1.402],
    [1.0, -0.344136, -0.714136],
    [1.0, 1.772, 0.0],
];

/// The orthonormal discrete cosine transform of 8 values, `[frequency, position]`.
static COSINES: LazyLock<[[f32; SIDE]; SIDE]> = LazyLock::new(|| {
    let cosine = |frequency: usize, position: usize| {
        let phase = std::f64::consts::PI * (position as f64 + 0.5) * frequency as f64 / 8.0;
        let scale: f64 = if frequency == 0 { 0.125 } else { 0.25 };
        (scale.sqrt() * phase.cos()) as f32
    };
    std::array::from_fn(|frequency| std::array::from_fn(|position| cosine(frequency, position)))
});

/// Adds noise to the coefficients of JPEG: color in YCbCr, blocks of 8 x 8, discrete cosine transform.
///
/// All of that is linear and invertible, so the noise alone is transformed and added to the image.
/// Parameters: `[3, blocks, 8, 8]`, in Y, Cb and Cr.
/// Source: the authors' `jpeg.py`; no quantization, as there.
/// Differs from the reference: any image size; blocks that reach beyond the border are cut off.
#[derive(Clone, Debug)]
pub struct Jpeg {
    /// Size of the image.
    pub extent: Extent,
}

impl Jpeg {
    fn blocks(&self) -> [usize; 2] {
        [self.extent.height, self.extent.width].map(|length| length.div_ceil(SIDE))
    }

    /// Calls `visit` with the number of each block and, for its pixels inside the image, index in the image and in the block.
    fn visit(&self, block: usize, mut visit: impl FnMut(usize, usize)) {
        let [_, across] = self.blocks();
        let Extent { height, width } = self.extent;
        let (top, left) = (block / across * SIDE, block % across * SIDE);
        for y in 0..SIDE.min(height - top) {
            for x in 0..SIDE.min(width - left) {
                visit((top + y) * width + left + x, y * SIDE + x);
            }
        }
    }
}

/// Returns the block with the given coefficients.
fn block_of(coefficients: &[f32]) -> [f32; BLOCK] {
    transformed(coefficients, |position, frequency| {
        COSINES[frequency][position]
    })
}

/// Returns the coefficients of a block.
fn coefficients_of(block: &[f32]) -> [f32; BLOCK] {
    transformed(block, |frequency, position| COSINES[frequency][position])
}

/// Returns `A block A^T`.
fn transformed(block: &[f32], a: impl Fn(usize, usize) -> f32) -> [f32; BLOCK] {
    let (mut half, mut whole) = ([0.0; BLOCK], [0.0; BLOCK]);
    for row in 0..SIDE {
        for column in 0..SIDE {
            let term = |k: usize| block[row * SIDE + k] * a(column, k);
            half[row * SIDE + column] = (0..SIDE).map(term).sum();
        }
    }
    for row in 0..SIDE {
        for column in 0..SIDE {
            let term = |k: usize| a(row, k) * half[k * SIDE + column];
            whole[row * SIDE + column] = (0..SIDE).map(term).sum();
        }
    }
    whole
}

impl Renderer for Jpeg {
    fn count(&self) -> usize {
        let [down, across] = self.blocks();
        3 * down * across * BLOCK
    }

    fn start(&self, epsilon: f64, rng: &mut Rng) -> Vec<f32> {
        let draws = (0..self.count()).map(|_| (epsilon * f64::from(rng.uniform())) as f32);
        draws.collect()
    }

    fn paint(&self, clean: &[f32], parameters: &[f32]) -> Vec<f32> {
        let pixels = self.extent.pixels();
        let (mut image, third) = (clean.to_vec(), self.count() / 3);
        for block in 0..third / BLOCK {
            let noise: [_; 3] = std::array::from_fn(|component| {
                block_of(&parameters[component * third + block * BLOCK..][..BLOCK])
            });
            self.visit(block, |pixel, place| {
                for (color, weights) in COLORS.iter().enumerate() {
                    let terms = weights.iter().zip(&noise);
                    image[color * pixels + pixel] += terms
                        .map(|(weight, noise)| weight * noise[place])
                        .sum::<f32>();
                }
            });
        }
        image
    }

    fn pull_paint(&self, _: &[f32], _: &[f32], slopes: &[f32]) -> Vec<f32> {
        let (pixels, third) = (self.extent.pixels(), self.count() / 3);
        let mut pulled = vec![0.0; self.count()];
        for block in 0..third / BLOCK {
            for component in 0..3 {
                let mut noise = [0.0; BLOCK];
                self.visit(block, |pixel, place| {
                    let colors = COLORS.iter().enumerate();
                    noise[place] = colors
                        .map(|(color, weights)| weights[component] * slopes[color * pixels + pixel])
                        .sum::<f32>();
                });
                pulled[component * third + block * BLOCK..][..BLOCK]
                    .copy_from_slice(&coefficients_of(&noise));
            }
        }
        pulled
    }
}
