//! Exports for transformers: a folder that `CLIPVisionModel` and `CLIPVisionModelWithProjection` load, and `CLIPModel`
//! too if it is written with a text tower.
//!
//! All three classes look for the same tensor names, so one layout serves them: `vision_model.*` and
//! `visual_projection.weight`, and with a text tower `text_model.*`, `text_projection.weight` and `logit_scale`.

use std::path::Path;

use serde_json::{Value, json};

use super::card::{Facts, Use, card, refuse_full};
use super::fold::{Last, folded};
use super::parts::{NamedTensor, is_zero, tower_parts, write_parts};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::loss::LARGEST_SCALE;
use crate::model::{Model, Pool, Stem, Vit};
use crate::ops::{Device, to_vec};
use crate::text::Cleaning;
use crate::weights::hugging_face_json;
use crate::weights::import::Loaded;
use crate::weights::names::{Scheme, hugging_face_text};
use crate::weights::outputs::Outputs;
use crate::weights::preprocessing::to_hugging_face;
use crate::weights::text::{TextParts, load_parts};

/// Writes a folder for `from_pretrained` of transformers' `CLIPVisionModelWithProjection` and `CLIPVisionModel` and,
/// with the folder of a text tower, `CLIPModel`, with a model card. Returns notes for the user.
///
/// Positions are written for the model's image size. A bias of the head, which CLIP lacks, is folded into that of the
/// last norm: embeddings then differ by rounding. All other weights are written unchanged.
///
/// Errors: a model or text tower that transformers' CLIP cannot represent, different sizes of the embeddings,
/// preprocessing that its image processor does not support, and errors of reading `text`.
pub fn hugging_face_clip(
    loaded: &Loaded,
    facts: &Facts,
    text: Option<&Path>,
    folder: &Path,
) -> Result<Vec<String>> {
    refuse_full(folder)?;
    if loaded.outputs == Outputs::Logits {
        let message = "this model outputs class logits, but CLIP models output embeddings";
        return Err(Error::input(message).hint("export it with --to timm"));
    }
    let preprocessing = loaded.preprocessing.preprocessing.clone()?;
    let statistics = loaded.model.config().statistics();
    let mut preprocessor = to_hugging_face(&preprocessing, statistics)?;
    let vit = representable(&loaded.model)?;
    let mut notes = Vec::new();
    let mut parts = vision_parts(loaded, vit, &mut notes)?;
    let vision = hugging_face_json::write(&vit.config, vit.classes, loaded.image_size);
    let text = match text {
        None => None,
        Some(path) => {
            let of_text = || format!("text tower in `{}`", path.display());
            let text = load_parts(path, &Device::cpu()).context(of_text)?;
            let config = text_config(&text, vit.classes).context(of_text)?;
            parts.extend(text_parts(&text, &mut notes));
            Some((text, config))
        }
    };
    files::make_folder(folder)?;
    let config = match &text {
        None => {
            let mut config = vision;
            config["architectures"] = json!(["CLIPVisionModelWithProjection"]);
            config
        }
        Some((text, of_text)) => {
            if write_tokenizer(text, folder, &mut notes)? {
                preprocessor["processor_class"] = "CLIPProcessor".into();
            }
            json!({
                "model_type": "clip",
                "architectures": ["CLIPModel"],
                "projection_dim": vit.classes,
                "text_config": of_text,
                "vision_config": vision,
            })
        }
    };
    write_parts(&folder.join("model.safetensors"), &parts)?;
    let with_text = text.is_some();
    let card = card(
        loaded,
        &preprocessing,
        facts,
        Use::Transformers { with_text },
    );
    files::write(&folder.join("README.md"), card.as_bytes())?;
    let write = |name: &str, value: &Value| {
        files::write(&folder.join(name), format!("{value:#}\n").as_bytes())
    };
    write("preprocessor_config.json", &preprocessor)?;
    // Written last, so that a folder with a configuration always has its weights.
    write("config.json", &config)?;
    Ok(notes)
}

/// Returns the transformer if it has the form of CLIP's image tower, apart from the bias of its head.
///
/// Errors: all differences at once.
fn representable(model: &Model) -> Result<&Vit> {
    let refused = |obstacles: &[&str]| {
        let message = format!(
            "transformers' CLIP cannot represent this model, which {}",
            obstacles.join(", ")
        );
        Error::input(message).hint(
            "export it with --to timm or --to open-clip; models that started from CLIP's weights, or trained with \
             pool = \"token\", class_token = true and pre_norm = true, have CLIP's form",
        )
    };
    let Model::Vit(vit) = model else {
        return Err(refused(&["is a ConvNeXt"]));
    };
    let config = &vit.config;
    let obstacles = [
        (config.stem == Stem::Conv, "has a convolutional stem"),
        (!config.class_token, "has no class token"),
        (
            config.pool == Pool::Average,
            "pools the mean of the patches instead of the class token",
        ),
        (!config.pre_norm, "has no norm before the first block"),
        (
            !is_zero(vit, "patch_embed.proj.bias"),
            "has a bias in its patch embedding",
        ),
    ];
    let obstacles = obstacles.into_iter().filter(|(is_it, _)| *is_it);
    let obstacles: Vec<&str> = obstacles.map(|(_, what)| what).collect();
    match obstacles.is_empty() {
        true => Ok(vit),
        false => Err(refused(&obstacles)),
    }
}

