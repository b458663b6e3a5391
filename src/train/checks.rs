//! Checks before a run starts, for everything that would make training or an evaluation fail later.

use std::path::Path;

use super::classes::difference;
use super::images::StageImages;
use super::outputs::StageOutputs;
use crate::data::classes::are_numbers;
use crate::data::loader;
use crate::error::{Context, Error, Result};
use crate::objective::Captions;
use crate::output::{Inputs, is_inside};
use crate::recipe::{Head, Recipe, Stage, TestImages};
use crate::weights::Outputs;

/// Checks the run folder.
///
/// Errors: the folder is an input of the run, is inside its image folders, or contains its start weights.
pub(crate) fn check_folder(recipe: &Recipe, folder: &Path) -> Result<()> {
    let mut inputs = Inputs::default();
    let mut models = Vec::new();
    let data = recipe.stage.iter().map(|stage| recipe.data_of(stage));
    let named = data.flat_map(|data| {
        let train = data.train.specs().into_iter();
        train
            .map(|spec| ("data.train", spec))
            .chain([("data.test", &data.test)])
    });
    for (key, spec) in named {
        if let Some(path) = spec.path() {
            inputs.add_data(key, path);
        }
    }
    if let Some(start) = &recipe.start {
        models.push(("start.weights", &start.weights));
    }
    for text in recipe.stage.iter().filter_map(|stage| stage.text.as_ref()) {
        models.extend(text.model.as_ref().map(|path| ("text.model", path)));
        for path in text.embeddings.iter().chain(&text.classes) {
            inputs.add("text", path);
        }
    }
    for (key, path) in models {
        inputs.add(key, path);
        if is_inside(path, folder) {
            let (path, folder) = (path.display(), folder.display());
            let message = format!("the run in `{folder}` would overwrite {key} `{path}`");
            return Err(Error::input(message).hint("choose another folder with --out"));
        }
    }
    inputs.check_folder("--out", folder)
}

/// Checks that every stage can continue from the previous one, and that all evaluations are possible. Returns notices
/// for the user.
pub(crate) fn check(
    recipe: &Recipe,
    images: &[StageImages],
    captions: &[Option<Captions>],
    outputs: &[StageOutputs],
) -> Result<Vec<String>> {
    for number in 0..recipe.stage.len() {
        check_captions(recipe, images, captions, number)?;
        if number > 0 {
            check_head(recipe, images, captions, outputs, number)?;
        }
    }
    let classifies = |stage: usize| classifies(outputs[stage], &captions[stage]);
    let mut notices = check_evaluation(recipe, images, &classifies)?;
    for (stage, images) in recipe.stage.iter().zip(images) {
        notices.extend(check_packed(stage, images).context(|| format!("stage `{}`", stage.name))?);
    }
    for evaluation in &recipe.final_evaluation {
        let number = evaluation.stage_of(&recipe.stage);
        let number = number.expect("recipes are checked");
        let (name, stage) = (&evaluation.name, &recipe.stage[number].name);
        if !classifies(number) {
            let message = format!(
                "final evaluation `{name}`: the test images of stage `{stage}` have no classes, and text.classes does not name any"
            );
            return Err(no_classes(message));
        }
        let of = format!("final evaluation `{name}`");
        notices.extend(too_few(&of, &evaluation.images, &images[number])?);
    }
    Ok(notices)
}

/// Checks images packed by `advxl data pack`. Returns a notice if their crops are upsampled.
///
/// Errors: the images were packed for a smaller size than the stage trains at, or are used as test images.
fn check_packed(stage: &Stage, images: &StageImages) -> Result<Option<String>> {
    if images.test.packed_example().is_some() {
        let message = "the test images were resized by `advxl data pack` for training";
        return Err(Error::input(message).hint("set data.test to the original images"));
    }
    let Some(picture) = images.train.packed_example() else {
        return Ok(None);
    };
    let largest = stage.phases.iter().map(|phase| phase.image_size as usize);
    let image_size = largest.max().unwrap_or_default();
    loader::check_packed(&picture, image_size)?;
    let side = picture.width().min(picture.height());
    let crop = stage.augmentation.random_resized_crop.as_ref();
    // For a 4:3 image and a crop with aspect ratio 3:4.
    let narrowest = crop.map(|crop| (side as f64 * crop.area[0].sqrt()) as usize);
    Ok(narrowest.filter(|narrowest| *narrowest < image_size).map(|narrowest| {
        format!(
            "stage `{}`: images are packed at {side} pixels on the shorter side, so the smallest crops are about {narrowest} \
             pixels wide and are upsampled to {image_size}",
            stage.name
        )
    }))
}

/// Returns whether a stage can classify images.
fn classifies(outputs: StageOutputs, captions: &Option<Captions>) -> bool {
    let zero_shot = captions.as_ref().is_some_and(Captions::classifies);
    outputs.kind == Outputs::Logits || zero_shot
}

