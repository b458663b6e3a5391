//! Depthwise convolution of channels-last images: one square kernel a channel, stride 1, same size.
//!
//! ```text
//!     one line of the input, sixteen channels of each pixel
//!     ... v v v v v v v v v v v v v v ...      each vector is loaded once for a line of the kernel
//!           \ \ \|/ / /                        and meets its seven weights, each for another sum
//!     ...       s s s s s s s s       ...      eight sums in registers: columns of the output
//! ```
//!
//! Work is cut into bands of lines and goes through a band sixteen channels at a time. Those are copied first, with the
//! lines that the kernel reads around the band and zeros at both ends of each: the copy stays in the first-level cache
//! while every line of the kernel reads it again, and the inner loop knows neither ends nor ragged channels nor
//! strides.
//!
//! The gradient of the input is the convolution with the kernel turned around. The gradients of the weights hold one
//! line of the kernel in registers, seven sums; bands are summed in their order.
//!
//! Every sum runs over the lines of the kernel and along them in order, so its bits depend on the band, the other
//! samples and the threads as little as in products.

use std::ops::Range;

use rayon::prelude::*;

use crate::buffer::{Buffer, Floats, as_f32, as_f32_mut};
use crate::cells::padded;
use crate::detect::Isa;
use crate::lanes::{LANES, Lanes, Op, chunk, chunk_mut};

/// Sizes of a depthwise convolution and of the batch that goes through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DepthwiseShape {
    /// Images.
    pub batch: usize,
    /// Lines of an image.
    pub height: usize,
    /// Pixels of a line.
    pub width: usize,
    /// Elements of a pixel.
    pub channels: usize,
    /// Pixels on a side of the kernel: odd. Half of it, rounded down, is the padding.
    pub kernel: usize,
}

impl DepthwiseShape {
    /// Elements of the input, `[batch, height * width, channels]`.
    pub fn elements(&self) -> usize {
        self.batch * self.line() * self.height
    }

    /// Useful work of a forward pass; the gradients of input and weights are as much again each.
    pub fn flops(&self) -> f64 {
        2.0 * self.elements() as f64 * (self.kernel * self.kernel) as f64
    }

    fn line(&self) -> usize {
        self.width * self.channels
    }

    fn check(&self, slices: &[(&str, usize)]) {
        for (name, found) in slices {
            let right = self.elements();
            assert!(*found == right, "`{name}` has {found} elements, {self:?} needs {right}");
        }
    }

    /// Lines of a task, of all images in one row: about `rows` pixels.
    pub(crate) fn band(&self, rows: usize) -> usize {
        let bands = (self.batch * self.height * self.width).div_ceil(rows).next_multiple_of(4);
        (self.batch * self.height).div_ceil(bands.max(1)).max(1)
    }
}

/// Pixels of a task.
const PIXELS: usize = 784;

/// Weights of a line of the kernel that are in registers together; longer lines are read in parts.
const TAPS: usize = 7;

/// The weights of a depthwise convolution, packed once for both directions.
///
/// It keeps the [`Path`](crate::Path) of the thread that made it.
#[derive(Debug)]
pub struct PackedDepthwise {
    isa: Isa,
    channels: usize,
    kernel: usize,
    /// `[vectors of channels, lines of the kernel, padded pixels, 16]`.
    forward: Floats,
    /// The same of the kernels turned around.
    backward: Floats,
    /// Padded.
    bias: Vec<f32>,
}

impl PackedDepthwise {
    /// Packs kernels as torch keeps them, `[channels, 1, kernel, kernel]`, and a bias `[channels]`.
    ///
    /// # Panics
    ///
    /// If the kernel's size is even or the weight has not the length that bias and kernel say.
    pub fn new(weight: &[f32], bias: &[f32], kernel: usize) -> Self {
        let (channels, taps) = (bias.len(), kernel * kernel);
        assert!(kernel % 2 == 1, "kernel = {kernel} must be odd");
        let right = channels * taps;
        assert!(weight.len() == right, "`weight` has {} elements, {channels} channels need {right}", weight.len());
        let line = kernel.next_multiple_of(TAPS);
        let size = padded(channels) * kernel * line;
        let (mut forward, mut backward) = (Floats::new(size), Floats::new(size));
        forward.fill(0.0);
        backward.fill(0.0);
        for (channel, from) in weight.chunks_exact(taps).enumerate() {
            for (tap, &value) in from.iter().enumerate() {
                for (to, tap) in [(&mut forward, tap), (&mut backward, taps - 1 - tap)] {
                    let at = (channel / LANES * kernel + tap / kernel) * line + tap % kernel;
                    to[at * LANES + channel % LANES] = value;
                }
            }
        }
        let mut padded_bias = vec![0.0; padded(channels)];
        padded_bias[..channels].copy_from_slice(bias);
        Self { isa: Isa::current(), channels, kernel, forward, backward, bias: padded_bias }
    }

