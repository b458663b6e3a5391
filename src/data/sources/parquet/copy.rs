//! The images of one Parquet file, copied to the local cache so that each can be read by itself.
//!
//! A row of a Parquet file cannot be read without decompressing its page, usually a megabyte of images, and training
//! reads rows in random order. So the encoded images are copied once, without change:
//!
//! | part       | contents                                                                                   |
//! |------------|--------------------------------------------------------------------------------------------|
//! | images     | the encoded images, one after another                                                      |
//! | table      | 16 bytes for each row: offset u64, length u32 (0: no image), label i32 (-1: none), little-endian |
//! | about      | JSON: the column of labels and the names of the classes, or null                           |
//! | end        | length of `about` u64, number of rows u64, BLAKE3 hash of `table` and `about`, `MAGIC`     |

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::columns::Rows;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::files::{Draft, Source};
use crate::storage::unpack::{kept, require_space};

/// The last bytes of a copy. Another layout gets another number.
const MAGIC: &[u8; 8] = b"ADVXLPQ1";
const END: usize = 8 + 8 + 32 + 8;
const ROW: usize = 16;
/// Images are written in pieces of about this many bytes.
const PIECE: usize = 4 << 20;
/// Largest number of classes, the same as for `tensors:`.
const MOST_CLASSES: i64 = 1_000_000;

/// The copy of a file.
#[derive(Debug)]
pub struct Copied {
    file: Source,
    /// Path of the copy.
    pub path: PathBuf,
    table: Vec<Row>,
    about: About,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    at: u64,
    length: u32,
    label: i32,
}

#[derive(Debug, Serialize, Deserialize)]
struct About {
    label: Option<String>,
    classes: Option<Vec<String>>,
}

impl Copied {
    /// Opens the copy of a file, and makes it if it is not in the cache.
    ///
    /// Errors: those of [`Rows`]; a label that is too large; no space for the copy.
    pub fn open(path: &Path) -> Result<Self> {
        let read = || {
            let stamp = files::stamp(path)?;
            let (copy, file, _) = kept(path, stamp, &["images"], |to| Ok((copy(path, &to)?, 0)))?;
            Self::read(file, copy)
        };
        read().context(|| format!("`{}`", path.display()))
    }

    fn read(file: Source, path: PathBuf) -> Result<Self> {
        let broken = || {
            let message = format!("`{}`, its copy in the cache, is damaged", path.display());
            Error::failed(message).hint("remove the copy, and run the same command again")
        };
        let length = file.length();
        let end_at = length.checked_sub(END as u64).ok_or_else(broken)?;
        let end = file.bytes(end_at, END as u64)?.ok_or_else(broken)?;
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| end[at + byte]));
        let (about_length, rows) = (number(0), number(8));
        let about_at = end_at.checked_sub(about_length).ok_or_else(broken)?;
        let table_at = rows
            .checked_mul(ROW as u64)
            .and_then(|size| about_at.checked_sub(size));
        let table_at = table_at.ok_or_else(broken)?;
        let bytes = file
            .bytes(table_at, end_at - table_at)?
            .ok_or_else(broken)?;
        if !end.ends_with(MAGIC) || blake3::hash(&bytes).as_bytes()[..] != end[16..48] {
            return Err(broken());
        }
        let (table, about) = bytes.split_at((about_at - table_at) as usize);
        let table = table.chunks_exact(ROW).map(|row| Row {
            at: u64::from_le_bytes(std::array::from_fn(|byte| row[byte])),
            length: u32::from_le_bytes(std::array::from_fn(|byte| row[8 + byte])),
            label: i32::from_le_bytes(std::array::from_fn(|byte| row[12 + byte])),
        });
        Ok(Self {
            table: table.collect(),
            about: serde_json::from_slice(about).map_err(|_| broken())?,
            file,
            path,
        })
    }

    /// Returns the number of rows.
    pub fn row_count(&self) -> usize {
        self.table.len()
    }

    /// Returns the bytes of an image; none if the row has none.
    pub fn bytes(&self, row: usize) -> Result<Option<Vec<u8>>> {
        let row = self.table[row];
        let mut bytes = vec![0; row.length as usize];
        self.file.fill(row.at, &mut bytes)?;
        Ok((row.length > 0).then_some(bytes))
    }

    /// Returns the label of a row; none if it is null or negative.
    pub fn label(&self, row: usize) -> Option<u32> {
        u32::try_from(self.table[row].label).ok()
    }

    /// Returns the name of the column of labels, if there is one.
    pub fn label_column(&self) -> Option<&str> {
        self.about.label.as_deref()
    }

    /// Returns the names of the classes, if the file has them.
    pub fn classes(&self) -> Option<&[String]> {
        self.about.classes.as_deref()
    }
}

fn copy(path: &Path, to: &Path) -> Result<Draft> {
    let (rows, columns) = Rows::open(path)?;
    let labels = rows.labels()?;
    require_space(
        "copying its images",
        to,
        columns
            .bytes
            .saturating_add(columns.rows.saturating_mul(ROW as u64)),
    )?;
    let mut draft = Draft::create(to)?;
    let (mut at, mut piece, mut table) = (0, Vec::new(), Vec::new());
    let mut number = 0;
    rows.images(|image| {
        let image = image.unwrap_or_default();
        let label = match &labels {
            Some(labels) => checked(labels.get(number).copied().flatten(), number)?,
            None => -1,
        };
        let length = u32::try_from(image.len())
            .map_err(|_| Error::input(format!("row {number} is too long")))?;
        table.extend((at + piece.len() as u64).to_le_bytes());
        table.extend(length.to_le_bytes());
        table.extend(label.to_le_bytes());
        piece.extend(image);
        number += 1;
        if piece.len() >= PIECE {
            draft.write(at, &piece)?;
            at += piece.len() as u64;
            piece.clear();
        }
        Ok(())
    })?;
    if let Some(labels) = &labels
        && labels.len() != number
    {
        let message = format!("{number} images, but {} labels", labels.len());
        return Err(Error::input(message).hint("copy or download it again"));
    }
    let about = About {
        label: columns.label,
        classes: columns.classes,
    };
    let about = serde_json::to_vec(&about).map_err(|error| Error::failed(error.to_string()))?;
    let about_length = about.len() as u64;
    table.extend(about);
    let hash = blake3::hash(&table);
    piece.append(&mut table);
    piece.extend(about_length.to_le_bytes());
    piece.extend((number as u64).to_le_bytes());
    piece.extend(hash.as_bytes());
    piece.extend(MAGIC);
    draft.write(at, &piece)?;
    Ok(draft)
}

/// Returns a label as it is in the table.
fn checked(label: Option<i64>, row: usize) -> Result<i32> {
    match label {
        Some(label) if label >= MOST_CLASSES => {
            let message = format!(
                "row {row} has label {label}, expected 0 to {}",
                MOST_CLASSES - 1
            );
            Err(Error::input(message).hint("labels start at 0"))
        }
        Some(label) if label >= 0 => Ok(label as i32),
        _ => Ok(-1),
    }
}
