//! Data sets of labelled pictures, and the way from their files to batches of `[0, 1]` floats.
//!
//! A [`Dataset`] answers for one index at a time; [`loader`] makes training batches of it in the
//! background, [`evaluation`] the unchanging pictures of an evaluation.
//! Knows no model, no normalisation and no tensor library; everything here is plain slices.
//!
//! | file                       | what                                                     |
//! |----------------------------|----------------------------------------------------------|
//! | [`cifar`] [`folder`] [`tensors`] [`synthetic`] | where pictures come from             |
//! | [`shards`] [`shard_index`] [`tar`] [`pattern`] [`recent`] | images and captions in tar files |
//! | [`store`] [`cloud`] [`unpack`] | files of this machine, gzipped ones, objects of stores |
//! | [`order`]                  | which sample comes when                                  |
//! | [`subset`] [`classes`]     | which images an evaluation uses, and which of a model's classes their labels mean |
//! | [`decode`] [`picture`] [`content`] | pictures of the formats that Pillow reads, strictly; what a file is instead |
//! | [`jpeg`]                   | JPEG to libjpeg-turbo's bytes, only where a crop needs them |
//! | [`health`] [`check`]       | what can be wrong with a sample; a whole data set looked through |
//! | [`resize`]                 | Pillow's resampling to the bit, and the same in floats   |
//! | [`augment`] [`operations`] [`mixing`] | random changes, all keyed                     |
//! | [`loader`] [`evaluation`]  | batches                                                  |

pub mod augment;
pub mod batch;
pub mod check;
pub mod cifar;
pub mod classes;
#[cfg_attr(not(feature = "cloud"), path = "cloud_absent.rs")]
pub mod cloud;
// What a program without the feature says is tested where all tests run, with it.
#[cfg(all(test, feature = "cloud"))]
#[allow(dead_code)]
mod cloud_absent;
pub mod content;
pub mod decode;
pub mod evaluation;
pub mod folder;
pub mod health;
pub mod jpeg;
pub mod loader;
pub mod mixing;
pub mod operations;
pub mod order;
pub mod pattern;
pub mod picture;
pub mod recent;
pub mod resize;
pub mod shard_index;
pub mod shards;
pub mod store;
pub mod subset;
pub mod synthetic;
pub mod tar;
pub mod tensors;
pub mod unpack;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub use augment::{Augmentation, RandAugment, RandomResizedCrop};
pub use batch::{Batch, Planes};
pub use classes::{ClassMap, ModelClasses, match_classes, match_prompts};
pub use decode::Examined;
pub use evaluation::{MAX_IMAGE_SIZE, Preprocessing, ResizeMode, evaluation_batch};
pub use health::{Fault, Health, Reason};
pub use loader::{Broken, Loader, Plan, Share};
pub use mixing::{Mix, Mixing};
pub use picture::{Picture, Region, View};
pub use shards::{Part, Sample};
pub use subset::{Selection, Subset, SubsetRecord};

use crate::error::{Error, Result};
use crate::files;
use crate::units::grouped;

/// Which part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// To learn from.
    Train,
    /// To measure with.
    Test,
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Split::Train => "train",
            Split::Test => "test",
        })
    }
}

/// A data set as it is named on the command line and in recipes.
///
/// `FOLDER` (class folders or CIFAR binaries, told apart by their content), `folder:FOLDER` (every folder in it is a
/// class), `tensors:FILE.safetensors`, `shards:PATTERN`, `synthetic:N` or `synthetic:N@SIZE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// A folder of class folders, perhaps within folders for splits, or of CIFAR binaries.
    Folder(PathBuf),
    /// A folder of class folders, whatever their names: `train` is a class like any other.
    ClassFolders(PathBuf),
    /// A safetensors file of images and labels.
    Tensors(PathBuf),
    /// Tar files of images and captions, by a pattern such as `data/{00000..00099}.tar`; in a store, `s3://bucket/*.tar`.
    Shards(String),
    /// Pictures drawn in code.
    Synthetic {
        /// How many, in each split.
        count: usize,
        /// Side in pixels.
        image_size: usize,
    },
}

