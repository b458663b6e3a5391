//! Gradients of weights as sums of products.
//!
//! The backward pass of a chunk leaves, for each linear layer, two packed *factors*: the gradient of
//! its output and its input. The gradient of the weight is the sum of their products over the
//! chunks, in the chunks' order, whichever thread computes which block of it.

use std::ops::Range;

use rayon::prelude::*;

use crate::Precision;
use crate::buffer::{Buffer, as_f32_mut};
use crate::cells::{Element, ElementOp, With};
use crate::detect::Isa;
use crate::gemm::{Epilogue, Left, Right, sum_of_products};
use crate::lanes::{LANES, Lanes, chunk, chunk_mut};
use crate::linear::{Linear, Norm};
use crate::norm;
use crate::pack::{PANEL, Rows, TALL_PANEL, down_rows, panels_len};

/// Chunks whose factors are made before they are multiplied and their memory is used again: enough work for many
/// threads, and little enough to stay in the last-level cache.
pub(crate) const GROUP: usize = 16;

/// Adds the sums of the chunks, in the chunks' order; `first` sets instead.
fn add_total<'a>(sums: impl Iterator<Item = &'a [f32]>, first: bool, to: &mut [f32]) {
    if first {
        to.fill(0.0);
    }
    for sums in sums {
        for (to, value) in to.iter_mut().zip(sums) {
            *to += value;
        }
    }
}

/// Factors of the gradient of one linear layer, packed down the rows of the chunk.
pub(crate) struct Factors {
    /// Gradient of the output, in panels of 48 columns.
    left: Buffer,
    /// The input, in panels of 32 columns.
    right: Buffer,
    /// Cells down the rows.
    steps: usize,
    /// Gradient of the output, summed over the rows.
    bias: Vec<f32>,
}

impl Factors {
    pub(crate) fn new<P: Element>(rows: usize, outputs: usize, inputs: usize) -> Self {
        let steps = P::cells(rows);
        Self {
            left: Buffer::new(panels_len(outputs, steps, TALL_PANEL)),
            right: Buffer::new(panels_len(inputs, steps, PANEL)),
            steps,
            bias: vec![0.0; outputs],
        }
    }
}

/// Gradients of a norm's parameters.
pub(crate) struct NormSums {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl NormSums {
    /// Of rows of this width, padded.
    pub(crate) fn new(width: usize) -> Self {
        Self { weight: vec![0.0; width], bias: vec![0.0; width] }
    }
}

/// A norm whose gradients are to be summed.
pub(crate) struct NormTarget<'a> {
    pub(crate) chunks: Vec<&'a NormSums>,
    pub(crate) weight: &'a mut [f32],
    pub(crate) bias: &'a mut [f32],
}

/// A linear layer whose gradients are to be summed.
pub(crate) struct LayerTarget<'a> {
    pub(crate) layer: &'a Linear,
    /// The norm that is folded into it.
    pub(crate) norm: Option<&'a Norm>,
    pub(crate) chunks: Vec<&'a Factors>,
    pub(crate) weight: &'a mut [f32],
    pub(crate) bias: &'a mut [f32],
}

/// Adds what a group of chunks gives to the gradients of norms and layers; the `first` group sets, and after the
/// `last` the gradients are whole.
pub(crate) fn add_gradients(
    (isa, precision): (Isa, Precision),
    norms: Vec<NormTarget>,
    layers: Vec<LayerTarget>,
    first: bool,
    last: bool,
) {
    for NormTarget { chunks, weight, bias } in norms {
        add_total(chunks.iter().map(|sums| &sums.weight[..]), first, weight);
        add_total(chunks.iter().map(|sums| &sums.bias[..]), first, bias);
    }
    let mut blocks = Vec::new();
    for LayerTarget { layer, norm, chunks, weight, bias } in layers {
        for (from, to) in layer.rows.starts() {
            let group = layer.rows.group();
            add_total(chunks.iter().map(|factors| &factors.bias[to..]), first, &mut bias[from..from + group]);
        }
        let bias = &bias[..];
        let mut rows = weight.chunks_exact_mut(layer.columns.len().max(1));
        for start in (0..layer.rows.padded()).step_by(ROWS) {
            let end = (start + ROWS).min(layer.rows.padded());
            let real = layer.rows.before(end) - layer.rows.before(start);
            let mut rows: Vec<_> = rows.by_ref().take(real).collect();
            for column in (0..layer.columns.padded()).step_by(COLUMNS) {
                let columns = column..(column + COLUMNS).min(layer.columns.padded());
                let real = layer.columns.before(columns.end) - layer.columns.before(column);
                let to = rows.iter_mut().map(|row| row.split_off_mut(..real).expect("a row has all columns")).collect();
                let (factors, norm) = (chunks.clone(), norm.filter(|_| last));
                blocks.push(WeightBlock { layer, norm, factors, bias, rows: start..end, columns, first, to });
            }
        }
    }
    blocks.into_par_iter().with_max_len(1).for_each(|block| isa.run(With(precision, block)));
}

