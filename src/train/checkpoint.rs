//! Checkpoints: a run's whole state in one file that is complete or absent.
//!
//! `checkpoints/000000226560.safetensors` holds weights, moments and average under the published
//! names of the weights, and in its header the counters and a hash over everything. A file that
//! does not match its hash is reported and the one before it is used.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use burn::tensor::Tensor;
use safetensors::View;
use safetensors::tensor::SafeTensors;

use super::{Monitor, Run, State};
use crate::error::{Error, Result};
use crate::files;
use crate::fused::{Stored, from_vec};

const SCHEMA: &str = "1";
/// The entry of the file's header that holds the counters.
const HEADER: &str = "advxl";

/// Writes the state of a run and removes all but the last few checkpoints.
pub fn save(run: &Run, state: &State) -> Result<()> {
    let folder = run.folder.checkpoints();
    files::make_folder(&folder)?;
    write(
        state,
        &run.images[state.stage].train.fingerprint(),
        &folder.join(file_name(state.samples)),
    )?;
    // As large as a checkpoint each; the run's lock keeps other processes away.
    files::remove_leftovers(&folder, "")?;
    let saved = list(&folder)?;
    let keep = run.recipe.checkpoint.keep as usize;
    for old in &saved[..saved.len().saturating_sub(keep)] {
        files::remove_file(old)?;
    }
    Ok(())
}

/// The newest whole checkpoint of a run, or its beginning.
///
/// Errors: there are checkpoints and none of them can be read, or they belong to other data.
pub fn resume(run: &Run, monitor: &mut Monitor) -> Result<State> {
    let folder = run.folder.checkpoints();
    if !folder.is_dir() {
        return State::new(run);
    }
    let saved = list(&folder)?;
    for path in saved.iter().rev() {
        match read(path, run) {
            Ok((state, data)) => {
                let images = &run.images[state.stage];
                if data != images.train.fingerprint() && !run.folder.changes_accepted() {
                    let message = format!(
                        "the run in `{}` was trained on other images than `{}` holds now",
                        run.folder.path().display(),
                        run.recipe.data_of(&run.recipe.stage[state.stage]).train
                    );
                    return Err(Error::input(message)
                        .hint("bring the images back, or add --accept-changes"));
                }
                monitor.resumed(&state)?;
                return Ok(state);
            }
            Err(error) => monitor.warn(&format!("{error}; trying the checkpoint before it"))?,
        }
    }
    if saved.is_empty() {
        return State::new(run);
    }
    let message = format!(
        "none of the {} checkpoints in `{}` is whole",
        saved.len(),
        folder.display()
    );
    Err(Error::input(message).hint("move the folder away to begin anew, or bring back a copy"))
}

/// The name of a checkpoint; names sort as numbers do.
pub fn file_name(samples: u64) -> String {
    format!("{samples:012}.safetensors")
}

/// The checkpoints of a folder, oldest first.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = files::list(folder)?;
    paths.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "safetensors")
    });
    Ok(paths)
}

/// Writes a state to a file.
pub fn write(state: &State, data: &str, path: &Path) -> Result<()> {
    let mut tensors: Vec<(String, Stored)> = Vec::new();
    let parameters = state.parameters();
    for (parameter, moments) in parameters.iter().zip(&state.optimizer.moments) {
        let mut push = |kind: &str, values| {
            let name = format!("{kind}.{}", parameter.name);
            tensors.push((
                name,
                Stored {
                    values,
                    shape: &parameter.shape,
                },
            ));
        };
        push("weights", &parameter.value);
        push("first_moment", &moments.first);
        push("second_moment", &moments.second);
        if let Some(average) = &moments.average {
            push("average", average);
        }
    }
    let mut counters = BTreeMap::from(
        [
            ("schema", SCHEMA.to_owned()),
            ("samples", state.samples.to_string()),
            ("stage", state.stage.to_string()),
            ("step", state.optimizer.step.to_string()),
            ("run_step", state.optimizer.run_step.to_string()),
            ("data", data.to_owned()),
        ]
        .map(|(key, value)| (key.to_owned(), value)),
    );
    let parts = tensors.iter().map(|(name, stored)| (&name[..], *stored));
    counters.insert("hash".to_owned(), hash(&counters, parts));
    // One entry, since the entries of a safetensors header come in no fixed order, and the same
    // state gives the same bytes.
    let counters = serde_json::to_string(&counters).expect("strings are JSON");
    let metadata = HashMap::from([(HEADER.to_owned(), counters)]);
    files::write_tensors(path, tensors, &metadata)
}

