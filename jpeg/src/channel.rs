//! One component of an image: the samples that a region needs, and their upsampling to the lines of the region.
//!
//! Source: libjpeg-turbo's `jdsample.c`, the default ("fancy") upsampling.

use std::ops::Range;

use advxl_kernels::jpeg::{
    Block, reduced_inverse_transform, upsample_across, upsample_both, upsample_down,
};

use super::header::{Component, Frame};
use super::region::Region;

/// A rectangle of blocks of a component.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    pub columns: Range<usize>,
    pub rows: Range<usize>,
}

/// How a component's samples become pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Upsampling {
    /// Repeats each sample, or copies it.
    Repeat,
    /// Interpolates linearly along lines.
    Across,
    /// Interpolates linearly along columns.
    Down,
    /// Interpolates linearly along both.
    Both,
}

/// A component being decoded.
pub(super) struct Channel {
    /// Samples per side of a block: 8, or fewer at a reduced scale.
    side: usize,
    /// Pixels covered by one sample, across and down.
    across: usize,
    down: usize,
    /// Samples of the whole image, without the padding of the last blocks.
    width: usize,
    height: usize,
    /// All blocks that contain these samples.
    pub all: Blocks,
    /// The blocks that the region needs.
    pub wanted: Blocks,
    upsampling: Upsampling,
    /// Samples of the wanted blocks, `[side * rows, stride]`.
    samples: Vec<u8>,
    stride: usize,
    /// Quantization steps, as of the start of the component's first scan.
    pub steps: Option<[u16; 64]>,
    /// Coefficients of all blocks, row by row. Progressive images only.
    coefficients: Vec<Block>,
    /// The lowest known bit of each coefficient, or `None` if the coefficient is unknown.
    pub known: [Option<u8>; 64],
}

impl Channel {
    /// Makes a channel for a region of the image at 1 / `reduction` of its scale.
    pub(super) fn new(
        frame: &Frame,
        component: &Component,
        region: &Region,
        reduction: usize,
    ) -> Self {
        let (most_across, most_down) = frame.most();
        let (mut across, mut down) = (most_across / component.across, most_down / component.down);
        // Samples at full size, without the padding of the last blocks.
        let (full_width, full_height) = (frame.width.div_ceil(across), frame.height.div_ceil(down));
        // A subsampled component is transformed to more samples per block instead of being upsampled.
        let mut side = 8 / reduction;
        while side < 8 && across.is_multiple_of(2) && down.is_multiple_of(2) {
            (side, across, down) = (2 * side, across / 2, down / 2);
        }
        let scaled =
            |pixels: usize, most: usize, own: usize| (pixels * own * side).div_ceil(most * 8);
        let width = scaled(frame.width, most_across, component.across);
        let height = scaled(frame.height, most_down, component.down);
        let upsampling = match (across, down) {
            // libjpeg-turbo also repeats samples at 1/8.
            _ if reduction == 8 => Upsampling::Repeat,
            // Narrow lines lack neighbors on both sides; libjpeg-turbo repeats their samples.
            (2, 1 | 2) if width <= 2 => Upsampling::Repeat,
            (2, 1) => Upsampling::Across,
            (1, 2) => Upsampling::Down,
            (2, 2) => Upsampling::Both,
            _ => Upsampling::Repeat,
        };
        // Interpolation needs one more sample on each side.
        let margin = |kinds: [Upsampling; 2]| usize::from(kinds.contains(&upsampling));
        let needed = |first: usize, count: usize, pixels: usize, samples: usize, more: usize| {
            let begin = (first / pixels).saturating_sub(more);
            let end = ((first + count - 1) / pixels + 1 + more).min(samples);
            begin / side..end.div_ceil(side)
        };
        let more_across = margin([Upsampling::Across, Upsampling::Both]);
        let more_down = margin([Upsampling::Down, Upsampling::Both]);
        let wanted = Blocks {
            columns: needed(region.left, region.width, across, width, more_across),
            rows: needed(region.top, region.height, down, height, more_down),
        };
        let stride = side * wanted.columns.len();
        let all = Blocks {
            columns: 0..full_width.div_ceil(8),
            rows: 0..full_height.div_ceil(8),
        };
        let kept = if frame.progressive {
            all.columns.len() * all.rows.len()
        } else {
            0
        };
        Self {
            side,
            across,
            down,
            width,
            height,
            upsampling,
            samples: vec![0; side * wanted.rows.len() * stride],
            stride,
            all,
            wanted,
            steps: None,
            coefficients: vec![[0; 64]; kept],
            known: [None; 64],
        }
    }

