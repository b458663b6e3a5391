//! Images and labels in a NumPy archive (`.npz`), such as the sets that EDM generated for CIFAR.
//!
//! `image` (or `images`) is u8 `[n, height, width, 3]`. `label` (or `labels`) is a whole number for each image, and may
//! be absent; then the images have no classes. The classes are named by number. The file has no splits: training and
//! test data are two files.
//!
//! Labels are in memory, images are read one by one: from the archive itself if they are stored (`numpy.savez`), else
//! (`numpy.savez_compressed`) from a copy that is unpacked once into the local cache ([`crate::storage::unpack`]).
//! Checksums of the labels and of compressed images are compared. That of stored images is not, since that would read
//! the whole file.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::npy::{Header, LIMIT, MAGIC};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::files::Source;
use crate::image::{Picture, content};
use crate::memory;
use crate::storage::archive::{Archive, Found, STORED, shown};
use crate::storage::unpack::{Contents, drafted, kept};
use crate::units::grouped;

/// Images in a file, and labels in memory.
#[derive(Debug)]
pub struct Npz {
    pub(super) name: String,
    pub(super) images: Source,
    /// Offset of the first image.
    pub(super) start: u64,
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) count: usize,
    /// None if the file has no labels.
    pub(super) labels: Option<Vec<u32>>,
    pub(super) classes: Vec<String>,
    pub(super) notices: Vec<String>,
}

const FORM: &str = "the file must contain `image` uint8 [n, height, width, 3] and `label` int64 [n], one for each image";
const DAMAGED: &str = "the file is damaged: copy or download it again";

/// Largest number of classes, the same as for `tensors:`.
const MOST_CLASSES: i64 = 1_000_000;
/// Deflate packs at most 1,032 bytes into one. An entry that claims more is not a compressed array.
const MOST_GROWTH: u64 = 1_100;

/// An array of the archive.
struct Array {
    /// Its name as users know it.
    name: &'static str,
    entry: Found,
    header: Header,
}

impl Npz {
    /// Opens and checks a file. Compressed images are unpacked.
    ///
    /// Errors: missing images, a wrong dtype, order or shape, a label that is negative or too large; a file that is
    /// damaged; no space for unpacked images.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(path).context(|| format!("`{}`", path.display()))
    }

    fn read(path: &Path) -> Result<Self> {
        let stamp = files::stamp(path)?;
        let source = Source::open(path)?;
        let archive = directory(&source)?;
        let images =
            array(&archive, &source, ["image", "images"])?.ok_or_else(|| missing(&archive))?;
        let (count, height, width) = shape(images.name, &images.header, images.entry.size)?;
        let labels = match array(&archive, &source, ["label", "labels"])? {
            Some(labels) => Some(read_labels(&source, &labels, images.name, count)?),
            None => None,
        };
        let classes = numbered(labels.as_deref().unwrap_or_default());
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let (images, start, notices) = match images.entry.method == STORED {
            true => (source, images.entry.start + images.header.start, Vec::new()),
            false => {
                let (copy, file) = unpacked(path, stamp, &source, &images)?;
                let text = format!(
                    "`{name}` is compressed; its images are unpacked in `{}`",
                    copy.display()
                );
                (file, images.header.start, vec![text])
            }
        };
        Ok(Self {
            name,
            images,
            start,
            width,
            height,
            count,
            labels,
            classes,
            notices,
        })
    }

    /// Returns the number of images.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Returns whether there are no images. [`Self::open`] refuses such files.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns the side of the images in pixels, if they are square.
    pub fn image_size(&self) -> Option<usize> {
        (self.width == self.height).then_some(self.width)
    }

    /// Returns the class names by label, which are numbers.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Returns where unpacked images are.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Returns the label of an image.
    ///
    /// Errors: a file without labels.
    pub fn label(&self, index: usize) -> Result<u32> {
        match &self.labels {
            Some(labels) => Ok(labels[index]),
            None => Err(Error::input(format!("`{}` has no `label`", self.name)).hint(FORM)),
        }
    }

    /// Reads an image.
    pub fn picture(&self, index: usize) -> Result<Picture> {
        let mut pixels = vec![0; 3 * self.width * self.height];
        let at = self.start + index as u64 * pixels.len() as u64;
        self.images.fill(at, &mut pixels)?;
        Picture::bytes(self.width, self.height, pixels)
    }

    /// Returns where an image comes from, for messages.
    pub fn name_of(&self, index: usize) -> String {
        format!("{} image {index}", self.name)
    }
}

/// Returns the names of the classes: numbers up to the largest label.
pub(super) fn numbered(labels: &[u32]) -> Vec<String> {
    let count = labels.iter().max().map_or(0, |most| most + 1);
    (0..count).map(|label| label.to_string()).collect()
}

