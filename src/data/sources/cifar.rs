//! CIFAR-10 and CIFAR-100 in the binary version: fixed-length records of labels and 32 x 32 pixels.
//!
//! The Python version (pickles) is only recognized to point to the binary version.
//!
//! | set       | training files            | test file        | record                             |
//! |-----------|---------------------------|------------------|------------------------------------|
//! | CIFAR-10  | `data_batch_1.bin` and on | `test_batch.bin` | label, 3072 pixels                 |
//! | CIFAR-100 | `train.bin`               | `test.bin`       | coarse label, label, 3072 pixels   |
//!
//! Pixels are `[3, 32, 32]` bytes. CIFAR-100 uses the fine label.
//! Source: <https://www.cs.toronto.edu/~kriz/cifar.html>

use std::path::{Path, PathBuf};

use crate::data::spec::Split;
use crate::error::{Error, Result};
use crate::files;
use crate::image::Picture;

/// Side of every image in pixels.
pub const SIDE: usize = 32;
const PIXELS: usize = 3 * SIDE * SIDE;

/// A split of CIFAR-10 or CIFAR-100 in memory.
#[derive(Debug)]
pub struct Cifar {
    files: Vec<CifarFile>,
    classes: Vec<String>,
    label_bytes: usize,
    len: usize,
}

#[derive(Debug)]
struct CifarFile {
    name: String,
    bytes: Vec<u8>,
    first: usize,
}

#[derive(Clone, Copy)]
enum Kind {
    Ten,
    Hundred,
}

impl Kind {
    fn classes(self) -> usize {
        match self {
            Kind::Ten => 10,
            Kind::Hundred => 100,
        }
    }

    fn label_bytes(self) -> usize {
        match self {
            Kind::Ten => 1,
            Kind::Hundred => 2,
        }
    }

    fn names_file(self) -> &'static str {
        match self {
            Kind::Ten => "batches.meta.txt",
            Kind::Hundred => "fine_label_names.txt",
        }
    }
}

/// Returns whether a folder contains CIFAR binaries.
pub fn is_cifar(folder: &Path) -> bool {
    kind_of(folder).is_some()
}

/// Returns a hint for a folder that has CIFAR in a subfolder or in the Python version.
pub fn near_miss(folder: &Path) -> Option<String> {
    for inner in ["cifar-10-batches-bin", "cifar-100-binary"] {
        let inner = folder.join(inner);
        if is_cifar(&inner) {
            return Some(format!("use `{}`", inner.display()));
        }
    }
    let pickles = ["data_batch_1", "cifar-10-batches-py", "cifar-100-python"];
    pickles
        .iter()
        .any(|name| folder.join(name).exists())
        .then(|| {
            "this is the Python version of CIFAR; download the binary version \
             from https://www.cs.toronto.edu/~kriz/cifar.html"
                .into()
        })
}

fn kind_of(folder: &Path) -> Option<Kind> {
    let has = |name: &str| folder.join(name).is_file();
    if has("test_batch.bin") || !training_batches(folder).is_empty() {
        Some(Kind::Ten)
    } else if has("train.bin") || has("test.bin") {
        Some(Kind::Hundred)
    } else {
        None
    }
}

