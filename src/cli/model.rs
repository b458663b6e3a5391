//! Models and their classes as they are named on the command line.

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

/// The model that a user named.
#[derive(clap::Args)]
pub(crate) struct NamedModel {
    /// A model folder, the folder of a run, or with --arch a file of weights.
    #[arg(value_name = "MODEL")]
    pub(crate) path: PathBuf,
    /// Architecture of a file of weights (safetensors, .pth, .bin): timm's name, open_clip's or ours.
    #[arg(long, value_name = "NAME")]
    arch: Option<String>,
    /// Mean of each channel for pixels in [0, 1]. If absent the folder's; of a file the one in it, ImageNet's, or CLIP's for its
    /// models.
    #[arg(long, value_name = "R,G,B", value_parser = parse_mean)]
    mean: Option<[f64; 3]>,
    /// Standard deviation of each channel; see --mean.
    #[arg(long, value_name = "R,G,B", value_parser = parse_std)]
    std: Option<[f64; 3]>,
}

impl NamedModel {
    /// An error where nothing has the path that was named.
    pub(crate) fn check_path(&self) -> Result<()> {
        if !self.path.exists() {
            let name = self.path.display();
            let is_size = self.path.to_str().and_then(ModelConfig::named).is_some();
            let hint = match is_size {
                true => format!(
                    "`{name}` names a size of model; its weights are in a model folder, a run or a file"
                ),
                false => {
                    "give a model folder, the folder of a run, or with --arch a file of weights"
                        .to_owned()
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
                return Err(
                    Error::input("--arch is for a file of weights, not for a folder")
                        .hint("leave it out: the folder says what its model is"),
                );
            }
            Some(name) => weights::load_file(&self.path, name, &device()?)?,
        };
        if let Some(key) = &loaded.wrapper {
            note(&format!(
                "note: of several things in the file, the weights are those in `{key}`"
            ));
        }
        for text in &loaded.notes {
            note(&format!("note: {text}"));
        }
        if self.mean.is_some() || self.std.is_some() {
            loaded.model.normalise_by(self.mean, self.std);
            // Normalized otherwise it is another model, whose evaluations are not gone on with.
            let (mean, std) = loaded.model.config().statistics();
            let identity = format!("{} {mean:?} {std:?}", loaded.hash);
            loaded.hash = blake3::hash(identity.as_bytes()).to_string();
        }
        Ok(loaded)
    }
}

/// A number of classes.
pub(crate) fn parse_classes(text: &str) -> std::result::Result<usize, String> {
    let classes = text.parse().ok();
    classes
        .filter(|classes| (1..=100_000_000).contains(classes))
        .ok_or_else(|| "give a number from 1 to 100000000".to_owned())
}

/// Patches along a side of images of `--image-size`; an error unless they are whole.
pub(crate) fn check_image_size(config: &ModelConfig, size: usize) -> Result<usize> {
    if size > MAX_IMAGE_SIZE {
        let message =
            format!("--image-size {size} is more than {MAX_IMAGE_SIZE}, the largest side");
        return Err(Error::input(message).hint("give a size near to the model's own"));
    }
    config.grid(size).map_err(|(message, hint)| {
        Error::input(message.replace("image_size =", "--image-size")).hint(hint)
    })
}

/// The model's class for each label of a data set, by name where both name their classes.
#[derive(clap::Args)]
pub(crate) struct NamedClasses {
    /// Names of the model's classes in the data set's words, one a line in the model's order: for folders such as
    /// n01440764, or for models that do not name their classes.
    #[arg(long, value_name = "FILE")]
    classes: Option<PathBuf>,
}

impl NamedClasses {
    /// `names` are the model's own; `prompts` are names for a text model instead, with their file.
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
                        "--classes `{}` has {} names and the model {count} classes",
                        path.display(),
                        names.len()
                    );
                    return Err(Error::input(message)
                        .hint("give one name for each class of the model, in the model's order"));
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

/// Names of classes, one a line. Of lines such as `n01440764 tench, Tinca tinca` the id is the name.
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
        return Err(Error::input(message).hint("give one name a line"));
    }
    let ids: Option<Vec<&str>> = lines
        .iter()
        .map(|line| line.split_whitespace().next().filter(|word| is_wnid(word)))
        .collect();
    let names = ids.unwrap_or(lines);
    Ok(names.into_iter().map(str::to_owned).collect())
}

/// The hint for a name that is not that of a size of model.
pub(crate) fn named_sizes(name: &str) -> String {
    let names = ModelConfig::names();
    match nearest(name, &names) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("the named sizes are {}", names.join(", ")),
    }
}
