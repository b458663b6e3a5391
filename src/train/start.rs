//! Initial weights that are not random, and heads made of class names.

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

/// The model of the recipe with the weights of a folder or file.
///
/// Learned positions are resampled to the image size of the first phase.
///
/// Errors: weights that cannot be loaded, of another model, or of other classes with a head that is to be kept.
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
        // Such a file alone does not tell how images are normalized; the recipe does.
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

/// An error unless the weights are of the recipe's model, whatever its size is called.
fn check_model(found: &ModelConfig, wanted: &ModelConfig) -> Result<()> {
    let text = |config: &ModelConfig| toml::to_string(config).expect("made of TOML's types");
    let mut differing = changes(&text(found), &text(wanted));
    differing.retain(|change| !change.starts_with("size:"));
    if differing.is_empty() {
        return Ok(());
    }
    let message = format!(
        "they are of another model than the recipe's `model` (theirs -> the recipe's):\n\n  {}\n",
        differing.join("\n  ")
    );
    Err(Error::input(message).hint("change the recipe's `model` to what the weights are"))
}

/// An error unless the outputs of a head are the classes of the images, in their order.
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
                "the training images have the classes of the start weights in another order";
            Err(Error::input(message).hint("set start.head = \"new\", or rename the class folders"))
        }
        _ => Ok(()),
    }
}

/// An error unless the head can go on in the first stage.
fn check_head(
    loaded: &Loaded,
    wanted: usize,
    classes: &[String],
    captions: Option<&Captions>,
) -> Result<()> {
    let (found, names) = (loaded.model.classes(), &loaded.classes);
    let message = match captions {
        Some(_) if loaded.outputs == Outputs::Logits => {
            format!(
                "their head gives logits of {found} classes, and captions are compared with embeddings"
            )
        }
        None if loaded.outputs == Outputs::Embedding => {
            format!("their head gives an embedding of {found} numbers, not logits of classes")
        }
        Some(_) if found == wanted => return Ok(()),
        Some(_) => format!("their head gives {found} numbers, and the text model {wanted}"),
        None if found != wanted => {
            format!("their head is for {found} classes, and the images have {wanted}")
        }
        None => return check_classes(names, found, classes),
    };
    Err(Error::input(message).hint("set start.head = \"new\", or use images of the same classes"))
}

/// Weight and bias of a head that classifies as the text model of the stage before did.
///
/// Logits by text are `t (W h + b)`, divided by the length of what is in brackets, with the projection `W`, `b`.
/// Without the division they are linear in `h`, and the largest is the same. Rows have length 1 on average, so that
/// the first logits are of the order of one.
///
/// `before` is the text side of that stage, `classes` the number of classes of this one, called `name`.
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
        let message = format!("stage `{name}`: there are no names of classes to make its head of");
        Error::input(message).hint("give text.classes in the stage before it")
    })?;
    let [named, width] = head.dims();
    if named != classes {
        let message =
            format!("stage `{name}` has {classes} classes, and the stage before it names {named}");
        return Err(Error::input(message).hint("measure the stage before it with the same classes"));
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
