//! Multi-head attention of one sample: `softmax(q k^T / sqrt(head_dim)) v`, head by head.
//!
//! Inside, queries, keys and values are rows of cells `[tokens, 3, heads, head_pad]`, the torch order with
//! every head padded to whole vectors. All products of one head fit the cache; parallel work over
//! samples is the caller's.

use rayon::prelude::*;

use crate::Precision;
use crate::buffer::{Buffer, as_f32, as_f32_mut};
use crate::cells::{Element, ElementOp, With, padded};
use crate::detect::Isa;
use crate::gemm::{Epilogue, Left, Right, product};
use crate::lanes::{LANES, Lanes, chunk_mut};
use crate::pack::{PANEL, Rows, along_rows, down_rows, panels_len};
use crate::softmax::softmax_row;

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Samples.
    pub batch: usize,
    /// Tokens of a sample.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Length of a head.
    pub head_dim: usize,
}

impl AttentionShape {
    fn sample(&self) -> usize {
        self.tokens * self.heads * self.head_dim
    }
    fn sizes(&self) -> Heads {
        Heads { tokens: self.tokens, heads: self.heads, head_dim: self.head_dim }
    }
}

/// What [`attention_gradient`] needs of [`attention`].
#[derive(Debug)]
pub struct AttentionSaved {
    isa: Isa,
    precision: Precision,
    shape: AttentionShape,
    /// Of each sample, as cells: queries, keys and values; probabilities.
    samples: Vec<(Buffer, Buffer)>,
}

/// Multi-head attention `softmax(q k^T / sqrt(head_dim)) v`.
///
/// Shapes: `qkv` `[batch, tokens, 3, heads, head_dim]`, `out` `[batch, tokens, heads, head_dim]`.
///
/// # Panics
///
/// If a slice has a length that does not match `shape`.
pub fn attention(shape: AttentionShape, precision: Precision, qkv: &[f32], out: &mut [f32]) -> AttentionSaved {
    let (sample, batch) = (shape.sample(), shape.batch);
    assert!(
        qkv.len() == 3 * batch * sample,
        "`qkv` has {} elements, {shape:?} needs {}",
        qkv.len(),
        3 * batch * sample
    );
    assert!(out.len() == batch * sample, "`out` has {} elements, {shape:?} needs {}", out.len(), batch * sample);
    let isa = Isa::current();
    let samples = (qkv.par_chunks((3 * sample).max(1)).zip(out.par_chunks_mut(sample.max(1))))
        .map(|(qkv, out)| isa.run(With(precision, Forward { sizes: shape.sizes(), qkv, out })))
        .collect();
    AttentionSaved { isa, precision, shape, samples }
}

/// Gradient of [`attention`]: `d_qkv` from `d_out`.
///
/// # Panics
///
/// If a slice does not have the length of the forward pass.
pub fn attention_gradient(saved: &AttentionSaved, d_out: &[f32], d_qkv: &mut [f32]) {
    let shape = saved.shape;
    let (sample, batch) = (shape.sample(), shape.batch);
    assert!(d_out.len() == batch * sample, "`d_out` has {} elements, {shape:?} needs {}", d_out.len(), batch * sample);
    assert!(
        d_qkv.len() == 3 * batch * sample,
        "`d_qkv` has {} elements, {shape:?} needs {}",
        d_qkv.len(),
        3 * batch * sample
    );
    (d_out.par_chunks(sample.max(1)).zip(d_qkv.par_chunks_mut((3 * sample).max(1))).zip(&saved.samples)).for_each(
        |((d_out, d_qkv), saved_sample)| {
            saved.isa.run(With(saved.precision, Gradient { sizes: shape.sizes(), saved: saved_sample, d_out, d_qkv }));
        },
    );
}

struct Forward<'a> {
    sizes: Heads,
    qkv: &'a [f32],
    out: &'a mut [f32],
}