const SPEC_HINT: &str = "use the path of a folder of class folders or of CIFAR binaries, `folder:PATH`, \
                         `tensors:FILE.safetensors`, `shards:data/{00000..00099}.tar`, or `synthetic:N` such as `synthetic:10000`";

impl FromStr for Spec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        match text.split_once(':') {
            _ if text.is_empty() => {
                Err(Error::input("the data set has an empty name").hint(SPEC_HINT))
            }
            Some(("tensors", "")) => {
                Err(Error::input("`tensors:` is not followed by a file").hint(SPEC_HINT))
            }
            Some(("tensors", path)) => Ok(Spec::Tensors(files::expanded(path))),
            Some(("folder", "")) => {
                Err(Error::input("`folder:` is not followed by a path").hint(SPEC_HINT))
            }
            Some(("folder", path)) => Ok(Spec::ClassFolders(files::expanded(path))),
            Some(("synthetic", rest)) => synthetic_spec(text, rest),
            Some(("shards", "")) => {
                Err(Error::input("`shards:` is not followed by a pattern").hint(SPEC_HINT))
            }
            Some(("shards", pattern)) => Ok(Spec::Shards(pattern.into())),
            Some((kind, rest))
                if (is_scheme(kind) || rest.starts_with("//")) && !Path::new(text).exists() =>
            {
                let message = format!("`{text}`: unknown kind of data set `{kind}`");
                let hint = match nearest_scheme(kind) {
                    _ if rest.starts_with("//") => format!("did you mean `shards:{text}`?"),
                    Some(known) => format!("did you mean `{known}:{rest}`?"),
                    None => SPEC_HINT.into(),
                };
                Err(Error::input(message).hint(hint))
            }
            _ => Ok(Spec::Folder(files::expanded(text))),
        }
    }
}

/// `C:\images` and `./a:b` are paths.
fn is_scheme(kind: &str) -> bool {
    kind.len() > 1
        && kind
            .chars()
            .all(|letter| letter.is_ascii_lowercase() || letter == '-')
}

fn nearest_scheme(kind: &str) -> Option<&'static str> {
    ["tensors", "synthetic", "shards", "folder"]
        .into_iter()
        .find(|known| strsim::damerau_levenshtein(kind, known) <= 2)
}

fn synthetic_spec(text: &str, rest: &str) -> Result<Spec> {
    let (count, image_size) = rest.split_once('@').unwrap_or((rest, "32"));
    let whole = |part: &str| part.replace('_', "").parse::<usize>().ok();
    let wrong = |what: &str| Error::input(format!("`{text}`: {what}")).hint(SPEC_HINT);
    let count = whole(count)
        .filter(|count| (1..=u32::MAX as usize).contains(count))
        .ok_or_else(|| wrong("the number of pictures is not a whole number from 1"))?;
    let image_size = whole(image_size)
        .filter(|size| (16..=1024).contains(size))
        .ok_or_else(|| wrong("the size is not a whole number of pixels from 16 to 1024"))?;
    Ok(Spec::Synthetic { count, image_size })
}

impl Spec {
    /// The folder or file that it names, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Spec::Folder(path) | Spec::ClassFolders(path) | Spec::Tensors(path) => Some(path),
            Spec::Shards(_) | Spec::Synthetic { .. } => None,
        }
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Spec::Folder(path) => write!(f, "{}", path.display()),
            Spec::ClassFolders(path) => write!(f, "folder:{}", path.display()),
            Spec::Tensors(path) => write!(f, "tensors:{}", path.display()),
            Spec::Shards(pattern) => write!(f, "shards:{pattern}"),
            Spec::Synthetic {
                count,
                image_size: 32,
            } => write!(f, "synthetic:{count}"),
            Spec::Synthetic { count, image_size } => write!(f, "synthetic:{count}@{image_size}"),
        }
    }
}

/// Labelled pictures, by index.
#[derive(Debug)]
pub struct Dataset {
    source: Source,
    image_size: Option<usize>,
    spec: Spec,
    split: Split,
}

