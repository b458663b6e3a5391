//! A data set: images with labels or captions, by index.

use std::path::Path;
use std::sync::Arc;

use super::classes::are_numbers;
use super::mixture::Mixture;
use super::shards::{Part, Sample};
use super::spec::{SPEC_HINT, Spec, Split};
use crate::error::{Context, Error, Result};
use crate::image::{Cutout, Examined, Fault, Picture, Reason, View};
use crate::units::grouped;

/// Number of leading samples that are searched for the mark of a packed image. Images that were small before packing do
/// not have it.
const FIRST: usize = 16;

/// Makes the same call for every kind of source.
macro_rules! each {
    ($self:ident, $source:ident => $call:expr) => {
        match &$self.source {
            Source::Cifar($source) => $call,
            Source::Folder($source) => $call,
            Source::Tensors($source) => $call,
            Source::Npz($source) => $call,
            Source::Parquet($source) => $call,
            Source::Shards($source) => $call,
            Source::Synthetic($source) => $call,
            Source::Mixed($source) => $call,
        }
    };
}

/// Images with labels or captions, by index.
#[derive(Debug)]
pub struct Dataset {
    source: Source,
    image_size: Option<usize>,
    spec: Spec,
    split: Split,
}

#[derive(Debug)]
pub(crate) enum Source {
    Cifar(crate::data::sources::cifar::Cifar),
    Folder(crate::data::sources::folder::Folder),
    Tensors(crate::data::sources::tensors::Tensors),
    Npz(crate::data::sources::npz::Npz),
    Parquet(crate::data::sources::parquet::Parquet),
    Shards(Box<crate::data::shards::Shards>),
    Synthetic(crate::data::sources::synthetic::Synthetic),
    Mixed(Mixed),
}

/// Several sources of training images, one after another, and their fractions.
#[derive(Debug)]
pub(crate) struct Mixed {
    parts: Vec<Dataset>,
    /// First sample of each source, then the number of samples.
    starts: Vec<usize>,
    mixture: Arc<Mixture>,
    notices: Vec<String>,
}

impl Mixed {
    /// Returns the source of a sample, and the sample's index in it.
    fn part(&self, index: usize) -> (&Dataset, usize) {
        let part = self.starts.partition_point(|start| *start <= index) - 1;
        (&self.parts[part], index - self.starts[part])
    }

    fn len(&self) -> usize {
        self.starts[self.parts.len()]
    }

    fn classes(&self) -> &[String] {
        self.parts[0].classes()
    }

    fn name_of(&self, index: usize) -> String {
        let (part, index) = self.part(index);
        part.name_of(index)
    }
}

impl Dataset {
    /// Opens a split. `seed` is only used for synthetic images.
    ///
    /// Errors: anything that makes the data unusable, with the file. Image files are decoded later, one by one, so a
    /// broken image is only found when it is read.
    pub fn open(spec: &Spec, split: Split, seed: u64) -> Result<Self> {
        let source = match spec {
            Spec::Folder(path) => Self::open_folder(path, split)?,
            Spec::ClassFolders(path) => Source::Folder(crate::data::sources::folder::Folder::open(
                path, split, false,
            )?),
            Spec::Tensors(path) => {
                Source::Tensors(crate::data::sources::tensors::Tensors::open(path)?)
            }
            Spec::Npz(path) => Source::Npz(crate::data::sources::npz::Npz::open(path)?),
            Spec::Npy { path, severity } => {
                Source::Npz(crate::data::sources::corrupted::open(path, *severity)?)
            }
            Spec::Wds(folder) => Source::Shards(Box::new(crate::data::shards::Shards::open(
                &crate::data::wds::pattern(folder, split)?,
            )?)),
            Spec::Parquet(pattern) => Source::Parquet(
                crate::data::sources::parquet::Parquet::open(pattern, split)?,
            ),
            Spec::Shards(pattern) => {
                Source::Shards(Box::new(crate::data::shards::Shards::open(pattern)?))
            }
            Spec::Synthetic { count, image_size } => Source::Synthetic(
                crate::data::sources::synthetic::Synthetic::new(seed, split, *count, *image_size),
            ),
        };
        let image_size = match &source {
            Source::Cifar(_) => Some(crate::data::sources::cifar::SIDE),
            Source::Folder(_) | Source::Parquet(_) | Source::Shards(_) => None,
            Source::Npz(npz) => npz.image_size(),
            Source::Tensors(tensors) => tensors.image_size(),
            Source::Synthetic(synthetic) => Some(synthetic.image_size()),
            Source::Mixed(_) => None,
        };
        Ok(Self {
            source,
            image_size,
            spec: spec.clone(),
            split,
        })
    }