    pub(crate) fn check(&self, shape: &DepthwiseShape) {
        let (found, packed) = ((shape.channels, shape.kernel), (self.channels, self.kernel));
        assert!(found == packed, "shape has (channels, kernel) = {found:?}, the packed weights {packed:?}");
    }

    /// The convolution of some lines, from `start` on.
    pub(crate) fn lines<'a>(
        &'a self,
        shape: DepthwiseShape,
        start: usize,
        x: &'a [f32],
        y: &'a mut [f32],
    ) -> impl Op<Output = ()> {
        Band { shape, start, x, weights: &self.forward, begin: Begin::Bias(&self.bias), y }
    }
}

/// `y = convolution(x) + bias`.
///
/// Shapes: `x` and `y` `[batch, height * width, channels]`.
///
/// # Panics
///
/// If a slice has a length that does not match `shape`, or `weights` are of another shape.
pub fn depthwise(shape: DepthwiseShape, weights: &PackedDepthwise, x: &[f32], y: &mut [f32]) {
    weights.check(&shape);
    shape.check(&[("x", x.len()), ("y", y.len())]);
    let band = shape.band(PIXELS);
    y.par_chunks_mut((band * shape.line()).max(1)).enumerate().with_max_len(1).for_each(|(index, y)| {
        weights.isa.run(weights.lines(shape, index * band, x, y));
    });
}

/// `dx = residual + the gradient of the input`, from `dy`, the gradient of the output; the residual is 0 if absent.
///
/// # Panics
///
/// If a slice has a length that does not match `shape`, or `weights` are of another shape.
pub fn depthwise_input_gradient(
    shape: DepthwiseShape,
    weights: &PackedDepthwise,
    dy: &[f32],
    residual: Option<&[f32]>,
    dx: &mut [f32],
) {
    weights.check(&shape);
    shape.check(&[("dy", dy.len()), ("dx", dx.len()), ("residual", residual.map_or(dx.len(), <[f32]>::len))]);
    let band = shape.band(PIXELS);
    let size = (band * shape.line()).max(1);
    dx.par_chunks_mut(size).enumerate().with_max_len(1).for_each(|(index, dx)| {
        let begin = residual.map_or(Begin::Zero, |values| Begin::Values(&values[index * size..][..dx.len()]));
        weights.isa.run(Band { shape, start: index * band, x: dy, weights: &weights.backward, begin, y: dx });
    });
}

/// Gradients of weight and bias (set, not added), in torch's layout.
///
/// # Panics
///
/// If a slice has a length that does not match `shape`.
pub fn depthwise_weight_gradient(
    shape: DepthwiseShape,
    x: &[f32],
    dy: &[f32],
    to_weight: &mut [f32],
    to_bias: &mut [f32],
) {
    weight_gradient(Isa::current(), shape, x, dy, to_weight, to_bias);
}

