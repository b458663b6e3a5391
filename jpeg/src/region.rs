//! Rectangles of pixels.

use std::ops::Range;

/// A rectangle of pixels within a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Columns on the left of it.
    pub left: usize,
    /// Rows above it.
    pub top: usize,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl Region {
    /// All of a picture.
    pub fn whole(width: usize, height: usize) -> Self {
        let (left, top) = (0, 0);
        Self {
            left,
            top,
            width,
            height,
        }
    }

    /// Its columns.
    pub fn columns(&self) -> Range<usize> {
        self.left..self.left + self.width
    }

    /// Its rows.
    pub fn rows(&self) -> Range<usize> {
        self.top..self.top + self.height
    }
}
