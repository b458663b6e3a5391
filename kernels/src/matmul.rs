//! Matrix products of f32 slices: `C = A B`, each operand plain or transposed, with what follows it.
//!
//! For products outside of a block: patch embedding, heads, their gradients. Weights that many
//! products share are packed once, as [`PackedMatrix`]. Work is shared over blocks of rows of C, and
//! every element is summed in one order however the work is shared. The inner product is [`crate::gemm`]'s;
//! long sums are not cut, so operands of tens of thousands of summed elements run below its best rate.

use std::marker::PhantomData;

use rayon::prelude::*;

use crate::Precision;
use crate::buffer::Buffer;
use crate::cells::{Element, ElementOp, With, padded};
use crate::detect::Isa;
use crate::gelu::{self, Gelu};
use crate::gemm::{Epilogue, Left, Right, product};
use crate::lanes::{LANES, Lanes};
use crate::pack::{PANEL, Rows, TALL_PANEL, along_rows, down_rows, panels_len};

/// How an operand lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Row-major as the formula has it: `A` as `[rows, summed]`, `B` as `[summed, columns]`.
    Plain,
    /// The other way round: `A` as `[summed, rows]`, `B` as `[columns, summed]` (a torch weight).
    Transposed,
}

/// What becomes of the product before it is written to C.
#[derive(Debug)]
pub enum Finish<'a> {
    /// `C = A B`
    Store,
    /// `C = A B + bias`; the bias has one element per column.
    Bias(&'a [f32]),
    /// `C = gelu(A B + bias)`.
    BiasGelu {
        /// One element per column.
        bias: &'a [f32],
        /// Which GELU.
        gelu: Gelu,
        /// Receives `A B + bias`, as large as C.
        before: Option<&'a mut [f32]>,
    },
    /// `C = residual + row_scale * (A B + bias)`.
    Residual {
        /// One element per column.
        bias: &'a [f32],
        /// As large as C.
        residual: &'a [f32],
        /// One factor per row; 1 if absent.
        row_scale: Option<&'a [f32]>,
    },
}

/// The second operand of products, packed once.
#[derive(Debug)]
pub struct PackedMatrix {
    isa: Isa,
    precision: Precision,
    summed: usize,
    columns: usize,
    panels: Buffer,
}

impl PackedMatrix {
    /// Packs `b`, which has `summed` rows and `columns` columns (the other way round if transposed).
    ///
    /// # Panics
    ///
    /// If `b` has not `summed * columns` elements.
    pub fn new(b: &[f32], layout: Layout, summed: usize, columns: usize, precision: Precision) -> Self {
        assert!(
            b.len() == summed * columns,
            "`b` has {} elements, summed = {summed} and columns = {columns} need {}",
            b.len(),
            summed * columns
        );
        let isa = Isa::current();
        let source = Source { values: b, layout: layout.other(), summed, columns };
        let steps = summed.div_ceil(precision.per_cell());
        let mut panels = Buffer::new(panels_len(columns, steps, PANEL));
        panels.par_chunks_mut((steps * PANEL).max(1)).enumerate().for_each(|(index, to)| {
            isa.run(With(precision, PackPanel { source, start: index * PANEL, to }));
        });
        Self { isa, precision, summed, columns, panels }
    }
}

/// `C = A B` and what [`Finish`] says; C is `[rows, columns]`, row-major.
///
/// With [`Precision::Bf16`] both operands are rounded to bf16 and the sums kept in f32.
///
/// # Panics
///
/// If a slice has a length that does not match the sizes.
///
/// ```
/// use advxl_kernels::{Finish, Layout, Precision, gemm};
/// let (a, b) = ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]);
/// let mut c = [0.0; 4];
/// gemm([2, 2, 2], (&a, Layout::Plain), (&b, Layout::Transposed), Precision::F32, Finish::Store, &mut c);
/// assert_eq!(c, [17.0, 23.0, 39.0, 53.0]);
/// ```
pub fn gemm(
    [rows, summed, columns]: [usize; 3],
    a: (&[f32], Layout),
    (b, layout): (&[f32], Layout),
    precision: Precision,
    finish: Finish,
    c: &mut [f32],
) {
    gemm_packed(rows, a, &PackedMatrix::new(b, layout, summed, columns, precision), finish, c);
}

