//! Reads and writes `config.json` of a model folder in timm's format.

use serde_json::{Value, json};

use super::architecture::CLIP_EPS;
use super::outputs::Outputs;
use super::preprocessing::{mean_color, of_timm, square, test_size, to_timm};
use super::stated::StatedModel;
use crate::error::{Error, Result};
use crate::image::{Preprocessing, ResizeMode};
use crate::model::config::common::{check_mean, check_std};
use crate::model::{ConvNextConfig, Model, ModelConfig, Pool, Position, Stem, VitConfig};
use crate::ops::Gelu;
use crate::storage::archive::shown;

/// timm's names of the activations.
const GELUS: [(&str, Gelu); 3] = [
    ("gelu", Gelu::Erf),
    ("gelu_tanh", Gelu::Tanh),
    ("quick_gelu", Gelu::Quick),
];

/// Returns the configuration of a model with its preprocessing.
pub(crate) fn write(
    model: &Model,
    preprocessing: &Preprocessing,
    outputs: Outputs,
    classes: &[String],
) -> Value {
    let (config, image_size) = (model.config(), preprocessing.image_size);
    let (mean, std) = config.statistics();
    let (architecture, pool, args, first, head) = match &config {
        ModelConfig::Vit(vit) => of_vit(vit, image_size),
        ModelConfig::ConvNext(convnext) => of_convnext(convnext),
    };
    let fixed = matches!(config, ModelConfig::Vit(_));
    let mut written = json!({
        // Any timm model of this kind: the arguments below set everything that differs.
        "architecture": architecture,
        "num_classes": model.classes(),
        "num_features": width(&config),
        "global_pool": pool,
        "label_names": classes,
        "model_args": args,
        "pretrained_cfg": {
            "tag": "advxl",
            "custom_load": false,
            "input_size": [3, image_size, image_size],
            "fixed_input_size": fixed,
            "mean": mean,
            "std": std,
            "num_classes": model.classes(),
            "pool_size": null,
            "first_conv": first,
            "classifier": head,
        },
        // Settings that timm has no key for.
        "advxl": ours(&config, preprocessing, outputs),
    });
    for (key, value) in to_timm(preprocessing) {
        written["pretrained_cfg"][key] = value;
    }
    written
}

fn width(config: &ModelConfig) -> usize {
    match config {
        ModelConfig::Vit(vit) => vit.width,
        ModelConfig::ConvNext(convnext) => convnext.widths[3],
    }
}

/// Architecture, pooling, arguments, first convolution and classifier.
type Entry = (
    &'static str,
    &'static str,
    Value,
    &'static str,
    &'static str,
);

fn of_vit(vit: &VitConfig, image_size: usize) -> Entry {
    let pool = match vit.pool {
        Pool::Average => "avg",
        Pool::Token => "token",
    };
    let gelu = GELUS.iter().find(|(_, gelu)| *gelu == vit.gelu);
    let args = json!({
        "img_size": image_size,
        "patch_size": vit.patch,
        "embed_dim": vit.width,
        "depth": vit.depth,
        "num_heads": vit.heads,
        "mlp_ratio": vit.mlp_ratio(),
        "global_pool": pool,
        "class_token": vit.class_token,
        "act_layer": gelu.expect("every activation has a name").0,
        "pre_norm": vit.pre_norm,
    });
    (
        // JSON cannot pass the norm epsilon as an argument; timm's registered models use one of two values.
        match vit.norm_eps == CLIP_EPS {
            true => "vit_base_patch16_clip_224",
            false => "vit_base_patch16_224",
        },
        pool,
        args,
        "patch_embed.proj",
        "head",
    )
}

fn of_convnext(convnext: &ConvNextConfig) -> Entry {
    let args = json!({
        "depths": convnext.depths,
        "dims": convnext.widths,
        "patch_size": convnext.patch,
    });
    ("convnext_base", "avg", args, "stem.0", "head.fc")
}

fn ours(config: &ModelConfig, preprocessing: &Preprocessing, outputs: Outputs) -> Value {
    let (mean, _) = config.statistics();
    let (position, position_size, norm_eps) = match config {
        ModelConfig::Vit(vit) => (Some(vit.position), vit.position_size, Some(vit.norm_eps)),
        ModelConfig::ConvNext(_) => (None, None, None),
    };
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "size": config.size(),
        "position": position,
        "position_size": position_size,
        "norm_eps": norm_eps,
        "outputs": outputs,
        // timm fills borders with the mean color.
        "fill": match preprocessing.resize_mode {
            ResizeMode::Longest { fill } if fill != mean_color(mean) => Some(fill),
            _ => None,
        },
        "stem": match config.stem() {
            Stem::Patch => None,
            stem => Some(stem),
        },
    })
}