#[derive(Debug)]
enum Source {
    Cifar(cifar::Cifar),
    Folder(folder::Folder),
    Tensors(tensors::Tensors),
    Shards(Box<shards::Shards>),
    Synthetic(synthetic::Synthetic),
}

/// The same call for every kind of source.
macro_rules! each {
    ($self:ident, $source:ident => $call:expr) => {
        match &$self.source {
            Source::Cifar($source) => $call,
            Source::Folder($source) => $call,
            Source::Tensors($source) => $call,
            Source::Shards($source) => $call,
            Source::Synthetic($source) => $call,
        }
    };
}

impl Dataset {
    /// Opens a split. `seed` only matters to synthetic pictures.
    ///
    /// Errors: whatever makes the data unusable, with the file it was found in. Pictures in files
    /// are decoded later, one by one, so a broken one is found when its turn comes.
    pub fn open(spec: &Spec, split: Split, seed: u64) -> Result<Self> {
        let source = match spec {
            Spec::Folder(path) => Self::open_folder(path, split)?,
            Spec::ClassFolders(path) => Source::Folder(folder::Folder::open(path, split, false)?),
            Spec::Tensors(path) => Source::Tensors(tensors::Tensors::open(path)?),
            Spec::Shards(pattern) => Source::Shards(Box::new(shards::Shards::open(pattern)?)),
            Spec::Synthetic { count, image_size } => {
                Source::Synthetic(synthetic::Synthetic::new(seed, split, *count, *image_size))
            }
        };
        let image_size = match &source {
            Source::Cifar(_) => Some(cifar::SIDE),
            Source::Folder(_) | Source::Shards(_) => None,
            Source::Tensors(tensors) => tensors.image_size(),
            Source::Synthetic(synthetic) => Some(synthetic.image_size()),
        };
        Ok(Self {
            source,
            image_size,
            spec: spec.clone(),
            split,
        })
    }

    fn open_folder(path: &Path, split: Split) -> Result<Source> {
        if path.is_file() {
            let hint = match path.extension() {
                Some(end) if end == "safetensors" => {
                    format!(
                        "for images in a safetensors file use `tensors:{}`",
                        path.display()
                    )
                }
                Some(end) if ["tar", "tgz", "gz"].iter().any(|known| end == *known) => {
                    format!("for shards use `shards:{}`", path.display())
                }
                _ => SPEC_HINT.into(),
            };
            let message = format!("`{}` is a file, not a folder of images", path.display());
            return Err(Error::input(message).hint(hint));
        }
        if cifar::is_cifar(path) {
            return Ok(Source::Cifar(cifar::Cifar::open(path, split)?));
        }
        if let Some(hint) = cifar::near_miss(path) {
            let message = format!("`{}` holds no CIFAR binaries itself", path.display());
            return Err(Error::input(message).hint(hint));
        }
        Ok(Source::Folder(folder::Folder::open(path, split, true)?))
    }

    /// Number of pictures.
    pub fn len(&self) -> usize {
        each!(self, source => source.len())
    }

    /// Whether there are no pictures, which `open` refuses.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Names of the classes, by label.
    pub fn classes(&self) -> &[String] {
        each!(self, source => source.classes())
    }

    /// An error unless the pictures have classes.
    pub fn require_classes(&self) -> Result<()> {
        match self.classes() {
            [] => Err(
                Error::input(format!("the images of `{}` have no labels", self.spec))
                    .hint(match &self.source {
                        Source::Shards(_) => "every sample needs a member such as `000.cls` with the number of its class",
                        _ => "add `labels` i64 [n] to the file",
                    }),
            ),
            _ => Ok(()),
        }
    }

    /// The side of all pictures, where they are known to be square and of one size.
    pub fn image_size(&self) -> Option<usize> {
        self.image_size
    }

    /// The class of a picture.
    ///
    /// Errors: a sample without a label; a shard's index cannot be read any more.
    pub fn label(&self, index: usize) -> Result<u32> {
        Ok(match &self.source {
            Source::Shards(shards) => shards.label(index)?,
            Source::Cifar(source) => source.label(index),
            Source::Folder(source) => source.label(index),
            Source::Tensors(source) => source.label(index)?,
            Source::Synthetic(source) => source.label(index),
        })
    }

