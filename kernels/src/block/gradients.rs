//! Gradients of a block's weights.
//!
//! The backward pass of a chunk leaves, for each linear layer, two packed *factors*: the gradient of
//! its output and its input. The gradient of the weight is the sum of their products over the
//! chunks, in the chunks' order, whichever thread computes which block of it.

use rayon::prelude::*;

use crate::block::forward::Sizes;
use crate::block::weights::{Linear, Norm};
use crate::block::{BlockShape, PackedBlock};
use crate::buffer::{Buffer, as_f32_mut};
use crate::cells::{Element, ElementOp, With};
use crate::gemm::{Epilogue, Left, Right, sum_of_products};
use crate::lanes::{LANES, Lanes, chunk, chunk_mut};
use crate::norm;
use crate::pack::{PANEL, Rows, TALL_PANEL, down_rows, panels_len};

/// Gradients of [`BlockWeights`](super::BlockWeights), same names and layouts.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)] // The names are those of the weights.
pub struct BlockGradients {
    pub norm1_weight: Vec<f32>,
    pub norm1_bias: Vec<f32>,
    pub qkv_weight: Vec<f32>,
    pub qkv_bias: Vec<f32>,
    pub proj_weight: Vec<f32>,
    pub proj_bias: Vec<f32>,
    pub norm2_weight: Vec<f32>,
    pub norm2_bias: Vec<f32>,
    pub fc1_weight: Vec<f32>,
    pub fc1_bias: Vec<f32>,
    pub fc2_weight: Vec<f32>,
    pub fc2_bias: Vec<f32>,
}

impl BlockGradients {
    /// Zeros for a block of this width and hidden length.
    pub fn zeros(width: usize, hidden: usize) -> Self {
        let zeros = |len| vec![0.0; len];
        Self {
            norm1_weight: zeros(width),
            norm1_bias: zeros(width),
            qkv_weight: zeros(3 * width * width),
            qkv_bias: zeros(3 * width),
            proj_weight: zeros(width * width),
            proj_bias: zeros(width),
            norm2_weight: zeros(width),
            norm2_bias: zeros(width),
            fc1_weight: zeros(hidden * width),
            fc1_bias: zeros(hidden),
            fc2_weight: zeros(width * hidden),
            fc2_bias: zeros(width),
        }
    }

    /// Sets all gradients from the factors of all chunks.
    pub(super) fn compute(&mut self, shape: &BlockShape, weights: &PackedBlock, chunks: &[ChunkGradients]) {
        let (width, hidden) = (shape.width, shape.hidden);
        if self.norm1_weight.len() != width || self.fc1_bias.len() != hidden {
            *self = Self::zeros(width, hidden);
        }
        for (to_weight, to_bias, of) in [
            (&mut self.norm1_weight, &mut self.norm1_bias, (|c| &c.norm1) as fn(&ChunkGradients) -> &NormSums),
            (&mut self.norm2_weight, &mut self.norm2_bias, |c| &c.norm2),
        ] {
            to_weight.copy_from_slice(&total(chunks, width, |c| &of(c).weight));
            to_bias.copy_from_slice(&total(chunks, width, |c| &of(c).bias));
        }
        let layers = [
            (&weights.qkv, Some(&weights.norm1), (|c| &c.qkv) as fn(&ChunkGradients) -> &Factors),
            (&weights.proj, None, |c| &c.proj),
            (&weights.fc1, Some(&weights.norm2), |c| &c.fc1),
            (&weights.fc2, None, |c| &c.fc2),
        ];
        let targets = [
            (&mut self.qkv_weight, &mut self.qkv_bias),
            (&mut self.proj_weight, &mut self.proj_bias),
            (&mut self.fc1_weight, &mut self.fc1_bias),
            (&mut self.fc2_weight, &mut self.fc2_bias),
        ];
        let sums = layers.map(|(layer, _, of)| total(chunks, layer.rows.padded(), |chunk| &of(chunk).bias));
        let mut blocks = Vec::new();
        for (((layer, norm, of), (weight, bias)), sums) in layers.into_iter().zip(targets).zip(&sums) {
            for (from, to) in layer.rows.starts() {
                let group = layer.rows.group();
                bias[from..from + group].copy_from_slice(&sums[to..to + group]);
            }
            let mut rest = &mut weight[..];
            for start in (0..layer.rows.padded()).step_by(TALL_PANEL) {
                let end = (start + TALL_PANEL).min(layer.rows.padded());
                let real = layer.rows.before(end) - layer.rows.before(start);
                let to;
                (to, rest) = rest.split_at_mut(real * layer.columns.len());
                let factors = chunks.iter().map(of).collect();
                blocks.push(WeightBlock { layer, norm, factors, bias: sums, start, end, to });
            }
        }
        blocks.into_par_iter().for_each(|block| weights.isa.run(With(weights.precision, block)));
    }
}

