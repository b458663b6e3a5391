//! The forward pass of a block.

use rayon::prelude::*;

use crate::Precision;
use crate::attention::{self, Heads, ToCells};
use crate::block::{BlockShape, PackedBlock};
use crate::buffer::Buffer;
use crate::cells::{Element, ElementOp, With, padded};
use crate::gelu::Gelu;
use crate::gemm::{Epilogue, Left, product};
use crate::lanes::{Lanes, chunk};
use crate::mlp::{AddToRows, MlpSaved, Wanted};
use crate::norm;

/// What the backward pass needs of a forward pass: in bf16 where the products are.
#[derive(Debug)]
pub struct BlockSaved {
    pub(super) wanted: Wanted,
    pub(super) chunks: Vec<ChunkSaved>,
    pub(super) shape: BlockShape,
    pub(super) precision: Precision,
    pub(super) gelu: Gelu,
    pub(super) path_scale: Option<(Vec<f32>, Vec<f32>)>,
}

impl BlockSaved {
    /// Memory held, in bytes.
    pub fn bytes(&self) -> usize {
        self.chunks.iter().map(ChunkSaved::bytes).sum()
    }
}

/// The activations of one chunk, as rows of cells.
#[derive(Debug)]
pub(super) struct ChunkSaved {
    pub(super) normalized1: Buffer,
    pub(super) inverse_deviation1: Vec<f32>,
    pub(super) qkv: Buffer,
    pub(super) probabilities: Buffer,
    /// Only for the gradients of the weights.
    pub(super) attended: Buffer,
    pub(super) mlp: MlpSaved,
}

impl ChunkSaved {
    fn new<P: Element>(sizes: &Sizes) -> Self {
        let rows = sizes.rows;
        Self {
            normalized1: Buffer::new(rows * P::cells(sizes.width())),
            inverse_deviation1: vec![0.0; rows],
            qkv: Buffer::new(rows * P::cells(3 * sizes.heads.inner())),
            probabilities: Buffer::new(sizes.samples * sizes.heads.probabilities::<P>()),
            attended: Buffer::new(rows * P::cells(sizes.heads.inner())),
            mlp: MlpSaved::new::<P>(rows, sizes.width(), sizes.hidden()),
        }
    }

    fn bytes(&self) -> usize {
        let Self { normalized1, inverse_deviation1, qkv, probabilities, attended, mlp } = self;
        let cells: usize = [normalized1, qkv, probabilities, attended].iter().map(|b| b.len()).sum();
        4 * (cells + inverse_deviation1.len()) + mlp.bytes()
    }
}

/// Sizes of one chunk.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) samples: usize,
    pub(super) rows: usize,
    pub(super) heads: Heads,
    pub(super) shape: BlockShape,
}

impl Sizes {
    /// For a chunk of `elements` elements.
    pub(super) fn new(shape: BlockShape, elements: usize) -> Self {
        let rows = elements / shape.width;
        Self { samples: rows / shape.tokens, rows, heads: shape.attention(), shape }
    }
    /// The width with padding.
    pub(super) fn width(&self) -> usize {
        padded(self.shape.width)
    }
    /// The hidden length with padding.
    pub(super) fn hidden(&self) -> usize {
        padded(self.shape.hidden)
    }
    /// Rows of cells as the first operand.
    pub(super) fn left<'a, P: Element>(&self, cells: &'a [u32], elements: usize) -> Left<'a> {
        Left { cells, row_stride: P::cells(elements), step_stride: 1, rows: self.rows }
    }
}

/// Applies a block: `x1 = x + s1 * attention(norm1(x))`, `y = x1 + s2 * mlp(norm2(x1))`.
///
/// `path_scale` are the factors `s1` and `s2` of each sample (stochastic depth: 0, or one over the
/// probability to stay). The result holds what [`block_backward`](super::block_backward) needs for what is
/// `wanted`.
///
/// Shapes: `x` and `y` `[batch, tokens, width]`; the factors `[batch]`.
///
/// # Panics
///
/// If a slice has a length that does not match `shape`, or `weights` are of another shape.
#[allow(clippy::too_many_arguments)] // A block has that many inputs.
pub fn block_forward(
    shape: BlockShape,
    weights: &PackedBlock,
    gelu: Gelu,
    eps: f32,
    path_scale: Option<(&[f32], &[f32])>,
    x: &[f32],
    y: &mut [f32],
    wanted: Wanted,
) -> Option<BlockSaved> {
    weights.check(&shape);
    let elements = shape.elements();
    assert!(x.len() == elements, "`x` has {} elements, {shape:?} needs {elements}", x.len());
    assert!(y.len() == elements, "`y` has {} elements, {shape:?} needs {elements}", y.len());
    if let Some((first, second)) = path_scale {
        let found = (first.len(), second.len());
        assert!(found == (shape.batch, shape.batch), "`path_scale` has {found:?} factors, batch = {}", shape.batch);
    }
    let path_scale = path_scale.map(|(first, second)| (first.to_vec(), second.to_vec()));
    let samples = shape.chunk_samples();
    let size = (samples * shape.tokens * shape.width).max(1);
    let chunks = x
        .par_chunks(size)
        .zip(y.par_chunks_mut(size))
        .enumerate()
        // Chunks are stolen one by one, so that no thread waits long for the others.
        .with_max_len(1)
        .map(|(index, (x, y))| {
            let sizes = Sizes::new(shape, x.len());
            let scale = path_scale
                .as_ref()
                .map(|(first, second)| [first, second].map(|factors| row_factors(&factors[index * samples..], &sizes)));
            let forward = Forward { sizes, weights, gelu, eps, scale, x, y, wanted };
            weights.isa.run(With(weights.precision, forward))
        })
        .collect::<Vec<_>>();
    let chunks: Vec<_> = chunks.into_iter().flatten().collect();
    let saved = BlockSaved { wanted, chunks, shape, precision: weights.precision, gelu, path_scale };
    (wanted != Wanted::Nothing).then_some(saved)
}

