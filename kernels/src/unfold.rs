//! Channels-last images to rows of what a kernel sees, so that a dense convolution is a product; and the gradient's
//! way back.
//!
//! A line of the kernel is one run of memory in the image as in the row, cut where it leaves the image, so the way
//! there copies runs. The way back gathers: a line of the image adds the runs that saw it, in the order of the
//! kernel's lines and then from left to right.

use rayon::prelude::*;

use crate::detect::Isa;
use crate::lanes::{LANES, Lanes, Op};

/// Images, and the kernel whose view of them is written out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unfold {
    /// Images.
    pub batch: usize,
    /// Lines of an image.
    pub height: usize,
    /// Pixels of a line.
    pub width: usize,
    /// Elements of a pixel.
    pub channels: usize,
    /// Pixels on a side of the kernel.
    pub kernel: usize,
    /// Pixels from one place of the kernel to the next.
    pub stride: usize,
    /// Zeros on each side of the image.
    pub padding: usize,
}

impl Unfold {
    /// Places of the kernel down and along the image, as PyTorch counts them: `(size + 2 padding - kernel) / stride +
    /// 1`, none if the kernel is larger than the padded image.
    pub fn output(&self) -> [usize; 2] {
        let places = |size: usize| match (size + 2 * self.padding).checked_sub(self.kernel) {
            Some(room) => room / self.stride + 1,
            None => 0,
        };
        [places(self.height), places(self.width)]
    }

    /// Elements of a row: what one place of the kernel sees.
    pub fn row(&self) -> usize {
        self.kernel * self.kernel * self.channels
    }

    /// Writes a row for every place of the kernel: its lines, their pixels, their channels.
    ///
    /// Shapes: `x` `[batch, height * width, channels]`, `rows` `[batch, places, kernel * kernel * channels]`, places
    /// line by line. With a weight `[out, kernel, kernel, channels]` the convolution is `rows W^T`.
    ///
    /// # Panics
    ///
    /// If a slice has a length that does not match the sizes, or kernel or stride are 0.
    pub fn unfold(&self, x: &[f32], rows: &mut [f32]) {
        self.check(x.len(), rows.len());
        let ([down, along], row) = (self.output(), self.row());
        rows.par_chunks_mut((along * row).max(1)).enumerate().for_each(|(index, rows)| {
            let image = &x[index / down * self.image()..][..self.image()];
            for (place, to) in rows.chunks_exact_mut(row).enumerate() {
                for (tap, to) in to.chunks_exact_mut(self.kernel * self.channels).enumerate() {
                    let seen = self.line(index % down, tap).zip(self.run(place));
                    let Some((line, (at, start, count))) = seen else {
                        to.fill(0.0);
                        continue;
                    };
                    to[..start].fill(0.0);
                    to[start..start + count].copy_from_slice(&image[line * self.width * self.channels + at..][..count]);
                    to[start + count..].fill(0.0);
                }
            }
        });
    }

    /// The gradient of the images from that of the rows: of every element the sum over all places that saw it.
    ///
    /// # Panics
    ///
    /// If a slice has a length that does not match the sizes, or kernel or stride are 0.
    pub fn gradient(&self, rows: &[f32], x: &mut [f32]) {
        self.check(x.len(), rows.len());
        let isa = Isa::current();
        x.par_chunks_mut((self.width * self.channels).max(1)).enumerate().for_each(|(index, to)| {
            isa.run(Gather { sizes: *self, rows, index, to });
        });
    }

    /// The line of the image that a line of the kernel meets at a place, if it meets any.
    fn line(&self, place: usize, tap: usize) -> Option<usize> {
        (place * self.stride + tap).checked_sub(self.padding).filter(|line| *line < self.height)
    }

    /// What the kernel's lines meet of the image's at a place along it: where that begins in the image's line and in
    /// the kernel's, and how many elements it is.
    #[inline(always)]
    fn run(&self, place: usize) -> Option<(usize, usize, usize)> {
        let origin = place * self.stride;
        let first = self.padding.saturating_sub(origin);
        let end = self.kernel.min((self.width + self.padding).saturating_sub(origin));
        let at = (origin + first).saturating_sub(self.padding);
        (first < end).then(|| (at * self.channels, first * self.channels, (end - first) * self.channels))
    }

    fn image(&self) -> usize {
        self.height * self.width * self.channels
    }

    fn check(&self, x: usize, rows: usize) {
        assert!(self.kernel > 0 && self.stride > 0, "{self:?} has no kernel or no stride");
        let [down, along] = self.output();
        let right = (self.batch * self.image(), self.batch * down * along * self.row());
        assert!((x, rows) == right, "images and rows have {:?} elements, {self:?} needs {right:?}", (x, rows));
    }
}

/// A line of the images' gradient.
struct Gather<'a> {
    sizes: Unfold,
    rows: &'a [f32],
    /// The line, counted through all images.
    index: usize,
    to: &'a mut [f32],
}

impl Op for Gather<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self { sizes, rows, index, to } = self;
        let Unfold { height, channels, kernel, stride, padding, .. } = sizes;
        let ([down, along], row) = (sizes.output(), sizes.row());
        let (image, line) = (index / height, index % height + padding);
        to.fill(0.0);
        for tap in 0..kernel {
            // The place down the image from which this line of the kernel meets the line.
            let Some(place) = line.checked_sub(tap).filter(|room| room.is_multiple_of(stride)) else { continue };
            let place = place / stride;
            if place >= down {
                continue;
            }
            let rows = &rows[(image * down + place) * along * row..][..along * row];
            for (place, from) in rows.chunks_exact(row).enumerate() {
                let Some((at, start, count)) = sizes.run(place) else { continue };
                let from = &from[tap * kernel * channels + start..][..count];
                for (to, from) in to[at..at + count].chunks_mut(LANES).zip(from.chunks(LANES)) {
                    let sum = s.add(s.load_part(to), s.load_part(from));
                    s.store_part(to, sum);
                }
            }
        }
    }
}
