//! Resizing of parameter grids and bilinear reading of images, with their derivatives, as PyTorch computes them.
//!
//! Positions are f64: in f32, a position near pixel 200 is off by 1e-5 of a pixel.

use super::renderer::Extent;

/// PyTorch's parameter of the bicubic kernel.
const CUBIC: f64 = -0.75;

/// Weights of a resize along one axis: each output is a weighted sum of a few inputs.
#[derive(Clone, Debug)]
pub struct Taps {
    inputs: usize,
    of: Vec<Vec<(usize, f64)>>,
}

impl Taps {
    /// Bilinear weights, without antialiasing (`interpolate(mode="bilinear", align_corners=False)`).
    pub fn bilinear(inputs: usize, outputs: usize) -> Self {
        Self::new(inputs, outputs, |position| {
            let position = position.max(0.0);
            let share = position - position.floor();
            let first = position.floor() as i64;
            vec![(first, 1.0 - share), (first + 1, share)]
        })
    }

    /// Bicubic weights, without antialiasing (`interpolate(mode="bicubic", align_corners=False)`).
    pub fn bicubic(inputs: usize, outputs: usize) -> Self {
        let near = |t: f64| ((CUBIC + 2.0) * t - (CUBIC + 3.0)) * t * t + 1.0;
        let far = |t: f64| ((CUBIC * t - 5.0 * CUBIC) * t + 8.0 * CUBIC) * t - 4.0 * CUBIC;
        Self::new(inputs, outputs, |position| {
            let share = position - position.floor();
            let first = position.floor() as i64;
            vec![
                (first - 1, far(share + 1.0)),
                (first, near(share)),
                (first + 1, near(1.0 - share)),
                (first + 2, far(2.0 - share)),
            ]
        })
    }

    /// Inputs beyond the border are those on it.
    fn new(inputs: usize, outputs: usize, taps: impl Fn(f64) -> Vec<(i64, f64)>) -> Self {
        let scale = inputs as f64 / outputs.max(1) as f64;
        let last = inputs as i64 - 1;
        let of = (0..outputs).map(|output| {
            let taps = taps((output as f64 + 0.5) * scale - 0.5).into_iter();
            taps.map(|(input, weight)| (input.clamp(0, last) as usize, weight))
                .collect()
        });
        Self {
            inputs,
            of: of.collect(),
        }
    }
}

/// Resizes a grid of parameters.
///
/// Shapes: `grid` `[rows.inputs, columns.inputs]`; the result `[rows.outputs, columns.outputs]`.
pub fn enlarge(grid: &[f32], rows: &Taps, columns: &Taps) -> Vec<f64> {
    let width = columns.of.len();
    let mut wide = vec![0.0; rows.inputs * width];
    for (row, wide) in wide.chunks_exact_mut(width).enumerate() {
        for (value, taps) in wide.iter_mut().zip(&columns.of) {
            let terms = taps.iter();
            *value = terms
                .map(|(input, weight)| weight * f64::from(grid[row * columns.inputs + input]))
                .sum();
        }
    }
    let mut large = vec![0.0; rows.of.len() * width];
    for (line, taps) in large.chunks_exact_mut(width).zip(&rows.of) {
        for (input, weight) in taps {
            let from = &wide[input * width..][..width];
            line.iter_mut()
                .zip(from)
                .for_each(|(to, from)| *to += weight * from);
        }
    }
    large
}

/// Returns the derivative of `<slopes, enlarge(grid)>` with respect to the grid.
pub fn pull_enlarge(slopes: &[f64], rows: &Taps, columns: &Taps) -> Vec<f32> {
    let width = columns.of.len();
    let mut wide = vec![0.0; rows.inputs * width];
    for (line, taps) in slopes.chunks_exact(width).zip(&rows.of) {
        for (input, weight) in taps {
            let to = &mut wide[input * width..][..width];
            to.iter_mut()
                .zip(line)
                .for_each(|(to, slope)| *to += weight * slope);
        }
    }
    let mut grid = vec![0.0; rows.inputs * columns.inputs];
    for (wide, grid) in wide
        .chunks_exact(width)
        .zip(grid.chunks_exact_mut(columns.inputs))
    {
        for (slope, taps) in wide.iter().zip(&columns.of) {
            for (input, weight) in taps {
                grid[*input] += weight * slope;
            }
        }
    }
    grid.into_iter().map(|slope| slope as f32).collect()
}

/// A channel read between pixels, with the derivatives of the value along x and y.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reading {
    /// The value.
    pub value: f64,
    /// Its derivative along x, per pixel.
    pub along_x: f64,
    /// Its derivative along y, per pixel.
    pub along_y: f64,
}

/// Reads a channel at a position in pixels, bilinearly, with zeros outside.
pub fn read(channel: &[f32], extent: Extent, x: f64, y: f64) -> Reading {
    let (left, top) = (x.floor(), y.floor());
    let (u, v) = (x - left, y - top);
    let at = |row: f64, column: f64| {
        let is_inside = (0.0..extent.height as f64).contains(&row)
            && (0.0..extent.width as f64).contains(&column);
        match is_inside {
            true => f64::from(channel[row as usize * extent.width + column as usize]),
            false => 0.0,
        }
    };
    let (a, b) = (at(top, left), at(top, left + 1.0));
    let (c, d) = (at(top + 1.0, left), at(top + 1.0, left + 1.0));
    Reading {
        value: (a * (1.0 - u) + b * u) * (1.0 - v) + (c * (1.0 - u) + d * u) * v,
        along_x: (b - a) * (1.0 - v) + (d - c) * v,
        along_y: (c - a) * (1.0 - u) + (d - b) * u,
    }
}

/// Reflects a position on the outer edges of the first and the last pixel and moves it into the image, with the derivative
/// of the result (`grid_sample(padding_mode="reflection", align_corners=False)`).
pub fn reflect(position: f64, length: usize) -> (f64, f64) {
    let span = length as f64;
    let from_edge = position + 0.5;
    let sign = if from_edge < 0.0 { -1.0 } else { 1.0 };
    let flips = (from_edge.abs() / span).floor();
    let rest = from_edge.abs() - flips * span;
    let is_even = flips % 2.0 == 0.0;
    let (reflected, slope) = match is_even {
        true => (rest - 0.5, sign),
        false => (span - rest - 0.5, -sign),
    };
    let last = span - 1.0;
    match reflected {
        below if below <= 0.0 => (0.0, 0.0),
        beyond if beyond >= last => (last, 0.0),
        inside => (inside, slope),
    }
}
