//! Model folders in timm's layout, and files of weights alone.
//!
//! `timm.create_model("local-dir:FOLDER", pretrained=True)` loads what [`save`] writes, and [`load`]
//! reads folders of timm, of open_clip (the image tower) and of transformers (ViT and CLIP) that hold plain vision
//! transformers or ConvNeXts. [`load_file`] reads a file that lies alone, such as AdvXL's released ones, whose
//! architecture must be named.
//!
//! A weight that the model has no place for is an error: leaving it out would give wrong numbers.

mod architecture;
mod config_json;
mod describe;
mod hugging_face_json;
mod names;
mod open_clip_json;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use serde_json::Value;

use super::state_dict::shown;
use super::{Model, ModelConfig, Position, StateDict};
use crate::error::{Context, Error, Result};
use crate::fused::{Stored, from_vec};
use crate::{files, json};
pub(crate) use architecture::CLIP_EPS;
use architecture::{known, scheme, unknown};
use describe::{Description, Told, describe};
use names::Names;
pub(crate) use names::{Head, Origin, Scheme, transposed};

/// Writes a model folder for images of a size.
///
/// Positions are written for that size, fixed ones too, since timm keeps positions as weights.
pub fn save(model: &Model, image_size: usize, classes: &[String], folder: &Path) -> Result<()> {
    files::make_folder(folder)?;
    let table = match model {
        Model::Vit(vit) => vit.position_table(image_size),
        Model::ConvNext(_) => Vec::new(),
    };
    let length = table.len();
    let table = from_vec(table, [length], &Device::flex());
    let shape = match model {
        Model::Vit(vit) => vec![1, length / vit.config.width, vit.config.width],
        Model::ConvNext(_) => Vec::new(),
    };
    let places = (length > 0).then(|| Stored {
        values: &table,
        shape: &shape,
    });
    let parameters = model.parameters();
    let others = parameters
        .iter()
        .filter(|parameter| parameter.name != "pos_embed");
    let others = others.map(|parameter| {
        let (values, shape) = (&parameter.value, &parameter.shape[..]);
        (parameter.name.clone(), Stored { values, shape })
    });
    let tensors = others.chain(places.map(|places| ("pos_embed".to_owned(), places)));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    files::write_tensors(&folder.join("model.safetensors"), tensors, &metadata)?;
    let config = serde_json::to_string_pretty(&config_json::write(model, image_size, classes))
        .expect("JSON values are printable");
    // Last, so that a folder with a configuration has its weights.
    files::write(&folder.join("config.json"), config.as_bytes())
}

/// A model that was read, with what is known of its use.
pub struct Loaded {
    /// The model.
    pub model: Model,
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

/// Reads a model folder: `config.json` and `model.safetensors`, or `pytorch_model.bin`, of timm or transformers, or
/// open_clip's `open_clip_config.json` and `open_clip_model.safetensors`, or `open_clip_pytorch_model.bin`.
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
    let Some((name, file)) = find(folder) else {
        let message = format!("`{}` is not a model folder", folder.display());
        return Err(Error::input(message).hint(
            "a model folder holds `config.json` and `model.safetensors`, as timm's `local-dir:` \
             folders and the `model` folder of a run do, or `open_clip_config.json` and \
             `open_clip_model.safetensors`; a file of weights alone is named itself",
        ));
    };
    let read = || {
        let config = json_file(folder, name)?;
        if name == OPEN_CLIP_CONFIG {
            return open_clip_json::read(&config);
        }
        if config["model_type"].is_string() {
            let preprocessor = "preprocessor_config.json";
            let preprocessor = match folder.join(preprocessor).is_file() {
                true => json_file(folder, preprocessor)?,
                false => Value::Null,
            };
            return hugging_face_json::read(&config, &preprocessor);
        }
        Ok((config_json::read(&config)?, Scheme::Timm))
    };
    let (told, scheme) = read().context(|| format!("`{}`", folder.display()))?;
    let weights = StateDict::open(&file)?;
    build(&weights, scheme, told, device).context(|| format!("`{}`", file.display()))
}

