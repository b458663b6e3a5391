//! Models for other programs: folders that timm and open_clip load, with a model card, and an entry for RobustBench.
//!
//! Weights are written as they are, so a round trip changes no logit.

pub(crate) mod board;
pub mod card;
pub(crate) mod open_clip;

pub use open_clip::open_clip;

use std::path::Path;

use serde_json::{Value, json};

use crate::attack::Norm;
use crate::error::{Error, Result};
use crate::eval::autoattack::{Settings, Version};
use crate::image::ResizeMode;
use crate::model::{ModelConfig, NORM_EPS, Stem};
use crate::settings::Words;
use crate::weights::architecture::CLIP_EPS;
use crate::weights::preprocessing::mean_color;
use crate::weights::{Loaded, Outputs};
use crate::{files, weights};

use card::{Facts, Use, card, percent, refuse_full};

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
    weights::save(
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

/// Whether an evaluation is AutoAttack's standard version with its own settings, which published numbers mean.
fn is_standard(evaluation: &Value) -> bool {
    let word = evaluation["norm"].as_str();
    let norm = word.and_then(Norm::from_word);
    let epsilon = evaluation["epsilon"]
        .as_str()
        .and_then(|text| text.parse().ok());
    let (Some(norm), Some(epsilon)) = (norm, epsilon) else {
        return false;
    };
    let attacks = Settings::new(Version::Standard, norm, epsilon).autoattack();
    let right = std::iter::once(Value::Null).chain(attacks.iter().map(|attack| json!(attack)));
    stages(evaluation)
        .iter()
        .map(|stage| stage["settings"].clone())
        .eq(right)
}

fn stages(result: &Value) -> &[Value] {
    result["stages"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
}

/// The evaluations of results, each one norm's, with the result that it is part of.
fn evaluations(results: &[Value]) -> Vec<(&Value, &Value)> {
    let mut found = Vec::new();
    for result in results {
        match result["evaluations"].as_array() {
            Some(several) => found.extend(several.iter().map(|evaluation| (result, evaluation))),
            None if !stages(result).is_empty() => found.push((result, result)),
            None => {}
        }
    }
    found
}

fn robustbench_entry(loaded: &Loaded, facts: &Facts) -> Result<Value> {
    let board = board::named(&facts.dataset)?;
    let mut found = evaluations(&facts.results);
    found.retain(|(_, evaluation)| is_standard(evaluation));
    let [(result, evaluation)] = found[..] else {
        let count = found.len();
        let message = format!(
            "{count} of the results are of AutoAttack, standard version, with its own settings; one is needed"
        );
        return Err(Error::input(message).hint(board.command()));
    };
    let epsilon = board.check(loaded, result, evaluation)?;
    let flags = evaluation["flags"]
        .as_array()
        .map(Vec::len)
        .unwrap_or_default();
    Ok(json!({
        "link": facts.link,
        "name": facts.name,
        "authors": facts.authors,
        "additional_data": facts.additional_data,
        "number_forward_passes": 1,
        "dataset": facts.dataset,
        "venue": "",
        "architecture": architecture(loaded),
        "eps": epsilon,
        "clean_acc": percent(&stages(evaluation)[0]["robust_accuracy"]),
        "reported": percent(&evaluation["robust_accuracy"]),
        "autoattack_acc": percent(&evaluation["robust_accuracy"]),
        "unreliable": flags > 0,
    }))
}

/// Such as `ViT-B/16`, `ConvNeXt-L + ConvStem` or `ViT, width 768, depth 6, patch 16`.
fn architecture(loaded: &Loaded) -> String {
    let config = loaded.model.config();
    let named = ModelConfig::named(config.size());
    let text = match (&config, named) {
        (ModelConfig::Vit(vit), Some(ModelConfig::Vit(named)))
            if (vit.width, vit.depth, vit.patch) == (named.width, named.depth, named.patch) =>
        {
            let word = vit.size.trim_start_matches("vit_");
            let word = word.trim_end_matches(|letter: char| letter.is_ascii_digit());
            let word = match word {
                "ti" => "Ti".to_owned(),
                "g" => "g".to_owned(),
                word => word.to_uppercase(),
            };
            format!("ViT-{word}/{}", vit.patch)
        }
        (ModelConfig::Vit(vit), _) => format!(
            "ViT, width {}, depth {}, patch {}",
            vit.width, vit.depth, vit.patch
        ),
        (ModelConfig::ConvNext(convnext), Some(ModelConfig::ConvNext(named)))
            if (convnext.widths, convnext.depths) == (named.widths, named.depths) =>
        {
            let word = convnext.size.trim_start_matches("convnext_");
            let short = [("tiny", "T"), ("small", "S"), ("base", "B"), ("large", "L")];
            let short = short.iter().find(|(long, _)| *long == word);
            format!("ConvNeXt-{}", short.map_or(word, |(_, short)| short))
        }
        (ModelConfig::ConvNext(convnext), _) => format!(
            "ConvNeXt, widths {:?}, depths {:?}",
            convnext.widths, convnext.depths
        ),
    };
    match config.stem() {
        Stem::Patch => text,
        Stem::Conv => format!("{text} + ConvStem"),
    }
}
