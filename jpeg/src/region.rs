//! Rectangles of pixels.

use std::ops::Range;

/// A rectangle of pixels in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Columns to its left.
    pub left: usize,
    /// Rows above it.
    pub top: usize,
    /// Width in columns.
    pub width: usize,
    /// Height in rows.
    pub height: usize,
}

impl Region {
    /// Returns the region of a whole image.
    pub fn whole(width: usize, height: usize) -> Self {
        let (left, top) = (0, 0);
        Self {
            left,
            top,
            width,
            height,
        }
    }

    /// Returns its columns.
    pub fn columns(&self) -> Range<usize> {
        self.left..self.left + self.width
    }

    /// Returns its rows.
    pub fn rows(&self) -> Range<usize> {
        self.top..self.top + self.height
    }
}
