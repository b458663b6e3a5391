//! The evaluations at the end of a run, of the models that it saved at the ends of its stages.

use serde_json::{Value, json};

use super::Run;
use super::measure::Readable;
use crate::data::Split;
use crate::error::{Context, Error, Kind, Result};
use crate::eval::result::{Subject, to_json};
use crate::eval::session::{Progress, conclude, examine};
use crate::eval::{Evaluation, Images, result};
use crate::model::Pass;
use crate::ops::Precision;
use crate::recipe::FinalEvaluation;
use crate::screen::Screen;
use crate::settings::Words;
use crate::text::zero_shot::by_text;
use crate::{ops, weights};

/// Images at a time; changes no result.
const BATCH: usize = 128;

/// The results of the recipe's final evaluations, by name.
///
/// What is there already is read, not done again; one that was stopped goes on. One that fails does not keep the others
/// from being made.
///
/// Errors: the first of an evaluation's.
pub fn evaluate_finally(run: &Run, screen: &mut dyn Screen) -> Result<Vec<(String, Value)>> {
    let mut results = Vec::new();
    let mut failed = None;
    for evaluation in &run.recipe.final_evaluation {
        let doing = || format!("final evaluation `{}`", evaluation.name);
        match evaluate(run, evaluation, screen).context(doing) {
            Ok(result) => results.push((evaluation.name.clone(), result)),
            Err(error) if goes_on_after(&error, run) => {
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

/// Whether the next evaluation can be made after an error: no process is to stop, and all of them have it.
fn goes_on_after(error: &Error, run: &Run) -> bool {
    let all_have_it = error.is_everywhere() || run.exchange.group.size() == 1;
    all_have_it && error.kind() != Kind::TryAgain
}

fn evaluate(run: &Run, evaluation: &FinalEvaluation, screen: &mut dyn Screen) -> Result<Value> {
    let folder = run.folder.path();
    let number = evaluation.stage_of(&run.recipe.stage);
    let number = number.expect("recipes are checked");
    let stage = &run.recipe.stage[number];
    let model = folder.join("stages").join(&stage.name);
    let saved = weights::load(&model, &run.device)?;
    // Images that are compared with captions are classified by the names of the classes.
    let head = match &run.captions[number] {
        None => None,
        Some(captions) => Some(captions.final_head(&stage.name, folder)?),
    };
    let model_hash = match &head {
        None => saved.hash,
        // With another text model, or other sentences, it is another classifier.
        Some(head) => {
            let head = ops::to_vec(head.clone());
            let mut hasher = blake3::Hasher::new();
            hasher.update(saved.hash.as_bytes());
            hasher.update(bytemuck::cast_slice(&head));
            hasher.finalize().to_string()
        }
    };
    let attacks = evaluation.attacks();
    let preprocessing = saved.preprocessing.preprocessing?;
    let (mean, std) = saved.model.config().statistics();
    let test = &run.images[number].test;
    let chosen = Readable::choose(run, number, &evaluation.images)?;
    for broken in &chosen.broken {
        if run.named.borrow_mut().insert(broken.name.clone()) {
            run.folder.broken("broken test image", Split::Test, broken);
            screen.line(&format!("warning: broken test image: {broken}"));
        }
    }
    chosen.check_rate(run, number)?;
    let subset = &chosen.subset;
    let count = subset.len();
    let subject = Subject {
        program: format!("advxl {}", env!("CARGO_PKG_VERSION")),
        model: model.display().to_string(),
        model_hash,
        data: run.recipe.data_of(stage).test.to_string(),
        data_hash: test.fingerprint(),
        data_classes: test.classes().to_vec(),
        images: count,
        subset: subset.record(test)?,
        left_out: chosen
            .broken
            .iter()
            .map(|broken| broken.sample as usize)
            .collect(),
        preprocessing,
        mean,
        std,
        seed: run.recipe.seed,
        precision: Precision::F32.word().to_owned(),
    };
    let path = folder.join(format!("result-{}.json", evaluation.name));
    let group = &run.exchange.group;
    let earlier = match group.is_first() {
        true => result::earlier(&path, &subject, &attacks),
        false => Ok(None),
    };
    if let Some(earlier) = group.of_first(group.agree(earlier)?) {
        screen.line(&format!(
            "evaluation `{}`: `{}` is there",
            evaluation.name,
            path.display()
        ));
        return Ok(earlier);
    }
    let left_out = match chosen.broken.len() {
        0 => String::new(),
        broken => format!(" ({broken} of {} broken and left out)", broken + count),
    };
    screen.line(&format!(
        "evaluation `{}` on {}{left_out}",
        evaluation.name,
        subset.describe()
    ));
    let logits = |images| {
        let outputs = saved.model.logits(images, &Pass::evaluation());
        match &head {
            None => outputs,
            Some(head) => by_text(outputs, head),
        }
    };
    let images = Images::Stored {
        dataset: test,
        subset,
        preprocessing,
    };
    let progress = Progress::new(folder, &subject.fingerprint(&attacks), false, group);
    let evaluated = Evaluation {
        logits: &logits,
        images: &images,
        attacks: &attacks,
        batch: BATCH,
        seed: run.recipe.seed,
        device: &run.device,
        group,
    };
    let findings = examine(&evaluated, &progress, screen)?;
    let result = to_json(&subject, &[findings]);
    conclude(&path, &result, &[progress], screen, group)?;
    run.folder.metrics(&json!({
        "event": "final_evaluation",
        "name": evaluation.name,
        "robust_accuracy": result["robust_accuracy"],
        "images": count,
        "broken_images": chosen.broken.len(),
    }));
    Ok(result)
}
