//! Position embeddings for any image size.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Tensor;

use crate::ops::{Device, from_vec, to_vec};

/// Returns the fixed 2D sine-cosine embedding of a square grid.
///
/// One half of the width encodes the column, the other the row; each half holds the sines, then the cosines of the
/// coordinate at frequencies 10000^(-2i / (width / 2)). Coordinates are those of the patch centers in a grid of
/// `reference` x `reference` patches over the same image; with `reference` = `grid` they are 0, 1, 2, ...
///
/// Shapes: returns `[grid * grid, width]`, flat, in row-major order.
/// Source: MoCo v3 (Chen et al. 2021) and MAE (He et al. 2022); timm's checkpoints use the same order of axes.
pub fn sincos2d(grid: usize, reference: usize, width: usize) -> Vec<f32> {
    let quarter = width / 4;
    let frequency = |i: usize| 10_000f64.powf(-(i as f64) / quarter as f64);
    let stretch = reference as f64 / grid as f64;
    let place = |patch: usize| (patch as f64 + 0.5) * stretch - 0.5;
    let mut values = Vec::with_capacity(grid * grid * width);
    for row in 0..grid {
        for column in 0..grid {
            for coordinate in [column, row] {
                let angles = (0..quarter).map(|i| place(coordinate) * frequency(i));
                values.extend(angles.clone().map(|angle| angle.sin() as f32));
                values.extend(angles.map(|angle| angle.cos() as f32));
            }
        }
    }
    values
}

/// Cache of the fixed embeddings of the most recent grid, on its device. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct FixedPlaces(Arc<Mutex<Option<(usize, Device, Tensor<1>)>>>);

impl FixedPlaces {
    /// Returns the embeddings of a grid, flat `[grid * grid, width]`, calling `make` unless they are cached.
    pub(crate) fn table(
        &self,
        grid: usize,
        device: &Device,
        make: impl FnOnce() -> Vec<f32>,
    ) -> Tensor<1> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((of, on, table)) if *of == grid && on == device => table.clone(),
            _ => {
                let places = make();
                let length = places.len();
                let table = from_vec(places, [length], device);
                *last = Some((grid, device.clone(), table.clone()));
                table
            }
        }
    }
}

/// Returns the matrix that resamples the embeddings of one grid to another.
///
/// Anti-aliased bicubic interpolation is linear in the embeddings, so it is a matrix product, and gradients need no
/// extra code.
///
/// Shapes: returns `[to * to, from * from]`.
/// Source: `timm.layers.resample_abs_pos_embed` (bicubic, `antialias=True`, `align_corners=False`).
pub fn resampling(from: usize, to: usize, device: &Device) -> Tensor<2> {
    let line = interpolation(from, to);
    // The matrix of the grid is the Kronecker product of the matrices of its two axes.
    let mut values = vec![0.0; to * to * from * from];
    for (row, of_row) in line.iter().enumerate() {
        for (column, of_column) in line.iter().enumerate() {
            let start = (row * to + column) * from * from;
            for (i, a) in of_row.iter().enumerate() {
                for (j, b) in of_column.iter().enumerate() {
                    values[start + i * from + j] = (a * b) as f32;
                }
            }
        }
    }
    from_vec(values, [to * to, from * from], device)
}

/// Resamples the embeddings of one grid to another, on the host.
///
/// Shapes: `embeddings` `[from * from, width]`, flat; returns `[to * to, width]`.
pub fn resampled(embeddings: &[f32], from: usize, to: usize) -> Vec<f32> {
    if from == to {
        return embeddings.to_vec();
    }
    let (cpu, rows) = (Device::cpu(), from * from);
    let width = embeddings.len() / rows;
    let embeddings: Tensor<2> = from_vec(embeddings.to_vec(), [rows, width], &cpu);
    to_vec(resampling(from, to, &cpu).matmul(embeddings))
}

/// Returns the weights of `from` inputs in each of `to` outputs along one axis.
///
/// The kernel is Keys' cubic with a = -0.5, which PyTorch and Pillow use for anti-aliasing.
fn interpolation(from: usize, to: usize) -> Vec<Vec<f64>> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let weights_of = |output: usize| {
        let center = (output as f64 + 0.5) * scale;
        let weight = |input: usize| cubic((input as f64 + 0.5 - center) / stretch);
        let reach = 2.0 * stretch;
        let first = (center - reach + 0.5).max(0.0) as usize;
        let last = ((center + reach + 0.5) as usize).min(from);
        let mut weights = vec![0.0; from];
        let sum: f64 = (first..last).map(weight).sum();
        for (input, slot) in weights.iter_mut().enumerate().take(last).skip(first) {
            *slot = weight(input) / sum;
        }
        weights
    };
    (0..to).map(weights_of).collect()
}

fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_embeddings_of_the_same_size_are_untouched() {
        let embeddings = sincos2d(3, 3, 8);
        assert_eq!(resampled(&embeddings, 3, 3), embeddings);
    }

    #[test]
    fn the_center_of_an_image_has_the_same_position_at_any_image_size() {
        let (three, five) = (sincos2d(3, 9, 8), sincos2d(5, 9, 8));
        // The center patches: number 4 of 9 and number 12 of 25.
        assert_eq!(three[4 * 8..5 * 8], five[12 * 8..13 * 8]);
        assert_ne!(
            sincos2d(3, 3, 8)[4 * 8..5 * 8],
            sincos2d(5, 5, 8)[12 * 8..13 * 8]
        );
    }

    #[test]
    fn a_constant_embedding_stays_constant_at_any_size() {
        let ones = [1.0; 16 * 2];
        for to in [1, 2, 3, 7, 14] {
            let found = resampled(&ones, 4, to);
            assert_eq!(found.len(), to * to * 2);
            assert!(
                found.iter().all(|value| (value - 1.0).abs() < 1e-5),
                "{to}: {found:?}"
            );
        }
    }
}
