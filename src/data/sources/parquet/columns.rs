//! Reads the columns of images and labels of a Parquet file, with the crate `parquet` (feature `parquet`).
//!
//! Images are `image` or `img`: the `bytes` of a struct, as Hugging Face's `datasets` writes images, or binary values.
//! Labels are whole numbers in `label`, `labels` or `fine_label`. Other columns are not read.

use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::{Compression, Type};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType};
use parquet::errors::ParquetError;
use parquet::file::metadata::{FileMetaData, ParquetMetaData};
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;

use crate::error::{Error, Result};
use crate::files::Source;

/// The columns of images, in order of preference.
const IMAGES: [&str; 4] = ["image.bytes", "img.bytes", "image", "img"];
/// The columns of labels, in order of preference.
const LABELS: [&str; 3] = ["label", "labels", "fine_label"];
/// Rows read at a time.
const ROWS: usize = 64;

const FORM: &str = "the file needs a column `image` or `img` of encoded images, and a column `label`, `labels` or \
                    `fine_label` of whole numbers, as Hugging Face's `datasets` writes them";
const AGAIN: &str = "copy or download it again";

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

/// An open Parquet file.
pub struct Rows {
    reader: SerializedFileReader<Chunks>,
    image: usize,
    label: Option<usize>,
}

impl Rows {
    /// Reads the metadata of a file.
    ///
    /// Errors: another kind of file, a damaged one, one without a column of images, an unsupported compression.
    pub fn open(path: &Path) -> Result<(Self, Columns)> {
        guarded(|| Self::read(path))
    }

    fn read(path: &Path) -> Result<(Self, Columns)> {
        let source = Source::open(path)?;
        let start = source
            .bytes(0, source.length().min(256))?
            .unwrap_or_default();
        if !start.starts_with(b"PAR1") {
            let found = crate::image::content::of(&start);
            let what = found.map_or_else(String::new, |found| format!("; this is {}", found.what));
            let hint = found.map_or(AGAIN, |found| found.hint);
            return Err(Error::input(format!("not a Parquet file{what}")).hint(hint));
        }
        let reader = SerializedFileReader::new(Chunks(Arc::new(source))).map_err(explain)?;
        let metadata = reader.metadata();
        let (image, label) = chosen(metadata.file_metadata())?;
        for column in [Some(image), label].into_iter().flatten() {
            check_compression(metadata, column)?;
        }
        let label_name = label.map(|label| name_of(metadata.file_metadata(), label));
        let groups = metadata.row_groups().iter();
        let columns = Columns {
            classes: label_name
                .as_deref()
                .and_then(|label| classes(metadata.file_metadata(), label)),
            label: label_name,
            bytes: groups
                .map(|group| group.column(image).uncompressed_size().max(0) as u64)
                .sum(),
            rows: u64::try_from(metadata.file_metadata().num_rows()).unwrap_or(0),
        };
        let rows = Self {
            reader,
            image,
            label,
        };
        Ok((rows, columns))
    }

    /// Calls `take` with the image of each row, none for rows without one, in order.
    pub fn images(&self, mut take: impl FnMut(Option<&[u8]>) -> Result<()>) -> Result<()> {
        guarded(|| {
            self.columns(self.image, |column, extent| match column {
                ColumnReader::ByteArrayColumnReader(column) => {
                    values(column, extent, |value: Option<&ByteArray>| {
                        take(value.map(ByteArray::data))
                    })
                }
                _ => Err(Error::input("the images are not binary").hint(FORM)),
            })
        })
    }

    /// Returns the label of each row, none for rows without one; none at all without a column of labels.
    pub fn labels(&self) -> Result<Option<Vec<Option<i64>>>> {
        let Some(label) = self.label else {
            return Ok(None);
        };
        let mut labels = Vec::new();
        guarded(|| {
            self.columns(label, |column, extent| match column {
                ColumnReader::Int32ColumnReader(column) => {
                    values(column, extent, |value: Option<&i32>| {
                        labels.push(value.map(|value| i64::from(*value)));
                        Ok(())
                    })
                }
                ColumnReader::Int64ColumnReader(column) => {
                    values(column, extent, |value: Option<&i64>| {
                        labels.push(value.copied());
                        Ok(())
                    })
                }
                _ => Err(Error::input("the labels are not whole numbers").hint(FORM)),
            })
        })?;
        Ok(Some(labels))
    }

    /// Calls `take` with the reader of a column and its extent in each group of rows.
    fn columns(
        &self,
        column: usize,
        mut take: impl FnMut(ColumnReader, Extent) -> Result<()>,
    ) -> Result<()> {
        let schema = self.reader.metadata().file_metadata().schema_descr();
        let most = schema.column(column).max_def_level();
        for number in 0..self.reader.num_row_groups() {
            let group = self.reader.get_row_group(number).map_err(explain)?;
            let rows = usize::try_from(group.metadata().num_rows()).unwrap_or(0);
            let extent = Extent { rows, most };
            take(group.get_column_reader(column).map_err(explain)?, extent)?;
        }
        Ok(())
    }
}