/// Reads the directory of the archive, and explains any other file.
fn directory(source: &Source) -> Result<Archive> {
    let start = source
        .bytes(0, source.length().min(256))?
        .unwrap_or_default();
    if start.starts_with(MAGIC) {
        let message = "this is a single array (.npy), not an archive of images and labels";
        return Err(Error::input(message)
            .hint("for images with `labels.npy` in the same folder, use `npy:FILE`"));
    }
    if !start.starts_with(b"PK") {
        let found = content::of(&start);
        let what = found.map_or_else(String::new, |found| format!("; this is {}", found.what));
        let hint = found.map_or(FORM, |found| found.hint);
        return Err(Error::input(format!("not a NumPy archive (.npz){what}")).hint(hint));
    }
    Archive::read(source, "NumPy archives")
}

fn missing(archive: &Archive) -> Error {
    let found: Vec<String> = archive
        .names()
        .take(8)
        .map(|name| {
            let name = name.strip_suffix(".npy").unwrap_or(name);
            format!("`{}`", shown(name))
        })
        .collect();
    let found = match found.is_empty() {
        true => "nothing".to_owned(),
        false => found.join(", "),
    };
    Error::input(format!("missing array `image`; found {found}")).hint(FORM)
}

/// Opens the array with one of two names, and compares its length with the one that its shape has.
fn array(archive: &Archive, source: &Source, names: [&'static str; 2]) -> Result<Option<Array>> {
    let mut found = Vec::new();
    for name in names {
        if let Some(entry) = archive.find(source, &format!("{name}.npy"))? {
            found.push((name, entry));
        }
    }
    let (name, entry) = match found[..] {
        [] => return Ok(None),
        [found] => found,
        _ => {
            let message = format!("both `{}` and `{}` are in the file", names[0], names[1]);
            return Err(Error::input(message).hint("write the file again with one of them"));
        }
    };
    let Some(contents) = Contents::open(source, entry) else {
        let message =
            format!("`{name}` is encrypted, or compressed with another method than Deflate");
        return Err(Error::input(message).hint("write the file again with `numpy.savez`"));
    };
    if entry.size > entry.packed.saturating_mul(MOST_GROWTH)
        || (entry.method == STORED && entry.size != entry.packed)
    {
        let message = format!(
            "`{name}`: {} bytes cannot hold an array of {}",
            entry.packed, entry.size
        );
        return Err(Error::input(message).hint(DAMAGED));
    }
    let mut start = Vec::new();
    // Of damaged contents, the first bytes may still be a header.
    contents
        .take(LIMIT)
        .read_to_end(&mut start)
        .map_err(|error| unreadable(name, &error))?;
    let header = Header::read(&start).context(|| format!("`{name}`"))?;
    Ok(Some(Array {
        name,
        entry,
        header,
    }))
}

/// Compares the length of an array of `size` bytes with its shape, whose values have `width` bytes.
fn check_length(name: &str, header: &Header, size: u64, width: u64) -> Result<()> {
    let values = size.saturating_sub(header.start);
    let needed = header.count().and_then(|count| count.checked_mul(width));
    if needed == Some(values) {
        return Ok(());
    }
    let shape = shape_text(&header.shape);
    let needed = needed.map_or_else(|| "too many".to_owned(), grouped);
    let message = format!(
        "`{name}` has {} bytes, but its shape {shape} needs {needed}",
        grouped(values)
    );
    Err(Error::input(message).hint(DAMAGED))
}

fn unreadable(name: &str, error: &std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::Other => Error::failed(error.to_string()),
        _ => Error::input(format!("`{name}` is damaged: {error}")).hint(DAMAGED),
    }
}

fn shape_text(shape: &[u64]) -> String {
    format!("{shape:?}")
}

/// Returns the number of images in an array of `size` bytes, their height and their width.
pub(super) fn shape(name: &str, header: &Header, size: u64) -> Result<(usize, usize, usize)> {
    if header.dtype != "|u1" {
        let message = format!(
            "`{name}` has dtype {}, expected uint8 (|u1)",
            shown(&header.dtype)
        );
        let hint = match header.dtype.as_bytes() {
            [_, b'f', ..] => {
                "save bytes: `(255 * image).round().astype('uint8')` for floats in [0, 1]"
            }
            _ => "save `image.astype('uint8')`",
        };
        return Err(Error::input(message).hint(hint));
    }
    let shown = shape_text(&header.shape);
    let wrong = |hint: &str| {
        let message = format!("`{name}` has shape {shown}, expected [n, height, width, 3]");
        Err(Error::input(message).hint(hint))
    };
    let (count, height, width) = match header.shape[..] {
        [count, height, width, 3] => (count, height, width),
        [_, 3, _, _] => {
            return wrong("move the channels to the end: `image.transpose(0, 2, 3, 1)`");
        }
        [_, _, _, 1] => return wrong("repeat the gray channel: `image.repeat(3, axis=3)`"),
        _ => return wrong(FORM),
    };
    if count == 0 || height == 0 || width == 0 {
        return wrong("the file contains no pixels");
    }
    if header.is_fortran {
        let message = format!(
            "`{name}` is in Fortran order, which scatters the bytes of an image over the file"
        );
        return Err(Error::input(message).hint("save `numpy.ascontiguousarray(image)`"));
    }
    check_length(name, header, size, 1)?;
    let fits = |side: u64| usize::try_from(side).ok();
    match (fits(count), fits(height), fits(width)) {
        (Some(count), Some(height), Some(width)) => Ok((count, height, width)),
        _ => wrong(FORM),
    }
}

