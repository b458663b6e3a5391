//! Start weights, and heads built from class names.

use burn::tensor::Tensor;

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
    captions: Option<&Captions>,
    device: &Device,
) -> Result<Model> {
    let architecture = start.architecture.as_deref();
    let outputs = captions.map_or(classes.len(), |captions| captions.width);
    let mut loaded = match (start.head, architecture) {
        (Head::New, _) => weights::load_body(&start.weights, architecture, device)?,
        (_, Some(name)) => weights::load_file(&start.weights, name, device)?,
        (_, None) => weights::load_any(&start.weights, device)?,
    };
    if architecture.is_some() && loaded.statistics.is_none() {
        // The file does not contain the normalization of images; use the recipe's.
        let (mean, std) = recipe.model.statistics();
        loaded.model.normalize_by(Some(mean), Some(std));
    }
    check_model(&loaded.model.config(), &recipe.model)?;
    if start.head == Head::Keep {
        check_head(&loaded, outputs, classes, captions)?;
    }
    let model = match start.head {
        Head::New | Head::Text => {
            let model = loaded.model;
            model.with_new_head(outputs, recipe.seed, 0)
        }
        Head::Keep => loaded.model,
    };
    Ok(model.at_image_size(recipe.first_image_size()))
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
fn check_head(
    loaded: &Loaded,
    expected: usize,
    classes: &[String],
    captions: Option<&Captions>,
) -> Result<()> {
    let (found, names) = (loaded.model.classes(), &loaded.classes);
    let message = match captions {
        Some(_) if loaded.outputs == Outputs::Logits => {
            format!(
                "the head outputs logits of {found} classes, but training on captions requires embeddings"
            )
        }
        None if loaded.outputs == Outputs::Embedding => {
            format!("the head outputs embeddings of {found} dimensions, not class logits")
        }
        Some(_) if found == expected => return Ok(()),
        Some(_) => format!("the head outputs {found} dimensions, but the text model {expected}"),
        None if found != expected => {
            format!("the head has {found} classes, but the images have {expected}")
        }
        None => return check_classes(names, found, classes),
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