/// The factor of every row of a chunk, from those of its samples.
pub(super) fn row_factors(factors: &[f32], sizes: &Sizes) -> Vec<f32> {
    let tokens = sizes.shape.tokens;
    (0..sizes.rows).map(|row| factors[row / tokens]).collect()
}

/// The forward pass of one chunk.
struct Forward<'a> {
    sizes: Sizes,
    weights: &'a PackedBlock,
    gelu: Gelu,
    eps: f32,
    scale: Option<[Vec<f32>; 2]>,
    x: &'a [f32],
    y: &'a mut [f32],
    wanted: Wanted,
}

impl ElementOp for Forward<'_> {
    type Output = Option<ChunkSaved>;

    #[inline(always)]
    fn run<S: Lanes, P: Element>(self, s: S) -> Option<ChunkSaved> {
        let Self { sizes, weights, gelu, eps, scale, x, y, wanted } = self;
        let PackedBlock { qkv, proj, mlp, .. } = weights;
        let (width, inner) = (sizes.width(), sizes.heads.inner());
        let true_width = sizes.shape.width;
        let scale = |i: usize| scale.as_ref().map(|scale| &scale[i][..]);
        let mut saved = ChunkSaved::new::<P>(&sizes);
        y.copy_from_slice(x);

        norm::normalize::<S, P>(s, x, true_width, eps, &mut saved.normalized1, &mut saved.inverse_deviation1);
        let a = sizes.left::<P>(&saved.normalized1, width);
        let mut to = BiasToCells { bias: &qkv.bias, to: ToCells::<P>::new(&mut saved.qkv, P::cells(3 * inner)) };
        product::<S, P>(s, a, qkv.forward::<P>(), &mut to);

        attend::<S, P>(s, &sizes, &mut saved);
        let a = sizes.left::<P>(&saved.attended, inner);
        let mut to = AddToRows { to: y, width: true_width, bias: &proj.bias, scale: scale(0) };
        product::<S, P>(s, a, proj.forward::<P>(), &mut to);

        saved.mlp.normalize::<S, P>(s, y, true_width, eps);
        mlp.forward::<S, P>(s, gelu, scale(1), &mut saved.mlp, y, wanted);
        if wanted == Wanted::Input {
            saved.attended = Buffer::default();
        }
        (wanted != Wanted::Nothing).then_some(saved)
    }
}

#[inline(always)]
fn attend<S: Lanes, P: Element>(s: S, sizes: &Sizes, saved: &mut ChunkSaved) {
    let (heads, tokens) = (sizes.heads, sizes.shape.tokens);
    let mut scratch = Buffer::new(heads.scratch::<P>());
    let samples = saved.qkv.chunks_exact(tokens * P::cells(3 * heads.inner()));
    let probabilities = saved.probabilities.chunks_exact_mut(heads.probabilities::<P>());
    let attended = saved.attended.chunks_exact_mut(tokens * P::cells(heads.inner()));
    for ((qkv, probabilities), attended) in samples.zip(probabilities).zip(attended) {
        attention::forward::<S, P>(s, heads, qkv, probabilities, attended, &mut scratch);
    }
}

/// `sums + bias` as cells.
struct BiasToCells<'a, P> {
    bias: &'a [f32],
    to: ToCells<'a, P>,
}

impl<S: Lanes, P: Element> Epilogue<S> for BiasToCells<'_, P> {
    #[inline(always)]
    fn put(&mut self, s: S, row: usize, column: usize, sums: S::V) {
        let sums = s.add(sums, s.load(chunk(self.bias, column)));
        self.to.put(s, row, column, sums);
    }
}
