//! Loads text models from open_clip, Hugging Face and advxl folders, and saves them.
//!
//! The image tower's tensors of a full CLIP model are recognized and ignored. Any other unused tensor is an error,
//! since ignoring it would give wrong results.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use super::embeddings::MadeBy;
use super::names::{Origin, hugging_face_text, transposed};
use super::state_dict::StateDict;
use crate::error::{Context, Error, Result};
use crate::ops::{Device, Stored};
use crate::storage::archive::shown;
use crate::text::config::{from_hugging_face, from_open_clip};
use crate::text::{TextConfig, TextModel, TextTower, Tokenizer, TokenizerConfig};
use crate::{files, json};

const OPEN_CLIP_CONFIG: &str = "open_clip_config.json";

const OPEN_CLIP_WEIGHTS: [&str; 2] = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"];

const WEIGHTS: [&str; 3] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
];

/// Loading and saving; the model itself is in [`crate::text`].
impl TextModel {
    /// Loads a model folder: `open_clip_config.json` or Hugging Face's `config.json`, a weights file (safetensors or
    /// PyTorch) and the tokenizer files.
    ///
    /// Errors: missing or damaged files; missing, unused or wrongly shaped tensors; non-finite values; settings of
    /// other models; a tokenizer with ids that the tower lacks.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let (config, settings, file) = describe(folder)?;
        let tokenizer = Tokenizer::open(folder, settings)?;
        check_vocabulary(folder, &config, &tokenizer)?;
        let (tower, weights) = open(&config, &file, device)?;
        let hash = hash(&weights.hash()?, &config, &tokenizer)?;
        Ok(Self {
            tower,
            tokenizer,
            hash,
        })
    }

    /// Returns what embedding files record about the model that made them.
    pub fn made_by(&self) -> MadeBy {
        MadeBy {
            text_model: self.hash.clone(),
            context: self.tower.config().context,
        }
    }

    /// Writes a folder that [`Self::load`] reads: weights under open_clip's names, a configuration, the tokenizer
    /// files.
    pub fn save(&self, folder: &Path) -> Result<()> {
        Self::save_parts(&self.tower, &self.tokenizer, folder)
    }

    /// Does the same as [`Self::save`] for a tower and a tokenizer that are not combined yet.
    pub fn save_parts(tower: &TextTower, tokenizer: &Tokenizer, folder: &Path) -> Result<()> {
        files::make_folder(folder)?;
        tokenizer.copy_to(folder)?;
        let parameters = tower.parameters();
        let tensors = parameters.iter().map(|parameter| {
            let (values, shape) = (&parameter.value, &parameter.shape[..]);
            (parameter.name.clone(), Stored { values, shape })
        });
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        files::write_tensors(&folder.join(OPEN_CLIP_WEIGHTS[0]), tensors, &metadata)?;
        let config = tower.config().to_open_clip(tokenizer.config());
        // Written last, so that a folder with a configuration always has its weights.
        let path = folder.join(OPEN_CLIP_CONFIG);
        files::write(&path, format!("{config:#}\n").as_bytes())
    }
}

/// A text tower, what else its folder holds that belongs to a whole model, and the tokenizer, if there is one.
pub(crate) struct TextParts {
    pub(crate) tower: TextTower,
    pub(crate) tokenizer: Option<Tokenizer>,
    /// Context and cleaning of the tokenizer, whether there is one or not.
    pub(crate) settings: TokenizerConfig,
    /// Logarithm of the scale of the similarities.
    pub(crate) logit_scale: Option<f32>,
    /// Offset of the similarities: SigLIP.
    pub(crate) logit_bias: Option<f32>,
}

/// Loads the same folders as [`TextModel::load`], and those without tokenizer files.
pub(crate) fn load_parts(folder: &Path, device: &Device) -> Result<TextParts> {
    let (config, settings, file) = describe(folder)?;
    let tokenizer = Tokenizer::find(folder, settings.clone())?;
    if let Some(tokenizer) = &tokenizer {
        check_vocabulary(folder, &config, tokenizer)?;
    }
    let (tower, weights) = open(&config, &file, device)?;
    let scalar = |name: &str| match weights.contains(name) {
        true => Ok(weights.floats(name)?.first().copied()),
        false => Ok(None),
    };
    let place = || format!("`{}`", file.display());
    Ok(TextParts {
        tower,
        tokenizer,
        settings,
        logit_scale: scalar("logit_scale").context(place)?,
        logit_bias: scalar("logit_bias").context(place)?,
    })
}

fn check_vocabulary(folder: &Path, config: &TextConfig, tokenizer: &Tokenizer) -> Result<()> {
    if tokenizer.vocabulary() <= config.vocabulary {
        return Ok(());
    }
    let (ids, rows) = (tokenizer.vocabulary(), config.vocabulary);
    let message = format!(
        "`{}`: the tokenizer has {ids} tokens, but the text tower has {rows}",
        folder.display()
    );
    Err(Error::input(message).hint("the tokenizer belongs to another model"))
}

/// Opens the weights file of a tower.
fn open(config: &TextConfig, file: &Path, device: &Device) -> Result<(TextTower, StateDict)> {
    let weights = StateDict::open(file)?;
    let tower = build(&weights, config, device).context(|| format!("`{}`", file.display()))?;
    Ok((tower, weights))
}

fn hash(weights: &str, config: &TextConfig, tokenizer: &Tokenizer) -> Result<String> {
    let all = format!("{weights} {config:?} {}", tokenizer.hash()?);
    Ok(blake3::hash(all.as_bytes()).to_string())
}

