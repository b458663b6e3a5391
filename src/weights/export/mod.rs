//! Models for other programs: folders that timm and open_clip load, with a model card, and an entry for RobustBench.
//!
//! Weights are written as they are, so a round trip changes no logit.

pub(crate) mod board;
pub mod card;
pub(crate) mod open_clip;
pub mod robustbench;

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
/// Errors: a model that timm has no word for.
pub fn timm(loaded: &Loaded, facts: &Facts, folder: &Path) -> Result<()> {
    refuse_full(folder)?;
    let config = loaded.model.config();
    let preprocessing = loaded.preprocessing.preprocessing.clone()?;
    refuse_what_timm_lacks(&config)?;
    match preprocessing.resize_mode {
        ResizeMode::Longest { fill } if fill != mean_color(config.statistics().0) => {
            let message =
                format!("timm pads images with their mean color, and this model's with {fill:?}");
            return Err(Error::input(message).hint("export it --to open-clip"));
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

/// Writes the same folder and the entry that RobustBench's `model_info` holds, numbers as strings.
///
/// Errors: no board of `facts.dataset`; no result of AutoAttack, standard version, for one norm; a result that does not
/// fit the board; a model whose outputs are no logits of classes.
pub fn robustbench(loaded: &Loaded, facts: &Facts, folder: &Path) -> Result<()> {
    if loaded.outputs == Outputs::Embedding {
        let message = "the outputs of this model are an embedding, and RobustBench's boards are for classifiers";
        return Err(Error::input(message).hint("export it --to timm or --to open-clip"));
    }
    let entry = robustbench_entry(loaded, facts)?;
    timm(loaded, facts, folder)?;
    let path = folder.join(format!("{}.json", facts.name));
    files::write(&path, format!("{entry:#}\n").as_bytes())
}

fn refuse_what_timm_lacks(config: &ModelConfig) -> Result<()> {
    let ours = "advxl itself reads it: evaluate the run's folder or its `model` folder";
    if config.stem() == Stem::Conv {
        let message = "timm has no word for a convolutional stem, so it could not load this model";
        return Err(Error::input(message).hint(ours));
    }
    match config {
        ModelConfig::Vit(vit) if vit.norm_eps > NORM_EPS && vit.norm_eps != CLIP_EPS => {
            let eps = vit.norm_eps;
            let message = format!(
                "the norms add {eps:e} to the variance, and timm's models {NORM_EPS:e} or {CLIP_EPS:e}"
            );
            Err(Error::input(message).hint(ours))
        }
        _ => Ok(()),
    }
}