/// [`gemm`] with a second operand that was packed before.
///
/// # Panics
///
/// If a slice has a length that does not match the sizes.
pub fn gemm_packed(rows: usize, (a, layout): (&[f32], Layout), b: &PackedMatrix, finish: Finish, c: &mut [f32]) {
    let (summed, columns) = (b.summed, b.columns);
    let lengths = |name: &str, found: usize, right: usize| {
        assert!(
            found == right,
            "`{name}` has {found} elements, [rows, summed, columns] = {:?} need {right}",
            [rows, summed, columns]
        );
    };
    lengths("a", a.len(), rows * summed);
    lengths("c", c.len(), rows * columns);
    finish.check(rows, columns, &lengths);
    if c.is_empty() {
        return;
    }
    // Blocks of one tall panel, or two where there are many rows: few enough to share B's panels.
    let block = if rows > 16 * TALL_PANEL { 2 * TALL_PANEL } else { TALL_PANEL };
    let source = Source { values: a, layout, summed, columns: rows };
    let parts = finish.split(block, columns, rows.div_ceil(block));
    (c.par_chunks_mut(block * columns).zip(parts)).enumerate().for_each(|(index, (c, finish))| {
        let start = index * block;
        b.isa.run(With(b.precision, Block { source, start, rows: c.len() / columns, b, finish, c }));
    });
}

impl Layout {
    fn other(self) -> Self {
        match self {
            Self::Plain => Self::Transposed,
            Self::Transposed => Self::Plain,
        }
    }
}

impl<'a> Finish<'a> {
    fn check(&self, rows: usize, columns: usize, lengths: &impl Fn(&str, usize, usize)) {
        match self {
            Self::Store => {}
            Self::Bias(bias) => lengths("bias", bias.len(), columns),
            Self::BiasGelu { bias, before, .. } => {
                lengths("bias", bias.len(), columns);
                lengths("before", before.as_ref().map_or(rows * columns, |b| b.len()), rows * columns);
            }
            Self::Residual { bias, residual, row_scale } => {
                lengths("bias", bias.len(), columns);
                lengths("residual", residual.len(), rows * columns);
                lengths("row_scale", row_scale.map_or(rows, <[f32]>::len), rows);
            }
        }
    }

    /// The same for every block of rows.
    fn split(self, block: usize, columns: usize, count: usize) -> Vec<Finish<'a>> {
        match self {
            Self::BiasGelu { bias, gelu, before: Some(before) } => before
                .chunks_mut(block * columns)
                .map(|before| Self::BiasGelu { bias, gelu, before: Some(before) })
                .collect(),
            Self::Residual { bias, residual, row_scale } => residual
                .chunks(block * columns)
                .enumerate()
                .map(|(i, residual)| {
                    let row_scale = row_scale.map(|scale| &scale[i * block..]);
                    Self::Residual { bias, residual, row_scale }
                })
                .collect(),
            Self::Store => (0..count).map(|_| Self::Store).collect(),
            Self::Bias(bias) => (0..count).map(|_| Self::Bias(bias)).collect(),
            Self::BiasGelu { bias, gelu, before: None } => {
                (0..count).map(|_| Self::BiasGelu { bias, gelu, before: None }).collect()
            }
        }
    }
}

/// An operand seen as vectors along the summed dimension, one for each of its `columns`.
#[derive(Clone, Copy)]
struct Source<'a> {
    values: &'a [f32],
    /// Plain: `[columns, summed]`, the summed dimension along the rows.
    layout: Layout,
    summed: usize,
    columns: usize,
}

