//! Stands in for `columns.rs` in builds without the feature `parquet`: everything is refused.

use std::path::Path;

use crate::error::{Error, Result};

/// What a file says about its images.
#[derive(Debug)]
pub struct Columns {
    /// Name of the column of labels; none if there is none.
    pub label: Option<String>,
    /// Names of the classes, if the file has them.
    pub classes: Option<Vec<String>>,
    /// Length of the images in bytes, as far as the file says.
    pub bytes: u64,
    /// Number of rows.
    pub rows: u64,
}

/// An open Parquet file; there is none.
pub enum Rows {}

impl Rows {
    /// Refuses every file.
    pub fn open(_: &Path) -> Result<(Self, Columns)> {
        Err(
            Error::input("this build of advxl cannot read Parquet files")
                .hint("build the program with `--features parquet`"),
        )
    }

    /// Returns nothing, as there is no file.
    pub fn images(&self, _: impl FnMut(Option<&[u8]>) -> Result<()>) -> Result<()> {
        match *self {}
    }

    /// Returns nothing, as there is no file.
    pub fn labels(&self) -> Result<Option<Vec<Option<i64>>>> {
        match *self {}
    }
}
