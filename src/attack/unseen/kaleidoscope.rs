//! Kaleidoscope: colored shapes with edges over the image.

use std::f64::consts::{FRAC_PI_2, FRAC_PI_3, TAU};

use super::renderer::{Extent, Renderer};
use crate::rng::Rng;

/// Smallest saturation and smallest value of a shape's color.
const SMALLEST: [f32; 2] = [0.7, 0.8];
/// Width of the square by which a shape is enlarged; what it gains is its edge.
const EDGE: usize = 5;

/// Number and size of the shapes, by data set.
#[derive(Clone, Copy, Debug)]
pub struct KaleidoscopeSizes {
    /// Number of shapes.
    pub shapes: usize,
    /// Side of a square in pixels; triangles and circles are sized accordingly.
    pub size: usize,
    /// Share of the image that shows through a shape.
    pub transparency: f32,
}

/// Covers parts of the image with circles, triangles and squares, and draws their edges in grey.
///
/// Parameters: `[shapes, 3]`, the change of each shape's color, then `[edge pixels]`, whose sizes are the grey of each.
/// Source: the authors' `kaleidoscope.py`. Colors of overlapping shapes add up, as there.
/// Differs from the reference: a pixel belongs to a triangle or square if its center does, and a shape that is too large
/// for the image is centered.
#[derive(Clone, Debug)]
pub struct Kaleidoscope {
    extent: Extent,
    shapes: Vec<Vec<usize>>,
    colors: Vec<[f32; 3]>,
    edges: Vec<usize>,
    is_edge: Vec<bool>,
    transparency: f32,
}

impl Kaleidoscope {
    /// Creates the corruption from the pixels of each shape, as indices in `[height, width]`, and its color.
    pub fn new(
        extent: Extent,
        shapes: Vec<Vec<usize>>,
        colors: Vec<[f32; 3]>,
        transparency: f32,
    ) -> Self {
        let Extent { height, width } = extent;
        let mut is_edge = vec![false; extent.pixels()];
        for shape in &shapes {
            let mut is_inside = vec![false; extent.pixels()];
            shape.iter().for_each(|pixel| is_inside[*pixel] = true);
            for pixel in shape {
                let (row, column) = (pixel / width, pixel % width);
                let around = |at: usize, end: usize| {
                    at.saturating_sub(EDGE / 2)..(at + EDGE / 2 + 1).min(end)
                };
                for y in around(row, height) {
                    for x in around(column, width) {
                        is_edge[y * width + x] |= !is_inside[y * width + x];
                    }
                }
            }
        }
        let edges = (0..extent.pixels()).filter(|pixel| is_edge[*pixel]);
        Self {
            extent,
            shapes,
            colors,
            edges: edges.collect(),
            is_edge,
            transparency,
        }
    }

    /// Draws the shapes and their colors.
    pub fn draw(extent: Extent, sizes: KaleidoscopeSizes, rng: &mut Rng) -> Self {
        let colors = (0..sizes.shapes).map(|_| {
            let hue = rng.uniform();
            let [saturation, value] = SMALLEST.map(|least| rng.between(least, 1.0));
            color(hue, saturation, value)
        });
        let colors = colors.collect();
        let shapes = (0..sizes.shapes).map(|_| shape(extent, sizes.size, rng));
        let shapes = shapes.collect();
        Self::new(extent, shapes, colors, sizes.transparency)
    }

    /// Returns the pixels of the edges, as indices in `[height, width]`, in the order of their parameters.
    pub fn edges(&self) -> &[usize] {
        &self.edges
    }
}

/// Converts from hue, saturation and value, each in [0, 1], to RGB.
pub fn color(hue: f32, saturation: f32, value: f32) -> [f32; 3] {
    // The distance of the hue from red, green and blue, which are a third of the circle apart.
    [5.0, 3.0, 1.0].map(|offset: f32| {
        let sector = (offset + 6.0 * hue) % 6.0;
        value - value * saturation * sector.min(4.0 - sector).clamp(0.0, 1.0)
    })
}