impl Source<'_> {
    /// Rows of cells for `count` columns from `start` on, `[count, summed]` or `[summed, count]`.
    #[inline(always)]
    fn cells<S: Lanes, P: Element>(&self, s: S, start: usize, count: usize) -> (Buffer, usize) {
        let (rows, length, origin, stride) = match self.layout {
            Layout::Plain => (count, self.summed, start * self.summed, self.summed),
            Layout::Transposed => (self.summed, count, start, self.columns),
        };
        let cells = P::cells(padded(length));
        let mut to = Buffer::new(rows * cells);
        for (row, to) in to.chunks_exact_mut(cells.max(1)).enumerate() {
            let from = &self.values[origin + row * stride..][..length];
            for (i, part) in from.chunks(LANES).enumerate() {
                P::store(s, to, P::cells(i * LANES), s.load_part(part));
            }
        }
        (to, cells)
    }
}

/// Packs one panel of the second operand.
struct PackPanel<'a> {
    source: Source<'a>,
    start: usize,
    to: &'a mut [u32],
}

impl ElementOp for PackPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes, P: Element>(self, s: S) {
        let Self { source, start, to } = self;
        let count = PANEL.min(source.columns - start);
        let (cells, stride) = source.cells::<S, P>(s, start, count);
        match source.layout {
            Layout::Plain => along_rows(s, Rows::new(&cells, stride, count), P::cells(source.summed), to),
            Layout::Transposed => {
                down_rows::<S, P>(s, Rows::new(&cells, stride, source.summed), padded(count), PANEL, to);
            }
        }
    }
}

/// A block of rows of C.
struct Block<'a> {
    source: Source<'a>,
    start: usize,
    rows: usize,
    b: &'a PackedMatrix,
    finish: Finish<'a>,
    c: &'a mut [f32],
}

impl ElementOp for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes, P: Element>(self, s: S) {
        let Self { source, start, rows, b, finish, c } = self;
        let steps = P::cells(b.summed);
        let (cells, stride) = source.cells::<S, P>(s, start, rows);
        let packed;
        let a = match source.layout {
            Layout::Plain => Left { cells: &cells, row_stride: stride, step_stride: 1, rows },
            Layout::Transposed => {
                let mut tall = Buffer::new(panels_len(padded(rows), steps, padded(rows)));
                let from = Rows::new(&cells, stride, b.summed);
                down_rows::<S, P>(s, from, padded(rows), padded(rows), &mut tall);
                packed = tall;
                Left { cells: &packed, row_stride: 1, step_stride: padded(rows), rows }
            }
        };
        let right = Right { panels: &b.panels, steps, columns: padded(b.columns) };
        product::<S, P>(s, a, right, &mut Write { finish, c, columns: b.columns, format: PhantomData::<P> });
    }
}

/// Writes rows of f32 without padding.
struct Write<'a, P> {
    finish: Finish<'a>,
    c: &'a mut [f32],
    columns: usize,
    format: PhantomData<P>,
}

impl<S: Lanes, P: Element> Epilogue<S> for Write<'_, P> {
    #[inline(always)]
    fn put(&mut self, s: S, row: usize, column: usize, sums: S::V) {
        let start = row * self.columns + column;
        let end = start + LANES.min(self.columns - column);
        let at = start..end;
        let part = |bias: &[f32]| s.load_part(&bias[column..column + end - start]);
        let value = match &mut self.finish {
            Finish::Store => sums,
            Finish::Bias(bias) => s.add(sums, part(bias)),
            Finish::BiasGelu { bias, gelu, before } => {
                let sums = s.add(sums, part(bias));
                if let Some(before) = before {
                    s.store_part(&mut before[at.clone()], sums);
                }
                gelu::value_and_slope(s, *gelu, sums).0
            }
            Finish::Residual { bias, residual, row_scale } => {
                let scale = s.splat(row_scale.map_or(1.0, |scale| scale[row]));
                s.fma(s.add(sums, part(bias)), scale, s.load_part(&residual[at.clone()]))
            }
        };
        s.store_part(&mut self.c[at], value);
    }
}
