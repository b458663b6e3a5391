//! Saves model folders in timm's layout; loads model folders and bare weights files.
//!
//! `timm.create_model("local-dir:FOLDER", pretrained=True)` loads what [`save`] writes. [`load`] reads folders of timm,
//! of open_clip (the image tower) and of transformers (ViT and CLIP) that hold plain vision transformers or ConvNeXts.
//! [`load_file`] reads a bare weights file, such as those released by AdvXL, whose architecture must be named.
//!
//! An unused weight is an error: ignoring it would give wrong results.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::architecture::{known, unknown};
use super::describe::{Description, describe};
use super::names::Names;
use super::outputs::{OPEN_CLIP_CONFIG, Outputs};
use super::state_dict::{StateDict, Statistics};
use super::stated::{StatedModel, scheme};
use crate::error::{Context, Error, Result};
use crate::image::Preprocessing;
use crate::model::{Model, ModelConfig, Position};
use crate::ops::{Device, Stored, from_vec};
use crate::storage::archive::shown;
use crate::{distributed, files, json, memory};

pub(crate) use crate::weights::names::Scheme;
pub use crate::weights::preprocessing::StatedPreprocessing;

/// Writes a model folder.
///
/// Positions are written for the image size of the preprocessing, fixed ones too, since timm stores positions as
/// weights.
pub fn save(
    model: &Model,
    preprocessing: &Preprocessing,
    outputs: Outputs,
    classes: &[String],
    folder: &Path,
) -> Result<()> {
    files::make_folder(folder)?;
    let table = match model {
        Model::Vit(vit) => vit.position_table(preprocessing.image_size),
        Model::ConvNext(_) => Vec::new(),
    };
    let length = table.len();
    let table = from_vec(table, [length], &Device::cpu());
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
    let config = crate::weights::config_json::write(model, preprocessing, outputs, classes);
    let config = serde_json::to_string_pretty(&config).expect("JSON values are printable");
    // Written last, so that a folder with a configuration always has its weights.
    files::write(&folder.join("config.json"), config.as_bytes())
}

/// A loaded model and what is known about its use.
pub struct Loaded {
    /// The model.
    pub model: Model,
    /// Image size of the model, in pixels per side.
    pub image_size: usize,
    /// Preprocessing to that size, as stated by the folder.
    pub preprocessing: StatedPreprocessing,
    /// Meaning of the outputs.
    pub outputs: Outputs,
    /// Class names, if the folder has them.
    pub classes: Vec<String>,
    /// Hash of the weights file.
    pub hash: String,
    /// The key under which the weights were found, if the file holds other things too; see
    /// [`StateDict::wrapper`].
    pub wrapper: Option<String>,
    /// Mean and std stored in the file itself, which the model then uses.
    pub statistics: Option<Statistics>,
    /// Notes for the user.
    pub notes: Vec<String>,
}

/// Loads a model folder of timm or transformers (`config.json` and `model.safetensors` or `pytorch_model.bin`) or of
/// open_clip (`open_clip_config.json` and `open_clip_model.safetensors` or `open_clip_pytorch_model.bin`). Sharded
/// weights are found by their index.
///
/// Errors: missing or damaged files; missing, unused or wrongly shaped tensors; non-finite values.
pub fn load(folder: &Path, device: &Device) -> Result<Loaded> {
    load_folder(folder, false, device)
}

fn load_folder(folder: &Path, needs_no_head: bool, device: &Device) -> Result<Loaded> {
    if folder.is_file() {
        let message = format!(
            "`{}` is a weights file without a model folder",
            folder.display()
        );
        return Err(Error::input(message)
            .hint("set its architecture, for example `--arch vit_huge_patch14_224`"));
    }
    let (name, file) = find(folder)?;
    let read = || {
        let config = json_file(folder, name)?;
        if name == OPEN_CLIP_CONFIG {
            return crate::weights::open_clip_json::read(&config);
        }
        if config["model_type"].is_string() {
            let preprocessor = "preprocessor_config.json";
            let preprocessor = match folder.join(preprocessor).is_file() {
                true => json_file(folder, preprocessor)?,
                false => Value::Null,
            };
            return crate::weights::hugging_face_json::read(&config, &preprocessor);
        }
        let mut stated = crate::weights::config_json::read(&config)?;
        let is_old = config["advxl"].is_object() && stated.outputs.is_none();
        if is_old && stated.class_names.is_empty() && learned_captions(folder) {
            stated.outputs = Some(Outputs::Embedding);
        }
        Ok((stated, Scheme::Timm))
    };
    let (stated, scheme) = read().context(|| format!("`{}`", folder.display()))?;
    let stated = StatedModel {
        needs_no_head,
        ..stated
    };
    let weights = StateDict::open(&file)?;
    build(weights, scheme, stated, device).context(|| format!("`{}`", file.display()))
}

