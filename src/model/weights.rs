//! Model folders in timm's layout, and files of weights alone.
//!
//! `timm.create_model("local-dir:FOLDER", pretrained=True)` loads what [`save`] writes, and [`load`]
//! reads folders that timm or Hugging Face users made for plain vision transformers. [`load_file`]
//! reads a file that lies alone, such as AdvXL's released ones, whose architecture must be named.
//!
//! A weight that the model has no place for is an error: leaving it out would give wrong numbers.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use burn::tensor::Device;
use serde_json::{Value, json};

use super::sizes::{IMAGENET_MEAN, IMAGENET_STD};
use super::state_dict::shown;
use super::{ModelConfig, Pool, Position, StateDict, Vit};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::fused::{Gelu, Stored, from_vec};
use crate::settings::nearest;

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
            "act_layer": match config.gelu {
                Gelu::Erf => "gelu",
                Gelu::Tanh => "gelu_tanh",
                Gelu::Quick => "quick_gelu",
            },
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

/// A model that was read, with what is known of its use.
pub struct Loaded {
    /// The model.
    pub model: Vit,
    /// Pixels on a side of the images it was made for.
    pub image_size: usize,
    /// Names of the classes, where the folder has them.
    pub classes: Vec<String>,
    /// Hash of the weight file.
    pub hash: String,
    /// The key that the weights were found under, if the file holds other things too; see
    /// [`StateDict::wrapper`].
    pub wrapper: Option<String>,
}

/// Reads a model folder: `config.json` and `model.safetensors`, or `pytorch_model.bin`.
///
/// Errors: files missing or damaged, tensors missing, left over or of the wrong shape, values not
/// finite.
pub fn load(folder: &Path, device: &Device) -> Result<Loaded> {
    if folder.is_file() {
        let message = format!(
            "`{}` is a file of weights without a model folder",
            folder.display()
        );
        return Err(Error::input(message)
            .hint("name its architecture, for example `--arch vit_huge_patch14_224`"));
    }
    let files = ["model.safetensors", "pytorch_model.bin"].map(|name| folder.join(name));
    let file = files.iter().find(|file| file.is_file());
    let (true, Some(file)) = (folder.join("config.json").is_file(), file) else {
        let message = format!("`{}` is not a model folder", folder.display());
        return Err(Error::input(message).hint(
            "a model folder holds `config.json` and `model.safetensors`, as timm's `local-dir:` \
             folders and the `model` folder of a run do; a file of weights alone is named itself",
        ));
    };
    let config: Value = serde_json::from_str(&files::read_text(&folder.join("config.json"))?)
        .map_err(|error| Error::input(format!("`config.json` is not JSON: {error}")))
        .context(|| format!("`{}`", folder.display()))?;
    let told = Told::by_config(&config).context(|| format!("`{}`", folder.display()))?;
    let weights = StateDict::open(file)?;
    build(&weights, told, device).context(|| format!("`{}`", file.display()))
}

/// Reads a file of weights alone, safetensors or PyTorch's, of a named architecture.
///
/// `architecture` is timm's name, such as `vit_huge_patch14_224`, or one of ours, such as `vit_h14`.
/// It gives the heads; all else is told by the shapes of the tensors. Images are normalised by
/// ImageNet's statistics, as AdvXL's models want it; set `mean` and `std` of the model's
/// configuration for others.
///
/// Errors: an unknown name, and those of [`load`].
pub fn load_file(path: &Path, architecture: &str, device: &Device) -> Result<Loaded> {
    if known(architecture).is_none() {
        return Err(unknown(architecture));
    }
    let weights = StateDict::open(path)?;
    let told = Told::by_name(architecture);
    build(&weights, told, device).context(|| format!("`{}`", path.display()))
}

