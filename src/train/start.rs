//! The weights that a run begins with, when they are not random.

use super::Run;
use crate::data::{ModelClasses, match_classes};
use crate::error::{Error, Result};
use crate::model::{Model, ModelConfig};
use crate::recipe::{Head, Start};
use crate::settings::changes;
use crate::weights;
use crate::weights::{Loaded, Outputs};

/// The model of the recipe with the weights of a folder or file.
///
/// Learned positions are resampled to the image size of the first phase.
///
/// Errors: weights that cannot be loaded, of another model, or of other classes with a head that is to be kept.
pub(crate) fn load(run: &Run, start: &Start) -> Result<Model> {
    let architecture = start.architecture.as_deref();
    let mut loaded = match (start.head, architecture) {
        (Head::New, _) => weights::load_body(&start.weights, architecture, &run.device)?,
        (_, Some(name)) => weights::load_file(&start.weights, name, &run.device)?,
        (_, None) => weights::load_any(&start.weights, &run.device)?,
    };
    if architecture.is_some() && loaded.statistics.is_none() {
        // Such a file alone does not tell how images are normalized; the recipe does.
        let (mean, std) = run.recipe.model.statistics();
        loaded.model.normalise_by(Some(mean), Some(std));
    }
    check_model(&loaded.model.config(), &run.recipe.model)?;
    if start.head == Head::Keep {
        check_head(run, &loaded)?;
    }
    let model = match start.head {
        Head::New | Head::Text => {
            let model = loaded.model;
            model.with_new_head(run.outputs(0), run.recipe.seed, 0)
        }
        Head::Keep => loaded.model,
    };
    Ok(model.at_image_size(run.recipe.first_image_size()))
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
fn check_head(run: &Run, loaded: &Loaded) -> Result<()> {
    let (found, wanted) = (loaded.model.classes(), run.outputs(0));
    let (names, classes) = (&loaded.classes, run.images[0].classes());
    let message = match &run.captions[0] {
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
