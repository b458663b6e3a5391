//! Checkpoints: a run's whole state in one file that is complete or absent.
//!
//! `checkpoints/000000226560.safetensors` holds weights, moments and average under the published
//! names of the weights, and in its header the counters and a hash over everything. A file that
//! does not match its hash is reported and the one before it is used.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use burn::tensor::Tensor;
use safetensors::tensor::SafeTensors;
use safetensors::{Dtype, View};
use serde::{Deserialize, Serialize};

use super::Run;
use super::classes::difference;
use super::monitor::Monitor;
use super::state::State;
use crate::distributed::zero::Exchange;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::ops::{from_vec, to_vec};

const SCHEMA: &str = "1";
/// The entry of the file's header that holds the counters.
pub(crate) const HEADER: &str = "advxl";
/// The counter that holds the names of the classes.
const CLASSES: &str = "classes";

/// Writes the state of a run and removes all but the last few checkpoints.
pub fn save(run: &Run, state: &State) -> Result<()> {
    let folder = run.folder.checkpoints();
    let is_first = run.exchange.group.is_first();
    if is_first {
        files::make_folder(&folder)?;
    }
    write(run, state, &folder.join(file_name(state.samples)))?;
    if !is_first {
        return Ok(());
    }
    let saved = list(&folder)?;
    let keep = run.recipe.checkpoint.keep as usize;
    for old in &saved[..saved.len().saturating_sub(keep)] {
        files::remove_file(old)?;
    }
    Ok(())
}