impl ElementOp for Forward<'_> {
    type Output = (Buffer, Buffer);

    #[inline(always)]
    fn run<S: Lanes, P: Element>(self, s: S) -> Self::Output {
        let sizes = self.sizes;
        let qkv = spread::<S, P>(s, self.qkv, sizes.head_dim);
        let mut probabilities = Buffer::new(sizes.probabilities::<P>());
        let mut attended = Buffer::new(sizes.tokens * P::cells(sizes.inner()));
        let mut scratch = Buffer::new(sizes.scratch::<P>());
        forward::<S, P>(s, sizes, &qkv, &mut probabilities, &mut attended, &mut scratch);
        gather::<S, P>(s, &attended, sizes.head_dim, self.out);
        (qkv, probabilities)
    }
}

struct Gradient<'a> {
    sizes: Heads,
    saved: &'a (Buffer, Buffer),
    d_out: &'a [f32],
    d_qkv: &'a mut [f32],
}

impl ElementOp for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes, P: Element>(self, s: S) {
        let (sizes, (qkv, probabilities)) = (self.sizes, self.saved);
        let d_out = spread::<S, P>(s, self.d_out, sizes.head_dim);
        let mut d_qkv = Buffer::new(qkv.len());
        let mut scratch = Buffer::new(sizes.scratch::<P>());
        backward::<S, P>(s, sizes, qkv, probabilities, &d_out, &mut d_qkv, &mut scratch);
        gather::<S, P>(s, &d_qkv, sizes.head_dim, self.d_qkv);
    }
}

/// Cells of heads with padding from f32 without.
#[inline(always)]
fn spread<S: Lanes, P: Element>(s: S, from: &[f32], head_dim: usize) -> Buffer {
    let stride = P::cells(padded(head_dim));
    let mut to = Buffer::new(from.len() / head_dim * stride);
    for (from, to) in from.chunks_exact(head_dim).zip(to.chunks_exact_mut(stride)) {
        for (i, part) in from.chunks(LANES).enumerate() {
            P::store(s, to, P::cells(i * LANES), s.load_part(part));
        }
    }
    to
}

/// The way back of [`spread`].
#[inline(always)]
fn gather<S: Lanes, P: Element>(s: S, from: &[u32], head_dim: usize, to: &mut [f32]) {
    let stride = P::cells(padded(head_dim));
    for (from, to) in from.chunks_exact(stride).zip(to.chunks_exact_mut(head_dim)) {
        for (i, part) in to.chunks_mut(LANES).enumerate() {
            s.store_part(part, P::load(s, from, P::cells(i * LANES)));
        }
    }
}

/// Sizes of one sample's attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
}

impl Heads {
    /// Elements of a head, with its padding.
    pub(crate) fn head_pad(&self) -> usize {
        padded(self.head_dim)
    }
    /// Elements of a token's values, all heads.
    pub(crate) fn inner(&self) -> usize {
        self.heads * self.head_pad()
    }
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
    /// Cells of the attention probabilities of one sample, `[heads, tokens, padded(tokens)]`.
    pub(crate) fn probabilities<P: Element>(&self) -> usize {
        self.heads * self.tokens * P::cells(padded(self.tokens))
    }
    /// Words of scratch memory.
    pub(crate) fn scratch<P: Element>(&self) -> usize {
        let panels = self.panels::<P>();
        self.tokens * padded(self.tokens) * 2 + 3 * panels
    }
    /// Enough for a head's rows packed either way.
    fn panels<P: Element>(&self) -> usize {
        let along = panels_len(padded(self.tokens), P::cells(self.head_pad()), PANEL);
        let down = panels_len(self.head_pad(), P::cells(self.tokens), PANEL);
        along.max(down).max(panels_len(padded(self.tokens), P::cells(self.tokens), padded(self.tokens)))
    }
}

