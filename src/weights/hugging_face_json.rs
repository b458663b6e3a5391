//! Reads `config.json` and `preprocessor_config.json` of transformers folders: ViT and CLIP. Writes CLIP's settings of an
//! image tower.

use serde_json::{Value, json};

use super::architecture::CLIP_EPS;
use super::config_json::{channels, eps};
use super::names::Scheme;
use super::outputs::Outputs;
use super::preprocessing::{of_hugging_face, square};
use super::stated::{ConfigKeys, StatedModel};
use crate::error::{Error, Result};
use crate::model::config::common::{CLIP_MEAN, CLIP_STD};
use crate::model::{Pool, VitConfig};
use crate::ops::Gelu;
use crate::storage::archive::shown;

/// Default mean and std of ViT's image processor.
const HALF: [f64; 3] = [0.5; 3];

/// transformers' names of the activations.
///
/// The first name of each is the one to write.
const GELUS: [(&str, Gelu); 5] = [
    ("gelu", Gelu::Erf),
    ("quick_gelu", Gelu::Quick),
    ("gelu_pytorch_tanh", Gelu::Tanh),
    ("gelu_new", Gelu::Tanh),
    ("gelu_fast", Gelu::Tanh),
];

const WORDS: ConfigKeys = ConfigKeys {
    classes: "num_labels",
    width: "hidden_size",
    depth: "num_hidden_layers",
    heads: "num_attention_heads",
    // Not a key of the file: the kind of model determines it.
    pool: "pool",
};

/// Reads what a configuration and a preprocessor configuration (or null) state about the model; returns it with the
/// naming scheme of its weights.
pub(crate) fn read(config: &Value, preprocessor: &Value) -> Result<(StatedModel, Scheme)> {
    // transformers' defaults for absent keys: (activation, eps, mean, std).
    let vit = ("gelu", 1e-12, HALF, HALF);
    let clip = ("quick_gelu", CLIP_EPS, CLIP_MEAN, CLIP_STD);
    let (vision, scheme, (usual, norm_eps, mean, std)) = match config["model_type"].as_str() {
        Some("vit") => (config, Scheme::HuggingFaceVit, vit),
        Some("clip_vision_model") => (config, Scheme::HuggingFaceClip, clip),
        Some("clip") => (&config["vision_config"], Scheme::HuggingFaceClip, clip),
        other => {
            let message = format!(
                "`config.json` has unsupported model_type = `{}`",
                shown(other.unwrap_or_default())
            );
            return Err(Error::input(message)
                .hint("transformers' `vit`, `clip` and `clip_vision_model` can be loaded"));
        }
    };
    let word = vision["hidden_act"].as_str().unwrap_or(usual);
    let Some((_, gelu)) = GELUS.iter().find(|(known, _)| *known == word) else {
        let message = format!(
            "`config.json` has unsupported hidden_act = `{}`",
            shown(word)
        );
        let words = GELUS.map(|(word, _)| format!("`{word}`"));
        return Err(Error::input(message).hint(format!("only {} can be loaded", words.join(", "))));
    };
    let number = |value: &Value| value.as_u64().map(|number| number as usize);
    let classes = class_names(config);
    let is_clip = scheme == Scheme::HuggingFaceClip;
    let size = square("config.json", "image_size", &vision["image_size"])?;
    let stated = StatedModel {
        size: String::new(),
        by_name_alone: false,
        image_size: size.map(|size| ("image_size", size)),
        patch: number(&vision["patch_size"]),
        outputs: Some(match is_clip {
            true => Outputs::Embedding,
            false => Outputs::Logits,
        }),
        preprocessing: of_hugging_face(preprocessor, is_clip),
        words: WORDS,
        heads: Some(number(&vision["num_attention_heads"]).unwrap_or(12)),
        width: Some(number(&vision["hidden_size"]).unwrap_or(768)),
        depth: Some(number(&vision["num_hidden_layers"]).unwrap_or(12)),
        pool: Some(Pool::Token),
        pre_norm: Some(is_clip),
        gelu: *gelu,
        norm_eps,
        mean,
        std,
        ..StatedModel::by_name("")
    };
    let stated = StatedModel {
        norm_eps: eps(&vision["layer_norm_eps"], "layer_norm_eps", &stated)?,
        ..stated
    };
    let stated = match preprocessor["do_normalize"] == Value::Bool(false) {
        true => StatedModel {
            mean: [0.0; 3],
            std: [1.0; 3],
            ..stated
        },
        false => {
            let stated = StatedModel {
                source: "preprocessor_config.json",
                ..stated
            };
            StatedModel {
                source: "config.json",
                mean: channels(preprocessor, ["mean", "image_mean"], &stated)?,
                std: channels(preprocessor, ["std", "image_std"], &stated)?,
                ..stated
            }
        }
    };
    let stated = match scheme {
        Scheme::HuggingFaceVit => StatedModel {
            class_count: (!classes.is_empty()).then_some(classes.len()),
            class_names: named(classes),
            ..stated
        },
        // The embedding size; class names have no meaning here.
        _ => StatedModel {
            words: ConfigKeys {
                classes: "projection_dim",
                ..WORDS
            },
            class_count: number(&config["projection_dim"]),
            ..stated
        },
    };
    Ok((stated, scheme))
}

/// Returns the `CLIPVisionConfig` of a transformer with `outputs` dimensions of the embedding.
pub(crate) fn write(vit: &VitConfig, outputs: usize, image_size: usize) -> Value {
    let activation = GELUS.iter().find(|(_, gelu)| *gelu == vit.gelu);
    json!({
        "model_type": "clip_vision_model",
        "hidden_size": vit.width,
        "intermediate_size": vit.hidden,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "num_channels": 3,
        "image_size": image_size,
        "patch_size": vit.patch,
        "hidden_act": activation.expect("every form has a name").0,
        "layer_norm_eps": vit.norm_eps,
        "projection_dim": outputs,
    })
}

/// Returns the names of `id2label` in the order of their ids.
fn class_names(config: &Value) -> Vec<String> {
    let pairs = config["id2label"].as_object().into_iter().flatten();
    let mut pairs: Vec<(u64, String)> = pairs
        .filter_map(|(id, name)| Some((id.parse().ok()?, name.as_str()?.to_owned())))
        .collect();
    pairs.sort();
    pairs.into_iter().map(|(_, name)| name).collect()
}

/// Discards names that transformers generated by numbering.
fn named(classes: Vec<String>) -> Vec<String> {
    let numbered = |(index, name): (usize, &String)| *name == format!("LABEL_{index}");
    match classes.iter().enumerate().all(numbered) {
        true => Vec::new(),
        false => classes,
    }
}