/// Packs the gradient of a layer's output and its input, each with its number of columns.
#[inline(always)]
pub(crate) fn factors<S: Lanes, P: Element>(
    s: S,
    rows: usize,
    (gradient, outputs): (&[u32], usize),
    (input, inputs): (&[u32], usize),
    to: &mut Factors,
) {
    let gradient = Rows::new(gradient, P::cells(outputs), rows);
    down_rows::<S, P>(s, gradient, outputs, TALL_PANEL, &mut to.left);
    down_rows::<S, P>(s, Rows::new(input, P::cells(inputs), rows), inputs, PANEL, &mut to.right);
    for row in gradient.cells.chunks_exact(gradient.stride) {
        for (column, bias) in to.bias.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let sum = s.add(s.load(bias), P::load(s, row, P::cells(column * LANES)));
            s.store(bias, sum);
        }
    }
}

/// Gradients of a norm's parameters from that of its output, over the rows of the chunk.
#[inline(always)]
pub(crate) fn column_sums<S: Lanes, P: Element>(s: S, dy: &[f32], normalized: &[u32], width: usize, to: &mut NormSums) {
    for (dy, normalized) in dy.chunks_exact(width).zip(normalized.chunks_exact(P::cells(width))) {
        norm::add_parameter_gradients::<S, P>(s, dy, normalized, &mut to.weight, &mut to.bias);
    }
}

/// Rows of a weight whose gradient is one task: they share the input's panels.
const ROWS: usize = 2 * TALL_PANEL;
/// Columns of a weight whose gradient is one task: they share the gradients' panels.
const COLUMNS: usize = 12 * PANEL;

/// The gradient of up to [`ROWS`] rows and [`COLUMNS`] columns of a weight.
struct WeightBlock<'a> {
    layer: &'a Linear,
    /// The norm before the layer, once the sum is whole: what was packed is the norm's input.
    norm: Option<&'a Norm>,
    factors: Vec<&'a Factors>,
    /// Gradient of the layer's bias.
    bias: &'a [f32],
    /// With padding, as the columns.
    rows: Range<usize>,
    columns: Range<usize>,
    /// Whether the sum starts at zero or from `to`.
    first: bool,
    /// The real columns of each real row.
    to: Vec<&'a mut [f32]>,
}

impl ElementOp for WeightBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes, P: Element>(self, s: S) {
        /// Steps of all rows that stay in the second-level cache while all columns pass.
        const STEPS: usize = 1024;
        let Self { layer, norm, factors, bias, rows, columns, first, mut to } = self;
        let stride = columns.len();
        let mut sums = Buffer::new(rows.len() * stride);
        let sums = as_f32_mut(&mut sums);
        sums.fill(0.0);
        // Where the real rows are in the sums, and which they are.
        let real_rows = || {
            let real = rows.clone().filter(|row| layer.rows.before(row + 1) > layer.rows.before(*row));
            real.map(|row| ((row - rows.start) * stride, layer.rows.before(row)))
        };
        // Where vectors of columns are in the sums, and which real columns they are of `to`.
        let vectors = || {
            columns.clone().step_by(LANES).map(|column| {
                let [start, end] = [column, column + LANES].map(|at| layer.columns.before(at));
                let skipped = layer.columns.before(columns.start);
                (column - columns.start, start - skipped..end - skipped)
            })
        };
        if !first {
            for ((at, _), to) in real_rows().zip(&to) {
                for (column, real) in vectors() {
                    s.store(chunk_mut(sums, at + column), s.load_part(&to[real]));
                }
            }
        }
        let steps = factors.first().map_or(1, |factors| factors.steps).max(1);
        for group in factors.chunks((STEPS / steps).max(1)) {
            for column in columns.clone().step_by(PANEL) {
                for row in rows.clone().step_by(TALL_PANEL) {
                    let parts = group.iter().map(|factors| {
                        let steps = factors.steps;
                        let cells = &factors.left[row * steps..];
                        let rows = TALL_PANEL.min(rows.end - row);
                        let a = Left { cells, row_stride: 1, step_stride: TALL_PANEL, rows };
                        let panels = &factors.right[column * steps..];
                        (a, Right { panels, steps, columns: PANEL.min(columns.end - column) })
                    });
                    let parts: Vec<_> = parts.collect();
                    let to = &mut sums[(row - rows.start) * stride..];
                    sum_of_products::<S, P>(s, &parts, &mut AddToSums { to, stride, column: column - columns.start });
                }
            }
        }
        for ((at, row), to) in real_rows().zip(&mut to) {
            for (column, real) in vectors() {
                let mut v = s.load(chunk(sums, at + column));
                if let Some(norm) = norm {
                    // The input was g x^ + b: its product is that of x^ by g, and db by b.
                    let column = column + columns.start;
                    let folded = s.mul(s.load(chunk(&norm.bias, column)), s.splat(bias[row]));
                    v = s.fma(v, s.load(chunk(&norm.weight, column)), folded);
                }
                s.store_part(&mut to[real], v);
            }
        }
    }
}

/// Adds to rows of f32, from `column` on.
struct AddToSums<'a> {
    to: &'a mut [f32],
    stride: usize,
    column: usize,
}

impl<S: Lanes> Epilogue<S> for AddToSums<'_> {
    #[inline(always)]
    fn put(&mut self, s: S, row: usize, column: usize, sums: S::V) {
        let to = chunk_mut(self.to, row * self.stride + self.column + column);
        let sums = s.add(s.load(to), sums);
        s.store(to, sums);
    }
}