/// The number of rows in a group, and the level of values that are not null.
#[derive(Clone, Copy)]
struct Extent {
    rows: usize,
    most: i16,
}

/// Calls `take` with the value of each row.
fn values<T: DataType>(
    mut column: ColumnReaderImpl<T>,
    Extent { rows, most }: Extent,
    mut take: impl FnMut(Option<&T::T>) -> Result<()>,
) -> Result<()> {
    let (mut left, mut levels, mut values) = (rows, Vec::new(), Vec::new());
    while left > 0 {
        levels.clear();
        values.clear();
        let wanted = left.min(ROWS);
        let (read, ..) = column
            .read_records(wanted, (most > 0).then_some(&mut levels), None, &mut values)
            .map_err(explain)?;
        if read == 0 {
            return Err(Error::input("a column has fewer values than rows").hint(AGAIN));
        }
        left -= read.min(left);
        let mut present = values.iter();
        for row in 0..read {
            let is_there = most == 0 || levels.get(row) == Some(&most);
            take(if is_there { present.next() } else { None })?;
        }
    }
    Ok(())
}

/// Returns the columns of images and labels.
fn chosen(metadata: &FileMetaData) -> Result<(usize, Option<usize>)> {
    let columns = metadata.schema_descr().columns();
    let find = |names: &[&str], is_type: fn(&ColumnDescriptor) -> bool| {
        names.iter().find_map(|name| {
            columns.iter().position(|column| {
                column.path().string() == *name && column.max_rep_level() == 0 && is_type(column)
            })
        })
    };
    let image = find(&IMAGES, |column| column.physical_type() == Type::BYTE_ARRAY);
    let label = find(&LABELS, |column| {
        matches!(column.physical_type(), Type::INT32 | Type::INT64)
    });
    let Some(image) = image else {
        let found = columns.iter().take(12).map(|column| {
            let name: String = column
                .path()
                .string()
                .chars()
                .take(80)
                .flat_map(char::escape_debug)
                .collect();
            format!("`{name}` ({})", column.physical_type())
        });
        let found: Vec<String> = found.collect();
        let message = format!("no column of encoded images; found {}", found.join(", "));
        return Err(Error::input(message).hint(FORM));
    };
    Ok((image, label))
}

fn name_of(metadata: &FileMetaData, column: usize) -> String {
    metadata.schema_descr().column(column).path().string()
}

fn check_compression(metadata: &ParquetMetaData, column: usize) -> Result<()> {
    for group in metadata.row_groups() {
        let compression = group.column(column).compression();
        if !matches!(
            compression,
            Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_)
        ) {
            let name = name_of(metadata.file_metadata(), column);
            let message =
                format!("column `{name}` is compressed with {compression}, which is not supported");
            return Err(Error::input(message)
                .hint("write the file again with `compression=\"snappy\"`, \"zstd\" or \"none\""));
        }
    }
    Ok(())
}

/// Returns the names of the classes of a label, which `datasets` writes into the key `huggingface`.
fn classes(metadata: &FileMetaData, label: &str) -> Option<Vec<String>> {
    let mut pairs = metadata.key_value_metadata()?.iter();
    let text = pairs
        .find(|pair| pair.key == "huggingface")?
        .value
        .as_ref()?;
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let names = value["info"]["features"][label]["names"].as_array()?;
    names
        .iter()
        .map(|name| name.as_str().map(str::to_owned))
        .collect()
}

fn explain(error: ParquetError) -> Error {
    let text = error.to_string();
    let text = text.strip_prefix("Parquet error: ").unwrap_or(&text);
    Error::input(format!("invalid Parquet file: {text}")).hint(AGAIN)
}

/// Turns a panic of the crate, which assumes valid files here and there, into an error.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Error::input("invalid Parquet file: its reader panicked").hint(AGAIN))
    })
}

/// The bytes of a file, as the crate asks for them.
struct Chunks(Arc<Source>);

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.0.length()
    }
}

impl ChunkReader for Chunks {
    type T = io::BufReader<Chunk>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        let source = Arc::clone(&self.0);
        Ok(io::BufReader::with_capacity(
            1 << 16,
            Chunk { source, at: start },
        ))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        match self.0.bytes(start, length as u64) {
            Ok(Some(bytes)) => Ok(bytes.into()),
            Ok(None) => Err(ParquetError::EOF("the file ends early".into())),
            Err(error) => Err(ParquetError::External(
                io::Error::other(error.to_string()).into(),
            )),
        }
    }
}

/// Reads a file sequentially from some place on.
struct Chunk {
    source: Arc<Source>,
    at: u64,
}

impl Read for Chunk {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.source.length().saturating_sub(self.at);
        let count = (bytes.len() as u64).min(left) as usize;
        let read = self.source.fill(self.at, &mut bytes[..count]);
        read.map_err(|error| io::Error::other(error.to_string()))?;
        self.at += count as u64;
        Ok(count)
    }
}