/// The first `len` sums over the chunks, in the chunks' order.
fn total(chunks: &[ChunkGradients], len: usize, of: impl Fn(&ChunkGradients) -> &[f32]) -> Vec<f32> {
    let mut sum = vec![0.0; len];
    for chunk in chunks {
        for (sum, value) in sum.iter_mut().zip(of(chunk)) {
            *sum += value;
        }
    }
    sum
}

/// What a chunk contributes to the gradients of the weights.
pub(super) struct ChunkGradients {
    pub(super) norm1: NormSums,
    pub(super) qkv: Factors,
    pub(super) proj: Factors,
    pub(super) norm2: NormSums,
    pub(super) fc1: Factors,
    pub(super) fc2: Factors,
}

/// Factors of the gradient of one linear layer, packed down the rows of the chunk.
pub(super) struct Factors {
    /// Gradient of the output, in panels of 48 columns.
    left: Buffer,
    /// The input, in panels of 32 columns.
    right: Buffer,
    /// Cells down the rows.
    steps: usize,
    /// Gradient of the output, summed over the rows.
    bias: Vec<f32>,
}

/// Gradients of a norm's parameters.
pub(super) struct NormSums {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl ChunkGradients {
    pub(super) fn new<P: Element>(sizes: &Sizes) -> Self {
        let steps = P::cells(sizes.rows);
        let (width, inner, hidden) = (sizes.width(), sizes.heads.inner(), sizes.hidden());
        let norm = || NormSums { weight: vec![0.0; width], bias: vec![0.0; width] };
        let factors = |outputs, inputs| Factors {
            left: Buffer::new(panels_len(outputs, steps, TALL_PANEL)),
            right: Buffer::new(panels_len(inputs, steps, PANEL)),
            steps,
            bias: vec![0.0; outputs],
        };
        Self {
            norm1: norm(),
            qkv: factors(3 * inner, width),
            proj: factors(width, inner),
            norm2: norm(),
            fc1: factors(hidden, width),
            fc2: factors(width, hidden),
        }
    }
}

/// Packs the gradient of a layer's output and its input, each with its number of columns.
#[inline(always)]
pub(super) fn factors<S: Lanes, P: Element>(
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
pub(super) fn column_sums<S: Lanes, P: Element>(s: S, dy: &[f32], normalised: &[u32], width: usize, to: &mut NormSums) {
    for (dy, normalised) in dy.chunks_exact(width).zip(normalised.chunks_exact(P::cells(width))) {
        norm::add_parameter_gradients::<S, P>(s, dy, normalised, &mut to.weight, &mut to.bias);
    }
}

/// The gradient of up to 48 rows of a weight.
struct WeightBlock<'a> {
    layer: &'a Linear,
    norm: Option<&'a Norm>,
    factors: Vec<&'a Factors>,
    /// Gradient of the layer's bias, with padding.
    bias: &'a [f32],
    /// Padded rows.
    start: usize,
    end: usize,
    to: &'a mut [f32],
}

impl ElementOp for WeightBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes, P: Element>(self, s: S) {
        /// Columns summed over all chunks before the next: with 48 rows, their sums fit the cache.
        const COLUMNS: usize = 12 * PANEL;
        /// Steps summed in registers before they are added to those sums.
        const STEPS: usize = 512;
        let Self { layer, norm, factors, bias, start, end, to } = self;
        let columns = layer.columns.padded();
        let mut sums = Buffer::new((end - start) * columns);
        let sums = as_f32_mut(&mut sums);
        sums.fill(0.0);
        let steps = factors.first().map_or(1, |factors| factors.steps).max(1);
        for column in (0..columns).step_by(COLUMNS) {
            for group in factors.chunks((STEPS / steps).max(1)) {
                let parts = group.iter().map(|factors| {
                    let steps = factors.steps;
                    let cells = &factors.left[start * steps..];
                    let a = Left { cells, row_stride: 1, step_stride: TALL_PANEL, rows: end - start };
                    let panels = &factors.right[column * steps..];
                    (a, Right { panels, steps, columns: COLUMNS.min(columns - column) })
                });
                let parts: Vec<_> = parts.collect();
                sum_of_products::<S, P>(s, &parts, &mut AddToSums { to: sums, stride: columns, column });
            }
        }
        let mut to = to.chunks_exact_mut(layer.columns.len().max(1));
        for (row, sums) in (start..end).zip(sums.chunks_exact(columns)) {
            if layer.rows.before(row + 1) == layer.rows.before(row) {
                continue;
            }
            let Some(to) = to.next() else { break };
            for (from_column, column) in layer.columns.starts() {
                let group = layer.columns.group();
                let to = &mut to[from_column..from_column + group];
                for (i, to) in to.chunks_mut(LANES).enumerate() {
                    let at = column + i * LANES;
                    let mut v = s.load(chunk(sums, at));
                    if let Some(norm) = norm {
                        // The input was g x^ + b: its product is that of x^ by g, and db by b.
                        let folded = s.mul(s.load(chunk(&norm.bias, at)), s.splat(bias[row]));
                        v = s.fma(v, s.load(chunk(&norm.weight, at)), folded);
                    }
                    s.store_part(to, v);
                }
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
