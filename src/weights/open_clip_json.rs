//! Reads the image tower from `open_clip_config.json` of an open_clip folder.
//!
//! The text tower's settings are ignored.

use serde_json::Value;

use super::architecture::{CLIP_EPS, known};
use super::config_json::{channels, eps};
use super::names::{Head, Scheme};
use super::outputs::{OPEN_CLIP_CONFIG, Outputs};
use super::preprocessing::{of_open_clip, square};
use super::stated::{ConfigKeys, StatedModel};
use crate::error::{Error, Result};
use crate::model::Pool;
use crate::model::config::common::{CLIP_MEAN, CLIP_STD};
use crate::ops::Gelu;
use crate::storage::archive::shown;

/// Known keys of `vision_cfg`: those read below, and those without effect outside training.
const KEYS: [&str; 32] = [
    "layers",
    "width",
    "head_width",
    "mlp_ratio",
    "patch_size",
    "image_size",
    "ls_init_value",
    "patch_dropout",
    "attentional_pool",
    "attn_pooler_queries",
    "attn_pooler_heads",
    "no_ln_pre",
    "pos_embed_type",
    "final_ln_after_pool",
    "pool_type",
    "output_tokens",
    "act_kwargs",
    "norm_kwargs",
    "block_type",
    "qk_norm",
    "scaled_cosine_attn",
    "scale_heads",
    "scale_attn_inner",
    "scale_attn",
    "scale_fc",
    "timm_model_name",
    "timm_model_pretrained",
    "timm_pool",
    "timm_proj",
    "timm_proj_bias",
    "timm_drop",
    "timm_drop_path",
];

/// Reads what a configuration states about the image tower; returns it with the naming scheme of its weights.
pub(crate) fn read(config: &Value) -> Result<(StatedModel, Scheme)> {
    // Older files, without preprocessing, hold only the inner part.
    let model = match &config["model_cfg"] {
        Value::Null => config,
        model => model,
    };
    let vision = &model["vision_cfg"];
    let Some(settings) = vision.as_object() else {
        let message = format!("`{OPEN_CLIP_CONFIG}` has no `vision_cfg`");
        return Err(Error::input(message).hint("copy or download the folder again"));
    };
    let unknown = |key: &&String| !KEYS.contains(&key.as_str());
    if let Some(key) = settings.keys().find(unknown) {
        let found = &settings[key];
        return Err(refused(
            &format!("unknown setting {} = {found}", shown(key)),
            "ignoring it could load a different model",
        ));
    }
    let number = |key: &str| vision[key].as_u64().map(|number| number as usize);
    let size = square(OPEN_CLIP_CONFIG, "image_size", &vision["image_size"])?;
    let stated = StatedModel {
        source: OPEN_CLIP_CONFIG,
        image_size: size.map(|size| ("image_size", size)),
        patch: number("patch_size"),
        outputs: Some(Outputs::Embedding),
        preprocessing: of_open_clip(&config["preprocess_cfg"]),
        by_name_alone: false,
        words: ConfigKeys {
            classes: "embed_dim",
            width: "width",
            depth: "layers",
            heads: "width / head_width",
            pool: "timm_pool",
        },
        class_count: model["embed_dim"].as_u64().map(|number| number as usize),
        mean: CLIP_MEAN,
        std: CLIP_STD,
        ..StatedModel::by_name(vision["timm_model_name"].as_str().unwrap_or_default())
    };
    let preprocessing = &config["preprocess_cfg"];
    let stated = StatedModel {
        size: String::new(),
        mean: channels(preprocessing, ["mean", "mean"], &stated)?,
        std: channels(preprocessing, ["std", "std"], &stated)?,
        ..stated
    };
    if vision["timm_model_name"].is_string() {
        return of_timm(vision, stated);
    }
    if vision["layers"].is_array() {
        let layers = &vision["layers"];
        return Err(refused(
            &format!("layers = {layers}"),
            "a list of layers means a ResNet, which cannot be loaded",
        ));
    }
    for key in [
        "attentional_pool",
        "ls_init_value",
        "qk_norm",
        "scaled_cosine_attn",
        "scale_heads",
        "scale_attn_inner",
        "scale_attn",
        "scale_fc",
    ] {
        let found = &vision[key];
        if !(found.is_null() || *found == Value::Bool(false)) {
            return Err(refused(
                &format!("{key} = {found}"),
                "only plain vision transformers can be loaded",
            ));
        }
    }
    let pool = pool(vision)?;
    let width = number("width").unwrap_or(768);
    let heads = match number("head_width").unwrap_or(64) {
        0 => 0,
        head_width => width / head_width,
    };
    let stated = StatedModel {
        heads: Some(heads),
        width: Some(width),
        depth: Some(number("layers").unwrap_or(12)),
        pre_norm: Some(vision["no_ln_pre"] != Value::Bool(true)),
        pool: Some(pool),
        gelu: gelu(model, vision)?,
        norm_eps: norm_eps(vision, &stated)?,
        ..stated
    };
    Ok((stated, Scheme::OpenClip(pool)))
}