/// What describes an open_clip model in its folder.
pub(crate) const OPEN_CLIP_CONFIG: &str = "open_clip_config.json";

/// The file that describes the model of a folder and the file of its weights. A folder may hold a model in several
/// forms; open_clip's, which has a text tower too, comes last.
fn find(folder: &Path) -> Option<(&'static str, PathBuf)> {
    let forms = [
        ("config.json", ["model.safetensors", "pytorch_model.bin"]),
        (
            OPEN_CLIP_CONFIG,
            ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"],
        ),
    ];
    forms.into_iter().find_map(|(config, weights)| {
        let mut weights = weights.iter().map(|name| folder.join(name));
        let file = weights.find(|file| file.is_file())?;
        folder.join(config).is_file().then_some((config, file))
    })
}

/// The configuration and the weights of an open_clip folder.
pub(crate) fn open_clip_folder(folder: &Path) -> Result<(Value, StateDict)> {
    let Some((OPEN_CLIP_CONFIG, file)) = find(folder) else {
        let message = format!("`{}` is not a folder of open_clip", folder.display());
        return Err(Error::input(message)
            .hint("it holds `open_clip_config.json` and `open_clip_model.safetensors`"));
    };
    let config =
        json_file(folder, OPEN_CLIP_CONFIG).context(|| format!("`{}`", folder.display()))?;
    Ok((config, StateDict::open(&file)?))
}

fn json_file(folder: &Path, name: &str) -> Result<Value> {
    json::parse(&files::read(&folder.join(name))?).map_err(|error| {
        Error::input(format!("`{name}` is not JSON: {error}"))
            .hint("copy or download the folder again")
    })
}

/// Reads a model folder, or the model in the folder of a run.
///
/// Errors: those of [`load`], and a run that has not saved a model yet.
pub fn load_any(path: &Path, device: &Device) -> Result<Loaded> {
    let of_run = path.join("model");
    let is_run = path.join("recipe.toml").is_file();
    if is_run && !of_run.is_dir() {
        let message = format!("the run in `{}` has not saved a model yet", path.display());
        return Err(Error::input(message).hint("a run saves one with each checkpoint"));
    }
    load(if is_run { &of_run } else { path }, device)
}

/// Reads a file of weights alone, safetensors or PyTorch's, of a named architecture.
///
/// `architecture` is timm's name, such as `vit_huge_patch14_224`, one of ours, such as `vit_h14`, or open_clip's of a
/// model with an image tower of its own, such as `ViT-H-14-CLIPA-336`. It gives the heads, and of open_clip's pooling
/// and activation; all else is told by the shapes of the tensors. Images are normalised by ImageNet's statistics, as
/// AdvXL's models want it, or by OpenAI's for CLIP's models but CLIPA's; set `mean` and `std` of the model's configuration
/// for others.
///
/// Errors: an unknown name, and those of [`load`].
pub fn load_file(path: &Path, architecture: &str, device: &Device) -> Result<Loaded> {
    if known(architecture).is_none() {
        return Err(unknown(architecture));
    }
    let weights = StateDict::open(path)?;
    let told = Told::by_name(architecture);
    let scheme = scheme(architecture);
    let built = match of_other_program(&weights, scheme) {
        Some(error) => Err(error),
        None => build(&weights, scheme, told, device),
    };
    built.context(|| format!("`{}`", path.display()))
}

/// The error where a file has another program's names than the architecture.
fn of_other_program(weights: &StateDict, scheme: Scheme) -> Option<Error> {
    let of_folder = "load the folder that it came in, which describes the model";
    let marks = [
        (
            "visual.conv1.weight",
            "open_clip",
            "name its architecture as open_clip does, for example `--arch ViT-B-16`",
        ),
        (
            "visual.trunk.patch_embed.proj.weight",
            "open_clip",
            of_folder,
        ),
        ("visual.trunk.stem.0.weight", "open_clip", of_folder),
        (
            "vision_model.embeddings.class_embedding",
            "transformers",
            of_folder,
        ),
        ("vit.embeddings.cls_token", "transformers", of_folder),
    ];
    let (_, program, hint) = marks
        .into_iter()
        .find(|(name, ..)| weights.contains(name))?;
    let is_tower = matches!(scheme, Scheme::OpenClip(_)) && weights.contains("visual.conv1.weight");
    (!is_tower).then(|| {
        Error::input(format!(
            "the weights have {program}'s names, not those of the architecture"
        ))
        .hint(hint)
    })
}

