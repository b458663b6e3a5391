//! Matrix products.
//!
//! ```text
//!                    packed B: panels of 32 columns, one cell per step and column
//!                        step 0   b b b b ... b     two vectors of 16 cells
//!                        step 1   b b b b ... b
//!                         ...
//!      A, in place     +-------------------------+
//!  row 0   a a a ...   | sums of 12 x 32 elements|  24 vector registers on AVX-512;
//!  row 1   a a a ...   | one cell of A times two |  they leave the registers once, after
//!   ...                | vectors of B per row and|  all steps, through the epilogue:
//!  row 11  a a a ...   | step                    |  bias, GELU, residual, conversion
//!                      +-------------------------+
//! ```
//!
//! A is read where it lies, by broadcast, through two strides (row and step), which covers both a
//! row-major matrix and one packed down its rows. The rows of A are divided evenly into tiles of at
//! most twelve, so that no thin tile remains.
//!
//! Every element of the result is summed over the steps in order, in one register, whatever tile it
//! falls into: its bits do not depend on the other rows, on the number of rows, or on the threads.

use std::marker::PhantomData;

use crate::cells::Element;
use crate::lanes::{LANES, Lanes, Op};
use crate::pack::PANEL;

/// Most rows of a register tile on any path.
const MAX_ROWS: usize = 12;

/// The sums of a tile, on their way from the registers to the epilogue.
type Tile = [[f32; PANEL]; MAX_ROWS];

/// The first operand: `cells[row * row_stride + step * step_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) cells: &'a [u32],
    pub(crate) row_stride: usize,
    pub(crate) step_stride: usize,
    pub(crate) rows: usize,
}

/// The second operand: panels of 32 columns with `steps` steps, of which `columns` columns, in whole
/// vectors, are wanted.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    pub(crate) panels: &'a [u32],
    pub(crate) steps: usize,
    pub(crate) columns: usize,
}

/// What becomes of the sums. `column` is a multiple of sixteen.
pub(crate) trait Epilogue<S: Lanes> {
    fn put(&mut self, s: S, row: usize, column: usize, sums: S::V);
}

/// Multiplies and hands every vector of sums to the epilogue, one panel of B after the other.
#[inline(always)]
pub(crate) fn product<S: Lanes, P: Element>(s: S, a: Left, b: Right, epilogue: &mut impl Epilogue<S>) {
    sum_of_products::<S, P>(s, &[(a, b)], epilogue);
}

/// The sum of several products of the same rows and columns, part after part, in the same registers.
#[inline(always)]
pub(crate) fn sum_of_products<S: Lanes, P: Element>(s: S, parts: &[(Left, Right)], epilogue: &mut impl Epilogue<S>) {
    let Some((rows, columns)) = parts.first().map(|(a, b)| (a.rows, b.columns)) else {
        return;
    };
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns.is_multiple_of(LANES), "columns in whole vectors");
    for (a, b) in parts {
        assert!(a.rows == rows && b.columns == columns, "parts have the same rows and columns");
        assert!(b.panels.len() >= columns.div_ceil(PANEL) * PANEL * b.steps, "panels hold all steps and columns");
        if b.steps > 0 {
            let last = (rows - 1) * a.row_stride + (b.steps - 1) * a.step_stride;
            assert!(a.cells.len() > last, "A holds all rows and steps");
        }
    }
    let tiles = rows.div_ceil(S::TILE_ROWS);
    let (height, taller) = (rows / tiles, rows % tiles);
    let mut tile: Tile = [[0.0; PANEL]; MAX_ROWS];
    for column in (0..columns).step_by(PANEL) {
        let vectors = if columns - column > LANES { 2 } else { 1 };
        let mut row = 0;
        for index in 0..tiles {
            let rows = height + usize::from(index < taller);
            let sums = Sums::<P> { parts, row, column, to: &mut tile, format: PhantomData };
            // SAFETY: the assertions above cover all rows and steps of A and all panels of B, of every part;
            // the tiles' rows add up to those of A.
            unsafe { sums.run(s, rows, vectors) };
            for (i, sums) in tile.iter().enumerate().take(rows) {
                for (j, sums) in sums.as_chunks::<LANES>().0.iter().enumerate().take(vectors) {
                    epilogue.put(s, row + i, column + j * LANES, s.load(sums));
                }
            }
            row += rows;
        }
    }
}

/// One tile: its first row and column in all parts.
struct Sums<'a, P> {
    parts: &'a [(Left<'a>, Right<'a>)],
    row: usize,
    column: usize,
    to: &'a mut Tile,
    format: PhantomData<P>,
}

impl<P: Element> Sums<'_, P> {
    /// # Safety
    ///
    /// Every part must hold `rows` rows from `row` on of all its steps, and a panel at `column`.
    #[inline(always)]
    unsafe fn run<S: Lanes>(self, s: S, rows: usize, vectors: usize) {
        macro_rules! by_rows {
            ($($rows:literal)*) => {
                match (rows, vectors) {
                    $(($rows, 2) => s.call(SumsOf::<P, $rows, 2>(self)),)*
                    $(($rows, 1) => s.call(SumsOf::<P, $rows, 1>(self)),)*
                    _ => unreachable!("a tile has 1 to 12 rows and 1 or 2 vectors"),
                }
            };
        }
        by_rows!(1 2 3 4 5 6 7 8 9 10 11 12)
    }
}

/// The register tile. Made only by the `unsafe` [`Sums::run`].
struct SumsOf<'a, P, const ROWS: usize, const VECTORS: usize>(Sums<'a, P>);

impl<P: Element, const ROWS: usize, const VECTORS: usize> Op for SumsOf<'_, P, ROWS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        if ROWS > S::TILE_ROWS {
            unreachable!("tiles are no taller than the path's");
        }
        let Sums { parts, row, column, to, .. } = self.0;
        let mut sums = [[s.splat(0.0); VECTORS]; ROWS];
        for &(Left { cells, row_stride, step_stride, .. }, Right { panels, steps, .. }) in parts {
            for step in 0..steps {
                // SAFETY: the panel at `column` has all steps of 32 columns (see `Sums::run`).
                let panel = unsafe { &*panels.as_ptr().add(column * steps + step * PANEL).cast::<[[u32; LANES]; 2]>() };
                let mut b = [s.splat_cell(0); VECTORS];
                for (b, panel) in b.iter_mut().zip(panel) {
                    *b = s.load_cells(panel);
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: A has the row `row + i` and all steps (see `Sums::run`).
                    let a = s.splat_cell(unsafe { *cells.as_ptr().add((row + i) * row_stride + step * step_stride) });
                    for (sum, &b) in sums.iter_mut().zip(&b) {
                        *sum = P::dot(s, *sum, a, b);
                    }
                }
            }
        }
        for (to, sums) in to.iter_mut().zip(&sums) {
            for (to, &sum) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
                s.store(to, sum);
            }
        }
    }
}
