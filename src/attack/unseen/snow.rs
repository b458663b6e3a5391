//! Snow: flakes of random shape at random points, over an image that is made paler.

use super::renderer::{Extent, Renderer, Stamp};
use crate::rng::Rng;

/// Layers of flakes, each with a shape of its own.
const LAYERS: usize = 5;
/// Share of the paler image in the result.
const PALENESS: f32 = 0.15;
/// Flakes start at exp(-u / SPREAD) for a uniform u, before the projection.
const SPREAD: f64 = 5.0;
/// Range of the width of the Gaussian that blurs a flake: for a kernel of 3 pixels, nearly a mean.
const BLUR: [f64; 2] = [10.0, 15.0];

/// Sizes of the flakes, by data set.
#[derive(Clone, Copy, Debug)]
pub struct SnowSizes {
    /// Side of a flake's kernel.
    pub flake: usize,
    /// Mean distance of flakes: one value in `spacing`^2 is a flake.
    pub spacing: usize,
    /// Side of the kernel that blurs a flake.
    pub blur: usize,
}

/// Adds flakes to a paler image, with the fourth power of a parameter as brightness.
///
/// Parameters: `[flakes]`.
/// Source: the authors' `snow.py`.
#[derive(Clone, Debug)]
pub struct Snow {
    /// Size of the image.
    pub extent: Extent,
    /// Layer, row and column of each flake, one per parameter.
    pub points: Vec<[usize; 3]>,
    /// The flake of each layer.
    pub flakes: Vec<Stamp>,
}

/// A flake: a line through the center of its kernel.
#[derive(Clone, Copy, Debug)]
pub struct Flake {
    /// Row and column of the end of the line, beyond the center of the kernel.
    pub end: [usize; 2],
    /// Thickness of the line in pixels, before the correction for its slope.
    pub thickness: f64,
    /// Whether the kernel is mirrored.
    pub is_mirrored: bool,
    /// Width of the Gaussian that blurs it.
    pub sigma: f64,
}

impl Snow {
    /// Draws the places and the shapes of the flakes.
    pub fn draw(extent: Extent, sizes: SnowSizes, rng: &mut Rng) -> Self {
        let is_mirrored = rng.chance(0.5);
        let half = sizes.flake / 2;
        let flakes = (0..LAYERS).map(|_| {
            let mut end = || half + 1 + rng.below(sizes.flake - half - 1);
            let end = [end(), end()];
            let thickness = match rng.uniform() {
                draw if draw < 0.6 => 1.0,
                draw if draw < 0.9 => 3.0,
                _ => 5.0,
            };
            let sigma = BLUR[0] + (BLUR[1] - BLUR[0]) * f64::from(rng.uniform());
            let flake = Flake {
                end,
                thickness,
                is_mirrored,
                sigma,
            };
            flake.kernel(sizes.flake, sizes.blur)
        });
        let flakes = flakes.collect();
        let share = 1.0 / (sizes.spacing * sizes.spacing) as f32;
        let mut points = Vec::new();
        for layer in 0..LAYERS {
            for row in 0..extent.height {
                for column in 0..extent.width {
                    if rng.chance(share) {
                        points.push([layer, row, column]);
                    }
                }
            }
        }
        Self {
            extent,
            points,
            flakes,
        }
    }
}

impl Flake {
    /// Returns the kernel: an antialiased line from the center to `end`, continued on the other side, and blurred.
    pub fn kernel(&self, size: usize, blur: usize) -> Stamp {
        let half = size / 2;
        let mut values = vec![0.0; size * size];
        // The line moves by a pixel along its longer axis and by `slope` along the other.
        let [down, across] = self.end.map(|end| (end - half) as f64);
        let is_steep = across < down;
        let (length, slope) = match is_steep {
            true => (self.end[0] - half, across / down),
            false => (self.end[1] - half, down / across),
        };
        let reach = 1.0 + self.thickness * (1.0 + slope).sqrt() / 4.0;
        for along in 0..=length {
            for other in 0..size - half {
                let distance = (other as f64 - slope * along as f64).abs();
                let value = (reach - distance).clamp(0.0, 1.0);
                let [row, column] = match is_steep {
                    true => [along, other],
                    false => [other, along],
                };
                values[(half + row) * size + half + column] = value;
                values[(half - row) * size + half - column] = value;
            }
        }
        if self.is_mirrored {
            values.chunks_exact_mut(size).for_each(<[f64]>::reverse);
        }
        let blurred = blurred(&values, size, blur, self.sigma).into_iter();
        Stamp::new(size, blurred.map(|value| value as f32).collect())
    }
}