/// Returns whether the run of a folder without class names trained on captions, according to its recipe. Folders of
/// older versions do not state their outputs.
fn learned_captions(folder: &Path) -> bool {
    let mut above = folder.ancestors().skip(1).take(2);
    let recipe = above.find_map(|above| files::read_text(&above.join("recipe.toml")).ok());
    let recipe = recipe.and_then(|text| text.parse::<toml::Table>().ok());
    let stages = recipe
        .as_ref()
        .and_then(|recipe| recipe.get("stage")?.as_array());
    let name = folder.file_name().and_then(|name| name.to_str());
    stages.into_iter().flatten().any(|stage| {
        let of_stage = folder
            .parent()
            .is_some_and(|parent| parent.ends_with("stages"));
        let is_it = !of_stage || stage.get("name").and_then(toml::Value::as_str) == name;
        let objective = stage.get("objective").or_else(|| stage.get("loss"));
        let kind = objective.and_then(|objective| objective.get("kind")?.as_str());
        is_it && kind == Some("contrastive")
    })
}

/// The file that describes a model, and the files that may hold its weights.
const FORMS: [(&str, [&str; 4]); 2] = [
    (
        "config.json",
        [
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        ],
    ),
    (
        OPEN_CLIP_CONFIG,
        [
            "open_clip_model.safetensors",
            "open_clip_model.safetensors.index.json",
            "open_clip_pytorch_model.bin",
            "open_clip_pytorch_model.bin.index.json",
        ],
    ),
];

/// Finds the file that describes the model of a folder, and its weights file. A folder may hold a model in several
/// formats; open_clip's, which includes a text tower, comes last.
///
/// Errors: one or both files are missing.
fn find(folder: &Path) -> Result<(&'static str, PathBuf)> {
    let has = |name: &str| folder.join(name).is_file();
    let weights = |names: &[&'static str]| names.iter().copied().find(|name| has(name));
    let whole = FORMS.iter().find_map(|(config, names)| {
        let weights = weights(names)?;
        has(config).then(|| (*config, folder.join(weights)))
    });
    if let Some(whole) = whole {
        return Ok(whole);
    }
    let path = folder.display();
    for (config, names) in &FORMS {
        match (has(config), weights(names)) {
            (true, _) => return Err(without_weights(folder, config, names[0])),
            (false, Some(weights)) => {
                let message = format!(
                    "`{path}` has `{weights}` but no `{config}`, which describes the model"
                );
                return Err(Error::input(message).hint(
                    "copy it too, or pass the weights file itself with its architecture (--arch)",
                ));
            }
            (false, None) => {}
        }
    }
    let message = format!("`{path}` is not a model folder");
    Err(Error::input(message).hint(
        "a model folder holds `config.json` and `model.safetensors`, like timm's `local-dir:` \
         folders and the `model` folder of a run, or `open_clip_config.json` and \
         `open_clip_model.safetensors`; for a bare weights file, pass the file itself",
    ))
}

fn without_weights(folder: &Path, config: &str, weights: &str) -> Error {
    let message = format!(
        "`{}` has `{config}` but no weights: `{weights}` is missing",
        folder.display()
    );
    let is_like = |path: &PathBuf| {
        let end = path.extension().and_then(|end| end.to_str());
        end.is_some_and(|end| ["safetensors", "bin", "pth", "pt", "ckpt"].contains(&end))
    };
    let listed = files::list(folder).unwrap_or_default();
    let others = listed.into_iter().filter(is_like).take(3);
    let names = others.map(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        format!("`{}`", shown(&name))
    });
    match names.collect::<Vec<_>>() {
        names if names.is_empty() => {
            Error::input(message).hint("copy or download the weights file too")
        }
        names => Error::input(message).hint(format!(
            "the folder has {}: rename the weights to `{weights}`, or pass that file itself with --arch",
            names.join(", ")
        )),
    }
}