    /// Opens the training images of several sources, mixed in these fractions.
    ///
    /// Errors: those of [`Self::open`], different classes, or fractions that do not add up to 1.
    pub fn open_mixed(sources: &[(&Spec, f64)], seed: u64) -> Result<Self> {
        let fractions: Vec<f64> = sources.iter().map(|(_, fraction)| *fraction).collect();
        let mixture = Arc::new(Mixture::new(seed, &fractions)?);
        let (mut parts, mut starts) = (Vec::<Self>::new(), vec![0]);
        for (spec, _) in sources {
            let part = Self::open(spec, Split::Train, seed)
                .context(|| format!("train images `{spec}`"))?;
            starts.push(starts[starts.len() - 1] + part.len());
            if let Some(first) = parts.first() {
                same_classes(first, &part)?;
            }
            parts.push(part);
        }
        let notices = parts.iter().flat_map(|part| part.notices().to_vec());
        let sizes: Vec<_> = parts.iter().map(|part| part.image_size).collect();
        Ok(Self {
            image_size: sizes[0].filter(|_| sizes.iter().all(|size| *size == sizes[0])),
            spec: sources[0].0.clone(),
            split: Split::Train,
            source: Source::Mixed(Mixed {
                notices: notices.collect(),
                parts,
                starts,
                mixture,
            }),
        })
    }

    /// Returns the sources and how they are mixed, if there are several.
    pub(crate) fn mixed(&self) -> Option<(&[Self], Arc<Mixture>)> {
        match &self.source {
            Source::Mixed(mixed) => Some((&mixed.parts, Arc::clone(&mixed.mixture))),
            _ => None,
        }
    }

    fn open_folder(path: &Path, split: Split) -> Result<Source> {
        if path.is_file() {
            let hint = match path.extension() {
                Some(end) if end == "safetensors" => {
                    format!(
                        "for images in a safetensors file, use `tensors:{}`",
                        path.display()
                    )
                }
                Some(end) if end == "npz" => {
                    format!("for a NumPy archive, use `npz:{}`", path.display())
                }
                Some(end) if end == "parquet" => {
                    format!("for Parquet files, use `parquet:{}`", path.display())
                }
                Some(end) if ["tar", "tgz", "gz"].iter().any(|known| end == *known) => {
                    format!("for shards, use `shards:{}`", path.display())
                }
                _ => SPEC_HINT.into(),
            };
            let message = format!("`{}` is a file, not a folder of images", path.display());
            return Err(Error::input(message).hint(hint));
        }
        if crate::data::sources::cifar::is_cifar(path) {
            return Ok(Source::Cifar(crate::data::sources::cifar::Cifar::open(
                path, split,
            )?));
        }
        if let Some(hint) = crate::data::sources::cifar::near_miss(path) {
            let message = format!("`{}` contains no CIFAR binaries", path.display());
            return Err(Error::input(message).hint(hint));
        }
        match crate::data::sources::folder::Folder::open(path, split, true) {
            Err(error) if crate::data::sources::parquet::is_near(path) => Err(error.hint(format!(
                "for Parquet files, use `parquet:{}`",
                path.display()
            ))),
            folder => Ok(Source::Folder(folder?)),
        }
    }

    /// Returns the number of samples.
    pub fn len(&self) -> usize {
        each!(self, source => source.len())
    }

    /// Returns whether there are no samples. [`Self::open`] refuses such data.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the class names by label; empty for data without labels.
    pub fn classes(&self) -> &[String] {
        each!(self, source => source.classes())
    }

    /// Returns an error unless the images have classes.
    pub fn require_classes(&self) -> Result<()> {
        match self.classes() {
            [] => Err(
                Error::input(format!("the images of `{}` have no labels", self.spec)).hint(
                    match &self.source {
                        Source::Shards(_) => {
                            "every sample needs a member such as `000.cls` with its class number"
                        }
                        Source::Npz(_) => "add `label` int64 [n] to the file",
                        Source::Parquet(_) => {
                            "the files need a column `label` of class numbers, none of them negative"
                        }
                        _ => "add `labels` i64 [n] to the file",
                    },
                ),
            ),
            _ => Ok(()),
        }
    }