/// Returns the paths of `data_batch_N.bin`, ordered by N.
fn training_batches(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = files::list(folder)
        .unwrap_or_default()
        .into_iter()
        .filter_map(|path| {
            let name = path.file_name()?.to_str()?;
            let number = name.strip_prefix("data_batch_")?.strip_suffix(".bin")?;
            Some((number.parse().ok()?, path))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

impl Cifar {
    /// Reads a split of the binaries in `folder`.
    ///
    /// Errors: a file that is missing, is not a whole number of records, or contains a label out of range.
    pub fn open(folder: &Path, split: Split) -> Result<Self> {
        let kind = kind_of(folder).ok_or_else(|| {
            Error::input(format!("`{}` contains no CIFAR binaries", folder.display()))
        })?;
        let mut paths = match (kind, split) {
            (Kind::Ten, Split::Train) => training_batches(folder),
            (Kind::Ten, Split::Test) => vec![folder.join("test_batch.bin")],
            (Kind::Hundred, Split::Train) => vec![folder.join("train.bin")],
            (Kind::Hundred, Split::Test) => vec![folder.join("test.bin")],
        };
        paths.retain(|path| path.is_file());
        if paths.is_empty() {
            let (split, file) = match (split, kind) {
                (Split::Train, Kind::Ten) => ("training", "data_batch_1.bin"),
                (Split::Train, Kind::Hundred) => ("training", "train.bin"),
                (Split::Test, Kind::Ten) => ("test", "test_batch.bin"),
                (Split::Test, Kind::Hundred) => ("test", "test.bin"),
            };
            return Err(Error::input(format!(
                "`{}` has no {split} images: `{file}` is missing",
                folder.display()
            ))
            .hint("copy the file from the same archive into this folder"));
        }
        let classes = class_names(folder, kind)?;
        let mut cifar = Self {
            files: Vec::new(),
            classes,
            label_bytes: kind.label_bytes(),
            len: 0,
        };
        for path in paths {
            cifar.add(&path)?;
        }
        Ok(cifar)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let bytes = files::read(path)?;
        let record = self.record();
        if bytes.is_empty() || bytes.len() % record != 0 {
            let nearest = ((bytes.len() + record / 2) / record).max(1);
            return Err(Error::input(format!(
                "`{}` has {} bytes, which is not a whole number of {record}-byte records; \
                 {nearest} records are {} bytes",
                path.display(),
                bytes.len(),
                nearest * record
            ))
            .hint("the file is truncated or has another format: copy or download it again"));
        }
        let fine = self.label_bytes - 1;
        let labels = bytes.chunks_exact(record).map(|record| record[fine]);
        for (number, label) in labels.enumerate() {
            if usize::from(label) >= self.classes.len() {
                return Err(Error::input(format!(
                    "`{}`, record {number}: label {label} is not one of the {} classes 0 to {}",
                    path.display(),
                    self.classes.len(),
                    self.classes.len() - 1
                ))
                .hint("the file is damaged or belongs to another data set"));
            }
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let records = bytes.len() / record;
        self.files.push(CifarFile {
            name: name.into_owned(),
            bytes,
            first: self.len,
        });
        self.len += records;
        Ok(())
    }

    fn record(&self) -> usize {
        self.label_bytes + PIXELS
    }

    /// Returns the file, the number within the file, and the bytes of a record.
    fn locate(&self, index: usize) -> (&CifarFile, usize, &[u8]) {
        let after = self.files.partition_point(|file| file.first <= index);
        let file = &self.files[after - 1];
        let number = index - file.first;
        let record = self.record();
        (file, number, &file.bytes[number * record..][..record])
    }

    /// Returns the number of images.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there are no images. [`Self::open`] refuses such data.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the class names by label.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Returns the label of an image.
    pub fn label(&self, index: usize) -> u32 {
        u32::from(self.locate(index).2[self.label_bytes - 1])
    }

    /// Returns an image.
    pub fn picture(&self, index: usize) -> Result<Picture> {
        let planes = &self.locate(index).2[self.label_bytes..];
        let area = SIDE * SIDE;
        let mut pixels = vec![0; PIXELS];
        for (place, pixel) in pixels.chunks_exact_mut(3).enumerate() {
            pixel[0] = planes[place];
            pixel[1] = planes[area + place];
            pixel[2] = planes[2 * area + place];
        }
        Picture::bytes(SIDE, SIDE, pixels)
    }

    /// Returns where an image comes from, for messages.
    pub fn name_of(&self, index: usize) -> String {
        let (file, number, _) = self.locate(index);
        format!("{} record {number}", file.name)
    }
}

/// Reads the file of class names; without the file the classes are named by number.
fn class_names(folder: &Path, kind: Kind) -> Result<Vec<String>> {
    let path = folder.join(kind.names_file());
    let expected = kind.classes();
    if !path.is_file() {
        return Ok((0..expected).map(|label| label.to_string()).collect());
    }
    let text = files::read_text(&path)?;
    let names: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(String::from)
        .collect();
    if names.len() != expected {
        return Err(Error::input(format!(
            "`{}` has {} class names, expected {expected}",
            path.display(),
            names.len()
        ))
        .hint("the file must have one class name per line"));
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(labels: &[u8], fill: u8) -> Vec<u8> {
        let mut bytes = labels.to_vec();
        for plane in 0..3 {
            bytes.extend(std::iter::repeat_n(fill + plane, SIDE * SIDE));
        }
        bytes
    }

    fn put(folder: &Path, name: &str, bytes: &[u8]) {
        files::write(&folder.join(name), bytes).unwrap();
    }

    #[test]
    fn batches_are_read_in_numerical_order() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        put(folder, "data_batch_10.bin", &record(&[9], 40));
        put(
            folder,
            "data_batch_2.bin",
            &[record(&[2], 20), record(&[3], 30)].concat(),
        );
        let cifar = Cifar::open(folder, Split::Train).unwrap();
        assert_eq!(cifar.len(), 3);
        let labels: Vec<u32> = (0..3).map(|index| cifar.label(index)).collect();
        assert_eq!(labels, [2, 3, 9]);
        assert_eq!(cifar.name_of(1), "data_batch_2.bin record 1");
        assert_eq!(cifar.name_of(2), "data_batch_10.bin record 0");
        let pixels = cifar.picture(1).unwrap().to_bytes();
        assert_eq!(&pixels[..6], [30, 31, 32, 30, 31, 32]);
        assert_eq!(cifar.classes()[7], "7");
    }

    #[test]
    fn cifar_100_uses_the_fine_label_and_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        put(folder, "test.bin", &record(&[4, 72], 0));
        let names: String = (0..100).map(|label| format!("name {label}\n")).collect();
        put(folder, "fine_label_names.txt", names.as_bytes());
        let cifar = Cifar::open(folder, Split::Test).unwrap();
        assert_eq!(cifar.label(0), 72);
        assert_eq!(cifar.classes()[72], "name 72");
        assert_eq!(cifar.picture(0).unwrap().to_bytes()[..3], [0, 1, 2]);
    }

    #[test]
    fn a_truncated_file_is_refused_with_its_length_and_the_expected_one() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        put(folder, "test_batch.bin", &[0; 3073 * 2 - 10]);
        let error = Cifar::open(folder, Split::Test).unwrap_err().to_string();
        assert!(
            error.contains(
                "test_batch.bin` has 6136 bytes, which is not a whole number of 3073-byte records; \
                 2 records are 6146 bytes"
            ),
            "{error}"
        );
    }

    #[test]
    fn a_label_out_of_range_and_a_missing_split_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        put(
            folder,
            "data_batch_1.bin",
            &[record(&[0], 0), record(&[11], 0)].concat(),
        );
        let error = Cifar::open(folder, Split::Train).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        assert!(
            error.contains("record 1: label 11 is not one of the 10 classes"),
            "{error}"
        );
        let error = Cifar::open(folder, Split::Test).unwrap_err().to_string();
        assert!(
            error.contains("no test images: `test_batch.bin` is missing"),
            "{error}"
        );
    }

    #[test]
    fn the_python_version_is_recognized() {
        let folder = tempfile::tempdir().unwrap();
        put(folder.path(), "data_batch_1", b"pickle");
        assert!(!is_cifar(folder.path()));
        assert!(
            near_miss(folder.path())
                .unwrap()
                .contains("Python version of CIFAR")
        );
    }
}