fn build(weights: &StateDict, told: Told, device: &Device) -> Result<Loaded> {
    let Description {
        config,
        classes,
        image_size,
    } = describe(weights, &told)?;
    let mut unused: BTreeSet<&str> = weights.names().collect();
    if config.position == Position::Sincos2d {
        // Fixed positions are made anew for each image size.
        unused.remove("pos_embed");
    }
    let take = |name: &str, shape: &[usize]| {
        unused.remove(name);
        values(weights, name, shape)
    };
    let model = Vit::with_weights(&config, classes, image_size, device, take)?;
    if !unused.is_empty() {
        return Err(left_over(&unused));
    }
    Ok(Loaded {
        model,
        image_size,
        classes: told.class_names,
        hash: weights.hash()?,
        wrapper: weights.wrapper().map(str::to_owned),
    })
}

/// The values of one weight, if they are what the model needs.
fn values(weights: &StateDict, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let found = weights.shape(name)?;
    if found != shape {
        let message = format!("`{name}` has shape {found:?} where {shape:?} is needed");
        return Err(Error::input(message));
    }
    let values = weights.floats(name)?;
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        let message = format!("`{name}` holds {} at place {at}", values[at]);
        return Err(Error::input(message).hint("the training that made it has diverged"));
    }
    Ok(values)
}

fn left_over(names: &BTreeSet<&str>) -> Error {
    let first: Vec<String> = names
        .iter()
        .take(5)
        .map(|name| format!("`{}`", shown(name)))
        .collect();
    let more = match names.len() - first.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let message = format!(
        "the model has no place for the weights {}{more}",
        first.join(", ")
    );
    Error::input(message)
        .hint("only plain vision transformers can be loaded; without these weights it would be another model")
}

/// What the tensors do not tell of a model.
struct Told {
    /// timm's or our name of the architecture.
    architecture: String,
    /// Our name of the size.
    size: String,
    heads: Option<usize>,
    pool: Option<Pool>,
    position: Position,
    position_size: Option<usize>,
    gelu: Gelu,
    mean: [f64; 3],
    std: [f64; 3],
    class_count: Option<usize>,
    class_names: Vec<String>,
}

impl Told {
    fn by_name(architecture: &str) -> Self {
        Self {
            architecture: architecture.to_owned(),
            size: architecture.to_owned(),
            heads: None,
            pool: None,
            position: Position::Learned,
            position_size: None,
            gelu: Gelu::Erf,
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
            class_count: None,
            class_names: Vec::new(),
        }
    }

    /// What timm's `config.json` tells.
    fn by_config(config: &Value) -> Result<Self> {
        let architecture = config["architecture"].as_str().unwrap_or_default();
        let number = |value: &Value| value.as_u64().map(|number| number as usize);
        let channels = |key: &str, fallback: [f64; 3]| -> Result<[f64; 3]> {
            let found = &config["pretrained_cfg"][key];
            if found.is_null() {
                return Ok(fallback);
            }
            let list = found.as_array().map(Vec::as_slice).unwrap_or_default();
            let list: Vec<f64> = list.iter().filter_map(Value::as_f64).collect();
            let three: Option<[f64; 3]> = list.try_into().ok();
            three
                .filter(|list| key != "std" || list.iter().all(|std| *std > 0.0))
                .ok_or_else(|| {
                    let message = format!("`config.json` has {key} = {found}");
                    Error::input(message)
                        .hint("give one number for each of three channels, std above 0")
                })
        };
        let pool = [&config["model_args"]["global_pool"], &config["global_pool"]];
        let pool = match pool.into_iter().find_map(Value::as_str) {
            None => None,
            Some("avg") => Some(Pool::Average),
            Some("token") => Some(Pool::Token),
            Some(other) => {
                let message = format!("`config.json` has global_pool = `{}`", shown(other));
                return Err(Error::input(message).hint("only `avg` and `token` can be loaded"));
            }
        };
        let gelu = match config["model_args"]["act_layer"].as_str() {
            None | Some("gelu") => Gelu::Erf,
            Some("gelu_tanh") => Gelu::Tanh,
            Some("quick_gelu") => Gelu::Quick,
            Some(other) => {
                let message = format!("`config.json` has act_layer = `{}`", shown(other));
                return Err(Error::input(message)
                    .hint("only `gelu`, `gelu_tanh` and `quick_gelu` can be loaded"));
            }
        };
        let names = config["label_names"].as_array();
        let names = names.map(Vec::as_slice).unwrap_or_default().iter();
        let ours = &config["advxl"];
        Ok(Self {
            heads: number(&config["model_args"]["num_heads"]),
            pool,
            size: ours["size"].as_str().unwrap_or(architecture).to_owned(),
            position: match ours["position"].as_str() {
                Some("sincos2d") => Position::Sincos2d,
                _ => Position::Learned,
            },
            position_size: number(&ours["position_size"]),
            gelu,
            mean: channels("mean", IMAGENET_MEAN)?,
            std: channels("std", IMAGENET_STD)?,
            class_count: number(&config["num_classes"]),
            class_names: names
                .filter_map(|name| name.as_str().map(str::to_owned))
                .collect(),
            ..Self::by_name(architecture)
        })
    }

