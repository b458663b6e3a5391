//! Model folders in timm's layout: `config.json` and `model.safetensors`.
//!
//! `timm.create_model("local-dir:FOLDER", pretrained=True)` loads what [`save`] writes, and [`load`]
//! reads folders that timm or Hugging Face users made for plain vision transformers.

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::Device;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

use super::sizes::{IMAGENET_MEAN, IMAGENET_STD};
use super::{ModelConfig, Pool, Position, Vit};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::fused::{Stored, from_vec};

/// Writes a model folder for images of a size.
///
/// Positions are written for that size, fixed ones too, since timm keeps positions as weights.
pub fn save(model: &Vit, image_size: usize, classes: &[String], folder: &Path) -> Result<()> {
    files::make_folder(folder)?;
    let places = model.position_table(image_size);
    let width = model.config.width;
    let shape = [1, places.len() / width, width];
    let places = from_vec(places, [shape[1] * width], &Device::flex());
    let places = Stored {
        values: &places,
        shape: &shape,
    };
    let parameters = model.parameters();
    let others = parameters
        .iter()
        .filter(|parameter| parameter.name != "pos_embed");
    let others = others.map(|parameter| {
        let (values, shape) = (&parameter.value, &parameter.shape[..]);
        (parameter.name.clone(), Stored { values, shape })
    });
    let tensors = others.chain([("pos_embed".to_owned(), places)]);
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    files::write_tensors(&folder.join("model.safetensors"), tensors, &metadata)?;
    let config = serde_json::to_string_pretty(&config_json(model, image_size, classes))
        .expect("JSON values are printable");
    // Last, so that a folder with a configuration has its weights.
    files::write(&folder.join("config.json"), config.as_bytes())
}

fn config_json(model: &Vit, image_size: usize, classes: &[String]) -> Value {
    let config = &model.config;
    let pool = match config.pool {
        Pool::Average => "avg",
        Pool::Token => "token",
    };
    json!({
        // Any plain transformer of timm: the arguments below say all that differs.
        "architecture": "vit_base_patch16_224",
        "num_classes": model.classes,
        "num_features": config.width,
        "global_pool": pool,
        "label_names": classes,
        "model_args": {
            "img_size": image_size,
            "patch_size": config.patch,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": config.hidden as f64 / config.width as f64,
            "global_pool": pool,
            "class_token": config.class_token,
        },
        "pretrained_cfg": {
            "tag": "advxl",
            "custom_load": false,
            "input_size": [3, image_size, image_size],
            "fixed_input_size": true,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": config.mean,
            "std": config.std,
            "num_classes": model.classes,
            "pool_size": null,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        // What timm has no word for.
        "advxl": {
            "version": env!("CARGO_PKG_VERSION"),
            "size": config.size,
            "position": config.position,
            "position_size": config.position_size,
        },
    })
}

/// A model read from a folder, with what the folder says of its use.
pub struct Loaded {
    /// The model.
    pub model: Vit,
    /// Pixels on a side of the images it was made for.
    pub image_size: usize,
    /// Names of the classes, where the folder has them.
    pub classes: Vec<String>,
    /// Hash of the weight file.
    pub hash: String,
}

/// Reads a model folder.
///
/// Errors: files missing or damaged, tensors missing or of the wrong shape, values not finite.
pub fn load(folder: &Path, device: &Device) -> Result<Loaded> {
    let file = folder.join("model.safetensors");
    if !folder.join("config.json").is_file() || !file.is_file() {
        let message = format!("`{}` is not a model folder", folder.display());
        return Err(Error::input(message).hint(
            "a model folder holds `config.json` and `model.safetensors`, as timm's `local-dir:` \
             folders and the `model` folder of a run do",
        ));
    }
    let config: Value = serde_json::from_str(&files::read_text(&folder.join("config.json"))?)
        .map_err(|error| Error::input(format!("`config.json` is not JSON: {error}")))
        .context(|| format!("`{}`", folder.display()))?;
    let bytes = files::read(&file)?;
    load_weights(&config, &bytes, device).context(|| format!("`{}`", file.display()))
}

fn load_weights(config: &Value, bytes: &[u8], device: &Device) -> Result<Loaded> {
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| {
        Error::input(format!("this is not a whole safetensors file: {error}"))
            .hint("copy or download it again")
    })?;
    let shape = |name: &str| {
        let tensor = tensors.tensor(name).map_err(|_| missing(name, &tensors))?;
        Ok(tensor.shape().to_vec())
    };
    let found = describe(config, &tensors, &shape)?;
    let image_size = found.image_size;
    let mut model = Vit::new(&found.config, found.classes, image_size, 0, device);
    for parameter in model.parameters_mut() {
        let tensor = tensors
            .tensor(&parameter.name)
            .map_err(|_| missing(&parameter.name, &tensors))?;
        if tensor.shape() != parameter.shape {
            let (name, found, right) = (&parameter.name, tensor.shape(), &parameter.shape);
            let message = format!("`{name}` has shape {found:?} where {right:?} is needed");
            return Err(Error::input(message));
        }
        let values = floats(&parameter.name, &tensor)?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let message = format!("`{}` holds {} at place {at}", parameter.name, values[at]);
            return Err(Error::input(message).hint("the training that made it has diverged"));
        }
        parameter.value = from_vec(values.clone(), [values.len()], device);
    }
    let names = config["label_names"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let classes = names
        .iter()
        .filter_map(|name| name.as_str().map(str::to_owned))
        .collect();
    Ok(Loaded {
        model,
        image_size,
        classes,
        hash: blake3::hash(bytes).to_string(),
    })
}

