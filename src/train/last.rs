//! The evaluations at the end of a run, of the model that the run has saved.

use serde_json::{Value, json};

use super::Run;
use crate::data::EvaluationTransform;
use crate::data::resize::Filter;
use crate::error::{Context, Result};
use crate::eval::result::{self, Subject, to_json};
use crate::eval::session::{Progress, conclude, examine};
use crate::eval::{Evaluation, Images};
use crate::fused::Precision;
use crate::model::{Pass, weights};
use crate::recipe::{FinalEvaluation, word_of};
use crate::screen::Screen;

/// Images at a time; changes no result.
const BATCH: usize = 128;

/// The results of the recipe's final evaluations, by name.
///
/// What is there already is read, not done again; one that was stopped goes on.
pub fn evaluate_finally(run: &Run, screen: &mut dyn Screen) -> Result<Vec<(String, Value)>> {
    let evaluations = run.recipe.final_evaluation.iter();
    let results = evaluations.map(|evaluation| {
        let doing = || format!("the final evaluation `{}`", evaluation.name);
        let result = evaluate(run, evaluation, screen).context(doing)?;
        Ok((evaluation.name.clone(), result))
    });
    results.collect()
}

fn evaluate(run: &Run, evaluation: &FinalEvaluation, screen: &mut dyn Screen) -> Result<Value> {
    let folder = run.folder.path();
    let saved = weights::load(&folder.join("model"), &run.device)?;
    let attacks = evaluation.attacks();
    let transform = EvaluationTransform {
        image_size: saved.image_size,
        crop_fraction: 1.0,
        interpolation: Filter::Bilinear,
    };
    let last = run.recipe.stage.last().expect("a recipe has stages");
    let test = &run.images.last().expect("as many as stages").test;
    let count = (evaluation.images as usize).min(test.len());
    let subject = Subject {
        program: format!("advxl {}", env!("CARGO_PKG_VERSION")),
        model: folder.join("model").display().to_string(),
        model_hash: saved.hash,
        data: run.recipe.data_of(last).test.to_string(),
        data_hash: test.fingerprint(),
        images: count,
        image_size: saved.image_size,
        crop_fraction: transform.crop_fraction,
        interpolation: "bilinear".to_owned(),
        seed: run.recipe.seed,
        precision: word_of(Precision::F32).to_owned(),
    };
    let path = folder.join(format!("result-{}.json", evaluation.name));
    if let Some(earlier) = result::earlier(&path, &subject, &attacks)? {
        screen.line(&format!(
            "evaluation `{}`: `{}` is there",
            evaluation.name,
            path.display()
        ));
        return Ok(earlier);
    }
    screen.line(&format!(
        "evaluation `{}` on {count} images",
        evaluation.name
    ));
    let logits = |images| saved.model.logits(images, &Pass::evaluation());
    let images = Images::Stored {
        dataset: test,
        transform,
        count,
    };
    let progress = Progress::new(folder, &subject.fingerprint(&attacks), false);
    let evaluated = Evaluation {
        logits: &logits,
        images: &images,
        attacks: &attacks,
        batch: BATCH,
        seed: run.recipe.seed,
        device: &run.device,
    };
    let findings = examine(&evaluated, &progress, screen)?;
    let result = to_json(&subject, &[findings]);
    conclude(&path, &result, &[progress], screen)?;
    run.folder.metrics(&json!({
        "event": "final_evaluation",
        "name": evaluation.name,
        "robust_accuracy": result["robust_accuracy"],
        "images": count,
    }))?;
    Ok(result)
}
