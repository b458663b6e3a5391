//! Encoded images and labels in Parquet files, as Hugging Face publishes data sets.
//!
//! | file          | contents                                                                  |
//! |---------------|---------------------------------------------------------------------------|
//! | [`columns`]   | reads the columns of images and labels (feature `parquet`)                |
//! | [`copy`]      | the images of one file in the local cache, where each is read by itself   |
//!
//! The first word of a file's name is its split: `train-00000-of-00002.parquet`, `test.parquet`. Names are matched as
//! those of split folders are ([`super::folder`]).

use std::path::{Path, PathBuf};

#[cfg_attr(not(feature = "parquet"), path = "columns_absent.rs")]
pub mod columns;
// All tests run with the feature `parquet`, so that a build without it still compiles.
#[cfg(all(test, feature = "parquet"))]
#[allow(dead_code)]
mod columns_absent;
pub mod copy;

use self::copy::Copied;
use super::folder::{Ignored, TEST_NAMES, TRAIN_NAMES, first_few};
use crate::data::spec::Split;
use crate::error::{Error, Result};
use crate::files;
use crate::image::{Fault, Reason};
use crate::storage::pattern::{braces, glob, is_glob, split_outside_braces};

const ENDING: &str = "parquet";
const HINT: &str = "write a file, a folder, or a pattern such as `parquet:data/train-*.parquet`";

/// The rows of Parquet files.
#[derive(Debug)]
pub struct Parquet {
    files: Vec<File>,
    classes: Vec<String>,
    is_labeled: bool,
    len: usize,
    split: Option<&'static str>,
    ignored: Ignored,
    notices: Vec<String>,
}

#[derive(Debug)]
struct File {
    path: PathBuf,
    /// Its file name.
    name: String,
    copy: Copied,
    /// Number of rows in the files before.
    first: usize,
}

impl Parquet {
    /// Opens the files of a split. Their images are copied to the local cache, unless they are there.
    ///
    /// Errors: a pattern that matches no file; files of other splits only; those of [`Copied::open`]; files that
    /// disagree about labels or class names; a label without a name, or only some rows with labels.
    pub fn open(pattern: &str, split: Split) -> Result<Self> {
        let found = expand(pattern)?;
        let chosen = choose(pattern, found, split)?;
        let mut parquet = Self {
            files: Vec::with_capacity(chosen.paths.len()),
            classes: Vec::new(),
            is_labeled: false,
            len: 0,
            split: chosen.split,
            ignored: chosen.ignored,
            notices: Vec::new(),
        };
        for path in chosen.paths {
            let copy = Copied::open(&path)?;
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let first = parquet.len;
            parquet.len += copy.row_count();
            parquet.files.push(File {
                path,
                name,
                copy,
                first,
            });
        }
        if parquet.len == 0 {
            return Err(Error::input(format!("`parquet:{pattern}` contains no rows")).hint(HINT));
        }
        parquet.read_classes()?;
        if let Some(folder) = parquet.files[0].copy.path.parent() {
            let text = format!(
                "the images of `parquet:{pattern}` are copied to `{}`",
                folder.display()
            );
            parquet.notices.push(text);
        }
        Ok(parquet)
    }

    /// Compares the files, and sets the classes.
    fn read_classes(&mut self) -> Result<()> {
        let first = &self.files[0];
        for file in &self.files[1..] {
            let differ = |what: &str| {
                let (one, other) = (first.path.display(), file.path.display());
                Err(
                    Error::input(format!("`{one}` and `{other}` have different {what}"))
                        .hint("they belong to different data sets: narrow the pattern"),
                )
            };
            if file.copy.label_column() != first.copy.label_column() {
                return differ("columns of labels");
            }
            if file.copy.classes() != first.copy.classes() {
                return differ("names of classes");
            }
        }
        let labels = self
            .files
            .iter()
            .flat_map(|file| (0..file.copy.row_count()).map(|row| file.copy.label(row)));
        let (mut most, mut labeled) = (0, 0);
        for label in labels.flatten() {
            most = most.max(label);
            labeled += 1;
        }
        if labeled == 0 {
            return Ok(());
        }
        if labeled < self.len {
            let missing = (0..self.len).find(|index| {
                let (file, row) = self.locate(*index);
                file.copy.label(row).is_none()
            });
            let name = self.name_of(missing.unwrap_or(0));
            let message =
                format!("`{name}`: no label, or a negative one, where other rows have one");
            return Err(Error::input(message).hint("remove the rows without labels"));
        }
        self.classes = match first.copy.classes() {
            Some(names) if most as usize >= names.len() => {
                let (file, count) = (first.path.display(), names.len());
                let message =
                    format!("`{file}` has {count} class names, but a row has label {most}");
                return Err(Error::input(message).hint("labels start at 0"));
            }
            Some(names) => names.to_vec(),
            None => (0..=most).map(|label| label.to_string()).collect(),
        };
        self.is_labeled = true;
        Ok(())
    }