struct Description {
    config: ModelConfig,
    classes: usize,
    image_size: usize,
}

/// What the shapes of the tensors and the configuration tell of the model.
fn describe(
    config: &Value,
    tensors: &SafeTensors<'_>,
    shape: &dyn Fn(&str) -> Result<Vec<usize>>,
) -> Result<Description> {
    let unfit = |what: &str| {
        Error::input(format!("{what}, so this is not a plain vision transformer"))
            .hint("only vision transformers can be loaded")
    };
    let [width, 3, patch, _] = shape("patch_embed.proj.weight")?[..] else {
        return Err(unfit(
            "`patch_embed.proj.weight` is not [width, 3, patch, patch]",
        ));
    };
    let [classes, _] = shape("head.weight")?[..] else {
        return Err(unfit("`head.weight` is not a matrix"));
    };
    let [hidden, _] = shape("blocks.0.mlp.fc1.weight")?[..] else {
        return Err(unfit("`blocks.0.mlp.fc1.weight` is not a matrix"));
    };
    let [1, places, _] = shape("pos_embed")?[..] else {
        return Err(unfit("`pos_embed` is not [1, tokens, width]"));
    };
    let has = |name: &str| tensors.tensor(name).is_ok();
    let depth = (0..)
        .take_while(|i| has(&format!("blocks.{i}.norm1.weight")))
        .count();
    let class_token = has("cls_token");
    let grid = (places as f64 - f64::from(u8::from(class_token))).sqrt();
    if patch == 0 || grid.fract() != 0.0 {
        return Err(unfit("`pos_embed` does not belong to a square grid"));
    }
    let named = config["architecture"].as_str().unwrap_or_default();
    let heads = config["model_args"]["num_heads"]
        .as_u64()
        .map(|heads| heads as usize);
    let heads = heads
        .or_else(|| known_heads(named))
        .unwrap_or((width / 64).max(1));
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(Error::input(format!(
            "num_heads = {heads} do not divide the width, {width}"
        )));
    }
    let channels = |key: &str, fallback: [f64; 3]| -> [f64; 3] {
        let list = config["pretrained_cfg"][key].as_array();
        let list = list.map(|list| list.iter().filter_map(Value::as_f64).collect::<Vec<_>>());
        list.and_then(|list| list.try_into().ok())
            .unwrap_or(fallback)
    };
    let size = config["advxl"]["size"].as_str().unwrap_or(named).to_owned();
    let position = match config["advxl"]["position"].as_str() {
        Some("sincos2d") => Position::Sincos2d,
        _ => Position::Learned,
    };
    Ok(Description {
        config: ModelConfig {
            size,
            patch,
            width,
            depth,
            heads,
            hidden,
            pool: if has("fc_norm.weight") {
                Pool::Average
            } else {
                Pool::Token
            },
            class_token,
            position,
            position_size: config["advxl"]["position_size"]
                .as_u64()
                .map(|size| size as usize),
            mean: channels("mean", IMAGENET_MEAN),
            std: channels("std", IMAGENET_STD),
        },
        classes,
        image_size: grid as usize * patch,
    })
}