    /// Returns the side of the images in pixels if all of them are known to be square and of the same size.
    pub fn image_size(&self) -> Option<usize> {
        self.image_size
    }

    /// Returns the label of a sample.
    ///
    /// Errors: a sample without a label; a shard's index that can no longer be read.
    pub fn label(&self, index: usize) -> Result<u32> {
        Ok(match &self.source {
            Source::Shards(shards) => shards.label(index)?,
            Source::Cifar(source) => source.label(index),
            Source::Folder(source) => source.label(index),
            Source::Tensors(source) => source.label(index)?,
            Source::Npz(source) => source.label(index)?,
            Source::Parquet(source) => source.label(index)?,
            Source::Synthetic(source) => source.label(index),
            Source::Mixed(mixed) => {
                let (part, index) = mixed.part(index);
                part.label(index)?
            }
        })
    }

    /// Prefetches a sample that will be read soon, if it is in an object store.
    pub fn ask(&self, index: usize, part: Part) {
        match &self.source {
            Source::Shards(shards) => shards.ask(index, part),
            Source::Mixed(mixed) => {
                let (source, index) = mixed.part(index);
                source.ask(index, part);
            }
            _ => {}
        }
    }

    /// Reads or draws an image.
    ///
    /// Errors: a file that cannot be read or decoded, with its name.
    pub fn picture(&self, index: usize) -> Result<Picture> {
        let sample = self.read(index, false).map_err(|fault| fault.error)?;
        Ok(sample.picture.picture)
    }

    /// Reads or draws a sample: its image and, if requested, its caption.
    ///
    /// Errors: anything that makes the sample unusable, by kind, with its name.
    pub fn read(&self, index: usize, caption: bool) -> std::result::Result<Sample, Fault> {
        self.read_part(index, caption, &Cutout::whole)
    }

