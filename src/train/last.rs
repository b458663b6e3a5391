//! The evaluations at the end of a run, of the models that it saved at the ends of its stages.

use serde_json::{Value, json};

use super::Run;
use crate::error::{Context, Result};
use crate::eval::result::{self, Subject, to_json};
use crate::eval::session::{Progress, conclude, examine};
use crate::eval::{Evaluation, Images};
use crate::fused::{self, Precision};
use crate::model::{Pass, weights};
use crate::recipe::{FinalEvaluation, word_of};
use crate::screen::Screen;
use crate::text::zero_shot::by_text;

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
            let head = fused::to_vec(head.clone());
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
    let count = (evaluation.images as usize).min(test.len());
    let subject = Subject {
        program: format!("advxl {}", env!("CARGO_PKG_VERSION")),
        model: model.display().to_string(),
        model_hash,
        data: run.recipe.data_of(stage).test.to_string(),
        data_hash: test.fingerprint(),
        images: count,
        preprocessing,
        mean,
        std,
        seed: run.recipe.seed,
        precision: word_of(Precision::F32).to_owned(),
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
    screen.line(&format!(
        "evaluation `{}` on {count} images",
        evaluation.name
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
        preprocessing,
        count,
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
    }))?;
    Ok(result)
}