/// Returns the tensors of the image tower under transformers' names.
fn vision_parts(loaded: &Loaded, vit: &Vit, notes: &mut Vec<String>) -> Result<Vec<NamedTensor>> {
    let mut parts = tower_parts(loaded);
    if !is_zero(vit, "head.bias") {
        let values = |name: &str| {
            let part = parts.iter().find(|part| part.name == name);
            part.map_or(Vec::new(), |part| to_vec(part.values.clone()))
        };
        let shift = folded(&Last {
            scale: &values("norm.weight"),
            shift: &values("norm.bias"),
            weight: &values("head.weight"),
            bias: &values("head.bias"),
        });
        let shift = shift.ok_or_else(|| {
            let message = "the head has a bias, which CLIP's projection lacks, and its weights are too close to \
                           linearly dependent to fold it into the last norm";
            Error::input(message).hint("export it with --to timm")
        })?;
        if let Some(part) = parts.iter_mut().find(|part| part.name == "norm.bias") {
            let (name, shape) = (part.name.clone(), part.shape.clone());
            *part = NamedTensor::new(name, shift, shape);
        }
        notes.push(
            "the bias of the head, which CLIP lacks, is folded into that of the last norm: embeddings differ by \
             rounding"
                .into(),
        );
    }
    let renamed = |part: NamedTensor| {
        let origin = Scheme::HuggingFaceClip.origin(&part.name);
        origin.map_or(Vec::new(), |origin| part.renamed(origin))
    };
    Ok(parts.into_iter().flat_map(renamed).collect())
}

/// Returns the `CLIPTextConfig` of a text tower for embeddings of a size.
fn text_config(text: &TextParts, embedding: usize) -> Result<Value> {
    let config = text.tower.config();
    if config.embedding != embedding {
        let message = format!(
            "its embedding has size {}, but the model's has size {embedding}",
            config.embedding
        );
        return Err(Error::input(message).hint(
            "give the folder of the model whose text tower this image tower was trained against",
        ));
    }
    if text.logit_bias.is_some_and(|bias| bias != 0.0) {
        let message = "it has a logit bias, which CLIPModel lacks";
        return Err(Error::input(message).hint("remove --text to export the image tower alone"));
    }
    let ends = text
        .tokenizer
        .as_ref()
        .and_then(|found| found.byte_pair_ends());
    config.to_hugging_face(ends.map(|ends| ends.map(|(_, id)| id)))
}

/// Returns the tensors of the text tower and the scale of the similarities under transformers' names.
fn text_parts(text: &TextParts, notes: &mut Vec<String>) -> Vec<NamedTensor> {
    let parameters = text.tower.parameters().into_iter();
    let mut parts: Vec<NamedTensor> = parameters
        .flat_map(|parameter| {
            let part = NamedTensor {
                name: parameter.name.clone(),
                values: parameter.value.clone(),
                shape: parameter.shape.clone(),
            };
            let origin = hugging_face_text(&part.name);
            origin.map_or(Vec::new(), |origin| part.renamed(origin))
        })
        .collect();
    let scale = text.logit_scale.unwrap_or_else(|| {
        notes.push(format!(
            "the text tower's folder has no `logit_scale`: {LARGEST_SCALE} is written, as advxl's zero-shot \
             evaluations use"
        ));
        LARGEST_SCALE.ln() as f32
    });
    parts.push(NamedTensor::new(
        "logit_scale".into(),
        vec![scale],
        Vec::new(),
    ));
    parts
}

/// Writes the tokenizer; returns whether there is one.
fn write_tokenizer(text: &TextParts, folder: &Path, notes: &mut Vec<String>) -> Result<bool> {
    let tokenize = "tokenize captions with the tokenizer that the text tower was trained with";
    let written = match &text.tokenizer {
        None => {
            notes.push(format!(
                "no tokenizer is written, since the text tower's folder has no tokenizer files: {tokenize}"
            ));
            false
        }
        Some(tokenizer) => {
            let written = tokenizer.write_for_transformers(folder)?;
            if !written {
                notes.push(format!(
                    "no tokenizer is written, since it is WordPiece, which CLIPTokenizer does not support: {tokenize}"
                ));
            }
            written
        }
    };
    let cleaning = text.settings.cleaning;
    if written && cleaning == Cleaning::Canonicalize {
        notes.push(
            "CLIPTokenizer keeps punctuation, which this model's captions are cleaned of: remove it before calling it"
                .into(),
        );
    }
    Ok(written)
}
