//! Models and their classes named on the command line.

use std::path::{Path, PathBuf};

use super::device::device;
use super::print::note;
use super::values::{parse_mean, parse_std};
use crate::data::classes::is_wnid;
use crate::data::{CLASSES_HINT, ClassMap, Dataset, ModelClasses, match_classes, match_prompts};
use crate::error::{Error, Result};
use crate::image::MAX_IMAGE_SIZE;
use crate::model::ModelConfig;
use crate::settings::nearest;
use crate::weights::Loaded;
use crate::{files, weights};

/// The model argument and its flags.
#[derive(clap::Args)]
pub(crate) struct NamedModel {
    /// Model folder, run folder, or with --arch a weights file
    #[arg(value_name = "MODEL")]
    pub(crate) path: PathBuf,
    /// Architecture of a weights file (safetensors, .pth, .bin): the name in timm, open_clip or advxl
    #[arg(long, value_name = "NAME")]
    arch: Option<String>,
    /// Channel means for pixels in [0, 1] [default: from the model folder; for a weights file those stored in it, else
    /// ImageNet's, or CLIP's for CLIP models]
    #[arg(long, value_name = "R,G,B", value_parser = parse_mean)]
    mean: Option<[f64; 3]>,
    /// Channel standard deviations for pixels in [0, 1] [default: as for --mean]
    #[arg(long, value_name = "R,G,B", value_parser = parse_std)]
    std: Option<[f64; 3]>,
}

impl NamedModel {
    /// Returns an error if the path does not exist.
    pub(crate) fn check_path(&self) -> Result<()> {
        if !self.path.exists() {
            let name = self.path.display();
            let is_size = self.path.to_str().and_then(ModelConfig::named).is_some();
            let hint = match is_size {
                true => format!(
                    "`{name}` is a model size without weights; use a model folder, a run folder or a weights file"
                ),
                false => {
                    "use a model folder, a run folder, or with --arch a weights file".to_owned()
                }
            };
            return Err(Error::input(format!("`{name}` does not exist")).hint(hint));
        }
        Ok(())
    }

    pub(crate) fn load(&self) -> Result<Loaded> {
        self.check_path()?;
        let mut loaded = match &self.arch {
            None => weights::load_any(&self.path, &device()?)?,
            Some(_) if self.path.is_dir() => {
                return Err(Error::input("--arch requires a weights file, got a folder")
                    .hint("remove --arch: the folder states its architecture"));
            }
            Some(name) => weights::load_file(&self.path, name, &device()?)?,
        };
        if let Some(key) = &loaded.wrapper {
            note(&format!(
                "note: the file has several entries; using the weights in `{key}`"
            ));
        }
        for text in &loaded.notes {
            note(&format!("note: {text}"));
        }
        if self.mean.is_some() || self.std.is_some() {
            loaded.model.normalize_by(self.mean, self.std);
            // With another normalization it is a different model, so its evaluations must not be resumed.
            let (mean, std) = loaded.model.config().statistics();
            let identity = format!("{} {mean:?} {std:?}", loaded.hash);
            loaded.hash = blake3::hash(identity.as_bytes()).to_string();
        }
        Ok(loaded)
    }
}

/// Parses a number of classes.
pub(crate) fn parse_classes(text: &str) -> std::result::Result<usize, String> {
    let classes = text.parse().ok();
    classes
        .filter(|classes| (1..=100_000_000).contains(classes))
        .ok_or_else(|| "expected a number from 1 to 100000000".to_owned())
}

/// Returns the number of patches along a side of images of `--image-size`, or an error if the patches do not fit.
pub(crate) fn check_image_size(config: &ModelConfig, size: usize) -> Result<usize> {
    if size > MAX_IMAGE_SIZE {
        let message = format!("--image-size must be at most {MAX_IMAGE_SIZE}, got {size}");
        return Err(Error::input(message).hint("use a size close to the model's own"));
    }
    config.grid(size).map_err(|(message, hint)| {
        Error::input(message.replace("image_size =", "--image-size")).hint(hint)
    })
}

/// The model's class for each label of a data set, by name where both name their classes.
#[derive(clap::Args)]
pub(crate) struct NamedClasses {
    /// File with the data set's name of each class of the model, one per line in the model's order; for class folders
    /// such as n01440764, or for models without class names
    #[arg(long, value_name = "FILE")]
    classes: Option<PathBuf>,
}

impl NamedClasses {
    /// Matches the classes of a data set with the model's. `prompts` are class names for a text model, with their file,
    /// and replace the names of the model.
    pub(crate) fn matched(
        &self,
        loaded: &Loaded,
        prompts: Option<(&[String], &Path)>,
        dataset: &Dataset,
        data: &str,
    ) -> Result<ClassMap> {
        dataset.require_classes()?;
        let count = prompts.map_or(loaded.model.classes(), |(names, _)| names.len());
        let map = match (&self.classes, prompts) {
            (Some(path), _) => {
                let names = read_classes(path)?;
                if names.len() != count {
                    let message = format!(
                        "--classes `{}` has {} names, but the model has {count} classes",
                        path.display(),
                        names.len()
                    );
                    return Err(Error::input(message)
                        .hint("write one name for each class of the model, in the model's order"));
                }
                let owner = format!("`{}`", path.display());
                let outputs = ModelClasses {
                    count,
                    names: &names,
                    owner: &owner,
                    advice: CLASSES_HINT,
                };
                match_classes(outputs, dataset.classes(), data)?
            }
            (None, Some((names, path))) => match_prompts(
                names,
                &format!("`{}`", path.display()),
                dataset.classes(),
                data,
            )?,
            (None, None) => {
                let outputs = ModelClasses {
                    count,
                    names: &loaded.classes,
                    owner: "the model",
                    advice: CLASSES_HINT,
                };
                match_classes(outputs, dataset.classes(), data)?
            }
        };
        if let Some(notice) = &map.notice {
            note(&format!("note: {notice}"));
        }
        Ok(map)
    }
}

/// Reads class names, one per line. From lines such as `n01440764 tench, Tinca tinca` only the id is kept.
pub(crate) fn read_classes(path: &Path) -> Result<Vec<String>> {
    let text = files::read_text(path)?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    if let Some(empty) = lines.iter().position(|line| line.is_empty()) {
        let message = format!(
            "`{}`, line {}: the name is empty",
            path.display(),
            empty + 1
        );
        return Err(Error::input(message).hint("write one name per line"));
    }
    let ids: Option<Vec<&str>> = lines
        .iter()
        .map(|line| line.split_whitespace().next().filter(|word| is_wnid(word)))
        .collect();
    let names = ids.unwrap_or(lines);
    Ok(names.into_iter().map(str::to_owned).collect())
}

/// Returns the hint for an unknown model size.
pub(crate) fn named_sizes(name: &str) -> String {
    let names = ModelConfig::names();
    match nearest(name, &names) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("use one of {}", names.join(", ")),
    }
}