pub(crate) fn weight_gradient(
    isa: Isa,
    shape: DepthwiseShape,
    x: &[f32],
    dy: &[f32],
    to_weight: &mut [f32],
    to_bias: &mut [f32],
) {
    let DepthwiseShape { channels, kernel, .. } = shape;
    shape.check(&[("x", x.len()), ("dy", dy.len())]);
    let (found, right) = ((to_weight.len(), to_bias.len()), (channels * kernel * kernel, channels));
    assert!(found == right, "weight and bias gradients have {found:?} elements, {shape:?} needs {right:?}");
    let band = shape.band(PIXELS);
    let bands = dy.par_chunks((band * shape.line()).max(1)).enumerate().with_max_len(1);
    let sums: Vec<Buffer> =
        bands.map(|(index, dy)| isa.run(WeightBand { shape, start: index * band, x, dy })).collect();
    let line = kernel.next_multiple_of(TAPS);
    // As many sums as the bands have, and one more for the bias.
    let size = (kernel * line + 1) * LANES;
    let (taps, wide) = (kernel * kernel, LANES * kernel * kernel);
    let vectors = to_weight.par_chunks_mut(wide).zip(to_bias.par_chunks_mut(LANES)).enumerate();
    vectors.for_each(|(vector, (to_weight, to_bias))| {
        let mut total = vec![0.0; size];
        for sums in &sums {
            total.iter_mut().zip(&as_f32(sums)[vector * size..]).for_each(|(total, value)| *total += value);
        }
        for (lane, (to_weight, to_bias)) in to_weight.chunks_exact_mut(taps).zip(to_bias).enumerate() {
            for (tap, to) in to_weight.iter_mut().enumerate() {
                *to = total[(tap / kernel * line + tap % kernel) * LANES + lane];
            }
            *to_bias = total[kernel * line * LANES + lane];
        }
    });
}

/// What sums begin with.
#[derive(Clone, Copy)]
enum Begin<'a> {
    Zero,
    /// A number for each channel, padded.
    Bias(&'a [f32]),
    /// As the output lies.
    Values(&'a [f32]),
}

/// Lines of the output.
struct Band<'a> {
    shape: DepthwiseShape,
    /// The first line, counted through all images.
    start: usize,
    /// The whole input.
    x: &'a [f32],
    weights: &'a [f32],
    begin: Begin<'a>,
    /// The lines of the output.
    y: &'a mut [f32],
}

impl Op for Band<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self { shape, start, x, weights, begin, y } = self;
        let kernel = shape.kernel;
        let lines = y.len() / shape.line();
        let size = kernel * kernel.next_multiple_of(TAPS) * LANES;
        let mut view = View::new(shape, start, lines);
        for channel in (0..shape.channels).step_by(LANES) {
            view.copy(s, x, channel);
            let weights = &weights[channel / LANES * size..][..size];
            for part in 0..kernel.div_ceil(TAPS) {
                // Sums that do not fit one part of the kernel's lines wait where the output lies.
                let begin = (part == 0).then_some(begin);
                for (column, count) in tiles::<S>(shape.width, 6) {
                    let job = Job { view: &view, part, column };
                    tile(s, count, Convolve { job, weights, begin, channel, y: &mut *y });
                }
            }
        }
    }
}

/// What some lines of an image's gradient give the weights: sums as [`PackedDepthwise`] has weights, and for each
/// vector of channels one more for the bias.
struct WeightBand<'a> {
    shape: DepthwiseShape,
    start: usize,
    x: &'a [f32],
    /// The lines of the output's gradient.
    dy: &'a [f32],
}

impl Op for WeightBand<'_> {
    type Output = Buffer;

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) -> Buffer {
        let Self { shape, start, x, dy } = self;
        let kernel = shape.kernel;
        let lines = dy.len() / shape.line();
        let size = (kernel * kernel.next_multiple_of(TAPS) + 1) * LANES;
        let mut sums = Buffer::new(padded(shape.channels) / LANES * size);
        as_f32_mut(&mut sums).fill(0.0);
        let mut view = View::new(shape, start, lines);
        // Its lines are the band's alone, without anything around them.
        let mut gradient = View::new(DepthwiseShape { batch: 1, height: lines, kernel: 1, ..shape }, 0, lines);
        for (vector, sums) in as_f32_mut(&mut sums).chunks_exact_mut(size).enumerate() {
            view.copy(s, x, vector * LANES);
            gradient.copy(s, dy, vector * LANES);
            let (sums, bias) = sums.split_at_mut(size - LANES);
            let mut sum = s.splat(0.0);
            for line in 0..lines {
                for pixel in &gradient.line(line)[..shape.width] {
                    sum = s.add(sum, s.load(pixel));
                }
            }
            s.store(chunk_mut(bias, 0), sum);
            for part in 0..kernel.div_ceil(TAPS) {
                for (column, count) in tiles::<S>(shape.width, 3) {
                    let job = Job { view: &view, part, column };
                    tile(s, count, Correlate { job, dy: &gradient, sums: &mut *sums });
                }
            }
        }
        sums
    }
}