/// Reads the configuration and the weights of an open_clip folder.
pub(crate) fn open_clip_folder(folder: &Path) -> Result<(Value, StateDict)> {
    let Ok((OPEN_CLIP_CONFIG, file)) = find(folder) else {
        let message = format!("`{}` is not an open_clip folder", folder.display());
        return Err(Error::input(message)
            .hint("expected `open_clip_config.json` and `open_clip_model.safetensors`"));
    };
    let config =
        json_file(folder, OPEN_CLIP_CONFIG).context(|| format!("`{}`", folder.display()))?;
    Ok((config, StateDict::open(&file)?))
}

fn json_file(folder: &Path, name: &str) -> Result<Value> {
    json::parse(&files::read(&folder.join(name))?).map_err(|error| {
        Error::input(format!("`{name}` is not valid JSON: {error}"))
            .hint("copy or download the folder again")
    })
}

/// Loads a model folder, or the model of a run folder.
///
/// Errors: those of [`load`], and a run that has not saved a model yet.
pub fn load_any(path: &Path, device: &Device) -> Result<Loaded> {
    load(&folder_of(path)?, device)
}

/// Returns the model folder of a run, or the folder itself.
fn folder_of(path: &Path) -> Result<PathBuf> {
    let of_run = path.join("model");
    let is_run = path.join("recipe.toml").is_file();
    if is_run && !of_run.is_dir() {
        let message = format!("the run in `{}` has not saved a model yet", path.display());
        return Err(Error::input(message).hint("a run saves one with each checkpoint"));
    }
    Ok(if is_run { of_run } else { path.to_owned() })
}

/// Loads weights like [`load_any`] or, with an architecture, [`load_file`], but allows a missing head, since a new one
/// replaces it: models pretrained without classes (MAE, DINO) and timm models with `num_classes=0`.
///
/// A missing head is filled with zeros for one class. Projection heads and decoders of the pretraining are ignored.
pub fn load_body(path: &Path, architecture: Option<&str>, device: &Device) -> Result<Loaded> {
    match architecture {
        None => load_folder(&folder_of(path)?, true, device),
        Some(name) => load_named(path, name, true, device),
    }
}

/// Loads a bare weights file, safetensors or PyTorch, of a named architecture.
///
/// `architecture` is a timm name such as `vit_huge_patch14_224`, one of ours such as `vit_h14`, or the open_clip name
/// of a model with open_clip's own image tower, such as `ViT-H-14-CLIPA-336`. It determines the heads and, for
/// open_clip names, pooling and activation; the shapes of the tensors determine everything else. Images are normalized
/// with ImageNet's statistics, as AdvXL's models expect, or with OpenAI's for CLIP models other than CLIPA; for others,
/// set `mean` and `std` of the model's configuration.
///
/// Errors: an unknown name, and those of [`load`].
pub fn load_file(path: &Path, architecture: &str, device: &Device) -> Result<Loaded> {
    load_named(path, architecture, false, device)
}

fn load_named(
    path: &Path,
    architecture: &str,
    needs_no_head: bool,
    device: &Device,
) -> Result<Loaded> {
    if known(architecture).is_none() {
        return Err(unknown(architecture));
    }
    let weights = StateDict::open(path)?;
    let stated = StatedModel {
        needs_no_head,
        ..StatedModel::by_name(architecture)
    };
    let scheme = scheme(architecture);
    let built = match of_other_program(&weights, scheme) {
        Some(error) => Err(error),
        None => build(weights, scheme, stated, device),
    };
    built.context(|| format!("`{}`", path.display()))
}

/// Returns an error if the tensor names belong to another program than the architecture.
fn of_other_program(weights: &StateDict, scheme: Scheme) -> Option<Error> {
    let of_folder = "load the folder that it came in, which describes the model";
    let marks = [
        (
            "visual.conv1.weight",
            "open_clip",
            "use open_clip's architecture name, for example `--arch ViT-B-16`",
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
            "the weights have {program} tensor names, not those of the architecture"
        ))
        .hint(hint)
    })
}

