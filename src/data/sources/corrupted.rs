//! Images in a NumPy array (`.npy`) with their labels in `labels.npy` in the same folder: the layout of CIFAR-10-C and
//! CIFAR-100-C.
//!
//! The images are u8 `[n, height, width, 3]`. An array of a corruption holds the same images five times, at severities 1
//! to 5 one after another. The labels are one whole number for each image.
//! Source: Hendrycks and Dietterich 2019.

use std::io::Cursor;
use std::path::Path;

use super::npy::{Header, LIMIT};
use super::npz::{Npz, labels_in, numbered, shape};
use crate::error::{Context, Error, Result};
use crate::files::Source;

/// Number of severities in an array.
pub const SEVERITIES: usize = 5;

/// Opens the images of one severity, from 1 to [`SEVERITIES`], or all images of the file.
///
/// Errors: a missing file, a wrong dtype, order or shape; images that are not five equal parts.
pub fn open(path: &Path, severity: Option<usize>) -> Result<Npz> {
    let (name, source, header) = array(path)?;
    let (count, height, width) =
        shape(&name, &header, source.length()).context(|| format!("`{}`", path.display()))?;
    let labels_path = path.with_file_name("labels.npy");
    let (labels_name, file, labels_header) = array(&labels_path)?;
    let bytes = file.bytes(0, file.length())?.unwrap_or_default();
    let size = file.length();
    let labels = labels_in(
        Cursor::new(bytes),
        &labels_name,
        &labels_header,
        size,
        (&name, count),
    )
    .context(|| format!("`{}`", labels_path.display()))?;
    // The classes of the whole file, so that every severity has the same.
    let classes = numbered(&labels);
    let (first, count) = match severity {
        None => (0, count),
        Some(severity) if count.is_multiple_of(SEVERITIES) => {
            let part = count / SEVERITIES;
            ((severity - 1) * part, part)
        }
        Some(severity) => {
            let path = path.display();
            let message =
                format!("`{path}` has {count} images, which are not {SEVERITIES} severities");
            let hint = format!("remove `@{severity}` to use all images");
            return Err(Error::input(message).hint(hint));
        }
    };
    let pixels = 3 * width as u64 * height as u64;
    Ok(Npz {
        name,
        images: source,
        start: header.start + first as u64 * pixels,
        width,
        height,
        count,
        labels: Some(labels[first..first + count].to_vec()),
        classes,
        notices: Vec::new(),
    })
}

/// Opens an array and reads its header.
fn array(path: &Path) -> Result<(String, Source, Header)> {
    let context = || format!("`{}`", path.display());
    let source = Source::open(path)?;
    let start = source.bytes(0, source.length().min(LIMIT))?;
    let header = Header::read(&start.unwrap_or_default()).context(context)?;
    let name = path.file_name().unwrap_or_default();
    Ok((name.to_string_lossy().into_owned(), source, header))
}
