//! The frozen models that objectives compare with, and the number of outputs that follows from them.

use std::path::Path;
use std::rc::Rc;

use super::images::StageImages;
use super::outputs::StageOutputs;
use super::start;
use crate::error::{Context, Error, Result};
use crate::model::Model;
use crate::objective::Captions;
use crate::ops::Device;
use crate::recipe::{Recipe, Stage};
use crate::weights::{Loaded, Outputs};

/// Dimension of the embeddings in a dry run whose start weights and text model are missing.
const REHEARSED: usize = 64;

/// The frozen reference of a stage, if its objective compares with one.
pub type Reference = Option<Rc<Model>>;

/// Determines the outputs of all stages, and loads their references.
///
/// Errors: a reference that cannot be loaded, outputs logits, or has another dimension than the text model.
pub(super) fn of_stages(
    recipe: &Recipe,
    images: &[StageImages],
    captions: &[Option<Captions>],
    device: &Device,
) -> Result<(Vec<StageOutputs>, Vec<Reference>)> {
    let mut all: Vec<StageOutputs> = Vec::new();
    let mut references: Vec<Reference> = Vec::new();
    // Weights that were loaded, by their path.
    let mut known: Vec<(&Path, Rc<Model>)> = Vec::new();
    for (number, stage) in recipe.stage.iter().enumerate() {
        if stage.objective.uses_logits() {
            all.push(StageOutputs {
                kind: Outputs::Logits,
                count: images[number].classes().len(),
            });
            references.push(None);
            continue;
        }
        let named = stage.objective.reference();
        let start = recipe.start.as_ref().map(|start| &start.weights);
        let from_start = named.is_none_or(|path| path.is_none());
        let path = named.flatten().or(start);
        let width = captions[number].as_ref().map(|captions| captions.width);
        let before = all
            .last()
            .filter(|before| before.kind == Outputs::Embedding);
        // Without a text model the dimension is that of the weights.
        let needs_weights = named.is_some() || (width.is_none() && before.is_none());
        let reference = match path.filter(|_| needs_weights) {
            None => None,
            Some(path) => Some(match known.iter().find(|(known, _)| known == path) {
                Some((_, model)) => Rc::clone(model),
                None => {
                    let model = load(recipe, stage, path, from_start, device)
                        .context(|| format!("stage `{}`", stage.name))?;
                    known.push((path, Rc::clone(&model)));
                    model
                }
            }),
        };
        let of_reference = reference.as_ref().map(|model| model.classes());
        if let (Some(width), Some(found)) = (width, of_reference)
            && width != found
        {
            let message = format!(
                "stage `{}`: the reference outputs {found} dimensions, but the text model {width}",
                stage.name
            );
            return Err(
                Error::input(message).hint("use the text model that belongs to the weights")
            );
        }
        let count = width.or(of_reference).or(before.map(|before| before.count));
        all.push(StageOutputs {
            kind: Outputs::Embedding,
            count: count.unwrap_or(REHEARSED),
        });
        let count = all[number].count;
        references.push(match (named, reference) {
            (None, _) => None,
            (Some(_), Some(reference)) => Some(reference),
            // Recipes are checked: only a dry run has no weights.
            (Some(_), None) => {
                let size = recipe.first_image_size();
                let model = Model::new(&recipe.model, count, size, recipe.seed, device);
                Some(Rc::new(model))
            }
        });
    }
    Ok((all, references))
}

/// Loads a model that outputs embeddings.
fn load(
    recipe: &Recipe,
    stage: &Stage,
    path: &Path,
    is_start: bool,
    device: &Device,
) -> Result<Rc<Model>> {
    let name = || format!("reference weights `{}`", path.display());
    let architecture = recipe.start.as_ref().filter(|_| is_start);
    let architecture = architecture.and_then(|start| start.architecture.as_deref());
    let Loaded { model, outputs, .. } =
        start::loaded(path, architecture, recipe, device).context(name)?;
    if outputs == Outputs::Logits {
        let message = format!(
            "objective.kind = `{}` compares embeddings, but the model outputs logits of {} classes",
            stage.objective.kind().word(),
            model.classes()
        );
        return Err(Error::input(message)
            .hint("use an image encoder, such as a CLIP model or timm weights without a head")
            .context(name()));
    }
    Ok(Rc::new(model.at_image_size(recipe.first_image_size())))
}