/// Sixteen channels of some lines and of those that the kernel reads around them, copied: each line begins and ends
/// with as many zeros as the kernel reaches over.
struct View {
    shape: DepthwiseShape,
    pixels: Buffer,
    /// Vectors of a line, zeros included.
    length: usize,
    /// The lines that are there.
    there: Range<usize>,
    /// The lines that are asked for.
    lines: Range<usize>,
}

impl View {
    fn new(shape: DepthwiseShape, start: usize, count: usize) -> Self {
        let reach = shape.kernel / 2;
        let there = start.saturating_sub(reach)..(start + count + reach).min(shape.batch * shape.height);
        let length = shape.width + shape.kernel.next_multiple_of(TAPS) - 1;
        let mut pixels = Buffer::new(there.len() * length * LANES);
        pixels.fill(0);
        Self { shape, pixels, length, there, lines: start..start + count }
    }

    /// Takes these channels in the place of those before.
    #[inline(always)]
    fn copy<S: Lanes>(&mut self, s: S, from: &[f32], channel: usize) {
        let Self { shape, length, there, .. } = self;
        let from = &from[there.start * shape.line()..there.end * shape.line()];
        let end = shape.channels.min(channel + LANES);
        let lines = as_f32_mut(&mut self.pixels).chunks_exact_mut(*length * LANES);
        for (from, to) in from.chunks_exact(shape.line()).zip(lines) {
            let to = &mut to.as_chunks_mut().0[shape.kernel / 2..];
            for (from, to) in from.chunks_exact(shape.channels).zip(to) {
                s.store(to, s.load_part(&from[channel..end]));
            }
        }
    }

    /// A line counted through all images.
    #[inline(always)]
    fn line(&self, line: usize) -> &[[f32; LANES]] {
        &as_f32(&self.pixels).as_chunks().0[(line - self.there.start) * self.length..][..self.length]
    }

    /// Lines of the kernel that meet lines of the image, for a line of the output.
    #[inline(always)]
    fn taps(&self, line: usize) -> Range<usize> {
        let DepthwiseShape { height, kernel, .. } = self.shape;
        let (y, half) = (line % height, kernel / 2);
        half.saturating_sub(y)..kernel.min(height - y + half)
    }
}

/// Most columns of a tile on any path.
const MOST: usize = 8;

/// Whether eight sums, seven weights and an input stay in registers together. If not, weights come one by one and meet
/// six sums, and inputs are read again for each; every sum is added up in the same order.
#[inline(always)]
fn many_registers<S: Lanes>() -> bool {
    S::TILE_ROWS == 12
}

/// Columns divided evenly into tiles of at most as many as the registers hold, `few` where those are few: where each
/// begins, and how many it has.
#[inline(always)]
fn tiles<S: Lanes>(width: usize, few: usize) -> impl Iterator<Item = (usize, usize)> {
    let most = if many_registers::<S>() { MOST } else { few };
    let count = width.div_ceil(most);
    (0..count).map(move |number| {
        let [start, end] = [number, number + 1].map(|number| width * number / count);
        (start, end - start)
    })
}

/// Some columns of the lines of a view.
struct Job<'a> {
    view: &'a View,
    /// Which seven weights of a line of the kernel.
    part: usize,
    column: usize,
}

/// What is done with a tile of `N` columns.
trait TileOp {
    fn run<S: Lanes, const N: usize>(self, s: S);
}

struct Columns<T, const N: usize>(T);

impl<T: TileOp, const N: usize> Op for Columns<T, N> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        self.0.run::<S, N>(s);
    }
}

/// Runs each number of columns in a function of its own, so that sums stay in registers.
#[inline(always)]
fn tile<S: Lanes>(s: S, columns: usize, op: impl TileOp) {
    macro_rules! by_columns {
        ($($columns:literal)*) => {
            match columns {
                $($columns => s.call(Columns::<_, $columns>(op)),)*
                _ => unreachable!("a tile has 1 to 8 columns"),
            }
        };
    }
    by_columns!(1 2 3 4 5 6 7 8)
}