fn build(
    mut file: StateDict,
    scheme: Scheme,
    mut stated: StatedModel,
    device: &Device,
) -> Result<Loaded> {
    if stated.needs_no_head && file.keep_below("backbone.") {
        stated
            .notes
            .push("only the weights below `backbone.` are loaded; all others are ignored".into());
    }
    let statistics = file.statistics().cloned();
    if let Some(found) = &statistics {
        take_statistics(&mut stated, found)?;
    }
    let weights = Names::new(&file, scheme);
    let Description {
        config,
        classes,
        image_size,
    } = describe(&weights, &stated)?;
    let names = stated.class_names.len();
    if names != 0 && names != classes {
        let source = stated.source;
        let message = format!("`{source}` names {names} classes, but the head has {classes}");
        return Err(Error::input(message).hint("correct or remove `label_names`"));
    }
    config.check_device(device)?;
    check_memory(&config, classes, image_size)?;
    let mut used = BTreeSet::new();
    if matches!(&config, ModelConfig::Vit(vit) if vit.position == Position::Sincos2d) {
        // Fixed positions are recomputed for each image size.
        used.insert("pos_embed".to_owned());
    }
    let mut scaled = false;
    let has_head = ["head.weight", "head.fc.weight"]
        .iter()
        .any(|name| weights.contains(name));
    let is_of_head = |name: &str| {
        let layer = name.rsplit_once('.').map(|(layer, _)| layer);
        matches!(layer, Some("head" | "head.fc"))
    };
    let take = |name: &str, shape: &[usize]| {
        if !has_head && is_of_head(name) {
            return Ok(vec![0.0; shape.iter().product()]);
        }
        let scales = layer_scale(name).into_iter().flatten();
        let scale = scales.into_iter().find(|scale| weights.contains(scale));
        used.insert(name.to_owned());
        let mut values = values(&weights, name, shape)?;
        if let Some(scale) = scale {
            scale_rows(&mut values, &self::values(&weights, &scale, &shape[..1])?);
            used.insert(scale);
            scaled = true;
        }
        Ok(values)
    };
    let model = Model::with_weights(&config, classes, image_size, device, take)?;
    if scaled {
        stated
            .notes
            .push("the layer scale is folded into the preceding weights".into());
    }
    let mut unused = weights.left_over(&used);
    if stated.needs_no_head {
        let of_decoder = |name: &str| name.starts_with("decoder_") || name == "mask_token";
        let all = unused.len();
        unused.retain(|name| !of_decoder(name));
        if unused.len() < all {
            stated.notes.push("MAE's decoder is ignored".into());
        }
    }
    if !unused.is_empty() {
        return Err(left_over(&unused));
    }
    Ok(Loaded {
        model,
        image_size,
        outputs: stated.outputs(classes),
        preprocessing: stated.preprocessing.at(image_size),
        classes: stated.class_names,
        hash: file.hash()?,
        wrapper: file.wrapper().map(str::to_owned),
        statistics,
        notes: stated.notes,
    })
}

/// Makes the mean and std stored with the weights those of the model.
///
/// Errors: the configuration states different ones.
fn take_statistics(stated: &mut StatedModel, found: &Statistics) -> Result<()> {
    let Statistics { names, mean, std } = found;
    let close = |a: &[f64; 3], b: &[f64; 3]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
    let configured = (stated.mean, stated.std);
    let [of_mean, of_std] = names.each_ref().map(|name| shown(name));
    let agrees = close(mean, &configured.0) && close(std, &configured.1);
    if !stated.by_name_alone && !agrees {
        let message = format!(
            "`{}` has mean {:?} and std {:?}, but the weights have `{of_mean}` {mean:?} and `{of_std}` {std:?}",
            stated.source, configured.0, configured.1
        );
        return Err(Error::input(message).hint("correct whichever are wrong"));
    }
    stated.notes.push(format!(
        "images are normalized with `{of_mean}` {mean:?} and `{of_std}` {std:?} from the file"
    ));
    (stated.mean, stated.std) = (*mean, *std);
    Ok(())
}

fn check_memory(config: &ModelConfig, classes: usize, image_size: usize) -> Result<()> {
    let parameters = config.parameters(classes, image_size) as f64;
    let hint = "use a machine with more memory, or a smaller model";
    memory::require(
        "this model",
        parameters * size_of::<f32>() as f64,
        distributed::available_memory(),
        hint,
    )
}

