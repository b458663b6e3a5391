//! Exports models for other programs: folders that timm, open_clip and transformers load, with a model card, and
//! RobustBench entries.
//!
//! Weights are written unchanged, so a round trip changes no logit; [`hugging_face_clip`] says which it changes.

pub(crate) mod board;
pub mod card;
pub(crate) mod fold;
pub(crate) mod hugging_face;
pub(crate) mod open_clip;
pub(crate) mod parts;
pub mod robustbench;

pub use hugging_face::hugging_face_clip;
pub use open_clip::open_clip;

use std::path::Path;

use crate::error::{Error, Result};
use crate::files;
use crate::image::ResizeMode;
use crate::model::{ModelConfig, NORM_EPS, Stem};
use crate::weights::architecture::CLIP_EPS;
use crate::weights::import::{Loaded, save};
use crate::weights::outputs::Outputs;
use crate::weights::preprocessing::mean_color;

use card::{Facts, Use, card, refuse_full};
use robustbench::robustbench_entry;

/// Writes a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`, with a model card.
///
/// Errors: a model that timm does not support.
pub fn timm(loaded: &Loaded, facts: &Facts, folder: &Path) -> Result<()> {
    refuse_full(folder)?;
    let config = loaded.model.config();
    let preprocessing = loaded.preprocessing.preprocessing.clone()?;
    refuse_what_timm_lacks(&config)?;
    match preprocessing.resize_mode {
        ResizeMode::Longest { fill } if fill != mean_color(config.statistics().0) => {
            let message =
                format!("timm pads images with the mean color, but this model uses {fill:?}");
            return Err(Error::input(message).hint("export it with --to open-clip"));
        }
        ResizeMode::Crop => {
            return Err(Error::input(
                "timm cannot crop images without resizing them",
            ));
        }
        _ => {}
    }
    let card = card(loaded, &preprocessing, facts, Use::Timm);
    save(
        &loaded.model,
        &preprocessing,
        loaded.outputs,
        &loaded.classes,
        folder,
    )?;
    files::write(&folder.join("README.md"), card.as_bytes())
}

/// Writes the same folder as [`timm`] and an entry for RobustBench's `model_info`, with numbers as strings.
///
/// Errors: no leaderboard for `facts.dataset`; not exactly one result of standard AutoAttack; a result that does not
/// qualify for the leaderboard; a model whose outputs are not class logits.
pub fn robustbench(loaded: &Loaded, facts: &Facts, folder: &Path) -> Result<()> {
    if loaded.outputs == Outputs::Embedding {
        let message =
            "this model outputs an embedding, but RobustBench's leaderboards are for classifiers";
        return Err(Error::input(message).hint("export it with --to timm or --to open-clip"));
    }
    let entry = robustbench_entry(loaded, facts)?;
    timm(loaded, facts, folder)?;
    let path = folder.join(format!("{}.json", facts.name));
    files::write(&path, format!("{entry:#}\n").as_bytes())
}

fn refuse_what_timm_lacks(config: &ModelConfig) -> Result<()> {
    let ours = "evaluate it with advxl, from the run folder or its `model` folder";
    if config.stem() == Stem::Conv {
        let message = "timm cannot load this model: it has no option for a convolutional stem";
        return Err(Error::input(message).hint(ours));
    }
    match config {
        ModelConfig::Vit(vit) if vit.norm_eps > NORM_EPS && vit.norm_eps != CLIP_EPS => {
            let eps = vit.norm_eps;
            let message = format!(
                "the layer norms use epsilon {eps:e}, but timm's models use {NORM_EPS:e} or {CLIP_EPS:e}"
            );
            Err(Error::input(message).hint(ours))
        }
        _ => Ok(()),
    }
}