fn no_classes(message: String) -> Error {
    Error::input(message)
        .hint("use test images with classes, or remove the evaluation from the recipe")
}

/// Returns a notice if an evaluation requests more images than there are.
///
/// Errors: a list of images that does not match the data set.
fn too_few(of: &str, requested: &TestImages, images: &StageImages) -> Result<Option<String>> {
    let chosen = images.subset(requested).context(|| of.to_owned())?.len();
    Ok(match requested {
        TestImages::Images(count) if (chosen as u64) < *count => Some(format!(
            "{of} requests {count} test images, but there are only {chosen}; using all of them"
        )),
        _ => None,
    })
}

/// Checks the evaluation during training. Returns a notice for each stage that cannot be evaluated.
///
/// Errors: no stage can be evaluated.
fn check_evaluation(
    recipe: &Recipe,
    images: &[StageImages],
    classifies: &dyn Fn(usize) -> bool,
) -> Result<Vec<String>> {
    let Some(evaluation) = &recipe.evaluation else {
        return Ok(Vec::new());
    };
    let (can, cannot): (Vec<usize>, Vec<usize>) =
        (0..recipe.stage.len()).partition(|number| classifies(*number));
    let reason = "no test images with classes, or no text model to embed class names";
    if can.is_empty() {
        let message =
            format!("`evaluation` has no effect: no stage can classify images ({reason})");
        return Err(no_classes(message));
    };
    let name = |number: usize| &recipe.stage[number].name;
    let cannot = cannot.into_iter();
    let mut notices: Vec<String> = cannot
        .map(|number| {
            format!(
                "stage `{}` is not evaluated during training: {reason}",
                name(number)
            )
        })
        .collect();
    for number in can {
        notices.extend(too_few(
            "`evaluation`",
            &evaluation.images,
            &images[number],
        )?);
    }
    notices.dedup();
    Ok(notices)
}

/// Checks that a stage that trains on captions has them.
fn check_captions(
    recipe: &Recipe,
    images: &[StageImages],
    captions: &[Option<Captions>],
    number: usize,
) -> Result<()> {
    let needed = captions[number]
        .as_ref()
        .is_some_and(Captions::needs_captions);
    if !needed
        || !recipe.stage[number].objective.uses_captions()
        || images[number].train.is_captioned()
    {
        return Ok(());
    }
    let name = &recipe.stage[number].name;
    let message = format!("stage `{name}`: the training images have no captions");
    Err(Error::input(message)
        .hint("use `shards:` with `.txt` or `.json` members, or an objective without captions, such as `cross_entropy`"))
}

/// Checks the head that a stage starts with.
///
/// Errors: it keeps a head with other classes or another embedding dimension, or builds one from class names that do
/// not match its images.
fn check_head(
    recipe: &Recipe,
    images: &[StageImages],
    captions: &[Option<Captions>],
    outputs: &[StageOutputs],
    number: usize,
) -> Result<()> {
    let (stage, before) = (&recipe.stage[number], number - 1);
    let classes = images[number].classes();
    let message = match (stage.head, outputs[before].kind, outputs[number].kind) {
        (Head::New, ..) => return Ok(()),
        (Head::Text, ..) => {
            let named = captions[before].as_ref().map_or(0, Captions::class_count);
            let of_it = images[before].test.classes();
            let message = if named != classes.len() {
                format!(
                    "has {named} class names, but the images have {} classes",
                    classes.len()
                )
            } else if !are_numbers(of_it)
                && !are_numbers(classes)
                && let Some(difference) =
                    difference(("the previous stage", of_it), ("this stage", classes))
            {
                format!("has class names that differ from those of the images: {difference}")
            } else {
                return Ok(());
            };
            return Err(Error::input(format!(
                "stage `{}`: head = `text` {message}",
                stage.name
            ))
            .hint("use test images with the same classes, in the same order, in the previous stage"));
        }
        (Head::Keep, Outputs::Logits, Outputs::Logits) => {
            let (own, others) = (
                ("this stage", classes),
                ("the previous stage", images[before].classes()),
            );
            let Some(difference) = difference(own, others) else {
                return Ok(());
            };
            format!(
                "stage `{}` has other classes than the previous stage ({} and {}): {difference}",
                stage.name,
                classes.len(),
                images[before].classes().len()
            )
        }
        (Head::Keep, ..) if outputs[before] == outputs[number] => return Ok(()),
        (Head::Keep, kind, _) => format!(
            "stage `{}` cannot keep the head of the previous stage, which outputs {}",
            stage.name,
            match kind {
                Outputs::Embedding => {
                    format!("embeddings of {} dimensions", outputs[before].count)
                }
                Outputs::Logits => "class logits".to_owned(),
            }
        ),
    };
    Err(Error::input(message)
        .hint("set head = \"new\" in that stage, or use images with the same classes"))
}