    /// Says that a sample will be read soon, so that a store can be asked for it meanwhile.
    pub fn ask(&self, index: usize, part: Part) {
        if let Source::Shards(shards) = &self.source {
            shards.ask(index, part);
        }
    }

    /// Reads or draws a picture.
    ///
    /// Errors: a file that cannot be read or decoded, named.
    pub fn picture(&self, index: usize) -> Result<Picture> {
        let sample = self.read(index, false).map_err(|fault| fault.error)?;
        Ok(sample.picture.picture)
    }

    /// Reads or draws a sample: its picture, and on demand its caption.
    ///
    /// Errors: whatever makes it unusable, by kind, with its name.
    pub fn read(&self, index: usize, caption: bool) -> std::result::Result<Sample, Fault> {
        self.read_part(index, caption, &Region::whole)
    }

    /// As [`Self::read`], but of the picture only what `view` asks for need be known.
    pub fn read_part(
        &self,
        index: usize,
        caption: bool,
        view: View,
    ) -> std::result::Result<Sample, Fault> {
        let plain = |picture| Examined {
            picture,
            odd: Vec::new(),
        };
        let named = |fault| self.named(fault, index);
        let picture = match &self.source {
            Source::Shards(shards) => return shards.read(index, caption, view).map_err(named),
            Source::Folder(folder) => {
                let bytes = folder.bytes(index)?;
                let mut examined = decode::examine_part(&bytes, view).map_err(named)?;
                if folder.format(index) != decode::Format::of_bytes(&bytes) {
                    examined.odd.push(Reason::WrongExtension);
                }
                examined
            }
            Source::Cifar(source) => plain(source.picture(index)?),
            Source::Tensors(source) => plain(source.picture(index)?),
            Source::Synthetic(source) => plain(source.picture(index)?),
        };
        let caption = match caption {
            true => self.caption(index)?,
            false => None,
        };
        Ok(Sample { picture, caption })
    }

    /// Whether pictures are files or members of tars, which may be broken one by one.
    pub fn is_decoded(&self) -> bool {
        matches!(self.source, Source::Folder(_) | Source::Shards(_))
    }

    /// Gives up what was asked for and will not be read.
    pub fn forget_asked(&self) {
        if let Source::Shards(shards) = &self.source {
            shards.forget_asked();
        }
    }

    /// Adds the sample's name to a fault of its own; a store's names what was asked of it.
    fn named(&self, fault: Fault, index: usize) -> Fault {
        match fault.outage {
            true => fault,
            false => fault.context(format!("`{}`", self.name_of(index))),
        }
    }

    /// The bytes of a picture's file, where pictures are files.
    pub fn file_bytes(&self, index: usize) -> Option<std::result::Result<Vec<u8>, Fault>> {
        match &self.source {
            Source::Folder(folder) => Some(folder.bytes(index).map_err(Fault::from)),
            Source::Shards(shards) => Some(shards.image_bytes(index)),
            Source::Cifar(_) | Source::Tensors(_) | Source::Synthetic(_) => None,
        }
    }

    /// Where a picture comes from, for messages.
    pub fn name_of(&self, index: usize) -> String {
        each!(self, source => source.name_of(index))
    }

    /// The key of a sample, by which its caption's embedding is found; only samples in shards have one.
    ///
    /// Errors: the shard's index cannot be read any more.
    pub fn key_of(&self, index: usize) -> Result<Option<String>> {
        match &self.source {
            Source::Shards(shards) => shards.key_of(index).map(Some),
            _ => Ok(None),
        }
    }

    /// Whether samples have captions.
    pub fn is_captioned(&self) -> bool {
        match &self.source {
            Source::Shards(shards) => shards.captioned(),
            Source::Synthetic(_) => true,
            Source::Cifar(_) | Source::Folder(_) | Source::Tensors(_) => false,
        }
    }

