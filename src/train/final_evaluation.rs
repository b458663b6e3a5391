//! Evaluations at the end of a run, of the models saved at the end of its stages.

use serde_json::{Value, json};

use super::run::Run;
use super::test_set::TestSet;
use crate::data::Split;
use crate::error::{Context, Error, Kind, Result};
use crate::eval::classifier::hash_with_head;
use crate::eval::result::{Subject, to_json};
use crate::eval::session::{Progress, conclude, examine};
use crate::eval::{Classifier, Images, Setup, result};
use crate::ops::Precision;
use crate::recipe::FinalEvaluation;
use crate::screen::Screen;
use crate::weights;

/// Batch size; does not affect results.
const BATCH: usize = 128;

/// Runs the recipe's final evaluations and returns the results by name.
///
/// Existing results are read rather than computed again, and an interrupted evaluation resumes. If one fails, the
/// others are still run.
///
/// Errors: the first error of an evaluation.
pub fn evaluate_finally(run: &Run, screen: &mut dyn Screen) -> Result<Vec<(String, Value)>> {
    let mut results = Vec::new();
    let mut failed = None;
    for evaluation in &run.recipe.final_evaluation {
        let doing = || format!("final evaluation `{}`", evaluation.name);
        match evaluate(run, evaluation, screen).context(doing) {
            Ok(result) => results.push((evaluation.name.clone(), result)),
            Err(error) if can_continue_after(&error, run) => {
                if failed.is_some() {
                    screen.line(&format!("error: {error}"));
                }
                failed.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    failed.map_or(Ok(results), Err)
}

/// Returns whether the next evaluation can run after an error: no stop was requested, and all ranks have the error.
fn can_continue_after(error: &Error, run: &Run) -> bool {
    let all_have_it = error.is_everywhere() || run.comm.world_size() == 1;
    all_have_it && error.kind() != Kind::TryAgain
}

fn evaluate(run: &Run, evaluation: &FinalEvaluation, screen: &mut dyn Screen) -> Result<Value> {
    let folder = run.folder.path();
    let number = evaluation.stage_of(&run.recipe.stage);
    let number = number.expect("recipes are checked");
    let stage = &run.recipe.stage[number];
    let model = folder.join("stages").join(&stage.name);
    let saved = weights::load(&model, &run.device)?;
    let preprocessing = saved.preprocessing.preprocessing?;
    // A model that outputs embeddings classifies zero-shot, by class names.
    let head = match &run.captions[number] {
        _ if run.has_logits(number) => None,
        None => None,
        Some(captions) => Some(captions.final_head(&stage.name, folder)?),
    };
    let hash = match &head {
        None => saved.hash,
        Some(head) => hash_with_head(&saved.hash, head),
    };
    let classifier = Classifier::new(saved.model, head, Precision::F32)
        .named(&model.display().to_string(), &hash);
    let attacks = evaluation.attacks();
    let test = &run.images[number].test;
    let chosen = TestSet::choose(&run.images[number], &evaluation.images, &run.comm)?;
    for broken in &chosen.broken {
        if run.reported.borrow_mut().insert(broken.name.clone()) {
            run.folder.broken("broken test image", Split::Test, broken);
            screen.line(&format!("warning: broken test image: {broken}"));
        }
    }
    chosen.check_rate(run.recipe.data_of(stage).broken_rate)?;
    let subset = &chosen.subset;
    let count = subset.len();
    let subject = Subject {
        left_out: chosen
            .broken
            .iter()
            .map(|broken| broken.sample as usize)
            .collect(),
        ..classifier.subject(
            &run.recipe.data_of(stage).test.to_string(),
            test,
            subset,
            preprocessing,
            run.recipe.seed,
        )?
    };
    let path = folder.join(format!("result-{}.json", evaluation.name));
    let comm = &run.comm;
    let earlier = match comm.is_main() {
        true => result::earlier(&path, &subject, &attacks),
        false => Ok(None),
    };
    if let Some(earlier) = comm.broadcast(comm.all_ok(earlier)?) {
        screen.line(&format!(
            "evaluation `{}`: using existing `{}`",
            evaluation.name,
            path.display()
        ));
        return Ok(earlier);
    }
    let left_out = match chosen.broken.len() {
        0 => String::new(),
        broken => format!(" ({broken} broken images left out)"),
    };
    screen.line(&format!(
        "evaluation `{}` on {}{left_out}",
        evaluation.name,
        subset.describe()
    ));
    let images = Images::Stored {
        dataset: test,
        subset,
        preprocessing,
    };
    let progress = Progress::new(folder, &subject.fingerprint(&attacks, None), false, comm);
    let setup = Setup {
        batch: BATCH,
        seed: run.recipe.seed,
        device: &run.device,
        comm,
    };
    let findings = examine(
        &classifier.evaluation(&images, &attacks, setup),
        &progress,
        screen,
    )?;
    let result = to_json(&subject, &[findings]);
    conclude(&path, &result, &[progress], screen, comm)?;
    run.folder.metrics(&json!({
        "event": "final_evaluation",
        "name": evaluation.name,
        "robust_accuracy": result["robust_accuracy"],
        "images": count,
        "broken_images": chosen.broken.len(),
    }));
    Ok(result)
}
