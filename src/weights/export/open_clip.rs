//! Exports for open_clip: a folder with the image tower and the text tower that it was trained against.
//!
//! open_clip loads only full models. The image tower is written as open_clip's own `VisionTransformer` if it has that
//! form, else as a timm model of the same form, if timm registers one: open_clip passes only a name to timm, no
//! arguments.

use std::path::Path;

use serde_json::{Value, json};

use super::card::{Facts, Use, card, refuse_full};
use super::parts::{NamedTensor, image_parts, is_zero, write_parts};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::model::{ConvNextConfig, Model, ModelConfig, NORM_EPS, Pool, Stem, Vit, VitConfig};
use crate::ops::{Device, Gelu, from_vec};
use crate::weights::architecture::CLIP_EPS;
use crate::weights::import::Loaded;
use crate::weights::names::{Head, Scheme};
use crate::weights::outputs::{OPEN_CLIP_CONFIG, Outputs};
use crate::weights::preprocessing::to_open_clip;
use crate::weights::state_dict::StateDict;

/// timm's vision transformers: the name without image size, our size, and the image sizes of the plain model, of the
/// one with a norm before the blocks, and of the latter with OpenAI's activation.
///
/// Source: `timm/models/vision_transformer.py`, 1.0.31.
type Registered = (&'static str, &'static str, [&'static [usize]; 3]);
const TIMM: [Registered; 9] = [
    ("vit_tiny_patch16", "vit_ti16", [&[224, 384], &[], &[]]),
    ("vit_small_patch16", "vit_s16", [&[224, 384], &[], &[]]),
    ("vit_small_patch32", "vit_s32", [&[224, 384], &[], &[]]),
    (
        "vit_base_patch16",
        "vit_b16",
        [&[224, 384], &[224, 384], &[224]],
    ),
    (
        "vit_base_patch32",
        "vit_b32",
        [&[224, 384], &[224, 256, 384, 448], &[224]],
    ),
    ("vit_large_patch16", "vit_l16", [&[224, 384], &[], &[]]),
    ("vit_large_patch32", "vit_l32", [&[224, 384], &[], &[]]),
    (
        "vit_huge_patch14",
        "vit_h14",
        [&[224], &[224, 336, 378], &[224, 378]],
    ),
    ("vit_giant_patch14", "vit_g14", [&[224], &[224], &[]]),
];

/// Entries that are not weights, in files of older versions and of OpenAI.
const NO_WEIGHTS: [&str; 5] = [
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
    "text.transformer.embeddings.position_ids",
];

/// Writes a folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`, with a model card.
///
/// The text tower and everything else outside the image tower is copied from the open_clip folder `text`.
///
/// Errors: a model that neither open_clip's own tower nor a registered timm model can represent, an embedding size that
/// differs from the text tower's, and errors of reading `text`.
pub fn open_clip(loaded: &Loaded, facts: &Facts, text: &Path, folder: &Path) -> Result<()> {
    refuse_full(folder)?;
    if loaded.outputs == Outputs::Logits {
        let message = "this model outputs class logits, but open_clip models output embeddings";
        return Err(Error::input(message).hint("export it with --to timm"));
    }
    let preprocessing = loaded.preprocessing.preprocessing.clone()?;
    let (mut config, tensors) = crate::weights::import::open_clip_folder(text)?;
    if config["model_cfg"].is_null() {
        config = json!({ "model_cfg": config });
    }
    let of_text = || format!("text tower in `{}`", text.display());
    let model = &mut config["model_cfg"];
    check_embedding(model, loaded).context(of_text)?;
    let (vision, scheme) = tower(loaded, model["quick_gelu"] == Value::Bool(true))?;
    model["vision_cfg"] = vision;
    let (mean, std) = loaded.model.config().statistics();
    config["preprocess_cfg"] = to_open_clip(&preprocessing)?;
    config["preprocess_cfg"]["mean"] = json!(mean);
    config["preprocess_cfg"]["std"] = json!(std);
    let mut parts = text_parts(&tensors).context(of_text)?;
    parts.extend(image_parts(loaded, scheme));
    files::make_folder(folder)?;
    write_parts(&folder.join("open_clip_model.safetensors"), &parts)?;
    let card = card(loaded, &preprocessing, facts, Use::OpenClip);
    files::write(&folder.join("README.md"), card.as_bytes())?;
    // Written last, so that a folder with a configuration always has its weights.
    files::write(
        &folder.join(OPEN_CLIP_CONFIG),
        format!("{config:#}\n").as_bytes(),
    )
}

fn check_embedding(model: &Value, loaded: &Loaded) -> Result<()> {
    let (ours, theirs) = (loaded.model.classes(), model["embed_dim"].as_u64());
    if theirs == Some(ours as u64) {
        return Ok(());
    }
    let theirs = theirs.map_or("no embed_dim".to_owned(), |size| {
        format!("embed_dim = {size}")
    });
    Err(Error::input(format!(
        "it has {theirs}, but the model's embedding has size {ours}"
    ))
    .hint("give the folder of the model whose text tower this image tower was trained against"))
}

/// Returns `vision_cfg` for a model, given its text tower's activation, and the naming scheme for its weights.
fn tower(loaded: &Loaded, quick_gelu: bool) -> Result<(Value, Scheme)> {
    let obstacles = match &loaded.model {
        Model::ConvNext(_) => vec!["is a ConvNeXt"],
        Model::Vit(vit) => obstacles(vit, quick_gelu),
    };
    if let (Model::Vit(vit), true) = (&loaded.model, obstacles.is_empty()) {
        let of_vit = vision_config(&vit.config, loaded.image_size);
        return Ok((of_vit, Scheme::OpenClip(vit.config.pool)));
    }
    let Some(name) = timm_name(&loaded.model.config(), loaded.image_size) else {
        let message = format!(
            "open_clip's own image tower cannot represent this model, which {}, and timm registers no model of its \
             form",
            obstacles.join(", ")
        );
        return Err(Error::input(message).hint(
            "export it with --to timm, or train a size and image size that timm registers, such as vit_b16 at 224 \
             with its class token",
        ));
    };
    let pool = match loaded.model.config() {
        ModelConfig::Vit(VitConfig {
            pool: Pool::Token, ..
        }) => "token",
        _ => "avg",
    };
    // Without a projection, open_clip keeps timm's head, which has a bias.
    let vision = json!({
        "timm_model_name": name,
        "timm_model_pretrained": false,
        "timm_pool": pool,
        "timm_proj": "",
        "image_size": loaded.image_size,
    });
    Ok((vision, Scheme::OpenClipTimm(Head::Own)))
}

/// Lists the features of a transformer that open_clip's own does not support.
fn obstacles(vit: &Vit, quick_gelu: bool) -> Vec<&'static str> {
    let is_zero = |name: &str| is_zero(vit, name);
    let config = &vit.config;
    [
        (config.stem == Stem::Conv, "has a convolutional stem"),
        (!config.class_token, "has no class token"),
        (
            !is_zero("patch_embed.proj.bias"),
            "has a bias in its patch embedding",
        ),
        (!is_zero("head.bias"), "has a bias in its head"),
        (
            (config.gelu == Gelu::Quick) != quick_gelu,
            "has a different activation than the text tower",
        ),
    ]
    .into_iter()
    .filter_map(|(is_it, what)| is_it.then_some(what))
    .collect()
}

/// Returns `vision_cfg` for a transformer of open_clip's own form.
fn vision_config(vit: &VitConfig, image_size: usize) -> Value {
    let mut config = json!({
        "image_size": image_size,
        "layers": vit.depth,
        "width": vit.width,
        "head_width": vit.width / vit.heads,
        "mlp_ratio": vit.mlp_ratio(),
        "patch_size": vit.patch,
        "norm_kwargs": { "eps": vit.norm_eps },
    });
    if !vit.pre_norm {
        config["no_ln_pre"] = true.into();
    }
    if vit.pool == Pool::Average {
        config["pool_type"] = "avg".into();
        config["final_ln_after_pool"] = true.into();
    }
    if vit.gelu == Gelu::Tanh {
        config["act_kwargs"] = json!({ "approximate": "tanh" });
    }
    config
}

/// Returns the timm name that fixes all settings of a model except pooling and classes, if there is one.
fn timm_name(config: &ModelConfig, image_size: usize) -> Option<String> {
    match config {
        ModelConfig::Vit(vit) => {
            let sizes = |vit: &VitConfig| [vit.patch, vit.width, vit.depth, vit.heads, vit.hidden];
            let (kind, word) = match (vit.pre_norm, vit.norm_eps, vit.gelu) {
                (false, NORM_EPS, Gelu::Erf) => (0, ""),
                (true, CLIP_EPS, Gelu::Erf) => (1, "clip_"),
                (true, CLIP_EPS, Gelu::Quick) => (2, "clip_quickgelu_"),
                _ => return None,
            };
            if vit.stem == Stem::Conv || !vit.class_token {
                return None;
            }
            let (name, ..) = TIMM.iter().find(|(_, size, images)| {
                VitConfig::named(size).is_some_and(|named| sizes(&named) == sizes(vit))
                    && images[kind].contains(&image_size)
            })?;
            Some(format!("{name}_{word}{image_size}"))
        }
        ModelConfig::ConvNext(found) => {
            let is_it = |name: &&str| {
                ConvNextConfig::named(name).is_some_and(|named| {
                    let sizes = (named.widths, named.depths, named.patch, named.stem);
                    sizes == (found.widths, found.depths, found.patch, found.stem)
                })
            };
            ConvNextConfig::names().find(is_it).map(str::to_owned)
        }
    }
}

/// Returns all tensors of an open_clip model except those of its image tower.
fn text_parts(file: &StateDict) -> Result<Vec<NamedTensor>> {
    let names = file
        .names()
        .filter(|name| !name.starts_with("visual.") && !NO_WEIGHTS.contains(name));
    let part = |name: &str| {
        let values = file.floats(name)?;
        let length = values.len();
        Ok(NamedTensor {
            name: name.to_owned(),
            values: from_vec(values, [length], &Device::cpu()),
            shape: file.shape(name)?.to_vec(),
        })
    };
    names.map(part).collect()
}