/// A hash over counters and tensors, whatever order a file keeps them in.
fn hash<'a, V: View + 'a>(
    counters: &BTreeMap<String, String>,
    tensors: impl Iterator<Item = (&'a str, V)>,
) -> String {
    let mut tensors: Vec<(&str, Part<V>)> = tensors
        .map(|(name, view)| (name, Part::Tensor(view)))
        .collect();
    let counters = counters.iter().filter(|(key, _)| *key != "hash");
    tensors.extend(counters.map(|(key, value)| (&key[..], Part::Counter(value))));
    // Names differ.
    tensors.sort_unstable_by_key(|(name, _)| *name);
    let mut hasher = blake3::Hasher::new();
    for (name, part) in tensors {
        let bytes = match &part {
            Part::Counter(value) => value.as_bytes().into(),
            Part::Tensor(view) => view.data(),
        };
        hasher
            .update(&(name.len() as u64).to_le_bytes())
            .update(name.as_bytes());
        hasher
            .update(&(bytes.len() as u64).to_le_bytes())
            .update(&bytes);
    }
    hasher.finalize().to_string()
}

enum Part<'a, V> {
    Counter(&'a str),
    Tensor(V),
}

/// The state in a file of the same recipe; also the hash of its data set.
fn read(path: &Path, run: &Run) -> Result<(State, String)> {
    let damaged = |what: &str| {
        Error::input(format!(
            "the checkpoint `{}` is damaged: {what}",
            path.display()
        ))
    };
    let bytes = files::read(path)?;
    let (_, header) =
        SafeTensors::read_metadata(&bytes).map_err(|error| damaged(&error.to_string()))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| damaged(&error.to_string()))?;
    let counters = header.metadata().as_ref().and_then(|all| all.get(HEADER));
    let counters: BTreeMap<String, String> = counters
        .and_then(|counters| serde_json::from_str(counters).ok())
        .ok_or_else(|| damaged("its header is not that of a checkpoint"))?;
    let views = tensors.tensors();
    let parts = views.iter().map(|(name, view)| (&name[..], view.clone()));
    if counters.get("hash") != Some(&hash(&counters, parts)) {
        return Err(damaged("its content does not match its hash"));
    }
    if counters.get("schema").map(String::as_str) != Some(SCHEMA) {
        let message = format!(
            "`{}` was written by another version of advxl",
            path.display()
        );
        return Err(Error::input(message));
    }
    let number = |key: &str| -> Result<u64> {
        let value = counters.get(key).and_then(|value| value.parse().ok());
        value.ok_or_else(|| damaged(&format!("`{key}` is missing")))
    };
    let tensor = |kind: &str, name: &str, length: usize| -> Result<Tensor<1>> {
        let name = format!("{kind}.{name}");
        let view = tensors
            .tensor(&name)
            .map_err(|_| damaged(&format!("`{name}` is missing")))?;
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
        if values.len() != length {
            return Err(damaged(&format!("`{name}` belongs to another model")));
        }
        Ok(from_vec(values, [length], &run.device))
    };
    let stage = number("stage")? as usize;
    if stage >= run.recipe.stage.len() {
        return Err(damaged(
            "it belongs to a stage that the recipe does not have",
        ));
    }
    let mut state = State::blank(run, stage);
    state.samples = number("samples")?;
    state.optimizer.step = number("step")?;
    state.optimizer.run_step = number("run_step")?;
    for (parameter, moments) in state.parameters_mut() {
        let length = parameter.value.dims()[0];
        parameter.value = tensor("weights", &parameter.name, length)?;
        moments.first = tensor("first_moment", &parameter.name, length)?;
        moments.second = tensor("second_moment", &parameter.name, length)?;
        if moments.average.is_some() {
            moments.average = Some(tensor("average", &parameter.name, length)?);
        }
    }
    Ok((state, counters.get("data").cloned().unwrap_or_default()))
}