/// Blurs a square with a Gaussian of `blur` pixels, reflected at the border without repeating it.
fn blurred(values: &[f64], size: usize, blur: usize, sigma: f64) -> Vec<f64> {
    let half = (blur / 2) as i64;
    let weights: Vec<f64> = (-half..=half)
        .map(|at| (-0.5 * (at as f64 / sigma).powi(2)).exp())
        .collect();
    let sum: f64 = weights.iter().sum();
    let last = size as i64 - 1;
    let reflected = |at: i64| (last - (last - at.abs()).abs()) as usize;
    let along = |value: &dyn Fn(usize) -> f64, at: usize| {
        let terms = weights.iter().zip(-half..=half);
        terms
            .map(|(weight, by)| weight / sum * value(reflected(at as i64 + by)))
            .sum::<f64>()
    };
    let mut wide = vec![0.0; size * size];
    for row in 0..size {
        for column in 0..size {
            wide[row * size + column] = along(&|at| values[row * size + at], column);
        }
    }
    let mut both = vec![0.0; size * size];
    for row in 0..size {
        for column in 0..size {
            both[row * size + column] = along(&|at| wide[at * size + column], row);
        }
    }
    both
}

impl Renderer for Snow {
    fn count(&self) -> usize {
        self.points.len()
    }

    /// The reference projects the values of all points to the ball before it removes those without a flake, so that flakes
    /// start faint.
    fn start(&self, epsilon: f64, rng: &mut Rng) -> Vec<f32> {
        let mut next = self.points.iter().peekable();
        let (mut start, mut squares) = (Vec::with_capacity(self.points.len()), 0.0);
        for layer in 0..LAYERS {
            for row in 0..self.extent.height {
                for column in 0..self.extent.width {
                    let value = (-f64::from(rng.uniform()) / SPREAD).exp();
                    squares += value * value;
                    if next
                        .next_if(|point| **point == [layer, row, column])
                        .is_some()
                    {
                        start.push(value);
                    }
                }
            }
        }
        let scale = (epsilon / squares.sqrt()).min(1.0);
        start
            .into_iter()
            .map(|value| (value * scale) as f32)
            .collect()
    }

    fn paint(&self, clean: &[f32], parameters: &[f32]) -> Vec<f32> {
        let pixels = self.extent.pixels();
        let mut snow = vec![0.0; pixels];
        for ([layer, row, column], parameter) in self.points.iter().zip(parameters) {
            let weight = parameter.powi(4);
            self.flakes[*layer].add(&mut snow, self.extent, [*row, *column], weight);
        }
        let (red, others) = clean.split_at(pixels);
        let (green, blue) = others.split_at(pixels);
        let mut image = Vec::with_capacity(clean.len());
        for channel in [red, green, blue] {
            for (index, pixel) in channel.iter().enumerate() {
                let luma = 0.2126 * red[index] + 0.7152 * green[index] + 0.0722 * blue[index];
                let pale = pixel.max(1.5 * luma + 0.5);
                image.push((1.0 - PALENESS) * pixel + PALENESS * pale + snow[index]);
            }
        }
        image
    }

    fn pull_paint(&self, _: &[f32], parameters: &[f32], slopes: &[f32]) -> Vec<f32> {
        let pixels = self.extent.pixels();
        let of_snow: Vec<f32> = (0..pixels)
            .map(|index| slopes[index] + slopes[pixels + index] + slopes[2 * pixels + index])
            .collect();
        let points = self.points.iter().zip(parameters);
        points
            .map(|([layer, row, column], parameter)| {
                let flake = &self.flakes[*layer];
                let slope = flake.pull(&of_snow, self.extent, [*row, *column]);
                slope * 4.0 * parameter.powi(3)
            })
            .collect()
    }
}
