//! One component of a picture: which of its samples a region needs, and the lines of the region made of them.
//!
//! Source: libjpeg-turbo's `jdsample.c`, whose default ("fancy") upsampling this is.

use std::ops::Range;

use advxl_kernels::jpeg::{
    Block, reduced_inverse_transform, upsample_across, upsample_both, upsample_down,
};

use super::header::{Component, Frame};
use super::region::Region;

/// Blocks of a component.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    pub columns: Range<usize>,
    pub rows: Range<usize>,
}

/// How a component's samples become pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Upsampling {
    /// Each sample several times, or once.
    Repeat,
    /// Linear along lines.
    Across,
    /// Linear along columns.
    Down,
    /// Linear along both.
    Both,
}

/// A component while it is decoded.
pub(super) struct Channel {
    /// Samples on a side of a block: 8, fewer at a reduced scale.
    side: usize,
    /// Pixels that one sample stands for.
    across: usize,
    down: usize,
    /// Samples of the whole picture, without what fills the last blocks.
    width: usize,
    height: usize,
    /// All blocks that hold these.
    pub all: Blocks,
    /// The blocks that the region needs.
    pub wanted: Blocks,
    upsampling: Upsampling,
    /// Samples of the wanted blocks, `[side * rows, stride]`.
    samples: Vec<u8>,
    stride: usize,
    /// Steps of quantisation, as they were when the component's first scan began.
    pub steps: Option<[u16; 64]>,
    /// Of a progressive picture the coefficients of all blocks, row after row.
    coefficients: Vec<Block>,
    /// To which bit each coefficient is known, none if not at all.
    pub known: [Option<u8>; 64],
}

impl Channel {
    /// For a region of the picture at the scale of 1 / `reduction`.
    pub(super) fn new(
        frame: &Frame,
        component: &Component,
        region: &Region,
        reduction: usize,
    ) -> Self {
        let (most_across, most_down) = frame.most();
        let (mut across, mut down) = (most_across / component.across, most_down / component.down);
        // Samples of full size: those of the last blocks that lie in the picture.
        let (full_width, full_height) = (frame.width.div_ceil(across), frame.height.div_ceil(down));
        // A component of few samples is transformed to more of them rather than upsampled.
        let mut side = 8 / reduction;
        while side < 8 && across.is_multiple_of(2) && down.is_multiple_of(2) {
            (side, across, down) = (2 * side, across / 2, down / 2);
        }
        let scaled =
            |pixels: usize, most: usize, own: usize| (pixels * own * side).div_ceil(most * 8);
        let width = scaled(frame.width, most_across, component.across);
        let height = scaled(frame.height, most_down, component.down);
        let upsampling = match (across, down) {
            // At an eighth libjpeg-turbo repeats, too.
            _ if reduction == 8 => Upsampling::Repeat,
            // Too narrow lines have no neighbours on both sides, and libjpeg-turbo repeats them.
            (2, 1 | 2) if width <= 2 => Upsampling::Repeat,
            (2, 1) => Upsampling::Across,
            (1, 2) => Upsampling::Down,
            (2, 2) => Upsampling::Both,
            _ => Upsampling::Repeat,
        };
        // Where values come from between samples, one more on each side.
        let beside = |kinds: [Upsampling; 2]| usize::from(kinds.contains(&upsampling));
        let needed = |first: usize, count: usize, pixels: usize, samples: usize, more: usize| {
            let begin = (first / pixels).saturating_sub(more);
            let end = ((first + count - 1) / pixels + 1 + more).min(samples);
            begin / side..end.div_ceil(side)
        };
        let more_across = beside([Upsampling::Across, Upsampling::Both]);
        let more_down = beside([Upsampling::Down, Upsampling::Both]);
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

    /// The coefficients of a block of a progressive picture; none of those that only fill an MCU.
    #[inline(always)]
    pub(super) fn block_mut(&mut self, (column, row): (usize, usize)) -> Option<&mut Block> {
        let columns = self.all.columns.len();
        let place = (column < columns).then_some(row * columns + column)?;
        self.coefficients.get_mut(place)
    }

    /// Makes samples of a row of wanted blocks; rows that are not wanted are left out.
    pub(super) fn fill_row(&mut self, row: usize, blocks: &[Block]) {
        let Some(steps) = &self.steps else { return };
        if self.wanted.rows.contains(&row) {
            let begin = (row - self.wanted.rows.start) * self.side * self.stride;
            let samples = &mut self.samples[begin..][..self.side * self.stride];
            reduced_inverse_transform(self.side, blocks, steps, samples, self.stride);
        }
    }

    /// Makes samples of the coefficients that all scans together have brought.
    pub(super) fn fill_from_coefficients(&mut self) {
        let coefficients = std::mem::take(&mut self.coefficients);
        let all = self.all.columns.len();
        for row in self.wanted.rows.clone() {
            self.fill_row(row, &coefficients[row * all..][self.wanted.columns.clone()]);
        }
    }

    /// A line of samples, `row` from above, from a column on; rows beyond the picture are those at its edge.
    fn line(&self, row: usize, column: usize) -> &[u8] {
        let row = row.min(self.height - 1) - self.side * self.wanted.rows.start;
        let first = self.side * self.wanted.columns.start;
        &self.samples[row * self.stride..][..self.stride][column - first..]
    }

    /// The pixels of a line of the region.
    ///
    /// Shapes: the result is `[region.width]`, in `work` or where the samples lie.
    pub(super) fn pixels<'a>(&'a self, y: usize, region: &Region, work: &'a mut Work) -> &'a [u8] {
        let row = y / self.down;
        let first = region.left / self.across;
        let count = (region.left + region.width - 1) / self.across + 1 - first;
        let near = self.line(row, first);
        // The line of samples on the other side of this line of pixels.
        let above = y.is_multiple_of(2);
        let beside = if above {
            row.saturating_sub(1)
        } else {
            row + 1
        };
        let begin = region.left % self.across;
        match self.upsampling {
            Upsampling::Repeat if self.across == 1 => return &near[..count],
            Upsampling::Down => {
                let far = self.line(beside, first);
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
                self.with_neighbours(row, first, count, &mut work.near);
                work.pixels.resize(2 * count, 0);
                upsample_across(&work.near, &mut work.pixels);
            }
            Upsampling::Both => {
                self.with_neighbours(row, first, count, &mut work.near);
                self.with_neighbours(beside, first, count, &mut work.far);
                work.pixels.resize(2 * count, 0);
                upsample_both(&work.near, &work.far, &mut work.pixels);
            }
        }
        &work.pixels[begin..][..region.width]
    }

    /// Samples of a line with one more on each side; at the picture's edges the last again.
    fn with_neighbours(&self, row: usize, first: usize, count: usize, to: &mut Vec<u8>) {
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

/// Lines that a component's pixels are made in.
#[derive(Default)]
pub(super) struct Work {
    near: Vec<u8>,
    far: Vec<u8>,
    pixels: Vec<u8>,
}