    /// What a picture shows in words, where that is known beyond its class; none in a data set
    /// without captions.
    ///
    /// Errors: in a data set with captions, one that is missing, empty or cannot be read, by kind.
    pub fn caption(&self, index: usize) -> std::result::Result<Option<String>, Fault> {
        match &self.source {
            Source::Synthetic(synthetic) => Ok(Some(synthetic.caption(index))),
            Source::Shards(shards) => {
                let caption = shards.caption(index);
                caption.map_err(|fault| self.named(fault, index))
            }
            Source::Cifar(_) | Source::Folder(_) | Source::Tensors(_) => Ok(None),
        }
    }

    /// What the user should know about the data set, found when it was opened.
    pub fn notices(&self) -> &[String] {
        match &self.source {
            Source::Shards(shards) => shards.notices(),
            _ => &[],
        }
    }

    /// The source, where it is shards.
    pub fn shards(&self) -> Option<&shards::Shards> {
        match &self.source {
            Source::Shards(shards) => Some(shards),
            _ => None,
        }
    }

    /// One line about what was opened: where the split came from, images, classes, what was left out.
    ///
    /// For example `imagenet/val (split val): 50,000 images, 1,000 classes, 3 files ignored (.txt)`.
    pub fn summary(&self) -> String {
        let place = match &self.source {
            Source::Folder(folder) => match folder.split() {
                Some(split) => format!("{} (split {split})", folder.root().display()),
                None => format!("{} (no split folders)", folder.root().display()),
            },
            Source::Cifar(_) | Source::Synthetic(_) => {
                format!("{} (split {})", self.spec, self.split)
            }
            Source::Shards(shards) => {
                let count = shards.identity().count();
                format!("{} ({})", self.spec, counted(count, "shard", "shards"))
            }
            Source::Tensors(_) => self.spec.to_string(),
        };
        let mut parts = vec![counted(self.len(), "image", "images")];
        parts.push(match self.classes().len() {
            0 => "no labels".to_owned(),
            count => counted(count, "class", "classes"),
        });
        if self.is_captioned() {
            parts.push("captions".to_owned());
        }
        let ignored: usize = self.ignored().values().sum();
        if ignored > 0 {
            let kinds = self
                .ignored()
                .iter()
                .map(|(kind, count)| match self.ignored().len() {
                    1 => kind.clone(),
                    _ => format!("{} {kind}", grouped(*count as u64)),
                });
            let kinds: Vec<String> = kinds.collect();
            let files = counted(ignored, "file", "files");
            parts.push(format!("{files} ignored ({})", kinds.join(", ")));
        }
        format!("{place}: {}", parts.join(", "))
    }

    /// Files that are no images, by their names, and were left out: how many of each kind.
    pub fn ignored(&self) -> &folder::Ignored {
        static NONE: folder::Ignored = folder::Ignored::new();
        match &self.source {
            Source::Folder(folder) => folder.ignored(),
            _ => &NONE,
        }
    }

    /// The name of an image within the data set, the same wherever the data set lies: its path, its shard and key, or
    /// its number.
    ///
    /// Errors: the shard's index cannot be read any more.
    pub fn id_of(&self, index: usize) -> Result<String> {
        Ok(match &self.source {
            Source::Folder(folder) => folder.relative_name(index),
            Source::Shards(shards) => shards.id_of(index)?,
            Source::Cifar(_) | Source::Tensors(_) | Source::Synthetic(_) => index.to_string(),
        })
    }

    /// Whether two data sets read some of the same files, so that one cannot measure what was learned from the other.
    ///
    /// Only places are compared: copies of the same images are not noticed.
    pub fn overlaps(&self, other: &Self) -> bool {
        let place =
            |path: &Path| crate::files::canonical(path).unwrap_or_else(|_| path.to_path_buf());
        match (&self.source, &other.source) {
            (Source::Folder(one), Source::Folder(two)) => {
                let (one, two) = (place(one.root()), place(two.root()));
                one.starts_with(&two) || two.starts_with(&one)
            }
            (Source::Tensors(_), Source::Tensors(_)) => match (&self.spec, &other.spec) {
                (Spec::Tensors(one), Spec::Tensors(two)) => place(one) == place(two),
                _ => false,
            },
            (Source::Shards(one), Source::Shards(two)) => {
                let places: std::collections::HashSet<String> = one.places().collect();
                two.places().any(|shard| places.contains(&shard))
            }
            _ => false,
        }
    }

