//! `result.json`: the results of an evaluation and everything needed to reproduce it.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::accuracy::Outcome;
use super::bound::{Sample, joint};
use super::calibration::{Calibration, margin_histogram};
use super::checks::Flag;
use super::curve::Point;
use super::interval::wilson;
use crate::attack::unseen::Corruption;
use crate::attack::{Attack, Unseen};
use crate::data::SubsetRecord;
use crate::error::Result;
use crate::files;
use crate::image::Preprocessing;
use crate::settings::Words;

/// The evaluated model and data.
#[derive(Clone, Debug, Serialize)]
pub struct Subject {
    /// Name and version of this program.
    pub program: String,
    /// Path of the model.
    pub model: String,
    /// Hash of its weights.
    pub model_hash: String,
    /// The data set as specified by the user.
    pub data: String,
    /// Hash of the data set's classes and labels.
    pub data_hash: String,
    /// Names of the data set's classes.
    pub data_classes: Vec<String>,
    /// Number of images.
    pub images: usize,
    /// Selection of the images.
    pub subset: SubsetRecord,
    /// Indices in the data set of images that could not be read and were left out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<usize>,
    /// Preprocessing to the model's image size.
    #[serde(flatten)]
    pub preprocessing: Preprocessing,
    /// Mean of each channel, subtracted inside the model.
    pub mean: [f64; 3],
    /// Standard deviation of each channel, by which the model divides.
    pub std: [f64; 3],
    /// Seed of the attacks' random numbers.
    pub seed: u64,
    /// Precision of the computation.
    pub precision: String,
    /// Precision in which attacks searched, if it is another one. Verdicts are in `precision`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub search_precision: Option<String>,
}

impl Subject {
    /// Returns the fingerprint of an evaluation of this subject. Two fingerprints are equal only if everything that
    /// determines the result is equal. `sample` is that of [`super::Evaluation`].
    pub fn fingerprint(&self, attacks: &[Attack], sample: Option<&Sample>) -> String {
        let named = Self {
            model: String::new(),
            data: String::new(),
            ..self.clone()
        };
        let mut text = json!({ "subject": named, "attacks": attacks });
        if let Some(sample) = sample {
            text["sample"] = json!(sample);
        }
        let text = text.to_string();
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }
}

/// Results of the attacks in one norm, or of one unseen attack.
pub struct Findings {
    /// The outcome of the evaluation.
    pub outcome: Outcome,
    /// The attacks.
    pub attacks: Vec<Attack>,
    /// The sample that the last attacks ran on; None if all ran on all images.
    pub sample: Option<Sample>,
    /// Signs that the results may be misleading.
    pub flags: Vec<Flag>,
    /// Robust accuracy over epsilon, if requested.
    pub curve: Option<Vec<Point>>,
}

impl Findings {
    /// Returns the unseen attack, if that is what was evaluated.
    pub fn unseen(&self) -> Option<&Unseen> {
        match &self.attacks[..] {
            [Attack::Unseen(attack)] => Some(attack),
            _ => None,
        }
    }

    /// Returns the share of images that survive all attacks.
    pub fn robust_accuracy(&self) -> f64 {
        self.outcome.accuracy_after(self.outcome.stages.len() - 1)
    }

    fn to_json(&self) -> Value {
        let outcome = &self.outcome;
        let stages = outcome.stages.iter().enumerate().map(|(index, stage)| {
            let attack = index.checked_sub(1).map(|index| &self.attacks[index]);
            json!({
                "attack": stage.attack,
                "settings": attack,
                "tried": stage.tried,
                "robust_accuracy": outcome.accuracy_after(index),
                "interval_95": wilson(stage.robust_count, outcome.robust.len()),
                "robust_count": stage.robust_count,
                "forward": stage.passes.forward,
                "backward": stage.passes.backward,
                "seconds": stage.seconds,
            })
        });
        let first = self.attacks.first();
        let mut found = json!({
            "norm": first.and_then(Attack::norm),
            "epsilon": first.and_then(Attack::epsilon),
            "unseen": self.unseen().map(|attack| attack.corruption),
            "robust_accuracy": self.robust_accuracy(),
            "interval_95": wilson(outcome.standing(), outcome.robust.len()),
            "flags": self.flags,
            "stages": stages.collect::<Vec<_>>(),
            "curve": self.curve,
            "calibration": Calibration::of(outcome),
            "margin_histogram": margin_histogram(outcome),
            "images_hash": outcome.images_hash,
            "pixels": outcome.pixels,
            "robust": outcome.robust,
            "broken_by": outcome.broken_by,
            "distance": outcome.distance,
            "margin": outcome.margin,
            "predicted": outcome.predicted,
        });
        if let Some(bound) = outcome.bound() {
            found["version"] = json!("autoattack fast");
            found["bound"] = json!(bound);
        }
        found
    }
}

