//! Checkpoints: a run's whole state in one file that is complete or absent.
//!
//! `checkpoints/000000226560.safetensors` holds weights, moments and average under the published
//! names of the weights, and in its header the counters and a hash over everything. A file that
//! does not match its hash is reported and the one before it is used.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use burn::tensor::Tensor;
use safetensors::tensor::SafeTensors;
use safetensors::{Dtype, View};
use serde::{Deserialize, Serialize};

use super::exchange::Exchange;
use super::{Monitor, Run, State};
use crate::error::{Error, Result};
use crate::files;
use crate::fused::{from_vec, to_vec};

const SCHEMA: &str = "1";
/// The entry of the file's header that holds the counters.
pub(crate) const HEADER: &str = "advxl";

/// Writes the state of a run and removes all but the last few checkpoints.
pub fn save(run: &Run, state: &State) -> Result<()> {
    let folder = run.folder.checkpoints();
    let is_first = run.exchange.group.is_first();
    if is_first {
        files::make_folder(&folder)?;
    }
    write(
        state,
        &run.images[state.stage].train.fingerprint(),
        &folder.join(file_name(state.samples)),
    )?;
    if !is_first {
        return Ok(());
    }
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
    let group = &run.exchange.group;
    // The first process reads, and tells the others.
    let found = match group.is_first() {
        true => newest(run, monitor),
        false => Ok(None),
    };
    let found = group.agree(found)?;
    let counters = group.of_first(found.as_ref().map(|found| found.counters));
    let Some(counters) = counters else {
        return group.agree(State::new(run));
    };
    let (mut state, bytes) = match found {
        Some(Found { state, bytes, .. }) => (state, Some(bytes)),
        None => (State::blank(run, counters.stage), None),
    };
    fill(&mut state, counters, bytes.as_deref())?;
    monitor.resumed(&state)?;
    Ok(state)
}

/// A checkpoint that was read and found whole.
struct Found {
    bytes: Vec<u8>,
    counters: Counters,
    /// Of its stage, with values still to be filled in.
    state: State,
    /// Hash of its data set.
    data: String,
}

/// How far a run is.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Counters {
    stage: usize,
    samples: u64,
    step: u64,
    run_step: u64,
}

/// The newest whole checkpoint, if there is any.
fn newest(run: &Run, monitor: &mut Monitor) -> Result<Option<Found>> {
    let folder = run.folder.checkpoints();
    if !folder.is_dir() {
        return Ok(None);
    }
    let saved = list(&folder)?;
    for path in saved.iter().rev() {
        match read(path, run) {
            Ok(found) => {
                let stage = found.counters.stage;
                let images = &run.images[stage];
                if found.data != images.train.fingerprint() && !run.folder.changes_accepted() {
                    let message = format!(
                        "the run in `{}` was trained on other images than `{}` holds now",
                        run.folder.path().display(),
                        run.recipe.data_of(&run.recipe.stage[stage]).train
                    );
                    return Err(Error::input(message)
                        .hint("bring the images back, or add --accept-changes"));
                }
                return Ok(Some(found));
            }
            Err(error) => monitor.warn(&format!("{error}; trying the checkpoint before it"))?,
        }
    }
    if saved.is_empty() {
        return Ok(None);
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

/// A tensor of a checkpoint, whose bytes come from all processes when they are asked for.
#[derive(Clone, Copy)]
struct Entry<'a> {
    /// All of it, or this process's part of it.
    values: &'a Tensor<1>,
    shape: &'a [usize],
    /// Puts the parts together; none where there is nothing but the whole.
    exchange: Option<&'a Exchange>,
}

impl View for Entry<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let length = self.shape.iter().product();
        let values = match self.exchange {
            None => self.values.clone(),
            Some(exchange) => {
                let whole = exchange.put_together(std::slice::from_ref(self.values), &[length]);
                whole.into_iter().next().expect("one for one")
            }
        };
        bytemuck::cast_slice(&to_vec(values)).to_vec().into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * size_of::<f32>()
    }
}

