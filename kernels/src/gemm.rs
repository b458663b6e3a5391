//! Matrix products.
//!
//! ```text
//!                    packed B: panels of 32 columns, one cell per step and column
//!                        step 0   b b b b ... b     two vectors of 16 cells
//!                        step 1   b b b b ... b
//!                         ...
//!      A, in place     +-------------------------+
//!  row 0   a a a ...   | sums of 12 x 32 elements|  24 vector registers on AVX-512;
//!  row 1   a a a ...   | one cell of A times two |  they leave the registers after a piece of
//!   ...                | vectors of B per row and|  the steps and come back for the next one;
//!  row 11  a a a ...   | step                    |  after the last through the epilogue:
//!                      +-------------------------+  bias, GELU, residual, conversion
//! ```
//!
//! A is read where it lies, by broadcast, through two strides (row and step), which covers both a
//! row-major matrix and one packed down its rows. The rows of A are divided evenly into tiles of at
//! most twelve, so that no thin tile remains.
//!
//! Every element of the result is summed over the steps in order, no matter which tile it falls into, and waits
//! between pieces as the same f32: its bits do not depend on the other rows, on the number of rows, or on the
//! threads.

#[cfg(target_arch = "x86_64")]
mod avx512;

use std::marker::PhantomData;
use std::ops::Range;

use crate::buffer::{Buffer, as_f32_mut};
use crate::cells::Element;
#[cfg(target_arch = "x86_64")]
use crate::lanes::Assembly;
use crate::lanes::{LANES, Lanes, Op, chunk_mut};
use crate::pack::PANEL;

/// Most rows of a register tile on any path.
const MAX_ROWS: usize = 12;

/// The sums of a tile, on their way from the registers to the next piece or the epilogue: rows of 32.
type Tile = [f32; TILE];
const TILE: usize = MAX_ROWS * PANEL;

/// The first operand: `cells[row * row_stride + step * step_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) cells: &'a [u32],
    pub(crate) row_stride: usize,
    pub(crate) step_stride: usize,
    pub(crate) rows: usize,
}

/// The second operand: panels of 32 columns with `steps` steps. `columns` columns, in whole
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

/// Most steps of a panel that the rows pass before the next ones: 28 KiB, which stay in the first-level
/// cache while all tiles of the rows read them.
const MAX_STEPS: usize = 224;

/// Multiplies and hands every vector of sums to the epilogue, one panel of B after the other.
#[inline(always)]
pub(crate) fn product<S: Lanes, P: Element>(s: S, a: Left, b: Right, epilogue: &mut impl Epilogue<S>) {
    sum_of_products::<S, P>(s, &[(a, b)], epilogue);
}

/// The sum of several products of the same rows and columns, part after part.
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
    let mut pieces = Vec::new();
    for &(a, b) in parts {
        let count = b.steps.div_ceil(MAX_STEPS).max(1);
        pieces.extend((0..count).map(|i| Piece { a, b, start: b.steps * i / count, end: b.steps * (i + 1) / count }));
    }
    let groups = groups(&pieces, rows);
    // Where the sums of every tile wait from one piece to the next, of all panels if there is another group;
    // one place is enough for one piece.
    let panels = if groups.len() > 1 { columns.div_ceil(PANEL) } else { 1 };
    let mut many = Buffer::new(if pieces.len() > 1 { panels * tiles * TILE } else { 0 });
    let mut one: Tile = [0.0; _];
    for group in groups {
        for column in (0..columns).step_by(PANEL) {
            let vectors = if columns - column > LANES { 2 } else { 1 };
            let first = column / PANEL % panels * tiles * TILE;
            for index in group.clone() {
                let piece = &pieces[index];
                // What passes the rows after this piece: the next of the group, of the next panel, of the next group.
                let next = match column + PANEL {
                    _ if index + 1 < group.end => pieces[index + 1].panel(column),
                    after if after < columns => pieces[group.start].panel(after),
                    _ => pieces.get(group.end).map_or(piece.panel(column), |piece| piece.panel(0)),
                };
                let mut row = 0;
                for number in 0..tiles {
                    let rows = height + usize::from(number < taller);
                    let tile = match pieces.len() {
                        1 => &mut one,
                        _ => chunk_mut(as_f32_mut(&mut many), first + number * TILE),
                    };
                    let Piece { a, start, end, .. } = *piece;
                    let job = Job {
                        a: a.cells.as_ptr().wrapping_add(row * a.row_stride + start * a.step_stride),
                        row_stride: a.row_stride,
                        step_stride: a.step_stride,
                        b: piece.panel(column),
                        steps: end - start,
                        begin: index == 0,
                        // Two tiles together ask for all of it, one line of 16 cells a step.
                        ahead: next.wrapping_add(number % 2 * LANES * (end - start)),
                        tile,
                    };
                    // SAFETY: the assertions above cover all rows and steps of A and all panels of B, of every
                    // part; the tiles' rows add up to those of A, the pieces' steps to those of B.
                    unsafe { run::<S, P>(s, job, rows, vectors) };
                    if index + 1 == pieces.len() {
                        for (i, sums) in tile.as_chunks::<PANEL>().0.iter().enumerate().take(rows) {
                            for (j, sums) in sums.as_chunks::<LANES>().0.iter().enumerate().take(vectors) {
                                epilogue.put(s, row + i, column + j * LANES, s.load(sums));
                            }
                        }
                    }
                    row += rows;
                }
            }
        }
    }
}