/// Reads what a configuration states about the model.
pub(crate) fn read(config: &Value) -> Result<StatedModel> {
    let architecture = config["architecture"].as_str().unwrap_or_default();
    let (args, ours) = (&config["model_args"], &config["advxl"]);
    let number = |value: &Value| value.as_u64().map(|number| number as usize);
    // Early timm files hold all keys in one object.
    let pretrained = match config["pretrained_cfg"].is_object() {
        true => &config["pretrained_cfg"],
        false => config,
    };
    let source = "config.json";
    let mut image_size = None;
    for (key, found) in [
        ("img_size", &args["img_size"]),
        ("input_size", &pretrained["input_size"]),
    ] {
        let size = square(source, key, found)?.map(|size| (key, size));
        image_size = image_size.or(size);
    }
    let channels_of = &pretrained["input_size"][0];
    if channels_of.as_u64().is_some_and(|channels| channels != 3) {
        let message = format!("`{source}` has input_size = {}", pretrained["input_size"]);
        return Err(Error::input(message).hint("only images with 3 channels are supported"));
    }
    let pool = [&args["global_pool"], &config["global_pool"]];
    let pool = match pool.into_iter().find_map(Value::as_str) {
        None => None,
        Some("avg") => Some(Pool::Average),
        Some("token") => Some(Pool::Token),
        Some(other) => {
            let message = format!(
                "`config.json` has unsupported global_pool = `{}`",
                shown(other)
            );
            return Err(Error::input(message).hint("only `avg` and `token` can be loaded"));
        }
    };
    let by_name = StatedModel::by_name(architecture);
    let gelu = match args["act_layer"].as_str() {
        None => by_name.gelu,
        Some(word) => {
            let known = GELUS.iter().find(|(known, _)| *known == word);
            let unknown = || {
                let message = format!(
                    "`config.json` has unsupported act_layer = `{}`",
                    shown(word)
                );
                Error::input(message)
                    .hint("only `gelu`, `gelu_tanh` and `quick_gelu` can be loaded")
            };
            known.ok_or_else(unknown)?.1
        }
    };
    let mean = channels(pretrained, ["mean", "mean"], &by_name)?;
    let names = config["label_names"].as_array();
    let names = names.map(Vec::as_slice).unwrap_or_default().iter();
    let (named, count) = (
        names.len(),
        number(&config["num_classes"]).unwrap_or(names.len()),
    );
    if named > 0 && named != count {
        let message = format!("`config.json` has {named} label_names, but num_classes = {count}");
        return Err(Error::input(message).hint("name every class, or remove label_names"));
    }
    Ok(StatedModel {
        by_name_alone: false,
        heads: number(&args["num_heads"]),
        depth: number(&args["depth"]),
        pool,
        size: ours["size"].as_str().unwrap_or(architecture).to_owned(),
        position: match ours["position"].as_str() {
            Some("sincos2d") => Position::Sincos2d,
            _ => Position::Learned,
        },
        position_size: number(&ours["position_size"]),
        patch: number(&args["patch_size"]),
        image_size,
        gelu,
        norm_eps: eps(&ours["norm_eps"], "norm_eps", &by_name)?,
        mean,
        std: channels(pretrained, ["std", "std"], &by_name)?,
        outputs: match &ours["outputs"] {
            Value::Null => None,
            found => Some(Outputs::named(found)?),
        },
        tag: pretrained["tag"]
            .as_str()
            .map_or(by_name.tag.clone(), str::to_owned),
        preprocessing: of_timm(pretrained, ours, mean),
        notes: test_size(pretrained).into_iter().collect(),
        class_count: number(&config["num_classes"]),
        class_names: names
            .filter_map(|name| name.as_str().map(str::to_owned))
            .collect(),
        ..by_name
    })
}

/// Reads the epsilon of the norms, or returns the known one if the configuration states none.
pub(crate) fn eps(found: &Value, key: &str, stated: &StatedModel) -> Result<f64> {
    match (found.is_null(), found.as_f64()) {
        (true, _) => Ok(stated.norm_eps),
        (_, Some(eps)) if eps > 0.0 => Ok(eps),
        _ => {
            let message = format!("`{}` has invalid {key} = {found}", stated.source);
            Err(Error::input(message).hint("use a number above 0, such as 1e-6"))
        }
    }
}

/// Reads the mean or std of the three channels under a key, or returns the known one if the configuration states none.
/// `what` is `mean` or `std`.
pub(crate) fn channels(
    config: &Value,
    [what, key]: [&str; 2],
    stated: &StatedModel,
) -> Result<[f64; 3]> {
    let found = &config[key];
    if found.is_null() {
        return Ok(if what == "mean" {
            stated.mean
        } else {
            stated.std
        });
    }
    let list = found.as_array().map(Vec::as_slice).unwrap_or_default();
    let list: Vec<f64> = list.iter().filter_map(Value::as_f64).collect();
    let three: Option<[f64; 3]> = list.try_into().ok();
    let three = three.ok_or_else(|| {
        let message = format!("`{}` has invalid {key} = {found}", stated.source);
        Error::input(message).hint("use one number for each of the three channels")
    })?;
    let checked = match what {
        "mean" => check_mean(&three),
        _ => check_std(&three),
    };
    let refused = |(_, hint): (String, String)| {
        let message = format!(
            "`{}` has {key} = {found}, which is out of range for pixels in [0, 1]",
            stated.source
        );
        Error::input(message).hint(hint)
    };
    checked.map(|()| three).map_err(refused)
}
