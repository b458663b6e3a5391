//! Bringing the second operand of a product into panels of 32 columns.
//!
//! ```text
//!            columns 0..32   32..64  ...
//!          +---------------+-------
//!  step 0  | c0 c1 ... c31 |           a cell is one f32 of row `step`,
//!  step 1  | c0 c1 ... c31 |           or the bf16 of rows 2 step and 2 step + 1
//!    ...   |               |
//!          +---------------+-------    each panel is contiguous
//! ```
//!
//! Sources are rows of cells ([`crate::cells`]). The summed dimension is either down the rows
//! ([`down_rows`]) or along them ([`along_rows`], the layout of a torch weight in the forward pass).

use crate::cells::Element;
use crate::lanes::{LANES, Lanes, chunk, chunk_mut};

/// Columns of a panel of the second operand.
pub(crate) const PANEL: usize = 32;
/// Columns of a panel of a first operand whose summed dimension is down the rows: whole vectors,
/// and whole register tiles of twelve rows.
pub(crate) const TALL_PANEL: usize = 48;

/// Rows of cells: row `i` starts at `i * stride`.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) cells: &'a [u32],
    pub(crate) stride: usize,
    pub(crate) count: usize,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    pub(crate) fn new(cells: &'a [u32], stride: usize, count: usize) -> Self {
        Self { cells, stride, count }
    }
    #[inline(always)]
    fn row(&self, i: usize) -> &'a [u32] {
        &self.cells[i * self.stride..]
    }
}

/// Cells that panels of `columns` columns and `steps` steps take.
pub(crate) fn panels_len(columns: usize, steps: usize, panel: usize) -> usize {
    columns.div_ceil(panel) * panel * steps
}

/// Packs `[summed, columns]` into panels of `panel` columns; `columns` in whole vectors.
#[inline(always)]
pub(crate) fn down_rows<S: Lanes, P: Element>(s: S, from: Rows, columns: usize, panel: usize, to: &mut [u32]) {
    let steps = P::cells(from.count);
    for step in 0..steps {
        let first = step * P::PER_CELL;
        let row = from.row(first);
        let next = (first + 1 < from.count).then(|| from.row(first + 1));
        for column in (0..columns).step_by(LANES) {
            let at = P::cells(column);
            let cells = P::across(s, &row[at..], next.map(|next| &next[at..]));
            let start = (column / panel * steps + step) * panel + column % panel;
            s.store_cells(chunk_mut(to, start), cells);
        }
    }
}

/// Packs `[columns, summed]` into panels of 32 columns; `steps` cells of every row are taken.
/// Columns that fill up the last panel are zero.
#[inline(always)]
pub(crate) fn along_rows<S: Lanes>(s: S, from: Rows, steps: usize, to: &mut [u32]) {
    for (index, panel) in to.chunks_exact_mut(PANEL * steps).enumerate() {
        for half in [0, LANES] {
            let column = index * PANEL + half;
            for step in (0..steps).step_by(LANES) {
                let count = LANES.min(steps - step);
                let mut block = [s.splat_cell(0); LANES];
                for (i, row) in block.iter_mut().enumerate().take(from.count.saturating_sub(column)) {
                    let cells = &from.row(column + i)[step..];
                    *row = if count == LANES {
                        s.load_cells(chunk(cells, 0))
                    } else {
                        let mut part = [0; LANES];
                        part[..count].copy_from_slice(&cells[..count]);
                        s.load_cells(&part)
                    };
                }
                s.transpose(&mut block);
                for (i, &cells) in block.iter().enumerate().take(count) {
                    s.store_cells(chunk_mut(panel, (step + i) * PANEL + half), cells);
                }
            }
        }
    }
}