/// Returns the possible names of a layer's scale (Touvron et al. 2021): timm's, and the one in DeiT-3's own files.
fn layer_scale(name: &str) -> Option<[String; 2]> {
    let (block, part) = name.strip_prefix("blocks.")?.split_once('.')?;
    let number = match part.rsplit_once('.')?.0 {
        "attn.proj" => 1,
        "mlp.fc2" => 2,
        _ => return None,
    };
    Some([
        format!("blocks.{block}.ls{number}.gamma"),
        format!("blocks.{block}.gamma_{number}"),
    ])
}

/// Multiplies each row of a matrix, or each element of a vector, by its scale.
fn scale_rows(values: &mut [f32], scales: &[f32]) {
    let row = values.len() / scales.len().max(1);
    for (row, scale) in values.chunks_exact_mut(row.max(1)).zip(scales) {
        row.iter_mut().for_each(|value| *value *= scale);
    }
}

/// Reads the values of one weight and checks its shape and that all values are finite.
fn values(weights: &Names, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let (found, called) = (weights.shape(name)?, weights.called(name));
    // The class token has no position there, which is equivalent to a zero one.
    let of_patches = match (name, shape) {
        ("pos_embed", [1, tokens, width]) => found == [1, tokens - 1, *width],
        _ => false,
    };
    if !(same(&found, shape) || of_patches) {
        let message = format!("{called} has shape {found:?}, expected {shape:?}");
        return Err(Error::input(message)
            .hint("the weights belong to different models, or to an unsupported model"));
    }
    let mut values = weights.floats(name)?;
    if of_patches {
        values.splice(..0, vec![0.0; shape[2]]);
    }
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        let message = format!("{called} contains {} at index {at}", values[at]);
        return Err(Error::input(message).hint("the training that produced it diverged"));
    }
    Ok(values)
}

/// Returns whether shapes are equal up to trailing axes of size 1: a linear layer is also a 1 x 1 convolution.
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
        "unexpected weights in the model: {}{more}",
        first.join(", ")
    );
    Error::input(message).hint(
        "only plain vision transformers and ConvNeXts can be loaded; ignoring these weights would give a different \
         model",
    )
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::*;
    use crate::model::config::vit::{Pool, VitConfig};
    use crate::model::pass::Pass;
    use crate::ops::Gelu;
    use crate::ops::to_vec;

    fn logits(model: &Model, size: usize) -> Vec<f32> {
        let values = (0..3 * size * size)
            .map(|i| (i % 17) as f32 / 17.0)
            .collect();
        let images: Tensor<4> = from_vec(values, [1, 3, size, size], &Device::cpu());
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
            let model = Model::new(&config, 3, 16, 1, &Device::cpu());
            let names = ["a", "b", "c"].map(str::to_owned);
            // Saved for a different size than that of the learned positions.
            save(
                &model,
                &Preprocessing::new(32),
                Outputs::Logits,
                &names,
                folder.path(),
            )
            .unwrap();
            let loaded = load(folder.path(), &Device::cpu()).unwrap();
            assert_eq!(loaded.image_size, 32);
            assert_eq!(loaded.classes, names);
            assert_eq!(loaded.model.config(), config);
            // Bit for bit: learned positions are resampled by one matrix product either way.
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
        let mut model = Model::new(&config, 2, 16, 0, &Device::cpu());
        let bias = model.parameters_mut().into_iter().last().unwrap();
        bias.value = from_vec(vec![0.0, f32::NAN], [2], &Device::cpu());
        save(
            &model,
            &Preprocessing::new(16),
            Outputs::Logits,
            &[],
            folder.path(),
        )
        .unwrap();
        let refusal = |folder: &Path| match load(folder, &Device::cpu()) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("a damaged file was loaded"),
        };
        let text = refusal(folder.path());
        assert!(
            text.contains("`head.bias` contains NaN at index 1"),
            "{text}"
        );

        let file = folder.path().join("model.safetensors");
        let bytes = files::read(&file).unwrap();
        files::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        let text = refusal(folder.path());
        assert!(
            text.contains("truncated or invalid safetensors file"),
            "{text}"
        );
    }
}
