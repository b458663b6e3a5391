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
    let known = Vec::new();
    let mut encoders = Encoders {
        recipe,
        device,
        known,
    };
    let (mut all, mut references) = (Vec::new(), Vec::new());
    for ((stage, images), captions) in recipe.stage.iter().zip(images).zip(captions) {
        let (outputs, reference) = if stage.objective.uses_logits() {
            let kind = Outputs::Logits;
            let count = images.classes().len();
            (StageOutputs { kind, count }, None)
        } else {
            let of_stage = encoders.of_stage(stage, captions.as_ref(), all.last());
            of_stage.context(|| format!("stage `{}`", stage.name))?
        };
        all.push(outputs);
        references.push(reference);
    }
    Ok((all, references))
}

/// The image encoders of a recipe.
struct Encoders<'a> {
    recipe: &'a Recipe,
    device: &'a Device,
    /// Weights that were loaded, by their path.
    known: Vec<(&'a Path, Rc<Model>)>,
}

impl<'a> Encoders<'a> {
    /// Returns the dimension of a stage's embeddings, and its reference. `before` are the outputs of the previous stage.
    fn of_stage(
        &mut self,
        stage: &'a Stage,
        captions: Option<&Captions>,
        before: Option<&StageOutputs>,
    ) -> Result<(StageOutputs, Reference)> {
        let reference = stage.objective.reference();
        let width = captions.map(|captions| captions.width);
        let before = before.filter(|before| before.kind == Outputs::Embedding);
        let before = before.map(|before| before.count);
        // Without a text model the dimension is that of the weights.
        let model = match reference.is_some() || width.or(before).is_none() {
            true => self.weights(stage, reference.flatten().map(|path| &**path))?,
            false => None,
        };
        let found = model.as_ref().map(|model| model.classes());
        if let (Some(width), Some(found)) = (width, found)
            && width != found
        {
            let message =
                format!("the reference outputs {found} dimensions, but the text model {width}");
            return Err(
                Error::input(message).hint("use the text model that belongs to the weights")
            );
        }
        let outputs = StageOutputs {
            kind: Outputs::Embedding,
            count: width.or(found).or(before).unwrap_or(REHEARSED),
        };
        // Recipes are checked: only a dry run has no weights.
        let random = || {
            let (config, size) = (&self.recipe.model, self.recipe.first_image_size());
            Rc::new(Model::new(
                config,
                outputs.count,
                size,
                self.recipe.seed,
                self.device,
            ))
        };
        Ok((outputs, reference.map(|_| model.unwrap_or_else(random))))
    }

    /// Loads weights for a stage: those at `path`, or the start weights. `None` if there are neither.
    fn weights(&mut self, stage: &Stage, path: Option<&'a Path>) -> Result<Reference> {
        let (path, architecture) = match (path, &self.recipe.start) {
            (Some(path), _) => (path, None),
            (None, Some(start)) => (&*start.weights, start.architecture.as_deref()),
            (None, None) => return Ok(None),
        };
        if let Some((_, model)) = self.known.iter().find(|(known, _)| *known == path) {
            return Ok(Some(Rc::clone(model)));
        }
        let name = || format!("reference weights `{}`", path.display());
        let loaded = start::loaded(path, architecture, self.recipe, self.device);
        let Loaded { model, outputs, .. } = loaded.context(name)?;
        if outputs == Outputs::Logits {
            let message = format!(
                "objective.kind = `{}` compares embeddings, but the model outputs logits of {} classes",
                stage.objective.kind().word(),
                model.classes()
            );
            let hint = "use an image encoder, such as a CLIP model or timm weights without a head";
            return Err(Error::input(message).hint(hint).context(name()));
        }
        let model = Rc::new(model.at_image_size(self.recipe.first_image_size()));
        self.known.push((path, Rc::clone(&model)));
        Ok(Some(model))
    }
}