/// Some steps of a part.
struct Piece<'a> {
    a: Left<'a>,
    b: Right<'a>,
    start: usize,
    end: usize,
}

impl Piece<'_> {
    /// Its cells of the panel at `column`.
    fn panel(&self, column: usize) -> *const u32 {
        self.b.panels.as_ptr().wrapping_add(column * self.b.steps + self.start * PANEL)
    }
}

/// Pieces that pass together from panel to panel: those whose cells of A, 256 KiB, stay in the second-level cache.
fn groups(pieces: &[Piece], rows: usize) -> Vec<Range<usize>> {
    const MOST: usize = 64 * 1024;
    let mut groups = Vec::new();
    let (mut start, mut cells) = (0, 0);
    for (index, piece) in pieces.iter().enumerate() {
        let size = rows * (piece.end - piece.start);
        if index > start && cells + size > MOST {
            groups.push(start..index);
            (start, cells) = (index, 0);
        }
        cells += size;
    }
    groups.push(start..pieces.len());
    groups
}

/// One tile of one piece: all the rows it has, and the piece's steps.
struct Job<'a> {
    /// Cells of A: `row * row_stride + step * step_stride` from here.
    a: *const u32,
    row_stride: usize,
    step_stride: usize,
    /// Cells of B: `step * 32 + column` from here.
    b: *const u32,
    steps: usize,
    /// Whether the sums start at zero or from the tile.
    begin: bool,
    /// Where memory that comes next begins, to be fetched one line of 16 cells a step; never read.
    ahead: *const u32,
    tile: &'a mut Tile,
}

/// # Safety
///
/// A must hold all rows and steps that the job says, B all steps.
#[inline(always)]
unsafe fn run<S: Lanes, P: Element>(s: S, job: Job, rows: usize, vectors: usize) {
    #[cfg(target_arch = "x86_64")]
    match s.tile_in_assembly(P::PER_CELL) {
        // SAFETY: the path has the instructions, and the caller promises the memory.
        Some(Assembly::F32) => return unsafe { avx512::f32_tile(job, rows, vectors) },
        // SAFETY: as above.
        Some(Assembly::Bf16) => return unsafe { avx512::bf16_tile(job, rows, vectors) },
        None => {}
    }
    macro_rules! by_rows {
        ($($rows:literal)*) => {
            match (rows, vectors) {
                $(($rows, 2) => s.call(SumsOf::<P, $rows, 2>(job, PhantomData)),)*
                $(($rows, 1) => s.call(SumsOf::<P, $rows, 1>(job, PhantomData)),)*
                _ => unreachable!("a tile has 1 to 12 rows and 1 or 2 vectors"),
            }
        };
    }
    by_rows!(1 2 3 4 5 6 7 8 9 10 11 12)
}

/// The register tile. Made only by the `unsafe` [`run`].
struct SumsOf<'a, P, const ROWS: usize, const VECTORS: usize>(Job<'a>, PhantomData<P>);

impl<P: Element, const ROWS: usize, const VECTORS: usize> Op for SumsOf<'_, P, ROWS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        if ROWS > S::TILE_ROWS {
            unreachable!("tiles are no taller than the path's");
        }
        let Job { a, row_stride, step_stride, b, steps, begin, tile, .. } = self.0;
        if begin {
            tile.fill(0.0);
        }
        let mut sums = [[s.splat(0.0); VECTORS]; ROWS];
        for (sums, from) in sums.iter_mut().zip(tile.as_chunks::<PANEL>().0) {
            for (sum, from) in sums.iter_mut().zip(from.as_chunks::<LANES>().0) {
                *sum = s.load(from);
            }
        }
        for step in 0..steps {
            // SAFETY: B has all steps of 32 columns (see `run`).
            let panel = unsafe { &*b.add(step * PANEL).cast::<[[u32; LANES]; 2]>() };
            let mut b = [s.splat_cell(0); VECTORS];
            for (b, panel) in b.iter_mut().zip(panel) {
                *b = s.load_cells(panel);
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                // SAFETY: A has the row `i` and all steps (see `run`).
                let a = s.splat_cell(unsafe { *a.add(i * row_stride + step * step_stride) });
                for (sum, &b) in sums.iter_mut().zip(&b) {
                    *sum = P::dot(s, *sum, a, b);
                }
            }
        }
        for (to, sums) in tile.as_chunks_mut::<PANEL>().0.iter_mut().zip(&sums) {
            for (to, &sum) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
                s.store(to, sum);
            }
        }
    }
}
