//! The two formats of a product's operands, f32 and bf16, behind one name.
//!
//! Operands are stored in 32-bit *cells*, so that packing, tiling and addresses are the same for
//! both: a cell is one f32, or two bf16 that are neighbors along the summed dimension. Rows are
//! padded to whole vectors of sixteen elements, and the padding is zero.

use crate::Precision;
use crate::lanes::{LANES, Lanes, chunk, chunk_mut};

/// Rounds a number of elements up to whole vectors.
pub(crate) const fn padded(elements: usize) -> usize {
    elements.next_multiple_of(LANES)
}

/// The format of a product's operands.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// Elements per cell.
    const PER_CELL: usize;
    /// Sixteen elements from `cell` on.
    fn load<S: Lanes>(s: S, cells: &[u32], cell: usize) -> S::V;
    /// Writes sixteen elements from `cell` on.
    fn store<S: Lanes>(s: S, cells: &mut [u32], cell: usize, v: S::V);
    /// `sum + a * b`, summed over the elements of each cell.
    fn dot<S: Lanes>(s: S, sum: S::V, a: S::C, b: S::C) -> S::V;
    /// Cells along the summed dimension when that dimension is the rows: sixteen columns of one row
    /// (f32), or of this row and the next, if there is one (bf16).
    fn across<S: Lanes>(s: S, row: &[u32], next: Option<&[u32]>) -> S::C;

    /// Number of cells that hold `elements` elements.
    #[inline(always)]
    fn cells(elements: usize) -> usize {
        elements.div_ceil(Self::PER_CELL)
    }
}

/// Operands as they are.
#[derive(Clone, Copy)]
pub(crate) struct F32;

/// Operands rounded to bf16.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;

impl Element for F32 {
    const PER_CELL: usize = 1;
    #[inline(always)]
    fn load<S: Lanes>(s: S, cells: &[u32], cell: usize) -> S::V {
        s.load(&chunk(cells, cell).map(f32::from_bits))
    }
    #[inline(always)]
    fn store<S: Lanes>(s: S, cells: &mut [u32], cell: usize, v: S::V) {
        let mut values = [0.0; LANES];
        s.store(&mut values, v);
        *chunk_mut(cells, cell) = values.map(f32::to_bits);
    }
    #[inline(always)]
    fn dot<S: Lanes>(s: S, sum: S::V, a: S::C, b: S::C) -> S::V {
        s.dot_f32(sum, a, b)
    }
    #[inline(always)]
    fn across<S: Lanes>(s: S, row: &[u32], _: Option<&[u32]>) -> S::C {
        s.load_cells(chunk(row, 0))
    }
}

impl Element for Bf16 {
    const PER_CELL: usize = 2;
    #[inline(always)]
    fn load<S: Lanes>(s: S, cells: &[u32], cell: usize) -> S::V {
        s.load_bf16(chunk(cells, cell))
    }
    #[inline(always)]
    fn store<S: Lanes>(s: S, cells: &mut [u32], cell: usize, v: S::V) {
        s.store_bf16(chunk_mut(cells, cell), v);
    }
    #[inline(always)]
    fn dot<S: Lanes>(s: S, sum: S::V, a: S::C, b: S::C) -> S::V {
        s.dot_bf16(sum, a, b)
    }
    #[inline(always)]
    fn across<S: Lanes>(s: S, row: &[u32], next: Option<&[u32]>) -> S::C {
        s.interleave(chunk(row, 0), next.map_or(&[0; 8], |next| chunk(next, 0)))
    }
}

impl Precision {
    /// [`Element::PER_CELL`] of the format.
    pub(crate) const fn per_cell(self) -> usize {
        match self {
            Self::F32 => F32::PER_CELL,
            Self::Bf16 => Bf16::PER_CELL,
        }
    }
}

/// A kernel over both formats.
pub(crate) trait ElementOp {
    /// What the kernel returns.
    type Output;
    /// The kernel; `#[inline(always)]` as in [`Op`](crate::lanes::Op).
    fn run<S: Lanes, P: Element>(self, s: S) -> Self::Output;
}

/// An [`ElementOp`] with its format chosen.
pub(crate) struct With<O>(pub(crate) Precision, pub(crate) O);

impl<O: ElementOp> crate::lanes::Op for With<O> {
    type Output = O::Output;
    #[inline(always)]
    fn run<S: Lanes>(self, s: S) -> O::Output {
        match self.0 {
            Precision::F32 => self.1.run::<S, F32>(s),
            Precision::Bf16 => self.1.run::<S, Bf16>(s),
        }
    }
}