fn refused(what: &str, hint: &str) -> Error {
    Error::input(format!("`{OPEN_CLIP_CONFIG}` has {what} in `vision_cfg`")).hint(hint)
}

fn pool(vision: &Value) -> Result<Pool> {
    let after = vision["final_ln_after_pool"] == Value::Bool(true);
    match (vision["pool_type"].as_str().unwrap_or("tok"), after) {
        // For a single token, norm before and norm after pooling are the same.
        ("tok", _) => Ok(Pool::Token),
        ("avg", true) => Ok(Pool::Average),
        ("avg", false) => Err(refused(
            "pool_type = `avg` without final_ln_after_pool",
            "average pooling can be loaded only if the last norm comes after it",
        )),
        (other, _) => Err(refused(
            &format!("pool_type = `{}`", shown(other)),
            "only `tok` and `avg` can be loaded",
        )),
    }
}

fn gelu(model: &Value, vision: &Value) -> Result<Gelu> {
    let quick = model["quick_gelu"] == Value::Bool(true);
    let arguments = &vision["act_kwargs"];
    let only = arguments.as_object().filter(|map| map.len() == 1);
    let approximate = only.and_then(|map| map.get("approximate")?.as_str());
    match (quick, arguments.is_null(), approximate) {
        (true, true, _) => Ok(Gelu::Quick),
        (false, true, _) | (false, _, Some("none")) => Ok(Gelu::Erf),
        (false, _, Some("tanh")) => Ok(Gelu::Tanh),
        _ => Err(refused(
            &format!("act_kwargs = {arguments}"),
            "only { \"approximate\": \"tanh\" } without quick_gelu can be loaded",
        )),
    }
}

fn norm_eps(vision: &Value, stated: &StatedModel) -> Result<f64> {
    let arguments = &vision["norm_kwargs"];
    let others = arguments
        .as_object()
        .map(|map| map.keys().any(|key| key != "eps"));
    if others.unwrap_or(!arguments.is_null()) {
        return Err(refused(
            &format!("norm_kwargs = {arguments}"),
            "only `eps` is supported",
        ));
    }
    match &arguments["eps"] {
        Value::Null => Ok(CLIP_EPS),
        found => eps(found, "norm_kwargs.eps", stated),
    }
}

/// Reads an image tower that is a timm model.
fn of_timm(vision: &Value, stated: StatedModel) -> Result<(StatedModel, Scheme)> {
    let name = stated.architecture.as_str();
    if known(name).is_none() {
        let what = format!("timm_model_name = `{}`", shown(name));
        return Err(refused(
            &what,
            "only plain vision transformers and ConvNeXts can be loaded",
        ));
    }
    let pool = match vision["timm_pool"].as_str().unwrap_or("avg") {
        "avg" => Some(Pool::Average),
        "token" => Some(Pool::Token),
        "" => None,
        other => {
            let what = format!("timm_pool = `{}`", shown(other));
            return Err(refused(&what, "only `avg` and `token` can be loaded"));
        }
    };
    let bias = vision["timm_proj_bias"] == Value::Bool(true);
    let head = match (vision["timm_proj"].as_str().unwrap_or("linear"), pool) {
        ("linear", _) => Head::Projection { bias },
        ("", Some(_)) => Head::Own,
        (other, _) => {
            let what = format!("timm_proj = `{}`", shown(other));
            return Err(refused(
                &what,
                "only `linear`, or an empty string with timm_pool, can be loaded",
            ));
        }
    };
    Ok((StatedModel { pool, ..stated }, Scheme::OpenClipTimm(head)))
}
