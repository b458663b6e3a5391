//! The run folder: recipe, metrics, log, checkpoints, models.
//!
//! With several processes, rank 0 writes and the others read. A run resumes only in a folder with the same recipe.
//! Files of another run, and files that do not belong to a run, are never overwritten.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::checkpoint;
use super::checkpoint::Provenance;
use super::phase::PhaseContext;
use super::reduce::Diverged;
use super::state::State;
use crate::data::sources::tensors;
use crate::data::{Batch, Broken, Split};
use crate::distributed::Comm;
use crate::error::{Error, Kind, Result};
use crate::image::Preprocessing;
use crate::ops::to_vec;
use crate::recipe::Recipe;
use crate::settings::changes;
use crate::weights::Outputs;
use crate::{files, weights};

const METRICS: &str = "metrics.jsonl";

/// An open run folder. No other process can open it until this is dropped.
pub struct RunFolder {
    path: PathBuf,
    accept_changes: bool,
    /// Recipe keys that differ from those the run started with.
    changes: Vec<String>,
    /// Files whose last line could not be written.
    torn: RefCell<BTreeSet<&'static str>>,
    /// Why the first line was lost, until it is reported.
    unwritten: RefCell<Option<Error>>,
    /// Whether a line was lost.
    is_losing: Cell<bool>,
    /// Held open for its lock, which the operating system releases when the process ends; `None` in processes that only
    /// read.
    lock: Option<File>,
}

/// Returns whether a recipe change does not affect results, so that a run may resume with it, such as on a machine with
/// another number of cores.
fn is_free(change: &str) -> bool {
    let key = change.split(':').next().unwrap_or_default();
    key == "data.workers" || (key.starts_with("stage.") && key.ends_with(".data.workers"))
}

/// Returns a saved recipe as it is written today, with the keys that replaced those of older versions.
fn in_todays_keys(saved: String) -> String {
    Recipe::parse(&saved, &[]).map_or(saved, |recipe| recipe.to_toml())
}

impl RunFolder {
    /// Opens or creates a run folder.
    ///
    /// Errors: it contains other files or another recipe (each changed key is listed), or another process is using it.
    pub fn open(path: &Path, recipe: &str, accept_changes: bool, comm: &Comm) -> Result<Self> {
        let folder = |lock, changes| Self {
            path: path.to_owned(),
            accept_changes,
            changes,
            torn: RefCell::default(),
            unwritten: RefCell::default(),
            is_losing: Cell::new(false),
            lock,
        };
        if !comm.is_main() {
            if !path.is_dir() {
                let message = format!("run folder `{}` does not exist", path.display());
                let hint = "all processes need access to the run folder: put it on storage that their machines share";
                return Err(Error::input(message).hint(hint));
            }
            return Ok(folder(None, Vec::new()));
        }
        let saved = path.join("recipe.toml");
        if path.is_dir() && !saved.is_file() && files::list(path)?.iter().any(|file| !is_ours(file))
        {
            let message = format!("`{}` is not empty and is not a run folder", path.display());
            return Err(Error::input(message).hint("choose another folder with --out"));
        }
        files::make_folder(path)?;
        let lock = files::lock(&path.join("lock"))?.ok_or_else(|| {
            let message = format!("another process is using `{}`", path.display());
            Error::new(Kind::TryAgain, message)
                .hint("wait for it to finish, or choose another --out")
        })?;
        let mut different = Vec::new();
        if saved.is_file() {
            different = changes(&in_todays_keys(files::read_text(&saved)?), recipe);
            different.retain(|change| !is_free(change));
            let changes = &different;
            if !changes.is_empty() && !accept_changes {
                let plural = if changes.len() == 1 { "key" } else { "keys" };
                let message = format!(
                    "the run in `{}` has a different recipe: {} {plural} changed\n\n  {}\n",
                    path.display(),
                    changes.len(),
                    changes.join("\n  ")
                );
                return Err(Error::input(message).hint(
                    "choose another folder with --out, or add --accept-changes to continue with the new recipe",
                ));
            }
        }
        let folder = folder(Some(lock), different);
        folder.remove_leftovers()?;
        Ok(folder)
    }

