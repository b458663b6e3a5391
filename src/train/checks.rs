//! What is known of a run before it begins: everything that would end it later, or make an evaluation impossible.

use std::path::Path;

use super::classes::difference;
use super::images::StageImages;
use crate::data::loader;
use crate::error::{Context, Error, Result};
use crate::objective::Captions;
use crate::output::{Inputs, is_inside};
use crate::recipe::{Head, Recipe, Stage, TestImages};

/// An error where the folder of a run is an input of the run, or lies among its images, or holds the weights that it begins
/// with.
pub(crate) fn check_folder(recipe: &Recipe, folder: &Path) -> Result<()> {
    let mut inputs = Inputs::default();
    let mut models = Vec::new();
    let data = recipe.stage.iter().map(|stage| recipe.data_of(stage));
    for (key, spec) in
        data.flat_map(|data| [("data.train", &data.train), ("data.test", &data.test)])
    {
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
            let message = format!("the run in `{folder}` would write over {key} `{path}`");
            return Err(Error::input(message).hint("choose another folder with --out"));
        }
    }
    inputs.check_folder("--out", folder)
}

/// Checks that every stage can begin where the one before it ends, and that what is to be evaluated can be.
///
/// Gives what the user should know, besides.
pub(crate) fn check(
    recipe: &Recipe,
    images: &[StageImages],
    captions: &[Option<Captions>],
) -> Result<Vec<String>> {
    for number in 0..recipe.stage.len() {
        check_captions(recipe, images, captions, number)?;
        if number > 0 {
            check_head(recipe, images, captions, number)?;
        }
    }
    let mut notices = check_evaluation(recipe, images, captions)?;
    for (stage, images) in recipe.stage.iter().zip(images) {
        notices.extend(check_packed(stage, images).context(|| format!("stage `{}`", stage.name))?);
    }
    for evaluation in &recipe.final_evaluation {
        let number = evaluation.stage_of(&recipe.stage);
        let number = number.expect("recipes are checked");
        let (name, stage) = (&evaluation.name, &recipe.stage[number].name);
        if !classifies(&captions[number]) {
            let message = format!(
                "final evaluation `{name}`: the test images of stage `{stage}` have no classes, and text.classes names none"
            );
            return Err(no_classes(message));
        }
        let of = format!("final evaluation `{name}`");
        notices.extend(too_few(&of, &evaluation.images, &images[number])?);
    }
    Ok(notices)
}

/// A notice where crops of images that were packed for training are enlarged.
///
/// Errors: images packed for a smaller size than the stage trains at, or to evaluate with.
fn check_packed(stage: &Stage, images: &StageImages) -> Result<Option<String>> {
    if images.test.packed_example().is_some() {
        let message = "the test images were resized by `advxl data pack` for training";
        return Err(Error::input(message).hint("name the original images as data.test"));
    }
    let Some(picture) = images.train.packed_example() else {
        return Ok(None);
    };
    let largest = stage.phases.iter().map(|phase| phase.image_size as usize);
    let image_size = largest.max().unwrap_or_default();
    loader::check_packed(&picture, image_size)?;
    let side = picture.width().min(picture.height());
    let crop = stage.augmentation.random_resized_crop.as_ref();
    // Of an image of 4:3 with the aspect ratio 3:4.
    let narrowest = crop.map(|crop| (side as f64 * crop.area[0].sqrt()) as usize);
    Ok(narrowest.filter(|narrowest| *narrowest < image_size).map(|narrowest| {
        format!(
            "stage `{}`: images are packed at {side} pixels on the shorter side, so the smallest crops are about {narrowest} \
             pixels wide and are enlarged to {image_size}",
            stage.name
        )
    }))
}

/// Whether classes are counted rather than named, as those of shards are.
fn is_numbered(classes: &[String]) -> bool {
    classes
        .iter()
        .enumerate()
        .all(|(number, name)| *name == number.to_string())
}

/// Whether the images of a stage can be classified.
fn classifies(captions: &Option<Captions>) -> bool {
    captions.as_ref().is_none_or(Captions::classifies)
}

fn no_classes(message: String) -> Error {
    Error::input(message)
        .hint("use test images with classes, or take the evaluation out of the recipe")
}