    /// Attention heads, which no shape tells, for tokens of a width.
    fn heads(&self, width: usize) -> Result<usize> {
        let heads = match (self.heads, known(&self.architecture)) {
            (Some(heads), _) => heads,
            (None, Some((right, heads))) if right == width => heads,
            (None, Some((right, _))) => {
                let name = &self.architecture;
                let message =
                    format!("`{name}` is {right} wide, and these weights are {width} wide");
                let error = Error::input(message);
                let fitting = TIMM.iter().find(|size| size.1 == width);
                return Err(match fitting {
                    Some((word, ..)) => error.hint(format!("is it a `vit_{word}`?")),
                    None => error.hint("name the architecture that the weights were trained as"),
                });
            }
            (None, None) => {
                let message = "`config.json` does not tell the number of attention heads";
                return Err(Error::input(message)
                    .hint("write it there, for example \"model_args\": { \"num_heads\": 12 }"));
            }
        };
        if heads == 0 || !width.is_multiple_of(heads) {
            let message = format!("num_heads = {heads} do not divide the width, {width}");
            return Err(Error::input(message));
        }
        Ok(heads)
    }
}

/// timm's words for sizes: (word, width, heads).
///
/// Source: the definitions in `timm/models/vision_transformer.py`.
const TIMM: [(&str, usize, usize); 8] = [
    ("tiny", 192, 3),
    ("small", 384, 6),
    ("medium", 512, 8),
    ("base", 768, 12),
    ("large", 1024, 16),
    ("huge", 1280, 16),
    ("giant", 1408, 16),
    ("gigantic", 1664, 16),
];

/// Width and heads of a named architecture: ours, or `vit_SIZE_...` and `deit_SIZE_...` of timm.
fn known(architecture: &str) -> Option<(usize, usize)> {
    if let Some(ours) = ModelConfig::named(architecture) {
        return Some((ours.width, ours.heads));
    }
    let mut words = architecture.split(['_', '.']);
    if !matches!(words.next(), Some("vit" | "deit")) {
        return None;
    }
    let word = words.next()?;
    let found = TIMM.iter().find(|size| size.0 == word)?;
    Some((found.1, found.2))
}

fn unknown(architecture: &str) -> Error {
    let error = Error::input(format!(
        "`{}` is no architecture that is known here",
        shown(architecture)
    ));
    let of_timm: Vec<String> = TIMM
        .iter()
        .flat_map(|(word, ..)| [14, 16].map(|patch| format!("vit_{word}_patch{patch}_224")))
        .collect();
    let ours = ModelConfig::names();
    let names: Vec<&str> = of_timm
        .iter()
        .map(String::as_str)
        .chain(ours.clone())
        .collect();
    match nearest(architecture, &names) {
        Some(near) if architecture.len() < 100 => error.hint(format!("did you mean `{near}`?")),
        _ => error.hint(format!(
            "use timm's name, such as `vit_huge_patch14_224`, or one of {}",
            ours.join(", ")
        )),
    }
}