    /// Returns the coefficients of a block of a progressive image, or `None` for blocks that only pad an MCU.
    #[inline(always)]
    pub(super) fn block_mut(&mut self, (column, row): (usize, usize)) -> Option<&mut Block> {
        let columns = self.all.columns.len();
        let place = (column < columns).then_some(row * columns + column)?;
        self.coefficients.get_mut(place)
    }

    /// Transforms a row of blocks to samples. Rows that the region does not need are ignored.
    pub(super) fn fill_row(&mut self, row: usize, blocks: &[Block]) {
        let Some(steps) = &self.steps else { return };
        if self.wanted.rows.contains(&row) {
            let begin = (row - self.wanted.rows.start) * self.side * self.stride;
            let samples = &mut self.samples[begin..][..self.side * self.stride];
            reduced_inverse_transform(self.side, blocks, steps, samples, self.stride);
        }
    }

    /// Transforms the coefficients of all scans to samples.
    pub(super) fn fill_from_coefficients(&mut self) {
        let coefficients = std::mem::take(&mut self.coefficients);
        let all = self.all.columns.len();
        for row in self.wanted.rows.clone() {
            self.fill_row(row, &coefficients[row * all..][self.wanted.columns.clone()]);
        }
    }

    /// Returns line `row` of the samples, starting at a column. Rows past the image repeat the last one.
    fn line(&self, row: usize, column: usize) -> &[u8] {
        let row = row.min(self.height - 1) - self.side * self.wanted.rows.start;
        let first = self.side * self.wanted.columns.start;
        &self.samples[row * self.stride..][..self.stride][column - first..]
    }

    /// Returns the pixels of a line of the region.
    ///
    /// Shapes: the result is `[region.width]`, borrowed from `work` or from the samples.
    pub(super) fn pixels<'a>(&'a self, y: usize, region: &Region, work: &'a mut Work) -> &'a [u8] {
        let row = y / self.down;
        let first = region.left / self.across;
        let count = (region.left + region.width - 1) / self.across + 1 - first;
        let near = self.line(row, first);
        // The adjacent line of samples, on the other side of this line of pixels.
        let above = y.is_multiple_of(2);
        let adjacent = if above {
            row.saturating_sub(1)
        } else {
            row + 1
        };
        let begin = region.left % self.across;
        match self.upsampling {
            Upsampling::Repeat if self.across == 1 => return &near[..count],
            Upsampling::Down => {
                let far = self.line(adjacent, first);
                work.pixels.resize(count, 0);
                upsample_down(&near[..count], &far[..count], above, &mut work.pixels);
            }
            Upsampling::Repeat => {
                work.pixels.clear();
                for sample in &near[..count] {
                    work.pixels
                        .extend(std::iter::repeat_n(*sample, self.across));
                }
            }
            Upsampling::Across => {
                self.with_neighbors(row, first, count, &mut work.near);
                work.pixels.resize(2 * count, 0);
                upsample_across(&work.near, &mut work.pixels);
            }
            Upsampling::Both => {
                self.with_neighbors(row, first, count, &mut work.near);
                self.with_neighbors(adjacent, first, count, &mut work.far);
                work.pixels.resize(2 * count, 0);
                upsample_both(&work.near, &work.far, &mut work.pixels);
            }
        }
        &work.pixels[begin..][..region.width]
    }

    /// Copies samples of a line and one more on each side. At the image's edges the last sample is repeated.
    fn with_neighbors(&self, row: usize, first: usize, count: usize, to: &mut Vec<u8>) {
        let begin = first.saturating_sub(1);
        let end = (first + count + 1).min(self.width);
        let line = &self.line(row, begin)[..end - begin];
        to.clear();
        if first == 0 {
            to.push(line[0]);
        }
        to.extend_from_slice(line);
        if first + count == self.width {
            to.push(line[line.len() - 1]);
        }
    }
}

/// Scratch lines for upsampling a component.
#[derive(Default)]
pub(super) struct Work {
    near: Vec<u8>,
    far: Vec<u8>,
    pixels: Vec<u8>,
}