/// A notice where an evaluation asks for more images than there are.
///
/// Errors: a list that does not fit the images.
fn too_few(of: &str, wanted: &TestImages, images: &StageImages) -> Result<Option<String>> {
    let chosen = images.subset(wanted).context(|| of.to_owned())?.len();
    Ok(match wanted {
        TestImages::Images(wanted) if (chosen as u64) < *wanted => Some(format!(
            "{of} asks for {wanted} test images and there are {chosen}: all are used"
        )),
        _ => None,
    })
}

/// An error where no stage can be evaluated while it trains; a notice for each that cannot, among others that can.
fn check_evaluation(
    recipe: &Recipe,
    images: &[StageImages],
    captions: &[Option<Captions>],
) -> Result<Vec<String>> {
    let Some(evaluation) = &recipe.evaluation else {
        return Ok(Vec::new());
    };
    let (can, cannot): (Vec<usize>, Vec<usize>) =
        (0..recipe.stage.len()).partition(|number| classifies(&captions[*number]));
    let reason = "its test images have no classes, or it has no text model to embed their names";
    if can.is_empty() {
        let message = format!(
            "`evaluation` has nothing to evaluate: no stage classifies images; of each, {reason}"
        );
        return Err(no_classes(message));
    };
    let name = |number: usize| &recipe.stage[number].name;
    let cannot = cannot.into_iter();
    let mut notices: Vec<String> = cannot
        .map(|number| {
            format!(
                "stage `{}` is not evaluated while it trains: {reason}",
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

/// An error where a stage learns captions that its images do not have.
fn check_captions(
    recipe: &Recipe,
    images: &[StageImages],
    captions: &[Option<Captions>],
    number: usize,
) -> Result<()> {
    let needed = captions[number]
        .as_ref()
        .is_some_and(Captions::needs_captions);
    if !needed || images[number].train.is_captioned() {
        return Ok(());
    }
    let name = &recipe.stage[number].name;
    let message = format!("stage `{name}`: its train images have no captions");
    Err(Error::input(message)
        .hint("use `shards:` with `.txt` or `.json` members, or loss.kind = \"cross_entropy\""))
}

/// An error where a stage goes on with a head that is for other classes, or for embeddings of another width, or makes one
/// of names that do not fit.
fn check_head(
    recipe: &Recipe,
    images: &[StageImages],
    captions: &[Option<Captions>],
    number: usize,
) -> Result<()> {
    let (stage, before) = (&recipe.stage[number], number - 1);
    let classes = images[number].classes();
    let message = match (stage.head, &captions[before], &captions[number]) {
        (Head::New, ..) => return Ok(()),
        (Head::Text, of_text, _) => {
            let named = of_text.as_ref().map_or(0, Captions::class_count);
            let of_it = images[before].test.classes();
            let message = if named != classes.len() {
                format!(
                    "{named} class names, and its images have {} classes",
                    classes.len()
                )
            } else if !is_numbered(of_it)
                && !is_numbered(classes)
                && let Some(difference) =
                    difference(("the test images before", of_it), ("its images", classes))
            {
                format!("the names of other classes than its images have: {difference}")
            } else {
                return Ok(());
            };
            return Err(Error::input(format!(
                "stage `{}`: head = `text` is made of {message}",
                stage.name
            ))
            .hint("give the stage before it test images of the same classes, in the same order"));
        }
        (Head::Keep, None, None) => {
            let (own, others) = (
                ("its images", classes),
                ("those before", images[before].classes()),
            );
            let Some(difference) = difference(own, others) else {
                return Ok(());
            };
            format!(
                "stage `{}` has images of other classes than the stage before it ({} and {}): {difference}",
                stage.name,
                classes.len(),
                images[before].classes().len()
            )
        }
        (Head::Keep, Some(before), Some(now)) if before.width == now.width => return Ok(()),
        (Head::Keep, before, _) => format!(
            "stage `{}` needs another head than the stage before it, which ends in {}",
            stage.name,
            match before {
                Some(captions) => format!("embeddings of {} dimensions", captions.width),
                None => "classes".to_owned(),
            }
        ),
    };
    Err(Error::input(message)
        .hint("set head = \"new\" in that stage, or use images of the same classes"))
}