/// The newest whole checkpoint of a run, or its beginning.
///
/// Errors: there are checkpoints and none of them can be read, or the newest belongs to another model or to other data.
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
    monitor.resumed(&state);
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
    /// Names of the classes that it is of; none of a stage with captions, and not known of old checkpoints.
    classes: Option<Vec<String>>,
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
///
/// Errors: it is of another model, or of other images; none is whole. Nothing in the folder is changed.
fn newest(run: &Run, monitor: &mut Monitor) -> Result<Option<Found>> {
    let folder = run.folder.checkpoints();
    if !folder.is_dir() {
        return Ok(None);
    }
    let saved = list(&folder)?;
    for path in saved.iter().rev() {
        match read(path)? {
            Ok(whole) => {
                let of_it = || format!("the checkpoint `{}`", path.display());
                return whole.of_run(run).map(Some).context(of_it);
            }
            Err(damage) => monitor.warn(&format!("{damage}; trying the checkpoint before it")),
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

/// An error where a checkpoint's images are not those of its stage, unless that is meant.
fn check_images(found: &Found, run: &Run) -> Result<()> {
    let stage = found.counters.stage;
    let images = &run.images[stage];
    if run.folder.changes_accepted() {
        return Ok(());
    }
    let spec = &run.recipe.data_of(&run.recipe.stage[stage]).train;
    let refuse = |message: String| {
        Err(Error::input(message).hint("bring the images back, or add --accept-changes"))
    };
    if let (Some(known), None) = (&found.classes, &run.captions[stage])
        && let Some(difference) = difference(
            ("the trained model", known),
            ("the images", images.classes()),
        )
    {
        return refuse(format!(
            "it was trained on other classes than `{spec}` has: {difference}"
        ));
    }
    match found.data == images.train.fingerprint() {
        true => Ok(()),
        false => refuse(format!(
            "it was trained on other images than `{spec}` holds now"
        )),
    }
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
pub(crate) fn write(run: &Run, state: &State, path: &Path) -> Result<()> {
    let images = &run.images[state.stage];
    let classes = match &run.captions[state.stage] {
        None => images.classes(),
        Some(_) => &[],
    };
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
            ("data", images.train.fingerprint()),
            (CLASSES, serde_json::json!(classes).to_string()),
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

/// A checkpoint that matches its hash.
struct Whole {
    bytes: Vec<u8>,
    counters: BTreeMap<String, String>,
}

/// Reads a checkpoint; inside is the error of one that is damaged.
///
/// Errors: it is whole, and of another version.
fn read(path: &Path) -> Result<std::result::Result<Whole, Error>> {
    let bytes = match files::read(path) {
        Ok(bytes) => bytes,
        Err(error) => return Ok(Err(error)),
    };
    let counters = parse(&bytes, path)?;
    Ok(counters.map(|counters| Whole { bytes, counters }))
}

/// The counters of a checkpoint whose content matches its hash; errors as [`read`] has them.
pub(crate) fn parse(
    bytes: &[u8],
    path: &Path,
) -> Result<std::result::Result<BTreeMap<String, String>, Error>> {
    let damaged = |what: &str| {
        let path = path.display();
        Ok(Err(Error::input(format!(
            "the checkpoint `{path}` is damaged: {what}"
        ))))
    };
    let parsed = SafeTensors::read_metadata(bytes)
        .and_then(|(_, header)| Ok((header, SafeTensors::deserialize(bytes)?)));
    let (header, tensors) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return damaged(&error.to_string()),
    };
    let told = header.metadata().as_ref().and_then(|all| all.get(HEADER));
    let told: Option<BTreeMap<String, String>> =
        told.and_then(|told| serde_json::from_str(told).ok());
    let Some(counters) = told else {
        return damaged("its header is not that of a checkpoint");
    };
    let views = tensors.tensors();
    let parts = views.iter().map(|(name, view)| (&name[..], view.clone()));
    if counters.get("hash") != Some(&hash(&counters, parts)) {
        return damaged("its content does not match its hash");
    }
    if counters.get("schema").map(String::as_str) != Some(SCHEMA) {
        let message = format!(
            "`{}` was written by another version of advxl",
            path.display()
        );
        return Err(Error::input(message).hint("go on with that version, or choose another --out"));
    }
    Ok(Ok(counters))
}

impl Whole {
    /// The state of a run that it holds.
    ///
    /// Errors: the run's recipe is for another model or other stages, or its images are others.
    fn of_run(self, run: &Run) -> Result<Found> {
        let number = |key: &str| -> Result<u64> {
            let value = self.counters.get(key).and_then(|value| value.parse().ok());
            value.ok_or_else(|| Error::input(format!("its counter `{key}` is missing")))
        };
        let counters = Counters {
            stage: number("stage")? as usize,
            samples: number("samples")?,
            step: number("step")?,
            run_step: number("run_step")?,
        };
        let stages = run.recipe.stage.len();
        if counters.stage >= stages {
            let stage = counters.stage + 1;
            let message = format!("it is of stage {stage}, and the recipe has {stages}");
            return Err(of_another(run, message));
        }
        let classes = self.counters.get(CLASSES);
        let found = Found {
            state: State::blank(run, counters.stage),
            counters,
            data: self.counters.get("data").cloned().unwrap_or_default(),
            classes: classes.and_then(|names| serde_json::from_str(names).ok()),
            bytes: self.bytes,
        };
        check_images(&found, run)?;
        match other_tensors(&found) {
            None => Ok(found),
            Some(difference) => Err(of_another(run, difference)),
        }
    }
}

/// The error of a checkpoint that is whole and of no use to the recipe; what the recipe changed is named with it.
fn of_another(run: &Run, difference: String) -> Error {
    let mut message = format!("it does not belong to this recipe: {difference}");
    let changes = run.folder.changes();
    if !changes.is_empty() {
        message += &format!("\n\n  {}\n", changes.join("\n  "));
    }
    let folder = run.folder.path().display();
    Error::input(message).hint(format!(
        "nothing in `{folder}` was changed, and its own recipe still resumes it; choose another folder with --out"
    ))
}

/// What a checkpoint's tensors have that the state to be filled in has not, or the other way round, or in another shape.
fn other_tensors(found: &Found) -> Option<String> {
    let tensors = SafeTensors::deserialize(&found.bytes).ok()?;
    let shown = |shape: Option<&Vec<usize>>| match shape {
        Some(shape) => format!("{shape:?}"),
        None => "absent".to_owned(),
    };
    let views = tensors.tensors();
    let saved: BTreeMap<_, _> = views
        .iter()
        .map(|(name, view)| (name.clone(), view.shape().to_vec()))
        .collect();
    let parameters = found.state.parameters();
    let wanted: BTreeMap<_, _> = parameters
        .iter()
        .zip(&found.state.optimizer.moments)
        .flat_map(|(parameter, moments)| {
            let kinds = kinds(moments.average.is_some()).iter();
            kinds.map(|kind| {
                (
                    format!("{kind}.{}", parameter.name),
                    parameter.shape.clone(),
                )
            })
        })
        .collect();
    let names: BTreeSet<_> = saved.keys().chain(wanted.keys()).collect();
    let is_other = |name: &&String| saved.get(*name) != wanted.get(*name);
    let other: Vec<&String> = names.into_iter().filter(is_other).collect();
    // Weights rather than their moments, which come first by the alphabet.
    let is_weight = |name: &&&String| name.starts_with("weights.");
    let name = *other.iter().find(is_weight).or(other.first())?;
    let more = match other.len() - 1 {
        0 => String::new(),
        more => format!(", and {more} more tensors differ"),
    };
    Some(format!(
        "`{name}` is {} in it and {} by the recipe{more}",
        shown(saved.get(name)),
        shown(wanted.get(name))
    ))
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
                        .expect("all are there: `other_tensors` has looked");
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