/// Writes sums as f32 rows of whole vectors.
pub(crate) struct ToF32<'a> {
    pub(crate) to: &'a mut [f32],
    pub(crate) stride: usize,
}

impl<S: Lanes> Epilogue<S> for ToF32<'_> {
    #[inline(always)]
    fn put(&mut self, s: S, row: usize, column: usize, sums: S::V) {
        s.store(chunk_mut(self.to, row * self.stride + column), sums);
    }
}

/// Writes sums as rows of cells.
pub(crate) struct ToCells<'a, P> {
    pub(crate) to: &'a mut [u32],
    pub(crate) stride: usize,
    pub(crate) format: std::marker::PhantomData<P>,
}

impl<'a, P> ToCells<'a, P> {
    pub(crate) fn new(to: &'a mut [u32], stride: usize) -> Self {
        Self { to, stride, format: std::marker::PhantomData }
    }
}

impl<S: Lanes, P: Element> Epilogue<S> for ToCells<'_, P> {
    #[inline(always)]
    fn put(&mut self, s: S, row: usize, column: usize, sums: S::V) {
        P::store(s, self.to, row * self.stride + P::cells(column), sums);
    }
}

/// Attention of one sample. The probabilities are kept for [`backward`].
#[inline(always)]
pub(crate) fn forward<S: Lanes, P: Element>(
    s: S,
    sizes: Heads,
    qkv: &[u32],
    probabilities: &mut [u32],
    attended: &mut [u32],
    scratch: &mut [u32],
) {
    let Heads { tokens, heads, .. } = sizes;
    let (pad, columns) = (sizes.head_pad(), padded(tokens));
    let (stride, out_stride) = (P::cells(3 * sizes.inner()), P::cells(sizes.inner()));
    let (scores, packed) = scratch.split_at_mut(tokens * columns);
    let scores = as_f32_mut(scores);
    for head in 0..heads {
        let [q, k, v] = [0, 1, 2].map(|i| P::cells((i * heads + head) * pad));
        let probabilities = {
            let size = tokens * P::cells(columns);
            &mut probabilities[head * size..][..size]
        };
        // scores [tokens, tokens] = q k^T
        let steps = P::cells(pad);
        let panels = &mut packed[..panels_len(columns, steps, PANEL)];
        along_rows(s, Rows::new(&qkv[k..], stride, tokens), steps, panels);
        let a = Left { cells: &qkv[q..], row_stride: stride, step_stride: 1, rows: tokens };
        product::<S, P>(s, a, Right { panels, steps, columns }, &mut ToF32 { to: scores, stride: columns });
        for (row, to) in scores.chunks_exact_mut(columns).zip(probabilities.chunks_exact_mut(P::cells(columns))) {
            softmax_row::<S, P>(s, row, tokens, sizes.scale(), to);
        }
        // attended [tokens, head_pad] = probabilities v
        let steps = P::cells(tokens);
        let panels = &mut packed[..panels_len(pad, steps, PANEL)];
        down_rows::<S, P>(s, Rows::new(&qkv[v..], stride, tokens), pad, PANEL, panels);
        let a = Left { cells: probabilities, row_stride: P::cells(columns), step_stride: 1, rows: tokens };
        let to = &mut attended[P::cells(head * pad)..];
        product::<S, P>(s, a, Right { panels, steps, columns: pad }, &mut ToCells::<P>::new(to, out_stride));
    }
}