    /// A hash over classes, number, names and labels, by which another data set is noticed.
    ///
    /// Of shards, over their names and counts. Cheap, since it reads no picture: changed pixels under the same names are not noticed.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut text = |part: &str| {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        };
        text(match &self.source {
            Source::Cifar(_) => "cifar",
            Source::Folder(_) => "folder",
            Source::Tensors(_) => "tensors",
            Source::Shards(_) => "shards",
            Source::Synthetic(_) => "synthetic",
        });
        self.classes().iter().for_each(|class| text(class));
        match &self.source {
            Source::Synthetic(synthetic) => text(&synthetic.identity()),
            Source::Folder(folder) => {
                (0..folder.len()).for_each(|index| text(&folder.relative_name(index)));
            }
            Source::Shards(shards) => {
                shards.identity().for_each(|shard| text(&shard));
                return hasher.finalize().to_hex().to_string();
            }
            Source::Cifar(_) | Source::Tensors(_) => {}
        }
        for index in 0..self.len() {
            // A data set without labels is told from others by its number of classes.
            let label = self.label(index).unwrap_or(u32::MAX);
            hasher.update(&label.to_le_bytes());
        }
        hasher.update(&(self.len() as u64).to_le_bytes());
        hasher.finalize().to_hex().to_string()
    }
}

/// A number and what it counts, such as `1 class` or `50,000 images`.
fn counted(count: usize, one: &str, many: &str) -> String {
    format!(
        "{} {}",
        grouped(count as u64),
        if count == 1 { one } else { many }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_reads_as_it_is_printed() {
        for text in [
            "data/images",
            "folder:data/train",
            "tensors:a/b.safetensors",
            "shards:a/{00..07}.tar,b/*.tar",
            "synthetic:100",
            "synthetic:7@64",
        ] {
            assert_eq!(text.parse::<Spec>().unwrap().to_string(), text);
        }
        assert_eq!(
            "synthetic:1_000@32".parse::<Spec>().unwrap().to_string(),
            "synthetic:1000"
        );
    }

    #[test]
    fn a_wrong_spec_is_answered_with_a_right_one() {
        let message = |text: &str| {
            let error = text.parse::<Spec>().unwrap_err();
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        };
        assert!(message("synthetic:many").contains("not a whole number from 1"));
        assert!(message("synthetic:10@8").contains("from 16 to 1024"));
        assert!(message("shards:").contains("not followed by a pattern"));
        assert!(message("shard:{0..1}.tar").contains("did you mean `shards:{0..1}.tar`?"));
        assert!(message("tensor:x").contains("did you mean `tensors:x`?"));
        assert!(message("").contains("synthetic:10000"));
    }

    #[test]
    fn a_file_in_the_place_of_a_folder_is_explained() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("images.safetensors");
        crate::files::write(&path, b"x").unwrap();
        let error = Dataset::open(&Spec::Folder(path), Split::Train, 0).unwrap_err();
        assert!(error.to_string().contains("use `tensors:"), "{error}");
        let path = folder.path().join("0.tar.gz");
        crate::files::write(&path, b"x").unwrap();
        let error = Dataset::open(&Spec::Folder(path), Split::Train, 0).unwrap_err();
        assert!(error.to_string().contains("use `shards:"), "{error}");
    }

    #[test]
    fn the_fingerprint_notices_another_seed_split_or_number() {
        let fingerprint = |count, split, seed| {
            let spec = Spec::Synthetic {
                count,
                image_size: 32,
            };
            Dataset::open(&spec, split, seed).unwrap().fingerprint()
        };
        let base = fingerprint(24, Split::Train, 0);
        assert_eq!(base, fingerprint(24, Split::Train, 0));
        assert_ne!(base, fingerprint(25, Split::Train, 0));
        assert_ne!(base, fingerprint(24, Split::Test, 0));
        assert_ne!(base, fingerprint(24, Split::Train, 1));
    }
}