    /// Removes partially written files that killed processes left behind. The lock keeps other processes away.
    fn remove_leftovers(&self) -> Result<()> {
        let within = |name: &str| match self.path.join(name) {
            folder if folder.is_dir() => files::list(&folder),
            _ => Ok(Vec::new()),
        };
        let mut folders = vec![self.path.clone()];
        folders.extend(["model", "checkpoints", "vocabulary"].map(|name| self.path.join(name)));
        for stage in within("stages")? {
            folders.extend([stage.join("text"), stage]);
        }
        // A crash bundle with a lock has become a run folder, which cleans up itself.
        for bundle in within("crash")?
            .into_iter()
            .filter(|bundle| !bundle.join("lock").exists())
        {
            folders.extend([bundle.join("checkpoints"), bundle]);
        }
        let mut folders = folders.iter().filter(|folder| folder.is_dir());
        folders.try_for_each(|folder| files::remove_leftovers(folder, ""))
    }

    /// Returns whether this process writes to the folder.
    pub(crate) fn writes(&self) -> bool {
        self.lock.is_some()
    }

    /// Writes the recipe, which binds the folder to it. Called after all checks of the run have passed.
    pub(crate) fn begin(&self, recipe: &str) -> Result<()> {
        let path = self.path.join("recipe.toml");
        let is_saved = || files::read(&path).is_ok_and(|saved| saved == recipe.as_bytes());
        match self.writes() && !is_saved() {
            true => files::write(&path, recipe.as_bytes()),
            false => Ok(()),
        }
    }

    /// Returns whether a run has started in this folder.
    pub(crate) fn has_begun(&self) -> bool {
        self.path.join("recipe.toml").is_file()
    }

    /// Returns the path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the folder of checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// Returns whether the user accepted a changed recipe or data set.
    pub fn changes_accepted(&self) -> bool {
        self.accept_changes
    }

    /// Returns the recipe keys that differ from those the run started with and that the user accepted.
    pub(crate) fn changes(&self) -> &[String] {
        &self.changes
    }

    /// Appends a line to `metrics.jsonl`.
    pub fn metrics(&self, line: &serde_json::Value) {
        self.append(METRICS, &line.to_string());
    }

    /// Appends a line. A line that cannot be written is lost, which [`Self::unwritten`] reports: a failing log must not
    /// stop training.
    fn append(&self, name: &'static str, line: &str) {
        if !self.writes() {
            return;
        }
        let mut torn = self.torn.borrow_mut();
        // The failed line may have been written partially.
        let begin = if torn.contains(name) { "\n" } else { "" };
        match files::append(&self.path.join(name), &format!("{begin}{line}\n")) {
            Ok(()) => _ = torn.remove(name),
            Err(error) => {
                torn.insert(name);
                if !self.is_losing.replace(true) {
                    self.unwritten.replace(Some(error));
                }
            }
        }
    }

    /// Returns why lines of metrics or log are lost, once, after the first loss.
    pub(crate) fn unwritten(&self) -> Option<Error> {
        self.unwritten.take()
    }

    /// Records a broken sample as an event in the metrics and in `quarantine.jsonl`.
    pub(crate) fn broken(&self, event: &str, split: Split, broken: &Broken) {
        self.metrics(&json!({
            "event": event,
            "sample": broken.sample,
            "name": broken.name,
            "reason": broken.reason,
        }));
        self.append("quarantine.jsonl", &quarantined(split, broken).to_string());
    }

    /// Returns whether the run was evaluated after `samples`, according to the metrics that rank 0 reads. Collective.
    pub(crate) fn was_evaluated(&self, samples: u64, comm: &Comm) -> bool {
        let is_it =
            |line: &serde_json::Value| line["samples"] == samples && line["evaluation"].is_object();
        comm.broadcast(self.writes() && self.lines().iter().any(is_it))
    }

    /// Returns the readable lines of the metrics.
    fn lines(&self) -> Vec<serde_json::Value> {
        let text = files::read_text(&self.path.join(METRICS)).unwrap_or_default();
        let lines = text.lines().map(serde_json::from_str);
        lines.filter_map(std::result::Result::ok).collect()
    }

    /// Returns the seconds of training in each stage, over all restarts, from the metrics.
    ///
    /// Work repeated after an interruption is counted twice.
    pub fn stage_seconds(&self) -> BTreeMap<String, f64> {
        let mut seconds = BTreeMap::new();
        for line in self.lines() {
            if let (Some(stage), Some(of_line)) =
                (line["stage"].as_str(), line["interval_seconds"].as_f64())
            {
                *seconds.entry(stage.to_owned()).or_insert(0.0) += of_line;
            }
        }
        seconds
    }

    /// Appends a line to `log.txt`.
    pub fn log(&self, line: &str) {
        self.append("log.txt", line);
    }

