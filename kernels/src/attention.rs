//! Multi-head attention of one sample: `softmax(q k^T / sqrt(head_dim)) v`, head by head.
//!
//! Queries, keys and values are rows of cells `[tokens, 3, heads, head_pad]`, the torch order with
//! every head padded to whole vectors. All products of one head fit the cache; parallel work over
//! samples is the caller's.

use crate::buffer::{as_f32, as_f32_mut};
use crate::cells::{Element, padded};
use crate::gelu::exp;
use crate::gemm::{Epilogue, Left, Right, product};
use crate::lanes::{LANES, Lanes, chunk_mut};
use crate::pack::{PANEL, Rows, along_rows, down_rows, panels_len};

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
        along.max(down).max(panels_len(
            padded(self.tokens),
            P::cells(self.tokens),
            padded(self.tokens),
        ))
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
        Self {
            to,
            stride,
            format: std::marker::PhantomData,
        }
    }
}

impl<S: Lanes, P: Element> Epilogue<S> for ToCells<'_, P> {
    #[inline(always)]
    fn put(&mut self, s: S, row: usize, column: usize, sums: S::V) {
        P::store(s, self.to, row * self.stride + P::cells(column), sums);
    }
}

/// Softmax of `scale * row`, of which `count` columns are real, written as cells; the rest is zero.
#[inline(always)]
pub(crate) fn softmax_row<S: Lanes, P: Element>(
    s: S,
    row: &mut [f32],
    count: usize,
    scale: f32,
    to: &mut [u32],
) {
    let mut largest = f32::NEG_INFINITY;
    let mut best = s.splat(f32::NEG_INFINITY);
    let whole = count / LANES;
    for part in &row.as_chunks::<LANES>().0[..whole] {
        best = s.max(best, s.load(part));
    }
    if whole > 0 {
        largest = s.largest(best);
    }
    for &value in &row[whole * LANES..count] {
        largest = if largest > value { largest } else { value };
    }
    let (factor, shift) = (s.splat(scale), s.splat(-largest * scale));
    let mut sum = s.splat(0.0);
    for (i, part) in row.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let power = exp(s, s.fma(s.load(part), factor, shift));
        let power = s.first(power, count.saturating_sub(i * LANES));
        sum = s.add(sum, power);
        s.store(part, power);
    }
    let inverse = s.splat(1.0 / s.sum(sum));
    for (i, part) in row.as_chunks::<LANES>().0.iter().enumerate() {
        P::store(s, to, P::cells(i * LANES), s.mul(s.load(part), inverse));
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
        let a = Left {
            cells: &qkv[q..],
            row_stride: stride,
            step_stride: 1,
            rows: tokens,
        };
        product::<S, P>(
            s,
            a,
            Right {
                panels,
                steps,
                columns,
            },
            &mut ToF32 {
                to: scores,
                stride: columns,
            },
        );
        for (row, to) in scores
            .chunks_exact_mut(columns)
            .zip(probabilities.chunks_exact_mut(P::cells(columns)))
        {
            softmax_row::<S, P>(s, row, tokens, sizes.scale(), to);
        }
        // attended [tokens, head_pad] = probabilities v
        let steps = P::cells(tokens);
        let panels = &mut packed[..panels_len(pad, steps, PANEL)];
        down_rows::<S, P>(s, Rows::new(&qkv[v..], stride, tokens), pad, PANEL, panels);
        let a = Left {
            cells: probabilities,
            row_stride: P::cells(columns),
            step_stride: 1,
            rows: tokens,
        };
        let to = &mut attended[P::cells(head * pad)..];
        product::<S, P>(
            s,
            a,
            Right {
                panels,
                steps,
                columns: pad,
            },
            &mut ToCells::<P>::new(to, out_stride),
        );
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
            let a = Left {
                cells: output,
                row_stride: out_stride,
                step_stride: 1,
                rows: tokens,
            };
            let mut to = ToF32 {
                to: as_f32_mut(scores),
                stride: columns,
            };
            product::<S, P>(
                s,
                a,
                Right {
                    panels,
                    steps,
                    columns,
                },
                &mut to,
            );
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
        let a = Left {
            cells: gradient,
            row_stride: score_stride,
            step_stride: 1,
            rows: tokens,
        };
        product::<S, P>(
            s,
            a,
            Right {
                panels,
                steps,
                columns: pad,
            },
            &mut ToCells::<P>::new(&mut qkv_gradient[q..], stride),
        );
        // dk = score gradient^T * q and dv = probabilities^T * output gradient
        for (left, from, from_stride, to) in [
            (gradient, &qkv[q..], stride, k),
            (probabilities, output, out_stride, v),
        ] {
            let tall = &mut second[..panels_len(columns, steps, columns)];
            down_rows::<S, P>(
                s,
                Rows::new(left, score_stride, tokens),
                columns,
                columns,
                tall,
            );
            let panels = &mut first[..panels_len(pad, steps, PANEL)];
            down_rows::<S, P>(s, Rows::new(from, from_stride, tokens), pad, PANEL, panels);
            let a = Left {
                cells: tall,
                row_stride: 1,
                step_stride: columns,
                rows: tokens,
            };
            product::<S, P>(
                s,
                a,
                Right {
                    panels,
                    steps,
                    columns: pad,
                },
                &mut ToCells::<P>::new(&mut qkv_gradient[to..], stride),
            );
        }
    }
}

/// `scale * p * (gradient - sum(p * gradient))`.
#[inline(always)]
fn score_gradient_row<S: Lanes, P: Element>(
    s: S,
    p: &[u32],
    gradient: &[f32],
    scale: f32,
    to: &mut [u32],
) {
    let mut sum = s.splat(0.0);
    for (i, part) in gradient.as_chunks::<LANES>().0.iter().enumerate() {
        sum = s.fma(s.load(part), P::load(s, p, P::cells(i * LANES)), sum);
    }
    let (sum, scale) = (s.splat(s.sum(sum)), s.splat(scale));
    for (i, part) in gradient.as_chunks::<LANES>().0.iter().enumerate() {
        let p = s.mul(P::load(s, p, P::cells(i * LANES)), scale);
        P::store(
            s,
            to,
            P::cells(i * LANES),
            s.mul(p, s.sub(s.load(part), sum)),
        );
    }
}
