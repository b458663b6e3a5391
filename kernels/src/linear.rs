//! Linear layers of a block, packed for both directions, with the norm before them folded in.
//!
//! A norm's weight and bias are parts of the layer that follows: `W (x^ g + b) + c = (W g) x^ + (W b + c)`. So only the
//! normalized rows `x^` are ever written, and [`crate::factors`] takes the layer's gradient apart again.

use rayon::prelude::*;

use crate::Precision;
use crate::buffer::Buffer;
use crate::cells::{Element, ElementOp, With, padded};
use crate::detect::Isa;
use crate::gemm::Right;
use crate::lanes::{LANES, Lanes, chunk};
use crate::pack::{PANEL, Rows, along_rows, down_rows, panels_len};

/// A dimension made of groups, each padded to whole vectors: the heads, or one group of all.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) groups: usize,
    pub(crate) size: usize,
}

impl Spread {
    pub(crate) fn whole(size: usize) -> Self {
        Self { groups: 1, size }
    }
    /// Elements without padding.
    pub(crate) fn len(self) -> usize {
        self.groups * self.size
    }
    /// Elements with padding.
    pub(crate) fn padded(self) -> usize {
        self.groups * padded(self.size)
    }
    /// Whether nothing is padded.
    #[inline(always)]
    fn is_whole(self) -> bool {
        self.size.is_multiple_of(LANES)
    }
    /// Ranges of each group without and with padding: where it starts, and where it starts padded.
    pub(crate) fn starts(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.groups).map(move |i| (i * self.size, i * padded(self.size)))
    }
    /// Length of every group.
    pub(crate) fn group(self) -> usize {
        self.size
    }
    /// The number of real elements before the padded index `at`.
    pub(crate) fn before(self, at: usize) -> usize {
        let pad = padded(self.size).max(1);
        (at / pad * self.size + (at % pad).min(self.size)).min(self.len())
    }
    /// Of `count` padded elements from `at` on, inside one group: where the real ones start, and how many.
    #[inline(always)]
    fn real(self, at: usize, count: usize) -> (usize, usize) {
        let pad = padded(self.size);
        let (group, inside) = (at / pad, at % pad);
        let inside = inside.min(self.size);
        (group * self.size + inside, count.min(self.size - inside))
    }
    /// A padded copy, zero in the padding.
    pub(crate) fn pad(self, values: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.padded()];
        for (from, to) in self.starts() {
            out[to..to + self.size].copy_from_slice(&values[from..from + self.size]);
        }
        out
    }
}

/// One linear layer, packed for `y = x W^T` and for `dx = dy W`.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) rows: Spread,
    pub(crate) columns: Spread,
    /// Panels over the outputs, summed over the inputs. The norm's weight before it is folded in.
    forward: Buffer,
    /// Panels over the inputs, summed over the outputs.
    backward: Buffer,
    /// Padded, with `W * norm_bias` folded in.
    pub(crate) bias: Vec<f32>,
}

impl Linear {
    /// The second operand of `y = x W^T`.
    pub(crate) fn forward<P: Element>(&self) -> Right<'_> {
        Right { panels: &self.forward, steps: P::cells(self.columns.padded()), columns: self.rows.padded() }
    }
    /// The second operand of `dx = dy W`.
    pub(crate) fn backward<P: Element>(&self) -> Right<'_> {
        Right { panels: &self.backward, steps: P::cells(self.rows.padded()), columns: self.columns.padded() }
    }
}

/// Weight and bias of a norm, padded.
#[derive(Debug)]
pub(crate) struct Norm {
    pub(crate) weight: Vec<f32>,
    pub(crate) bias: Vec<f32>,
}

impl Norm {
    pub(crate) fn new(weight: &[f32], bias: &[f32]) -> Self {
        let whole = Spread::whole(weight.len());
        Self { weight: whole.pad(weight), bias: whole.pad(bias) }
    }
}