/// Draws a circle, an equilateral triangle or a square.
fn shape(extent: Extent, size: usize, rng: &mut Rng) -> Vec<usize> {
    let Extent { height, width } = extent;
    let kind = rng.below(3);
    if kind == 0 {
        let (x, y) = (rng.below(width) as f64, rng.below(height) as f64);
        let radius = size as f64 / 2.0;
        return pixels(extent, |column, row| {
            (column - x).powi(2) + (row - y).powi(2) < radius * radius
        });
    }
    let (side, turn) = match kind {
        1 => ((1.5 * size as f64 / FRAC_PI_3.sin()).floor(), FRAC_PI_3),
        _ => (size as f64, FRAC_PI_2),
    };
    // No corner is outside the image.
    let margin = side as usize + 1;
    let mut place = |length: usize| match length.saturating_sub(2 * margin) {
        0 => length as f64 / 2.0,
        free => (margin + rng.below(free)) as f64,
    };
    let (x, y) = (place(width), place(height));
    let angle = TAU * f64::from(rng.uniform());
    let corner = |angle: f64| (x + side * angle.cos(), y + side * angle.sin());
    let (first, last) = (corner(angle), corner(angle + turn));
    let corners = match kind {
        1 => vec![(x, y), first, last],
        _ => vec![
            (x, y),
            first,
            (first.0 + last.0 - x, first.1 + last.1 - y),
            last,
        ],
    };
    pixels(extent, |column, row| {
        let next = corners.iter().cycle().skip(1);
        corners.iter().zip(next).all(|(a, b)| {
            // On the inner side of each edge of a convex polygon.
            (b.0 - a.0) * (row - a.1) - (b.1 - a.1) * (column - a.0) >= 0.0
        })
    })
}

fn pixels(extent: Extent, is_inside: impl Fn(f64, f64) -> bool) -> Vec<usize> {
    let place = |index: &usize| ((index % extent.width) as f64, (index / extent.width) as f64);
    (0..extent.pixels())
        .filter(|index| {
            let (column, row) = place(index);
            is_inside(column, row)
        })
        .collect()
}

impl Renderer for Kaleidoscope {
    fn count(&self) -> usize {
        3 * self.shapes.len() + self.edges.len()
    }

    fn start(&self, epsilon: f64, rng: &mut Rng) -> Vec<f32> {
        let colors = 3 * self.shapes.len();
        let draw = |number| {
            let draw = f64::from(rng.uniform());
            let draw = if number < colors {
                2.0 * draw - 1.0
            } else {
                draw
            };
            (epsilon * draw) as f32
        };
        (0..self.count()).map(draw).collect()
    }

    fn paint(&self, clean: &[f32], parameters: &[f32]) -> Vec<f32> {
        let pixels = self.extent.pixels();
        let (changes, greys) = parameters.split_at(3 * self.shapes.len());
        let mut is_covered = vec![false; pixels];
        let covered = self.shapes.iter().flatten();
        covered.for_each(|pixel| is_covered[*pixel] = true);
        let mut image = clean.to_vec();
        for (channel, image) in image.chunks_exact_mut(pixels).enumerate() {
            for (pixel, is_covered) in image.iter_mut().zip(&is_covered) {
                *pixel *= if *is_covered { self.transparency } else { 1.0 };
            }
            for (number, (shape, color)) in self.shapes.iter().zip(&self.colors).enumerate() {
                let color = color[channel] + changes[3 * number + channel];
                shape.iter().for_each(|pixel| image[*pixel] += color);
            }
            for (pixel, grey) in self.edges.iter().zip(greys) {
                image[*pixel] = grey.abs();
            }
        }
        image
    }

    fn pull_paint(&self, _: &[f32], parameters: &[f32], slopes: &[f32]) -> Vec<f32> {
        let pixels = self.extent.pixels();
        let mut pulled = Vec::with_capacity(self.count());
        for shape in &self.shapes {
            for slopes in slopes.chunks_exact(pixels) {
                let shown = shape.iter().filter(|pixel| !self.is_edge[**pixel]);
                pulled.push(shown.map(|pixel| slopes[*pixel]).sum());
            }
        }
        let greys = self.edges.iter().zip(&parameters[3 * self.shapes.len()..]);
        pulled.extend(greys.map(|(pixel, grey)| {
            let sum: f32 = slopes
                .chunks_exact(pixels)
                .map(|slopes| slopes[*pixel])
                .sum();
            match *grey {
                0.0 => 0.0,
                grey => grey.signum() * sum,
            }
        }));
        pulled
    }
}