/// Returns the content of `result.json`.
pub fn to_json(subject: &Subject, findings: &[Findings]) -> Value {
    let mut result = json!(subject);
    let fields = result.as_object_mut().expect("a subject is an object");
    let names = findings
        .iter()
        .map(|found| subject.fingerprint(&found.attacks, found.sample.as_ref()));
    fields.insert("fingerprints".into(), json!(names.collect::<Vec<_>>()));
    fields.extend(found(findings));
    result
}

/// Returns the mean accuracy over all unseen attacks, called UA2 in ImageNet-UA, if each of them was evaluated.
pub fn ua2(findings: &[Findings]) -> Option<f64> {
    let of = |corruption: &Corruption| {
        let mut unseen = findings.iter();
        let found = unseen.find(|found| {
            let attack = found.unseen();
            attack.is_some_and(|attack| attack.corruption == *corruption)
        });
        found.map(Findings::robust_accuracy)
    };
    let accuracies: Vec<f64> = Corruption::VALUES.iter().map(of).collect::<Option<_>>()?;
    Some(accuracies.iter().sum::<f64>() / accuracies.len() as f64)
}

/// Returns the result fields. With one evaluation these are its fields; with several norms or unseen attacks, `robust`
/// covers the images that are robust in all of them, and each has an entry under `evaluations`.
pub fn found(findings: &[Findings]) -> Map<String, Value> {
    if let [only] = findings {
        let Value::Object(found) = only.to_json() else {
            unreachable!("findings are an object")
        };
        return found;
    }
    let count = findings
        .first()
        .map_or(0, |first| first.outcome.robust.len());
    let all = |index: usize| {
        let is_robust = |found: &Findings| found.outcome.robust.get(index) == Some(&true);
        findings.iter().all(is_robust)
    };
    let robust: Vec<bool> = (0..count).map(all).collect();
    let standing = robust.iter().filter(|robust| **robust).count();
    let evaluations: Vec<Value> = findings.iter().map(Findings::to_json).collect();
    let share = standing as f64 / count.max(1) as f64;
    let fields = [
        ("robust_accuracy", json!(share)),
        ("interval_95", json!(wilson(standing, count))),
        ("robust", json!(robust)),
        ("evaluations", json!(evaluations)),
    ];
    let named = fields.map(|(name, value)| (name.to_owned(), value));
    let mut named: Map<String, Value> = named.into_iter().collect();
    if let Some(ua2) = ua2(findings) {
        named.insert("ua2".into(), json!(ua2));
    }
    let bounds: Vec<_> = findings.iter().filter_map(|f| f.outcome.bound()).collect();
    if !bounds.is_empty() {
        let (points, confidence) = joint(bounds.into_iter());
        named.insert("version".into(), json!("autoattack fast"));
        let bound = json!({ "points": points, "confidence": confidence });
        named.insert("bound".into(), bound);
    }
    named
}

/// Writes a result. If the file holds the result of a different evaluation, that file is first renamed to a free name,
/// which is returned.
pub fn write(path: &Path, result: &Value) -> Result<Option<PathBuf>> {
    let mut kept = None;
    let same = |text: &[u8]| {
        let earlier = serde_json::from_slice::<Value>(text);
        earlier.is_ok_and(|earlier| earlier["fingerprints"] == result["fingerprints"])
    };
    if path.is_file() && !same(&files::read(path)?) {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let mut names = (1..).map(|number| path.with_file_name(format!("{stem}-{number}.json")));
        let free = names
            .find(|path| !path.exists())
            .expect("numbers do not end");
        files::rename(path, &free)?;
        kept = Some(free);
    }
    files::write(path, format!("{result:#}\n").as_bytes())?;
    // Left over by evaluations that were killed while writing.
    let (folder, name) = (
        path.parent().unwrap_or(path),
        path.file_name().unwrap_or_default(),
    );
    files::remove_leftovers(folder, &name.to_string_lossy())?;
    Ok(kept)
}

/// Returns the result of the same evaluation, on all images, if the file has it.
pub fn earlier(path: &Path, subject: &Subject, attacks: &[Attack]) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let ours = json!([subject.fingerprint(attacks, None)]);
    let found = serde_json::from_slice::<Value>(&files::read(path)?).ok();
    Ok(found.filter(|result| result["fingerprints"] == ours))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_wilsons() {
        // Agresti and Coull 1998: 2 of 10 gives 0.057 to 0.510.
        let (low, high) = wilson(2, 10);
        assert!(
            (low - 0.0567).abs() < 5e-4 && (high - 0.5098).abs() < 5e-4,
            "{low} {high}"
        );
        assert_eq!(wilson(0, 0), (0.0, 1.0));
    }
}