    /// Reads a sample like [`Self::read`], but may decode only the part of the image that `view` requests.
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
            Source::Mixed(mixed) => {
                let (part, index) = mixed.part(index);
                return part.read_part(index, caption, view);
            }
            Source::Folder(folder) => {
                let bytes = folder.bytes(index)?;
                let mut examined =
                    crate::image::decode::examine_part(&bytes, view).map_err(named)?;
                if folder.format(index) != crate::image::decode::outcome::Format::of_bytes(&bytes) {
                    examined.odd.push(Reason::WrongExtension);
                }
                examined
            }
            Source::Cifar(source) => plain(source.picture(index)?),
            Source::Tensors(source) => plain(source.picture(index)?),
            Source::Npz(source) => plain(source.picture(index)?),
            Source::Parquet(parquet) => {
                let bytes = parquet.bytes(index).map_err(named)?;
                crate::image::decode::examine_part(&bytes, view).map_err(named)?
            }
            Source::Synthetic(source) => plain(source.picture(index)?),
        };
        let caption = match caption {
            true => self.caption(index)?,
            false => None,
        };
        Ok(Sample { picture, caption })
    }

    /// Returns one of the first images that was resized by packing, if there is one. Only PNM images
    /// in shards, the format of packed shards, are read.
    pub fn packed_example(&self) -> Option<Picture> {
        if let Source::Mixed(mixed) = &self.source {
            return mixed.parts.iter().find_map(Self::packed_example);
        }
        let shards = self.shards()?;
        let first = (0..self.len().min(FIRST)).filter(|index| shards.is_pnm(*index));
        let mut pictures = first.filter_map(|index| self.picture(index).ok());
        pictures.find(Picture::is_packed)
    }

    /// Returns whether images are separate files, rows or tar members, which can be broken one by one.
    pub fn is_decoded(&self) -> bool {
        match &self.source {
            Source::Folder(_) | Source::Parquet(_) | Source::Shards(_) => true,
            Source::Mixed(mixed) => mixed.parts.iter().any(Self::is_decoded),
            _ => false,
        }
    }

    /// Drops prefetched samples that will not be read.
    pub fn forget_asked(&self) {
        match &self.source {
            Source::Shards(shards) => shards.forget_asked(),
            Source::Mixed(mixed) => mixed.parts.iter().for_each(Self::forget_asked),
            _ => {}
        }
    }

    /// Adds the sample's name to its fault. A store's outage already names the request.
    fn named(&self, fault: Fault, index: usize) -> Fault {
        match fault.outage {
            true => fault,
            false => fault.context(format!("`{}`", self.name_of(index))),
        }
    }

    /// Returns the bytes of an image file; none if images are not files, rows or tar members.
    pub fn file_bytes(&self, index: usize) -> Option<std::result::Result<Vec<u8>, Fault>> {
        match &self.source {
            Source::Folder(folder) => Some(folder.bytes(index).map_err(Fault::from)),
            Source::Shards(shards) => Some(shards.image_bytes(index)),
            Source::Parquet(parquet) => Some(parquet.bytes(index)),
            Source::Mixed(mixed) => {
                let (part, index) = mixed.part(index);
                part.file_bytes(index)
            }
            Source::Cifar(_) | Source::Tensors(_) | Source::Npz(_) | Source::Synthetic(_) => None,
        }
    }

    /// Returns where a sample comes from, for messages.
    pub fn name_of(&self, index: usize) -> String {
        each!(self, source => source.name_of(index))
    }

    /// Returns the key of a sample, which identifies its caption's embedding; only samples in shards have one.
    ///
    /// Errors: a shard's index that can no longer be read.
    pub fn key_of(&self, index: usize) -> Result<Option<String>> {
        match &self.source {
            Source::Shards(shards) => shards.key_of(index).map(Some),
            _ => Ok(None),
        }
    }

    /// Returns whether the samples have captions.
    pub fn is_captioned(&self) -> bool {
        match &self.source {
            Source::Shards(shards) => shards.captioned(),
            Source::Synthetic(_) => true,
            Source::Mixed(mixed) => mixed.parts.iter().all(Self::is_captioned),
            _ => false,
        }
    }

    /// Returns the caption of a sample; none in a data set without captions.
    ///
    /// Errors: in a data set with captions, a caption that is missing, empty or unreadable, by kind.
    pub fn caption(&self, index: usize) -> std::result::Result<Option<String>, Fault> {
        match &self.source {
            Source::Synthetic(synthetic) => Ok(Some(synthetic.caption(index))),
            Source::Mixed(mixed) => {
                let (part, index) = mixed.part(index);
                part.caption(index)
            }
            Source::Shards(shards) => {
                let caption = shards.caption(index);
                caption.map_err(|fault| self.named(fault, index))
            }
            _ => Ok(None),
        }
    }

    /// Returns what the user should know about the data set, as found when it was opened.
    pub fn notices(&self) -> &[String] {
        match &self.source {
            Source::Shards(shards) => shards.notices(),
            Source::Npz(npz) => npz.notices(),
            Source::Parquet(parquet) => parquet.notices(),
            Source::Mixed(mixed) => &mixed.notices,
            _ => &[],
        }
    }

    /// Returns the shards, if the samples are in shards.
    pub fn shards(&self) -> Option<&crate::data::shards::Shards> {
        match &self.source {
            Source::Shards(shards) => Some(shards),
            _ => None,
        }
    }

    /// Returns one line about the data set: where the split comes from, images, classes, and ignored files.
    ///
    /// For example `imagenet/val (split val): 50,000 images, 1,000 classes, 3 files ignored (.txt)`.
    pub fn summary(&self) -> String {
        if let Source::Mixed(mixed) = &self.source {
            let parts = mixed.parts.iter().zip(mixed.mixture.percentages());
            let parts = parts.map(|(part, share)| format!("{share} % of {}", part.summary()));
            return parts.collect::<Vec<_>>().join("; ");
        }
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
            Source::Parquet(parquet) => {
                let files = counted(parquet.file_count(), "file", "files");
                match parquet.split() {
                    Some(split) => format!("{} ({files}, split {split})", self.spec),
                    None => format!("{} ({files})", self.spec),
                }
            }
            Source::Tensors(_) | Source::Npz(_) | Source::Mixed(_) => self.spec.to_string(),
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

    /// Returns the number of ignored files of each kind. Names decide which files are images.
    pub fn ignored(&self) -> &crate::data::sources::folder::Ignored {
        static NONE: crate::data::sources::folder::Ignored =
            crate::data::sources::folder::Ignored::new();
        match &self.source {
            Source::Folder(folder) => folder.ignored(),
            Source::Parquet(parquet) => parquet.ignored(),
            _ => &NONE,
        }
    }

    /// Returns the id of an image within the data set: its path, its file and row, its shard and key, or its number. It does not depend
    /// on where the data set is stored.
    ///
    /// Errors: a shard's index that can no longer be read.
    pub fn id_of(&self, index: usize) -> Result<String> {
        Ok(match &self.source {
            Source::Folder(folder) => folder.relative_name(index),
            Source::Shards(shards) => shards.id_of(index)?,
            Source::Parquet(parquet) => parquet.id_of(index),
            Source::Mixed(mixed) => {
                let (part, index) = mixed.part(index);
                format!("{}/{}", part.spec, part.id_of(index)?)
            }
            Source::Cifar(_) | Source::Tensors(_) | Source::Npz(_) | Source::Synthetic(_) => {
                index.to_string()
            }
        })
    }

    /// Returns whether two data sets share files, so that one cannot be used to evaluate a model trained on the other.
    ///
    /// Only locations are compared: copies of the same images are not detected.
    pub fn overlaps(&self, other: &Self) -> bool {
        let place =
            |path: &Path| crate::files::canonical(path).unwrap_or_else(|_| path.to_path_buf());
        match (&self.source, &other.source) {
            (Source::Mixed(mixed), _) => mixed.parts.iter().any(|part| part.overlaps(other)),
            (Source::Folder(one), Source::Folder(two)) => {
                let (one, two) = (place(one.root()), place(two.root()));
                one.starts_with(&two) || two.starts_with(&one)
            }
            (Source::Tensors(_), Source::Tensors(_)) => match (&self.spec, &other.spec) {
                (Spec::Tensors(one), Spec::Tensors(two)) => place(one) == place(two),
                _ => false,
            },
            (Source::Npz(_), Source::Npz(_)) => match (&self.spec, &other.spec) {
                (Spec::Npz(one), Spec::Npz(two)) => place(one) == place(two),
                _ => false,
            },
            (Source::Parquet(one), Source::Parquet(two)) => {
                let places: std::collections::HashSet<_> = one.paths().map(place).collect();
                two.paths().any(|path| places.contains(&place(path)))
            }
            (Source::Shards(one), Source::Shards(two)) => {
                let places: std::collections::HashSet<String> = one.places().collect();
                two.places().any(|shard| places.contains(&shard))
            }
            _ => false,
        }
    }

    /// Returns a hash that identifies the data set.
    ///
    /// It covers the kind of source and the classes. For shards, it also covers their names and sample counts; for
    /// other sources the number of images and their labels, with the names of files (class folders, Parquet) and the seed,
    /// split and size of synthetic images. No image is read, so changed pixels under the same names are not detected.
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
            Source::Npz(_) => "npz",
            Source::Parquet(_) => "parquet",
            Source::Shards(_) => "shards",
            Source::Synthetic(_) => "synthetic",
            Source::Mixed(_) => "mixed",
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
            Source::Parquet(parquet) => parquet.identity().for_each(|file| text(&file)),
            Source::Mixed(mixed) => {
                mixed
                    .parts
                    .iter()
                    .for_each(|part| text(&part.fingerprint()));
                let shares = mixed.mixture.percentages();
                shares.for_each(|share| text(&share.to_string()));
                return hasher.finalize().to_hex().to_string();
            }
            // The arrays of a folder share their labels.
            Source::Npz(npz) => {
                if let Spec::Npy { severity, .. } = &self.spec {
                    text(&format!("{} {severity:?}", npz.name_of(0)));
                }
            }
            Source::Cifar(_) | Source::Tensors(_) => {}
        }
        for index in 0..self.len() {
            // `u32::MAX` means no label.
            let label = self.label(index).unwrap_or(u32::MAX);
            hasher.update(&label.to_le_bytes());
        }
        hasher.update(&(self.len() as u64).to_le_bytes());
        hasher.finalize().to_hex().to_string()
    }
}

/// Checks that the labels of two sources mean the same: equal names, or numbers in place of names.
fn same_classes(first: &Dataset, other: &Dataset) -> Result<()> {
    let (one, two) = (first.classes(), other.classes());
    if one == two || (are_numbers(two) && two.len() == one.len()) {
        return Ok(());
    }
    let message = format!(
        "data.sources: `{}` has {} classes and `{}` has {} other ones",
        first.spec,
        one.len(),
        other.spec,
        two.len()
    );
    Err(Error::input(message)
        .hint("sources need the same class names in the same order, or labels by the same numbers"))
}

/// Formats a number with its noun, such as `1 class` or `50,000 images`.
pub(crate) fn counted(count: usize, one: &str, many: &str) -> String {
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
    fn a_file_instead_of_a_folder_is_refused_with_the_right_spec() {
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
    fn the_fingerprint_depends_on_seed_split_and_number_of_images() {
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
