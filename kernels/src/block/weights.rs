//! Weights of a block, packed once per update for all the passes until the next.

use rayon::prelude::*;

use crate::block::BlockShape;
use crate::buffer::Buffer;
use crate::cells::{Element, ElementOp, With, padded};
use crate::detect::Isa;
use crate::lanes::{LANES, Lanes, chunk};
use crate::pack::{PANEL, Rows, along_rows, down_rows, panels_len};
use crate::{Path, Precision};

/// Weights of a block in torch's layout: `[out, in]`, row-major, names as in timm.
///
/// Shapes: norms and `proj_bias`, `fc2_bias` `[width]`; `qkv_weight` `[3 width, width]`, rows in the
/// order `3, heads, head_dim`; `proj_weight` `[width, width]`; `fc1_weight` `[hidden, width]`;
/// `fc2_weight` `[width, hidden]`.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // The names are timm's; the shapes stand above.
pub struct BlockWeights<'a> {
    pub norm1_weight: &'a [f32],
    pub norm1_bias: &'a [f32],
    pub qkv_weight: &'a [f32],
    pub qkv_bias: &'a [f32],
    pub proj_weight: &'a [f32],
    pub proj_bias: &'a [f32],
    pub norm2_weight: &'a [f32],
    pub norm2_bias: &'a [f32],
    pub fc1_weight: &'a [f32],
    pub fc1_bias: &'a [f32],
    pub fc2_weight: &'a [f32],
    pub fc2_bias: &'a [f32],
}

/// A dimension made of groups, each padded to whole vectors: the heads, or one group of all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spread {
    groups: usize,
    size: usize,
}

impl Spread {
    fn whole(size: usize) -> Self {
        Self { groups: 1, size }
    }
    /// Elements without padding.
    pub(super) fn len(self) -> usize {
        self.groups * self.size
    }
    /// Elements with padding.
    pub(super) fn padded(self) -> usize {
        self.groups * padded(self.size)
    }
    /// Whether nothing is padded.
    #[inline(always)]
    fn is_whole(self) -> bool {
        self.size.is_multiple_of(LANES)
    }
    /// Ranges of each group without and with padding: where it starts, and where it starts padded.
    pub(super) fn starts(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.groups).map(move |i| (i * self.size, i * padded(self.size)))
    }
    /// Length of every group.
    pub(super) fn group(self) -> usize {
        self.size
    }
    /// The number of real elements before the padded index `at`.
    pub(super) fn before(self, at: usize) -> usize {
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
    fn pad(self, values: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.padded()];
        for (from, to) in self.starts() {
            out[to..to + self.size].copy_from_slice(&values[from..from + self.size]);
        }
        out
    }
}

/// One linear layer, packed for `y = x W^T` and for `dx = dy W`.
#[derive(Debug)]
pub(super) struct Linear {
    pub(super) rows: Spread,
    pub(super) columns: Spread,
    /// Panels over the outputs, summed over the inputs. The norm's weight before it is folded in.
    pub(super) forward: Buffer,
    /// Panels over the inputs, summed over the outputs.
    pub(super) backward: Buffer,
    /// Padded, with `W * norm_bias` folded in.
    pub(super) bias: Vec<f32>,
}

/// Weight and bias of a norm.
#[derive(Debug)]
pub(super) struct Norm {
    pub(super) weight: Vec<f32>,
    pub(super) bias: Vec<f32>,
}

/// The weights of a block, packed and rounded for all products of both directions.
///
/// Make it once per update; every pass until the next update shares it. It keeps the [`Path`] of
/// the thread that made it.
#[derive(Debug)]
pub struct PackedBlock {
    pub(super) isa: Isa,
    pub(super) precision: Precision,
    width: usize,
    heads: usize,
    hidden: usize,
    pub(super) norm1: Norm,
    pub(super) qkv: Linear,
    pub(super) proj: Linear,
    pub(super) norm2: Norm,
    pub(super) fc1: Linear,
    pub(super) fc2: Linear,
}

impl PackedBlock {
    /// Packs the weights of a block of `heads` heads; the other sizes follow from the slices.
    ///
    /// # Panics
    ///
    /// If the lengths of the slices do not fit each other, or `heads` does not divide the width.
    pub fn new(heads: usize, weights: &BlockWeights, precision: Precision) -> Self {
        let width = weights.norm1_weight.len();
        let hidden = weights.fc1_bias.len();
        assert!(heads > 0 && width > 0 && width.is_multiple_of(heads), "heads = {heads} must divide width = {width}");
        for (name, found, right) in [
            ("norm1_bias", weights.norm1_bias.len(), width),
            ("qkv_weight", weights.qkv_weight.len(), 3 * width * width),
            ("qkv_bias", weights.qkv_bias.len(), 3 * width),
            ("proj_weight", weights.proj_weight.len(), width * width),
            ("proj_bias", weights.proj_bias.len(), width),
            ("norm2_weight", weights.norm2_weight.len(), width),
            ("norm2_bias", weights.norm2_bias.len(), width),
            ("fc1_weight", weights.fc1_weight.len(), hidden * width),
            ("fc2_weight", weights.fc2_weight.len(), width * hidden),
            ("fc2_bias", weights.fc2_bias.len(), width),
        ] {
            assert!(found == right, "`{name}` has {found} elements, width {width} and hidden {hidden} need {right}");
        }
        let isa = Isa::current();
        let whole = Spread::whole(width);
        let inner = Spread { groups: heads, size: width / heads };
        let three = Spread { groups: 3 * heads, ..inner };
        let inside = Spread::whole(hidden);
        let norm = |weight, bias| Norm { weight: whole.pad(weight), bias: whole.pad(bias) };
        let norm1 = norm(weights.norm1_weight, weights.norm1_bias);
        let norm2 = norm(weights.norm2_weight, weights.norm2_bias);
        let pack = |weight, bias, rows, columns, norm| pack_linear(isa, precision, weight, bias, rows, columns, norm);
        let ((qkv, proj), (fc1, fc2)) = rayon::join(
            || {
                rayon::join(
                    || pack(weights.qkv_weight, weights.qkv_bias, three, whole, Some(&norm1)),
                    || pack(weights.proj_weight, weights.proj_bias, whole, inner, None),
                )
            },
            || {
                rayon::join(
                    || pack(weights.fc1_weight, weights.fc1_bias, inside, whole, Some(&norm2)),
                    || pack(weights.fc2_weight, weights.fc2_bias, whole, inside, None),
                )
            },
        );
        Self { isa, precision, width, heads, hidden, norm1, qkv, proj, norm2, fc1, fc2 }
    }

    /// The format of the products' operands.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The instructions its kernels run on.
    pub fn path(&self) -> Path {
        self.isa.path()
    }

    pub(super) fn check(&self, shape: &BlockShape) {
        let found = (shape.width, shape.heads, shape.hidden);
        let packed = (self.width, self.heads, self.hidden);
        assert!(found == packed, "shape has (width, heads, hidden) = {found:?}, the packed weights {packed:?}");
    }
}

fn pack_linear(
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