/// Calls `body` with each of the vectors that `N` columns meet along seven weights, written out: a loop of that
/// length would not be unrolled, and its sums would not stay in registers.
macro_rules! for_each_input {
    ($inputs:ident, $N:ident, |$j:ident, $v:ident| $body:block) => {
        for_each_input!(@ $inputs, $N, $j, $v, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13)
    };
    (@ $inputs:ident, $N:ident, $j:ident, $v:ident, $body:block, $($at:literal)*) => {
        $(if $at < $N + TAPS - 1 {
            let $j = $at;
            let $v = &$inputs[$at];
            $body
        })*
    };
}

/// The convolution of a tile.
struct Convolve<'a> {
    job: Job<'a>,
    /// Of these channels.
    weights: &'a [f32],
    /// If absent, sums start from the present values.
    begin: Option<Begin<'a>>,
    channel: usize,
    /// The lines of the output.
    y: &'a mut [f32],
}

impl TileOp for Convolve<'_> {
    #[inline(always)]
    fn run<S: Lanes, const N: usize>(self, s: S) {
        let Self { job: Job { view, part, column }, weights, begin, channel, y } = self;
        let DepthwiseShape { width, channels, kernel, .. } = view.shape;
        let length = kernel.next_multiple_of(TAPS);
        let end = channels.min(channel + LANES);
        let weights = &weights.as_chunks().0[part * TAPS..];
        for (number, line) in view.lines.clone().enumerate() {
            let pixels = (number * width + column) * channels..(number * width + column + N) * channels;
            let mut sums = [s.splat(0.0); N];
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = match begin {
                    Some(Begin::Zero) => s.splat(0.0),
                    Some(Begin::Bias(bias)) => s.load(chunk(bias, channel)),
                    Some(Begin::Values(values)) => s.load_part(&values[pixels.clone()][i * channels..][channel..end]),
                    None => s.load_part(&y[pixels.clone()][i * channels..][channel..end]),
                };
            }
            for tap in view.taps(line) {
                let inputs = &view.line(line + tap - kernel / 2)[column + part * TAPS..][..N + TAPS - 1];
                let weights: &[_; TAPS] = chunk(weights, tap * length);
                if !many_registers::<S>() {
                    for (t, w) in weights.iter().enumerate() {
                        let w = s.load(w);
                        for (sum, v) in sums.iter_mut().zip(&inputs[t..t + N]) {
                            *sum = s.fma(s.load(v), w, *sum);
                        }
                    }
                    continue;
                }
                let w = weights.each_ref().map(|w| s.load(w));
                for_each_input!(inputs, N, |j, v| {
                    let v = s.load(v);
                    for (t, &w) in w.iter().enumerate() {
                        if j >= t && j - t < N {
                            sums[j - t] = s.fma(v, w, sums[j - t]);
                        }
                    }
                });
            }
            for (to, &sum) in y[pixels].chunks_exact_mut(channels).zip(&sums) {
                s.store_part(&mut to[channel..end], sum);
            }
        }
    }
}

/// Adds the products of input and gradient to the sums of each weight.
struct Correlate<'a> {
    job: Job<'a>,
    dy: &'a View,
    sums: &'a mut [f32],
}

impl TileOp for Correlate<'_> {
    #[inline(always)]
    fn run<S: Lanes, const N: usize>(self, s: S) {
        let Self { job: Job { view, part, column }, dy, sums } = self;
        let kernel = view.shape.kernel;
        let length = kernel.next_multiple_of(TAPS);
        for tap in 0..kernel {
            let to: &mut [_; TAPS] = chunk_mut(sums.as_chunks_mut().0, tap * length + part * TAPS);
            let mut sums = to.each_ref().map(|to| s.load(to));
            for (number, line) in view.lines.clone().enumerate() {
                if !view.taps(line).contains(&tap) {
                    continue;
                }
                let inputs = &view.line(line + tap - kernel / 2)[column + part * TAPS..][..N + TAPS - 1];
                let gradient: &[_; N] = chunk(dy.line(number), column);
                let d = gradient.each_ref().map(|d| s.load(d));
                for_each_input!(inputs, N, |j, v| {
                    let v = s.load(v);
                    for (t, sum) in sums.iter_mut().enumerate() {
                        if j >= t && j - t < N {
                            *sum = s.fma(v, d[j - t], *sum);
                        }
                    }
                });
            }
            for (to, &sum) in to.iter_mut().zip(&sums) {
                s.store(to, sum);
            }
        }
    }
}