/// Packs a weight `[rows, columns]` and its bias, with the norm before it, if there is one, folded in.
pub(crate) fn pack_linear(
    isa: Isa,
    precision: Precision,
    weight: &[f32],
    bias: &[f32],
    rows: Spread,
    columns: Spread,
    norm: Option<&Norm>,
) -> Linear {
    let per_cell = precision.per_cell();
    let (row_steps, column_steps) = (rows.padded() / per_cell, columns.padded() / per_cell);
    let mut forward = Buffer::new(panels_len(rows.padded(), column_steps, PANEL));
    let mut backward = Buffer::new(panels_len(columns.padded(), row_steps, PANEL));
    let mut bias = rows.pad(bias);
    // The steps of every backward panel that come from one forward panel's rows.
    let mut parts: Vec<Vec<_>> = (0..rows.padded().div_ceil(PANEL)).map(|_| Vec::new()).collect();
    for panel in backward.chunks_exact_mut((PANEL * row_steps).max(1)) {
        for (parts, part) in parts.iter_mut().zip(panel.chunks_mut(PANEL * PANEL / per_cell)) {
            parts.push(part);
        }
    }
    let panels = forward.par_chunks_mut((PANEL * column_steps).max(1)).zip(parts).zip(bias.par_chunks_mut(PANEL));
    panels.enumerate().with_max_len(1).for_each(|(index, ((forward, backward), bias))| {
        let start = index * PANEL;
        isa.run(With(precision, Pack { weight, rows, columns, norm, start, forward, backward, bias }));
    });
    Linear { rows, columns, forward, backward, bias }
}

/// Packs some rows of a weight for both directions, while they are in the cache.
struct Pack<'a> {
    weight: &'a [f32],
    rows: Spread,
    columns: Spread,
    norm: Option<&'a Norm>,
    /// The first row, with padding.
    start: usize,
    /// Their panel for the forward direction.
    forward: &'a mut [u32],
    /// Their steps of every panel for the backward direction.
    backward: Vec<&'a mut [u32]>,
    /// Their bias; what the norm's bias gives is added.
    bias: &'a mut [f32],
}

impl ElementOp for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes, P: Element>(self, s: S) {
        let Self { weight, rows, columns, norm, start, forward, backward, bias } = self;
        let (count, width) = (bias.len(), columns.padded());
        let stride = P::cells(width);
        // Row by row without padding; none of what is padding.
        let row = |index: usize| {
            let (real, count) = rows.real(start + index, 1);
            &weight[real * columns.len()..][..count * columns.len()]
        };
        let mut cells = Buffer::new(count * stride);
        for (index, to) in cells.chunks_exact_mut(stride).enumerate() {
            spread::<S, P>(s, row(index), columns, None, to);
        }
        for (index, to) in backward.into_iter().enumerate() {
            let from = Rows::new(&cells[P::cells(index * PANEL)..], stride, count);
            down_rows::<S, P>(s, from, PANEL.min(width - index * PANEL), PANEL, to);
        }
        if let Some(norm) = norm {
            // W (x^ g + b) = (W g) x^ + W b.
            for (index, (to, bias)) in cells.chunks_exact_mut(stride).zip(bias).enumerate() {
                spread::<S, P>(s, row(index), columns, Some(norm), to);
                *bias += product(s, row(index), &norm.bias);
            }
        }
        along_rows(s, Rows::new(&cells, stride, count), stride, forward);
    }
}

/// A row of a weight as cells, zero in the padding; with a norm times its weight.
#[inline(always)]
fn spread<S: Lanes, P: Element>(s: S, row: &[f32], columns: Spread, norm: Option<&Norm>, to: &mut [u32]) {
    for at in (0..columns.padded()).step_by(LANES) {
        // Without padding a vector is where it is; the search for its place costs more than its copy.
        let (real, count) = if columns.is_whole() { (at, LANES) } else { columns.real(at, LANES) };
        let mut v = s.load_part(if row.is_empty() { &[] } else { &row[real..real + count] });
        if let Some(norm) = norm {
            v = s.mul(v, s.load(chunk(&norm.weight, at)));
        }
        P::store(s, to, P::cells(at), v);
    }
}

/// The product of a row and a vector that is at least as long.
#[inline(always)]
fn product<S: Lanes>(s: S, row: &[f32], vector: &[f32]) -> f32 {
    // Four sums, so that the additions do not wait for each other.
    let mut sums = [s.splat(0.0); 4];
    for (i, w) in row.chunks(LANES).enumerate() {
        let v = s.load_part(&vector[i * LANES..][..w.len()]);
        sums[i % 4] = s.fma(s.load_part(w), v, sums[i % 4]);
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}