struct Description {
    config: ModelConfig,
    classes: usize,
    image_size: usize,
}

/// What the shapes of the tensors, and what else is told, say of the model.
fn describe(weights: &StateDict, told: &Told) -> Result<Description> {
    let unfit = |what: &str| {
        Error::input(format!("{what}, so this is not a plain vision transformer"))
            .hint("only vision transformers can be loaded")
    };
    // Sizes beside a size of zero could be anything; without it the file's length bounds them.
    let shape = |name: &str| match weights.shape(name)? {
        shape if shape.contains(&0) => Err(unfit(&format!("`{name}` has no numbers"))),
        shape => Ok(shape),
    };
    let &[width, 3, patch, _] = shape("patch_embed.proj.weight")? else {
        return Err(unfit(
            "`patch_embed.proj.weight` is not [width, 3, patch, patch]",
        ));
    };
    let &[hidden, _] = shape("blocks.0.mlp.fc1.weight")? else {
        return Err(unfit("`blocks.0.mlp.fc1.weight` is not a matrix"));
    };
    let &[1, places, _] = shape("pos_embed")? else {
        return Err(unfit("`pos_embed` is not [1, tokens, width]"));
    };
    let &[classes, _] = shape("head.weight")? else {
        return Err(unfit("`head.weight` is not a matrix"));
    };
    if let Some(told) = told.class_count.filter(|told| *told != classes) {
        let message =
            format!("`config.json` has num_classes = {told}, and `head.weight` {classes} rows");
        return Err(Error::input(message).hint("correct the one that is wrong"));
    }
    let class_token = weights.contains("cls_token");
    let patches = places - usize::from(class_token).min(places);
    let grid = patches.isqrt();
    if grid == 0 || grid * grid != patches {
        return Err(unfit("`pos_embed` does not belong to a square grid"));
    }
    if told.position == Position::Sincos2d && !width.is_multiple_of(4) {
        let message = format!("position = `sincos2d` needs a width that 4 divides, not {width}");
        return Err(Error::input(message));
    }
    let depth = (0..)
        .take_while(|i| weights.contains(&format!("blocks.{i}.norm1.weight")))
        .count();
    Ok(Description {
        config: ModelConfig {
            size: told.size.clone(),
            patch,
            width,
            depth,
            heads: told.heads(width)?,
            hidden,
            pool: pool(weights, told.pool)?,
            class_token,
            position: told.position,
            position_size: told.position_size,
            gelu: told.gelu,
            mean: told.mean,
            std: told.std,
        },
        classes,
        image_size: grid * patch,
    })
}

/// What the head sees: the norm before it tells.
fn pool(weights: &StateDict, told: Option<Pool>) -> Result<Pool> {
    let has = |pool: Pool| weights.contains(&format!("{}.weight", pool.norm()));
    let pool = match (has(Pool::Average), has(Pool::Token)) {
        (true, true) => {
            let message = "the file has both `norm` and `fc_norm`, and a model uses one of them";
            return Err(Error::input(message).hint(
                "take out the other: `norm` where the class token is used, `fc_norm` where the mean is",
            ));
        }
        (true, false) => Pool::Average,
        (false, _) => Pool::Token,
    };
    if told.is_some_and(|told| told != pool) {
        let (norm, other) = match pool {
            Pool::Average => ("fc_norm", "token"),
            Pool::Token => ("norm", "avg"),
        };
        let message =
            format!("`config.json` has global_pool = `{other}`, but the weights have `{norm}`");
        return Err(Error::input(message).hint(
            "`avg` goes with `fc_norm` and `token` with `norm`; other models cannot be loaded",
        ));
    }
    Ok(pool)
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
                gelu: if class_token { Gelu::Tanh } else { Gelu::Erf },
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