/// Gradient of [`forward`] for one sample, from that of `attended`.
#[inline(always)]
pub(crate) fn backward<S: Lanes, P: Element>(
    s: S,
    sizes: Heads,
    qkv: &[u32],
    probabilities: &[u32],
    attended_gradient: &[u32],
    qkv_gradient: &mut [u32],
    scratch: &mut [u32],
) {
    let Heads { tokens, heads, .. } = sizes;
    let (pad, columns) = (sizes.head_pad(), padded(tokens));
    let (stride, out_stride) = (P::cells(3 * sizes.inner()), P::cells(sizes.inner()));
    let score_stride = P::cells(columns);
    let (scores, rest) = scratch.split_at_mut(tokens * columns);
    let (gradient, rest) = rest.split_at_mut(tokens * columns);
    let (first, second) = rest.split_at_mut(sizes.panels::<P>());
    let steps = P::cells(tokens);
    for head in 0..heads {
        let [q, k, v] = [0, 1, 2].map(|i| P::cells((i * heads + head) * pad));
        let size = tokens * score_stride;
        let probabilities = &probabilities[head * size..][..size];
        let output = &attended_gradient[P::cells(head * pad)..];
        // gradient of the probabilities [tokens, tokens] = output gradient * v^T
        {
            let steps = P::cells(pad);
            let panels = &mut first[..panels_len(columns, steps, PANEL)];
            along_rows(s, Rows::new(&qkv[v..], stride, tokens), steps, panels);
            let a = Left { cells: output, row_stride: out_stride, step_stride: 1, rows: tokens };
            let mut to = ToF32 { to: as_f32_mut(scores), stride: columns };
            product::<S, P>(s, a, Right { panels, steps, columns }, &mut to);
        }
        // ... of the scores: p * (gradient - sum(p * gradient)), with the scale of the softmax
        for row in 0..tokens {
            let p = &probabilities[row * score_stride..][..score_stride];
            let from = &as_f32(scores)[row * columns..][..columns];
            let to = &mut gradient[row * score_stride..][..score_stride];
            score_gradient_row::<S, P>(s, p, from, sizes.scale(), to);
        }
        let gradient = &gradient[..size];
        // dq [tokens, head_pad] = score gradient * k
        let panels = &mut first[..panels_len(pad, steps, PANEL)];
        down_rows::<S, P>(s, Rows::new(&qkv[k..], stride, tokens), pad, PANEL, panels);
        let a = Left { cells: gradient, row_stride: score_stride, step_stride: 1, rows: tokens };
        product::<S, P>(
            s,
            a,
            Right { panels, steps, columns: pad },
            &mut ToCells::<P>::new(&mut qkv_gradient[q..], stride),
        );
        // dk = score gradient^T * q and dv = probabilities^T * output gradient
        for (left, from, from_stride, to) in [(gradient, &qkv[q..], stride, k), (probabilities, output, out_stride, v)]
        {
            let tall = &mut second[..panels_len(columns, steps, columns)];
            down_rows::<S, P>(s, Rows::new(left, score_stride, tokens), columns, columns, tall);
            let panels = &mut first[..panels_len(pad, steps, PANEL)];
            down_rows::<S, P>(s, Rows::new(from, from_stride, tokens), pad, PANEL, panels);
            let a = Left { cells: tall, row_stride: 1, step_stride: columns, rows: tokens };
            product::<S, P>(
                s,
                a,
                Right { panels, steps, columns: pad },
                &mut ToCells::<P>::new(&mut qkv_gradient[to..], stride),
            );
        }
    }
}

/// `scale * p * (gradient - sum(p * gradient))`.
#[inline(always)]
fn score_gradient_row<S: Lanes, P: Element>(s: S, p: &[u32], gradient: &[f32], scale: f32, to: &mut [u32]) {
    let mut sum = s.splat(0.0);
    for (i, part) in gradient.as_chunks::<LANES>().0.iter().enumerate() {
        sum = s.fma(s.load(part), P::load(s, p, P::cells(i * LANES)), sum);
    }
    let (sum, scale) = (s.splat(s.sum(sum)), s.splat(scale));
    for (i, part) in gradient.as_chunks::<LANES>().0.iter().enumerate() {
        let p = s.mul(P::load(s, p, P::cells(i * LANES)), scale);
        P::store(s, to, P::cells(i * LANES), s.mul(p, s.sub(s.load(part), sum)));
    }
}