/// Heads of timm's architectures whose heads are not 64 wide.
fn known_heads(architecture: &str) -> Option<usize> {
    ["vit_huge_patch14", "vit_giant_patch14"]
        .iter()
        .any(|name| architecture.starts_with(name))
        .then_some(16)
}

fn missing(name: &str, tensors: &SafeTensors<'_>) -> Error {
    let names = tensors.names();
    let names: Vec<&str> = names.iter().map(|name| name.as_ref()).collect();
    let error = Error::input(format!("the tensor `{name}` is missing"));
    match crate::settings::nearest(name, &names) {
        Some(near) => error.hint(format!("the file has `{near}`")),
        None => error.hint("only plain vision transformers of timm can be loaded"),
    }
}

fn floats(name: &str, tensor: &TensorView<'_>) -> Result<Vec<f32>> {
    let bytes = tensor.data();
    match tensor.dtype() {
        // Files need not align their tensors, so bytes are copied and not cast.
        Dtype::F32 => Ok(bytemuck::pod_collect_to_vec(bytes)),
        Dtype::BF16 => {
            let pairs = bytes.chunks_exact(2);
            Ok(pairs
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
                .collect())
        }
        Dtype::F16 => {
            let pairs = bytes.chunks_exact(2);
            Ok(pairs
                .map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect())
        }
        other => Err(Error::input(format!("`{name}` is stored as {other:?}"))
            .hint("store weights as F32, F16 or BF16")),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::*;
    use crate::fused::to_vec;
    use crate::model::Pass;

    fn logits(model: &Vit, size: usize) -> Vec<f32> {
        let values = (0..3 * size * size)
            .map(|i| (i % 17) as f32 / 17.0)
            .collect();
        let images: Tensor<4> = from_vec(values, [1, 3, size, size], &Device::flex());
        to_vec(model.logits(images, &Pass::evaluation()))
    }

    #[test]
    fn a_saved_model_gives_the_same_logits_after_loading() {
        let folder = tempfile::tempdir().unwrap();
        for (position, position_size, pool, class_token) in [
            (Position::Sincos2d, None, Pool::Average, false),
            (Position::Sincos2d, Some(64), Pool::Token, true),
            (Position::Learned, None, Pool::Average, true),
        ] {
            let config = ModelConfig {
                width: 16,
                depth: 2,
                heads: 2,
                hidden: 24,
                pool,
                class_token,
                position,
                position_size,
                ..ModelConfig::named("vit_micro").unwrap()
            };
            let model = Vit::new(&config, 3, 16, 1, &Device::flex());
            let names = ["a", "b", "c"].map(str::to_owned);
            // Saved for another size than learned positions were made for.
            save(&model, 32, &names, folder.path()).unwrap();
            let loaded = load(folder.path(), &Device::flex()).unwrap();
            assert_eq!(loaded.image_size, 32);
            assert_eq!(loaded.classes, names);
            assert_eq!(loaded.model.config, config);
            // To the bit but for learned positions, whose resampling is one product either way.
            assert_eq!(logits(&loaded.model, 32), logits(&model, 32));
        }
    }

    #[test]
    fn damaged_weights_are_refused_with_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let config = ModelConfig {
            width: 8,
            depth: 1,
            heads: 1,
            hidden: 8,
            ..ModelConfig::named("vit_micro").unwrap()
        };
        let mut model = Vit::new(&config, 2, 16, 0, &Device::flex());
        let bias = model.parameters_mut().into_iter().last().unwrap();
        bias.value = from_vec(vec![0.0, f32::NAN], [2], &Device::flex());
        save(&model, 16, &[], folder.path()).unwrap();
        let refusal = |folder: &Path| match load(folder, &Device::flex()) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("a damaged file was loaded"),
        };
        let text = refusal(folder.path());
        assert!(text.contains("`head.bias` holds NaN at place 1"), "{text}");

        let file = folder.path().join("model.safetensors");
        let bytes = files::read(&file).unwrap();
        files::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        let text = refusal(folder.path());
        assert!(text.contains("not a whole safetensors file"), "{text}");
    }
}