    /// Returns the file of an image and its row there.
    fn locate(&self, index: usize) -> (&File, usize) {
        // Files without rows begin where the next file does.
        let after = self.files.partition_point(|file| file.first <= index);
        let file = &self.files[after - 1];
        (file, index - file.first)
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

    /// Returns the number of files.
    pub fn file_count(&self) -> usize {
        self.files.len()
    }

    /// Returns the name of the split; none if the names of the files have none.
    pub fn split(&self) -> Option<&'static str> {
        self.split
    }

    /// Returns the number of files that were left out, by kind.
    pub fn ignored(&self) -> &Ignored {
        &self.ignored
    }

    /// Returns where the images are copied to.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Returns the paths of the files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// Returns the name and the number of rows of each file, which identify the data set.
    pub fn identity(&self) -> impl Iterator<Item = String> {
        self.files
            .iter()
            .map(|file| format!("{} {}", file.name, file.copy.row_count()))
    }

    /// Returns the label of an image.
    ///
    /// Errors: files without labels.
    pub fn label(&self, index: usize) -> Result<u32> {
        let (file, row) = self.locate(index);
        let label = file.copy.label(row).filter(|_| self.is_labeled);
        label.ok_or_else(|| Error::input(format!("`{}` has no label", file.name)))
    }

    /// Reads the bytes of an encoded image.
    ///
    /// Errors: a row without an image.
    pub fn bytes(&self, index: usize) -> std::result::Result<Vec<u8>, Fault> {
        let (file, row) = self.locate(index);
        file.copy.bytes(row)?.ok_or_else(|| {
            Fault::new(Reason::MissingImage, "the row has no image")
                .hint("the file may only name its images: write it again with their bytes")
        })
    }

    /// Returns where an image comes from, for messages.
    pub fn name_of(&self, index: usize) -> String {
        let (file, row) = self.locate(index);
        format!("{} row {row}", file.path.display())
    }

    /// Returns the id of an image, which does not depend on where the files are.
    pub fn id_of(&self, index: usize) -> String {
        let (file, row) = self.locate(index);
        format!("{}/{row}", file.name)
    }
}

/// Returns whether a folder has Parquet files in it, or a subfolder that has.
pub fn is_near(folder: &Path) -> bool {
    in_folder(folder).is_ok()
}

/// Files, and whether a pattern names them without a choice of ours.
struct Expanded {
    paths: Vec<PathBuf>,
    is_folder: bool,
}

/// Expands a pattern to the files that it names.
fn expand(pattern: &str) -> Result<Expanded> {
    let mut all = Expanded {
        paths: Vec::new(),
        is_folder: false,
    };
    for part in split_outside_braces(pattern) {
        let part = part.trim();
        if part.is_empty() {
            return Err(
                Error::input(format!("`parquet:{pattern}`: empty part between commas")).hint(HINT),
            );
        }
        for name in braces(part, pattern)? {
            let path = files::expanded(&name);
            if path.is_dir() {
                all.paths.extend(in_folder(&path)?);
                all.is_folder = true;
            } else if is_glob(&name) && !path.exists() {
                all.paths.extend(glob(&path)?);
            } else if path.is_file() {
                all.paths.push(path);
            } else {
                return Err(Error::input(format!("`{name}` does not exist")).hint(HINT));
            }
        }
    }
    if all.paths.is_empty() {
        return Err(Error::input(format!("no file matches `{pattern}`"))
            .hint("check the folder and the pattern"));
    }
    let mut places = std::collections::HashSet::new();
    for path in &all.paths {
        if !places.insert(files::canonical(path)?) {
            let message = format!("`{}` is listed twice", path.display());
            return Err(Error::input(message)
                .hint("its rows would count twice; make sure that the patterns do not overlap"));
        }
    }
    Ok(all)
}

