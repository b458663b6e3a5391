//! RobustBench entries.

use serde_json::{Value, json};

use super::board;
use super::card::{Facts, architecture, evaluations, is_standard, percent, stages};
use crate::error::{Error, Result};
use crate::weights::import::Loaded;

pub(crate) fn robustbench_entry(loaded: &Loaded, facts: &Facts) -> Result<Value> {
    let board = board::named(&facts.dataset)?;
    let mut found = evaluations(&facts.results);
    found.retain(|(_, evaluation)| is_standard(evaluation));
    let [(result, evaluation)] = found[..] else {
        let count = found.len();
        let message = format!(
            "expected one result of standard AutoAttack with its default settings, got {count}"
        );
        return Err(Error::input(message).hint(board.command()));
    };
    let epsilon = board.check(loaded, result, evaluation)?;
    let flags = evaluation["flags"]
        .as_array()
        .map(Vec::len)
        .unwrap_or_default();
    Ok(json!({
        "link": facts.link,
        "name": facts.name,
        "authors": facts.authors,
        "additional_data": facts.additional_data,
        "number_forward_passes": 1,
        "dataset": facts.dataset,
        "venue": "",
        "architecture": architecture(loaded),
        "eps": epsilon,
        "clean_acc": percent(&stages(evaluation)[0]["robust_accuracy"]),
        "reported": percent(&evaluation["robust_accuracy"]),
        "autoattack_acc": percent(&evaluation["robust_accuracy"]),
        "unreliable": flags > 0,
    }))
}