/// Writes a state to a file. All processes go through it, since each has parts of it; the first one writes.
pub fn write(state: &State, data: &str, path: &Path) -> Result<()> {
    let mut tensors: Vec<(String, Entry)> = Vec::new();
    let parameters = state.parameters();
    for (parameter, moments) in parameters.iter().zip(&state.optimizer.moments) {
        let mut push = |kind: &str, values, exchange| {
            let name = format!("{kind}.{}", parameter.name);
            let shape = &parameter.shape[..];
            tensors.push((
                name,
                Entry {
                    values,
                    shape,
                    exchange,
                },
            ));
        };
        let parts = Some(&state.exchange);
        push("weights", &parameter.value, None);
        push("first_moment", &moments.first, parts);
        push("second_moment", &moments.second, parts);
        if let Some(average) = &moments.average {
            push("average", average, parts);
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
    if state.exchange.group.is_first() {
        return files::write_tensors(path, tensors, &metadata);
    }
    // In the order of the file, by name.
    tensors.sort_by(|(left, _), (right, _)| left.cmp(right));
    tensors.iter().for_each(|(_, entry)| drop(entry.data()));
    Ok(())
}

/// A hash over counters and tensors, whatever order a file keeps them in.
pub(crate) fn hash<'a, V: View + 'a>(
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

fn damage(path: &Path, what: &str) -> Error {
    Error::input(format!(
        "the checkpoint `{}` is damaged: {what}",
        path.display()
    ))
}

/// Counters, hash of the data set and tensors of a checkpoint whose content matches its hash.
pub(crate) fn parse<'a>(
    bytes: &'a [u8],
    path: &Path,
) -> Result<(Counters, String, SafeTensors<'a>)> {
    let damaged = |what: &str| damage(path, what);
    let (_, header) =
        SafeTensors::read_metadata(bytes).map_err(|error| damaged(&error.to_string()))?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| damaged(&error.to_string()))?;
    let told = header.metadata().as_ref().and_then(|all| all.get(HEADER));
    let told: BTreeMap<String, String> = told
        .and_then(|told| serde_json::from_str(told).ok())
        .ok_or_else(|| damaged("its header is not that of a checkpoint"))?;
    let views = tensors.tensors();
    let parts = views.iter().map(|(name, view)| (&name[..], view.clone()));
    if told.get("hash") != Some(&hash(&told, parts)) {
        return Err(damaged("its content does not match its hash"));
    }
    if told.get("schema").map(String::as_str) != Some(SCHEMA) {
        let message = format!(
            "`{}` was written by another version of advxl",
            path.display()
        );
        return Err(Error::input(message));
    }
    let number = |key: &str| -> Result<u64> {
        let value = told.get(key).and_then(|value| value.parse().ok());
        value.ok_or_else(|| damaged(&format!("`{key}` is missing")))
    };
    let counters = Counters {
        stage: number("stage")? as usize,
        samples: number("samples")?,
        step: number("step")?,
        run_step: number("run_step")?,
    };
    let data = told.get("data").cloned().unwrap_or_default();
    Ok((counters, data, tensors))
}

/// A checkpoint of the same recipe.
fn read(path: &Path, run: &Run) -> Result<Found> {
    let damaged = |what: &str| damage(path, what);
    let bytes = files::read(path)?;
    let (counters, data, tensors) = parse(&bytes, path)?;
    if counters.stage >= run.recipe.stage.len() {
        return Err(damaged(
            "it belongs to a stage that the recipe does not have",
        ));
    }
    let mut state = State::blank(run, counters.stage);
    for (parameter, moments) in state.parameters_mut() {
        for kind in kinds(moments.average.is_some()) {
            let name = format!("{kind}.{}", parameter.name);
            let view = tensors
                .tensor(&name)
                .map_err(|_| damaged(&format!("`{name}` is missing")))?;
            let length: usize = view.shape().iter().product();
            if view.dtype() != Dtype::F32 || length != parameter.value.dims()[0] {
                return Err(damaged(&format!("`{name}` belongs to another model")));
            }
        }
    }
    Ok(Found {
        counters,
        state,
        data,
        bytes,
    })
}

/// What is kept of every weight.
fn kinds(averaged: bool) -> &'static [&'static str] {
    match averaged {
        true => &["weights", "first_moment", "second_moment", "average"],
        false => &["weights", "first_moment", "second_moment"],
    }
}

/// Fills in a state from a checkpoint that was found whole; `bytes` are there in the first process alone.
fn fill(state: &mut State, counters: Counters, bytes: Option<&[u8]>) -> Result<()> {
    let tensors = bytes.map(SafeTensors::deserialize).transpose();
    let tensors = tensors.map_err(|error| Error::failed(error.to_string()))?;
    let exchange = state.exchange.clone();
    for (parameter, moments) in state.parameters_mut() {
        let (length, device) = (parameter.value.dims()[0], parameter.value.device());
        for kind in kinds(moments.average.is_some()) {
            let name = format!("{kind}.{}", parameter.name);
            let values = match &tensors {
                Some(tensors) => {
                    let view = tensors
                        .tensor(&name)
                        .expect("all are there: `read` has looked");
                    bytemuck::pod_collect_to_vec(view.data())
                }
                None => vec![0.0; length],
            };
            let whole = from_vec(exchange.group.floats_of_first(values), [length], &device);
            match *kind {
                "weights" => parameter.value = whole,
                "first_moment" => moments.first = exchange.own(&whole),
                "second_moment" => moments.second = exchange.own(&whole),
                _ => moments.average = Some(exchange.own(&whole)),
            }
        }
    }
    state.samples = counters.samples;
    state.optimizer.step = counters.step;
    state.optimizer.run_step = counters.run_step;
    Ok(())
}
