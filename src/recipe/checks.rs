//! Checks that involve more than one table of a recipe.

use super::evaluation::FinalEvaluation;
use super::objective::ObjectiveKind;
use super::stage::Stage;
use super::start::Head;
use super::text::Text;
use crate::distributed::Parallel;
use crate::settings::Table;

/// Reports names that would be the same file name, on case-insensitive file systems too.
pub(super) fn check_names<'a>(table: &Table, key: &str, names: impl Iterator<Item = &'a str>) {
    let mut seen: Vec<&str> = Vec::new();
    for name in names {
        if let Some(other) = seen.iter().find(|seen| seen.eq_ignore_ascii_case(name)) {
            let message = match *other == name {
                true => format!("two `{key}` tables are named `{name}`"),
                false => format!("`{key}` names `{other}` and `{name}` differ only in case"),
            };
            table.problem_with_hint(key, message, "give each a unique name");
        }
        seen.push(name);
    }
}

/// Reports batches that cannot be split evenly into shards.
pub(super) fn check_shards(table: &Table, stages: &[Stage], parallel: Parallel) {
    let shards = parallel.shards;
    for stage in stages {
        if !stage.batch.is_multiple_of(shards) {
            let message = format!(
                "stage `{}`: batch = {} is not a multiple of the {shards} shards",
                stage.name, stage.batch
            );
            let hint = format!("use batch = {}", stage.batch.next_multiple_of(shards));
            table.problem_with_hint("parallel", message, hint);
        }
    }
}

/// Reports stages without data, and a top-level `data` that no stage uses.
pub(super) fn check_data(table: &Table, stages: &[Stage]) {
    let without = stages.iter().find(|stage| stage.data.is_none());
    match (without, table.has("data")) {
        (Some(stage), false) => {
            let message = format!(
                "the table `data` is missing, and stage `{}` does not set its own",
                stage.name
            );
            table.problem("data", message);
        }
        (None, true) => {
            let message = "data has no effect, because every stage sets its own";
            table.problem("data", message);
        }
        _ => {}
    }
}

/// Reports references to a text model of an earlier stage that does not exist, and a head in the first stage.
pub(super) fn check_heads(table: &Table, stages: &[Stage]) {
    for (number, stage) in stages.iter().enumerate() {
        let named = stage.text.as_ref().and_then(|text| text.from.as_ref());
        let has_new = |stage: &Stage| stage.text.as_ref().is_some_and(|text| text.new.is_some());
        let before = &stages[..number];
        if let Some(named) = named
            && !before
                .iter()
                .any(|earlier| earlier.name == *named && has_new(earlier))
        {
            let message = format!(
                "stage `{}`: text.from = `{named}` is not an earlier stage with a `new` text model",
                stage.name
            );
            table.problem("stage", message);
        }
        let of_text = before
            .last()
            .is_some_and(|earlier| earlier.text.as_ref().is_some_and(Text::has_model));
        if stage.head == Head::Text && !of_text {
            let message = format!(
                "stage `{}`: head = `text` requires a text model in the previous stage",
                stage.name
            );
            table.problem("stage", message);
        }
    }
    if let Some(first) = stages.first()
        && first.head != Head::Keep
    {
        let message = format!("head has no effect in the first stage, `{}`", first.name);
        let hint = "set the head of the start weights in the table `start`";
        table.problem_with_hint("stage", message, hint);
    }
}

/// Reports objectives that fine-tune an encoder without one to start from or to compare with.
pub(super) fn check_references(table: &Table, stages: &[Stage]) {
    if table.has("start") {
        return;
    }
    for (number, stage) in stages.iter().enumerate() {
        let kind = stage.objective.kind();
        let name = kind.word();
        let message = match (stage.objective.reference(), kind) {
            (Some(None), _) => format!(
                "stage `{}`: objective.kind = `{name}` compares with a frozen reference, but there are no start weights",
                stage.name
            ),
            (None, ObjectiveKind::SimClip) if number == 0 => format!(
                "stage `{}`: objective.kind = `{name}` fine-tunes an encoder, but there are no start weights",
                stage.name
            ),
            _ => continue,
        };
        let hint = match stage.objective.reference() {
            Some(_) => "add start = { weights = \"MODEL\" }, or set objective.reference",
            None => "add start = { weights = \"MODEL\" }",
        };
        table.problem_with_hint("stage", message, hint);
    }
}

/// Reports final evaluations of stages that do not exist or cannot classify.
pub(super) fn check_final(table: &Table, stages: &[Stage], evaluations: &[FinalEvaluation]) {
    for evaluation in evaluations {
        let name = &evaluation.name;
        let Some(stage) = evaluation.stage_of(stages) else {
            let known: Vec<_> = stages.iter().map(|stage| &stage.name[..]).collect();
            let named = evaluation.stage.as_deref().unwrap_or_default();
            let message = format!("final evaluation `{name}`: unknown stage `{named}`");
            let hint = format!("known stages are {}", known.join(", "));
            table.problem_with_hint("final_evaluation", message, hint);
            continue;
        };
        let stage_has_model = stages[stage].text.as_ref().is_some_and(Text::has_model);
        if !stages[stage].objective.uses_logits() && !stage_has_model {
            let message = format!(
                "final evaluation `{name}`: stage `{}` has no text model to embed class names with",
                stages[stage].name
            );
            table.problem("final_evaluation", message);
        }
    }
}