    /// Writes the model in timm's layout to `model`, and at the end of a stage to `stages/NAME` too, with its text
    /// model.
    pub(crate) fn save_models(
        &self,
        phase: &PhaseContext,
        state: &State,
        classes: &[String],
    ) -> Result<()> {
        // Collective: each rank has parts of the averages.
        let zero = &phase.zero;
        let (model, tower) = (state.averaged(zero), state.averaged_tower(zero));
        if !self.writes() {
            return Ok(());
        }
        let preprocessing = Preprocessing::new(phase.image_size());
        let outputs = phase.outputs;
        let classes = match outputs {
            Outputs::Logits => classes,
            Outputs::Embedding => &[],
        };
        if phase.ends_stage(state.samples) {
            let name = &phase.stage.name;
            let folder = self.path.join("stages").join(name);
            weights::save(&model, &preprocessing, outputs, classes, &folder)?;
            if let Some(captions) = phase.captions {
                captions.save(tower, name, &self.path)?;
            }
        }
        let folder = self.path.join("model");
        weights::save(&model, &preprocessing, outputs, classes, &folder)
    }

    /// Writes a crash bundle that reproduces a non-finite step, and returns the error to report. Collective.
    ///
    /// The bundle is a run folder that stops just before the step, so training there fails again immediately, with all
    /// values available. The run's own folder is not changed.
    pub(crate) fn save_crash(
        &self,
        phase: &PhaseContext,
        state: &State,
        provenance: &Provenance,
        batch: &Batch,
        found: &Diverged,
    ) -> Result<Error> {
        let bundle = self
            .path
            .join("crash")
            .join(format!("{:012}", state.samples));
        let checkpoints = bundle.join("checkpoints");
        if self.writes() {
            files::make_folder(&checkpoints)?;
        }
        let path = checkpoints.join(checkpoint::file_name(state.samples));
        checkpoint::write(&path, state, provenance, &phase.zero)?;
        let message = format!(
            "stage `{}`, after {} samples: the loss is {} and the gradient norm is {}; the \
             weights were not changed",
            phase.stage.name, state.samples, found.loss, found.gradient_norm
        );
        let error = Error::failed(message);
        if !self.writes() {
            return Ok(error);
        }
        let shape = [batch.first.len(), 3, side(batch), side(batch)];
        let labels: Vec<i64> = batch.first.iter().map(|label| i64::from(*label)).collect();
        for (name, images) in [
            ("images", &batch.pixels(side(batch))),
            ("adversarial", &found.adversarial),
        ] {
            let path = bundle.join(format!("{name}.safetensors"));
            tensors::save(&path, images, shape, &labels, phase.dataset.classes())?;
        }
        let of_tensor = state
            .trained()
            .zip(&found.gradients)
            .map(|(parameter, gradient)| {
                let values = to_vec(gradient.clone());
                let largest =
                    |values: &[f32]| values.iter().fold(0f32, |most, v| most.max(v.abs()));
                let broken = values.iter().filter(|value| !value.is_finite()).count();
                json!({
                    "name": parameter.name,
                    "not_finite_in_gradient": broken,
                    "largest_gradient": largest(&values),
                    "largest_weight": largest(&parameter.to_vec()),
                })
            });
        let report = json!({
            "samples": state.samples,
            "stage": phase.stage.name,
            "loss": found.loss.to_string(),
            "gradient_norm": found.gradient_norm.to_string(),
            "sample_indices": batch.samples,
            "parameters": of_tensor.collect::<Vec<_>>(),
        });
        files::write(
            &bundle.join("report.json"),
            format!("{report:#}\n").as_bytes(),
        )?;
        files::write(
            &bundle.join("recipe.toml"),
            phase.recipe.to_toml().as_bytes(),
        )?;
        let bundle = bundle.display();
        Ok(error.hint(format!(
            "reproduce this update with `advxl train {bundle}/recipe.toml --out {bundle}`; \
             `{bundle}/report.json` lists the non-finite gradients; a lower learning rate, clip_norm or \
             precision = \"f32\" may help"
        )))
    }
}

fn quarantined(split: Split, broken: &Broken) -> serde_json::Value {
    json!({
        "split": split.to_string(),
        "sample": broken.sample,
        "name": broken.name,
        "reason": broken.kind,
        "detail": broken.reason,
    })
}

fn side(batch: &Batch) -> usize {
    let pixels = batch.images.len() / (3 * batch.first.len().max(1));
    pixels.isqrt()
}

/// Returns whether a file may have been left by a run that had no recipe yet.
fn is_ours(path: &Path) -> bool {
    let ours = ["lock", "vocabulary"];
    path.file_name()
        .is_some_and(|name| ours.iter().any(|own| name == *own))
}