/// Reads the configurations of a folder's tower and tokenizer; returns them with the path of the weights.
fn describe(folder: &Path) -> Result<(TextConfig, TokenizerConfig, PathBuf)> {
    let config = [OPEN_CLIP_CONFIG, "config.json"].map(|name| folder.join(name));
    let Some(path) = config.iter().find(|path| path.is_file()) else {
        let message = format!("`{}` is not a text model folder", folder.display());
        return Err(Error::input(message).hint(
            "expected `open_clip_config.json` or Hugging Face's `config.json`, weights and a tokenizer",
        ));
    };
    let of_open_clip = path.ends_with(OPEN_CLIP_CONFIG);
    let place = || format!("`{}`", path.display());
    let json = json::parse(&files::read(path)?)
        .map_err(|error| Error::input(format!("not valid JSON: {error}")))
        .context(place)?;
    let read = match of_open_clip {
        true => from_open_clip(&json),
        false => from_hugging_face(&json),
    };
    let (config, tokenizer) = read.context(place)?;
    let first = if of_open_clip {
        &OPEN_CLIP_WEIGHTS[..]
    } else {
        &[]
    };
    let names = first.iter().chain(&WEIGHTS).map(|name| folder.join(name));
    let names: Vec<PathBuf> = names.collect();
    match names.iter().find(|path| path.is_file()) {
        Some(file) => Ok((config, tokenizer, file.clone())),
        None => {
            let message = format!("`{}` has no weights file", folder.display());
            let expected: Vec<String> = names
                .iter()
                .filter_map(|path| Some(format!("`{}`", path.file_name()?.display())))
                .collect();
            Err(Error::input(message).hint(format!("expected {}", expected.join(" or "))))
        }
    }
}

/// Naming scheme of a tower's tensors.
enum Names {
    /// open_clip's names with a prefix.
    OpenClip(&'static str),
    HuggingFace,
}

fn build(weights: &StateDict, config: &TextConfig, device: &Device) -> Result<TextTower> {
    config.check_device(device)?;
    let names = if weights.contains("text_model.embeddings.token_embedding.weight") {
        Names::HuggingFace
    } else if weights.contains("text.token_embedding.weight") {
        Names::OpenClip("text.")
    } else {
        Names::OpenClip("")
    };
    let mut unused: BTreeSet<&str> = weights.names().filter(|name| !is_known(name)).collect();
    let mut take = |name: &str, shape: &[usize]| {
        unused.remove(name);
        values(weights, name, shape)
    };
    let tower = TextTower::with_weights(config, device, |name, shape| match names {
        Names::OpenClip(prefix) => take(&format!("{prefix}{name}"), shape),
        Names::HuggingFace => from_hugging_face_names(name, shape, &mut take),
    })?;
    match unused.first() {
        None => Ok(tower),
        Some(first) => {
            let more = match unused.len() - 1 {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            let message = format!(
                "unexpected weights in the text tower: `{}`{more}",
                shown(first)
            );
            Err(Error::input(message).hint(
                "only CLIP and CLIPA text towers can be loaded; ignoring these weights would give a different model",
            ))
        }
    }
}

/// Returns whether a tensor is a known part of a full model outside the text tower.
fn is_known(name: &str) -> bool {
    let image = ["visual.", "vision_model."];
    // OpenAI's files also hold sizes, and old Hugging Face and open_clip files hold buffers that are recomputed.
    let others = [
        "visual_projection.weight",
        "logit_scale",
        "logit_bias",
        "input_resolution",
        "context_length",
        "vocab_size",
        "attn_mask",
        "text.attn_mask",
        "text_model.embeddings.position_ids",
    ];
    image.iter().any(|prefix| name.starts_with(prefix)) || others.contains(&name)
}

/// Reads a weight, given its open_clip name, from a file with Hugging Face names.
fn from_hugging_face_names(
    name: &str,
    shape: &[usize],
    take: &mut impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
) -> Result<Vec<f32>> {
    match hugging_face_text(name) {
        Some(Origin::Transposed(theirs)) => {
            let turned = take(&theirs, &[shape[1], shape[0]])?;
            Ok(transposed(&turned, shape[0]))
        }
        Some(Origin::Stacked(theirs)) => {
            let mut third = shape.to_vec();
            third[0] /= theirs.len();
            let mut all = Vec::with_capacity(shape.iter().product());
            for theirs in &theirs {
                all.extend(take(theirs, &third)?);
            }
            Ok(all)
        }
        Some(Origin::Same(theirs)) => take(&theirs, shape),
        Some(Origin::Lifted(_) | Origin::Zeros(..)) | None => take(name, shape),
    }
}

/// Reads the values of one weight and checks its shape and that all values are finite.
pub(crate) fn values(weights: &StateDict, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    if !weights.contains(name) {
        let message = format!("tensor `{name}` is missing");
        return Err(Error::input(message).hint(
            "the file is not a CLIP or CLIPA text tower, or the configuration belongs to another model",
        ));
    }
    let found = weights.shape(name)?;
    if found != shape {
        let message = format!("`{name}` has shape {found:?}, expected {shape:?}");
        return Err(Error::input(message).hint("the configuration belongs to another model"));
    }
    let values = weights.floats(name)?;
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(at) => {
            let message = format!("`{name}` contains {} at index {at}", values[at]);
            Err(Error::input(message).hint("the training that produced it diverged"))
        }
    }
}
