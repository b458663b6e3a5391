//! Start weights, and heads built from class names.

use std::path::Path;

use burn::tensor::Tensor;

use super::outputs::StageOutputs;
use super::state::State;
use crate::data::{FOLDERS_HINT, ModelClasses, match_classes};
use crate::distributed::Zero;
use crate::error::{Error, Result};
use crate::model::{Model, ModelConfig};
use crate::objective::Captions;
use crate::ops::Device;
use crate::recipe::{Head, Recipe, Start};
use crate::settings::changes;
use crate::weights;
use crate::weights::{Loaded, Outputs};

/// Loads the recipe's model with weights from a folder or file.
///
/// Learned position embeddings are resampled to the image size of the first phase.
///
/// Errors: weights that cannot be loaded, have another architecture, or have other classes although the head is kept.
pub(super) fn load(
    start: &Start,
    recipe: &Recipe,
    classes: &[String],
    outputs: StageOutputs,
    device: &Device,
) -> Result<Model> {
    let architecture = start.architecture.as_deref();
    let loaded = match start.head {
        Head::New => {
            let loaded = weights::load_body(&start.weights, architecture, device)?;
            normalized(loaded, architecture, recipe)
        }
        _ => loaded(&start.weights, architecture, recipe, device)?,
    };
    check_model(&loaded.model.config(), &recipe.model)?;
    if start.head == Head::Keep {
        check_head(&loaded, outputs, classes)?;
    }
    let model = match start.head {
        Head::New | Head::Text => {
            let model = loaded.model;
            model.with_new_head(outputs.count, recipe.seed, 0)
        }
        Head::Keep => loaded.model,
    };
    Ok(model.at_image_size(recipe.first_image_size()))
}

/// Loads a model with its head from a folder or file.
///
/// Errors: weights that cannot be loaded.
pub(super) fn loaded(
    path: &Path,
    architecture: Option<&str>,
    recipe: &Recipe,
    device: &Device,
) -> Result<Loaded> {
    let loaded = match architecture {
        Some(name) => weights::load_file(path, name, device)?,
        None => weights::load_any(path, device)?,
    };
    Ok(normalized(loaded, architecture, recipe))
}

/// Normalizes images as the recipe's model if a weights file does not contain the normalization.
fn normalized(mut loaded: Loaded, architecture: Option<&str>, recipe: &Recipe) -> Loaded {
    if architecture.is_some() && loaded.statistics.is_none() {
        let (mean, std) = recipe.model.statistics();
        loaded.model.normalize_by(Some(mean), Some(std));
    }
    loaded
}

/// Checks that the weights have the architecture of the recipe's model. The name of the size is ignored.
fn check_model(found: &ModelConfig, expected: &ModelConfig) -> Result<()> {
    let text = |config: &ModelConfig| toml::to_string(config).expect("consists of TOML types");
    let mut differing = changes(&text(found), &text(expected));
    differing.retain(|change| !change.starts_with("size:"));
    if differing.is_empty() {
        return Ok(());
    }
    let message = format!(
        "the architecture differs from the recipe's `model` (weights -> recipe):\n\n  {}\n",
        differing.join("\n  ")
    );
    Err(Error::input(message).hint("change the recipe's `model` to match the weights"))
}

/// Checks that the outputs of a head are the classes of the images, in the same order.
fn check_classes(names: &[String], count: usize, classes: &[String]) -> Result<()> {
    let outputs = ModelClasses {
        count,
        names,
        owner: "the start weights",
        advice: FOLDERS_HINT,
    };
    let map = match_classes(outputs, classes, "the training images")?;
    match map.table() {
        Some(table) if !table.iter().copied().eq(0..count as u32) => {
            let message =
                "the training images have the classes of the start weights in a different order";
            Err(Error::input(message).hint("set start.head = \"new\", or rename the class folders"))
        }
        _ => Ok(()),
    }
}

/// Checks that the first stage can keep the head.
fn check_head(loaded: &Loaded, expected: StageOutputs, classes: &[String]) -> Result<()> {
    let (found, names) = (loaded.model.classes(), &loaded.classes);
    let StageOutputs { kind, count } = expected;
    let message = match (loaded.outputs, kind) {
        (Outputs::Logits, Outputs::Embedding) => {
            format!(
                "the head outputs logits of {found} classes, but the objective requires embeddings"
            )
        }
        (Outputs::Embedding, Outputs::Logits) => {
            format!("the head outputs embeddings of {found} dimensions, not class logits")
        }
        (_, Outputs::Embedding) if found == count => return Ok(()),
        (_, Outputs::Embedding) => {
            format!("the head outputs {found} dimensions, but the text model or reference {count}")
        }
        (_, Outputs::Logits) if found != count => {
            format!("the head has {found} classes, but the images have {count}")
        }
        (_, Outputs::Logits) => return check_classes(names, found, classes),
    };
    Err(Error::input(message).hint("set start.head = \"new\", or use images with the same classes"))
}

/// Returns weight and bias of a head that makes the same predictions as zero-shot classification in the previous stage.
///
/// Zero-shot logits are `t (W h + b)`, divided by the norm of the term in parentheses, with the projection `W`, `b`.
/// Without the division they are linear in `h`, and the largest logit is the same. Rows are scaled to length 1 on
/// average, so that the initial logits are of order one.
///
/// `before` is the text side of the previous stage, `name` the name of this stage and `classes` its number of classes.
pub(super) fn head_by_text(
    state: &State,
    zero: &Zero,
    before: Option<&Captions>,
    name: &str,
    classes: usize,
) -> Result<[Tensor<1>; 2]> {
    let head = match before {
        Some(captions) => captions.class_head(state.averaged_tower(zero).as_ref())?,
        None => None,
    };
    let head = head.ok_or_else(|| {
        let message = format!("stage `{name}`: head = `text` requires class names");
        Error::input(message).hint("set text.classes in the previous stage")
    })?;
    let [named, width] = head.dims();
    if named != classes {
        let message =
            format!("stage `{name}` has {classes} classes, but the previous stage names {named}");
        return Err(Error::input(message)
            .hint("use test images with the same classes in the previous stage"));
    }
    let averaged = state.averaged(zero);
    let [weight, bias] = averaged.head();
    let inputs = weight.shape[1];
    let weight = head.clone().matmul(weight.shaped([width, inputs]));
    let bias = head.matmul(bias.shaped([width, 1]));
    let length = (weight.clone() * weight.clone()).sum_dim(1).sqrt().mean();
    let scale = 1.0 / f64::from(length.into_scalar::<f32>()).max(1e-12);
    Ok([
        (weight * scale).reshape([classes * inputs]),
        (bias * scale).reshape([classes]),
    ])
}