/// Reads a whole number from exactly its bytes.
type Whole = fn(&[u8]) -> Option<i64>;

/// Returns the width in bytes of a dtype of whole numbers and the function that reads one.
fn whole(dtype: &str) -> Option<(usize, Whole)> {
    fn number<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
        bytes.try_into().ok()
    }
    Some(match dtype {
        "|u1" => (1, |bytes| {
            number(bytes).map(|one| u8::from_le_bytes(one).into())
        }),
        "|i1" => (1, |bytes| {
            number(bytes).map(|one| i8::from_le_bytes(one).into())
        }),
        "<u2" => (2, |bytes| {
            number(bytes).map(|one| u16::from_le_bytes(one).into())
        }),
        "<i2" => (2, |bytes| {
            number(bytes).map(|one| i16::from_le_bytes(one).into())
        }),
        "<u4" => (4, |bytes| {
            number(bytes).map(|one| u32::from_le_bytes(one).into())
        }),
        "<i4" => (4, |bytes| {
            number(bytes).map(|one| i32::from_le_bytes(one).into())
        }),
        "<u8" => (8, |bytes| {
            number(bytes).map(|one| i64::try_from(u64::from_le_bytes(one)).unwrap_or(i64::MAX))
        }),
        "<i8" => (8, |bytes| number(bytes).map(i64::from_le_bytes)),
        _ => return None,
    })
}

fn read_labels(source: &Source, array: &Array, images: &str, count: usize) -> Result<Vec<u32>> {
    let contents = Contents::open(source, array.entry);
    let contents = contents.ok_or_else(|| Error::failed("the archive has changed"))?;
    labels_in(
        contents,
        array.name,
        &array.header,
        array.entry.size,
        (images, count),
    )
}

/// Reads the labels of `count` images from an array of `size` bytes, header included.
pub(super) fn labels_in(
    mut contents: impl Read,
    name: &str,
    header: &Header,
    size: u64,
    (images, count): (&str, usize),
) -> Result<Vec<u32>> {
    let Some((width, read)) = whole(&header.dtype) else {
        let message = format!(
            "`{name}` has dtype {}, expected whole numbers (<i8)",
            shown(&header.dtype)
        );
        return Err(Error::input(message).hint("save `label.astype('int64')`"));
    };
    if header.shape != [count as u64] {
        let shape = shape_text(&header.shape);
        let message = format!(
            "`{images}` has {} images, but `{name}` has shape {shape}",
            grouped(count as u64)
        );
        return Err(Error::input(message).hint(FORM));
    }
    check_length(name, header, size, width as u64)?;
    let what = format!("{} labels", grouped(count as u64));
    memory::require(
        &what,
        4.0 * count as f64,
        memory::available(),
        "use a machine with more memory",
    )?;
    let damaged = |error: std::io::Error| unreadable(name, &error);
    let mut labels = Vec::with_capacity(count);
    let mut bytes = vec![0; header.start as usize];
    contents.read_exact(&mut bytes).map_err(damaged)?;
    bytes.resize((1 << 17) * width, 0);
    while labels.len() < count {
        let some = &mut bytes[..width * (count - labels.len()).min(1 << 17)];
        contents.read_exact(some).map_err(damaged)?;
        for one in some.chunks_exact(width) {
            let label = read(one).unwrap_or(-1);
            if !(0..MOST_CLASSES).contains(&label) {
                let most = MOST_CLASSES - 1;
                let message = format!(
                    "image {} has label {label}, expected 0 to {most}",
                    labels.len()
                );
                return Err(Error::input(message).hint("labels start at 0"));
            }
            labels.push(label as u32);
        }
    }
    // At the end the checksum is compared.
    match contents.read(&mut [0]).map_err(damaged)? {
        0 => Ok(labels),
        _ => Err(Error::input(format!("`{name}` is damaged: it is too long")).hint(DAMAGED)),
    }
}

/// Unpacks compressed images into the local cache, unless they are there. Returns the copy.
fn unpacked(
    path: &Path,
    stamp: (u64, u64),
    source: &Source,
    images: &Array,
) -> Result<(PathBuf, Source)> {
    let make = |to: PathBuf| {
        let contents = Contents::open(source, images.entry);
        let contents = contents.ok_or_else(|| Error::failed("the archive has changed"))?;
        let what = format!("unpacking `{}`", images.name);
        let draft = drafted(contents, images.entry.size, &to, &what, |error| {
            unreadable(images.name, &error)
        })?;
        Ok((draft, 0))
    };
    let (copy, file, _) = kept(path, stamp, &["npy"], make)?;
    if file.length() != images.entry.size {
        let message = format!(
            "`{}`, the unpacked copy, has the wrong length",
            copy.display()
        );
        return Err(Error::failed(message).hint("remove it, and run the same command again"));
    }
    Ok((copy, file))
}