fn build(file: &StateDict, scheme: Scheme, told: Told, device: &Device) -> Result<Loaded> {
    let weights = Names::new(file, scheme);
    let Description {
        config,
        classes,
        image_size,
    } = describe(&weights, &told)?;
    let mut used = BTreeSet::new();
    if matches!(&config, ModelConfig::Vit(vit) if vit.position == Position::Sincos2d) {
        // Fixed positions are made anew for each image size.
        used.insert("pos_embed".to_owned());
    }
    let take = |name: &str, shape: &[usize]| {
        used.insert(name.to_owned());
        values(&weights, name, shape)
    };
    let model = Model::with_weights(&config, classes, image_size, device, take)?;
    let unused = weights.left_over(&used);
    if !unused.is_empty() {
        return Err(left_over(&unused));
    }
    Ok(Loaded {
        model,
        image_size,
        classes: told.class_names,
        hash: file.hash()?,
        wrapper: file.wrapper().map(str::to_owned),
    })
}

/// The values of one weight, if they are what the model needs.
fn values(weights: &Names, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let (found, called) = (weights.shape(name)?, weights.called(name));
    if !same(&found, shape) {
        let message = format!("{called} has shape {found:?} where {shape:?} is needed");
        return Err(Error::input(message)
            .hint("these weights are not all of one model, or of one that cannot be loaded"));
    }
    let values = weights.floats(name)?;
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        let message = format!("{called} holds {} at place {at}", values[at]);
        return Err(Error::input(message).hint("the training that made it has diverged"));
    }
    Ok(values)
}

/// Whether shapes are equal but for axes of 1 at the end: a product is also a convolution of 1 x 1.
fn same(found: &[usize], right: &[usize]) -> bool {
    let trimmed = |shape: &[usize]| {
        shape
            .iter()
            .rposition(|axis| *axis != 1)
            .map_or(0, |at| at + 1)
    };
    found[..trimmed(found)] == right[..trimmed(right)]
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
        .hint("only plain vision transformers and ConvNeXts can be loaded; without these weights it would be another model")
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::*;
    use crate::fused::Gelu;
    use crate::fused::to_vec;
    use crate::model::Pass;
    use crate::model::{Pool, VitConfig};

    fn logits(model: &Model, size: usize) -> Vec<f32> {
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
            let config = ModelConfig::Vit(VitConfig {
                width: 16,
                depth: 2,
                heads: 2,
                hidden: 24,
                pool,
                class_token,
                position,
                position_size,
                gelu: if class_token { Gelu::Tanh } else { Gelu::Erf },
                ..VitConfig::named("vit_micro").unwrap()
            });
            let model = Model::new(&config, 3, 16, 1, &Device::flex());
            let names = ["a", "b", "c"].map(str::to_owned);
            // Saved for another size than learned positions were made for.
            save(&model, 32, &names, folder.path()).unwrap();
            let loaded = load(folder.path(), &Device::flex()).unwrap();
            assert_eq!(loaded.image_size, 32);
            assert_eq!(loaded.classes, names);
            assert_eq!(loaded.model.config(), config);
            // To the bit but for learned positions, whose resampling is one product either way.
            assert_eq!(logits(&loaded.model, 32), logits(&model, 32));
        }
    }

    #[test]
    fn damaged_weights_are_refused_with_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let config = ModelConfig::Vit(VitConfig {
            width: 8,
            depth: 1,
            heads: 1,
            hidden: 8,
            ..VitConfig::named("vit_micro").unwrap()
        });
        let mut model = Model::new(&config, 2, 16, 0, &Device::flex());
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