/// Returns the Parquet files in a folder, or in its only subfolder that has some.
fn in_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let here = |folder: &Path| -> Result<Vec<PathBuf>> {
        let mut paths = files::list(folder)?;
        let is_hidden = |path: &Path| {
            let name = path.file_name().unwrap_or_default();
            name.to_string_lossy().starts_with('.')
        };
        paths.retain(|path| {
            path.extension().is_some_and(|end| end == ENDING) && path.is_file() && !is_hidden(path)
        });
        Ok(paths)
    };
    let paths = here(folder)?;
    if !paths.is_empty() {
        return Ok(paths);
    }
    let mut found = Vec::new();
    for inner in files::list(folder)?
        .into_iter()
        .filter(|path| path.is_dir())
    {
        let paths = here(&inner).unwrap_or_default();
        if !paths.is_empty() {
            found.push((inner, paths));
        }
    }
    match &mut found[..] {
        [] => Err(Error::input(format!(
            "no `.parquet` files in folder `{}`",
            folder.display()
        ))
        .hint(HINT)),
        [(_, paths)] => Ok(std::mem::take(paths)),
        several => {
            let names: Vec<String> = several
                .iter()
                .map(|(inner, _)| format!("`{}`", inner.display()))
                .collect();
            let message = format!(
                "several folders have `.parquet` files: {}",
                first_few(&names)
            );
            Err(Error::input(message).hint("choose one of them"))
        }
    }
}

struct Chosen {
    paths: Vec<PathBuf>,
    split: Option<&'static str>,
    ignored: Ignored,
}

/// Keeps the files of a split, if their names have splits. A file or glob of one split is used for any.
fn choose(pattern: &str, found: Expanded, split: Split) -> Result<Chosen> {
    let splits: Vec<Option<&'static str>> = found.paths.iter().map(|path| split_of(path)).collect();
    let has = |name: &&&str| splits.contains(&Some(**name));
    let train = TRAIN_NAMES.iter().find(has).copied();
    let test = TEST_NAMES.iter().flatten().find(has).copied();
    let is_same = splits.iter().all(|other| *other == splits[0]);
    let wanted = match split {
        _ if is_same && (splits[0].is_none() || !found.is_folder) => splits[0],
        Split::Train => train,
        Split::Test => test,
    };
    if wanted.is_none() && splits.iter().any(Option::is_some) {
        let other = train.or(test).unwrap_or_default();
        let missing = match split {
            Split::Train => "`train-`",
            Split::Test => "`validation-` or `test-`",
        };
        let message = format!(
            "`parquet:{pattern}` has files of the split `{other}`, but none that begins with {missing}"
        );
        return Err(Error::input(message).hint(format!(
            "to use them as they are, name them: `parquet:FOLDER/{other}-*.parquet`"
        )));
    }
    let count = found.paths.len();
    let paths = found.paths.into_iter().zip(splits);
    let paths: Vec<PathBuf> = paths
        .filter(|(_, split)| *split == wanted)
        .map(|(path, _)| path)
        .collect();
    let mut ignored = Ignored::new();
    if paths.len() < count {
        ignored.insert("of other splits".to_owned(), count - paths.len());
    }
    Ok(Chosen {
        paths,
        split: wanted,
        ignored,
    })
}

/// Returns the split that begins the name of a file.
fn split_of(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?.to_str()?.to_lowercase();
    let word = name
        .split(|letter: char| !letter.is_alphanumeric())
        .next()?;
    let mut names = TRAIN_NAMES.iter().chain(TEST_NAMES.iter().flatten());
    names.find(|known| **known == word).copied()
}
