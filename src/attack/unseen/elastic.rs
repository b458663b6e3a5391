//! Elastic deformation: the image is read at positions that a smooth flow displaces.

use super::renderer::{Extent, Renderer};
use super::sample::{Reading, Taps, enlarge, pull_enlarge, read};
use crate::rng::Rng;

/// Enlarges a coarse flow to the image bicubically and reads the image at the displaced positions bilinearly.
///
/// Parameters: `[2, rows, columns]`, displacement along x and y; the image is 2 wide and high.
/// Source: the authors' `elastic.py`. As there, undisplaced positions span the image from edge to edge (not from the
/// center of the first pixel to that of the last), and the image is zero outside.
#[derive(Clone, Debug)]
pub struct Elastic {
    extent: Extent,
    rows: Taps,
    columns: Taps,
    count: usize,
}

impl Elastic {
    /// Creates a deformation whose flow has a value for every `factor` pixels, at least one.
    pub fn new(extent: Extent, factor: usize) -> Self {
        let [rows, columns] =
            [extent.height, extent.width].map(|length| (length / factor.max(1)).max(1));
        Self {
            extent,
            rows: Taps::bicubic(rows, extent.height),
            columns: Taps::bicubic(columns, extent.width),
            count: rows * columns,
        }
    }

    /// Returns the readings of all channels, `[3, height, width]`.
    fn readings(&self, clean: &[f32], parameters: &[f32]) -> Vec<Reading> {
        let Extent { height, width } = self.extent;
        let (along_x, along_y) = parameters.split_at(self.count);
        let [along_x, along_y] =
            [along_x, along_y].map(|flow| enlarge(flow, &self.rows, &self.columns));
        let position = |index: usize, length: usize, flow: f64| {
            let at = match length {
                1 => -1.0,
                _ => 2.0 * index as f64 / (length - 1) as f64 - 1.0,
            };
            ((at + flow + 1.0) * length as f64 - 1.0) / 2.0
        };
        let mut readings = Vec::with_capacity(clean.len());
        for channel in clean.chunks_exact(self.extent.pixels()) {
            for y in 0..height {
                for x in 0..width {
                    let index = y * width + x;
                    let (x, y) = (
                        position(x, width, along_x[index]),
                        position(y, height, along_y[index]),
                    );
                    readings.push(read(channel, self.extent, x, y));
                }
            }
        }
        readings
    }
}

impl Renderer for Elastic {
    fn count(&self) -> usize {
        2 * self.count
    }

    fn start(&self, _: f64, rng: &mut Rng) -> Vec<f32> {
        (0..self.count()).map(|_| rng.between(-1.0, 1.0)).collect()
    }

    fn paint(&self, clean: &[f32], parameters: &[f32]) -> Vec<f32> {
        let readings = self.readings(clean, parameters).into_iter();
        readings.map(|reading| reading.value as f32).collect()
    }

    fn pull_paint(&self, clean: &[f32], parameters: &[f32], slopes: &[f32]) -> Vec<f32> {
        let pixels = self.extent.pixels();
        let mut flows = [vec![0.0; pixels], vec![0.0; pixels]];
        let readings = self.readings(clean, parameters);
        for (index, (reading, slope)) in readings.iter().zip(slopes).enumerate() {
            let slope = f64::from(*slope);
            flows[0][index % pixels] += slope * reading.along_x * self.extent.width as f64 / 2.0;
            flows[1][index % pixels] += slope * reading.along_y * self.extent.height as f64 / 2.0;
        }
        let pulled = flows.iter();
        pulled
            .flat_map(|flow| pull_enlarge(flow, &self.rows, &self.columns))
            .collect()
    }
}
