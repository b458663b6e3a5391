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

use super::state::State;
use crate::distributed::Zero;
use crate::error::{Error, Result};
use crate::files;
use crate::ops::{Device, from_vec, to_vec};

const SCHEMA: &str = "1";
/// The entry of the file's header that holds the counters.
pub(crate) const HEADER: &str = "advxl";
/// The counter that holds the names of the classes.
const CLASSES: &str = "classes";
/// The counter that holds the algorithms of products on a GPU.
const ALGORITHMS: &str = "algorithms";

/// What a checkpoint's state was trained on.
#[derive(Clone, Debug, Default)]
pub struct Provenance {
    /// Hash of the data set.
    pub data: String,
    /// Names of the classes; empty for captions, `None` in checkpoints of old versions.
    pub classes: Option<Vec<String>>,
    /// On an NVIDIA GPU: which of cuBLASLt's algorithms its products use, since others round differently.
    pub algorithms: Option<String>,
}

/// Position of a run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Counters {
    /// Number of the stage, from 0.
    pub stage: usize,
    /// Samples seen by the run.
    pub samples: u64,
    step: u64,
    run_step: u64,
}

/// Writes a state to a folder of checkpoints and removes all but the last few. A collective.
pub fn save(
    folder: &Path,
    keep: usize,
    state: &State,
    provenance: &Provenance,
    zero: &Zero,
) -> Result<()> {
    let is_main = zero.comm().is_main();
    if is_main {
        files::make_folder(folder)?;
    }
    write(
        &folder.join(file_name(state.samples)),
        state,
        provenance,
        zero,
    )?;
    if !is_main {
        return Ok(());
    }
    let saved = list(folder)?;
    for old in &saved[..saved.len().saturating_sub(keep)] {
        files::remove_file(old)?;
    }
    Ok(())
}

/// The name of a checkpoint; names sort as numbers do.
pub fn file_name(samples: u64) -> String {
    format!("{samples:012}.safetensors")
}

/// The checkpoints of a folder, oldest first.
pub(super) fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = files::list(folder)?;
    paths.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "safetensors")
    });
    Ok(paths)
}

/// A tensor of a checkpoint, whose bytes are gathered from all ranks when they are needed.
#[derive(Clone, Copy)]
struct Entry<'a> {
    /// All of it, or this rank's part of it.
    values: &'a Tensor<1>,
    shape: &'a [usize],
    /// Gathers the parts; none where every rank has the whole.
    zero: Option<&'a Zero<'a>>,
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
        let values = match self.zero {
            None => self.values.clone(),
            Some(zero) => {
                let whole = zero.all_gather(std::slice::from_ref(self.values), &[length]);
                whole.into_iter().next().expect("one for one")
            }
        };
        bytemuck::cast_slice(&to_vec(values)).to_vec().into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * size_of::<f32>()
    }
}

/// Writes a state to a file. A collective, since each rank has parts of it; rank 0 writes.
pub(super) fn write(
    path: &Path,
    state: &State,
    provenance: &Provenance,
    zero: &Zero,
) -> Result<()> {
    let mut tensors: Vec<(String, Entry)> = Vec::new();
    let parameters = state.parameters();
    for (parameter, moments) in parameters.iter().zip(&state.optimizer.moments) {
        let mut push = |kind: &str, values, zero| {
            let name = format!("{kind}.{}", parameter.name);
            let shape = &parameter.shape[..];
            tensors.push((
                name,
                Entry {
                    values,
                    shape,
                    zero,
                },
            ));
        };
        let parts = Some(zero);
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
            ("data", provenance.data.clone()),
            (
                CLASSES,
                serde_json::json!(provenance.classes.as_deref().unwrap_or_default()).to_string(),
            ),
        ]
        .map(|(key, value)| (key.to_owned(), value)),
    );
    let algorithms = provenance.algorithms.clone();
    counters.extend(algorithms.map(|text| (ALGORITHMS.to_owned(), text)));
    let parts = tensors.iter().map(|(name, stored)| (&name[..], *stored));
    counters.insert("hash".to_owned(), hash(&counters, parts));
    // One entry, since the entries of a safetensors header come in no fixed order, and the same
    // state gives the same bytes.
    let counters = serde_json::to_string(&counters).expect("strings are JSON");
    let metadata = HashMap::from([(HEADER.to_owned(), counters)]);
    if zero.comm().is_main() {
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
    let mut tensors: Vec<(&str, HashPart<V>)> = tensors
        .map(|(name, view)| (name, HashPart::Tensor(view)))
        .collect();
    let counters = counters.iter().filter(|(key, _)| *key != "hash");
    tensors.extend(counters.map(|(key, value)| (&key[..], HashPart::Counter(value))));
    // Names differ.
    tensors.sort_unstable_by_key(|(name, _)| *name);
    let mut hasher = blake3::Hasher::new();
    for (name, part) in tensors {
        let bytes = match &part {
            HashPart::Counter(value) => value.as_bytes().into(),
            HashPart::Tensor(view) => view.data(),
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

enum HashPart<'a, V> {
    Counter(&'a str),
    Tensor(V),
}

/// An intact checkpoint: one that matches its hash.
pub struct Intact {
    bytes: Vec<u8>,
    header: BTreeMap<String, String>,
}

/// Reads a checkpoint; inside is the error of one that is damaged.
///
/// Errors: it is intact, and of another version.
pub(super) fn read(path: &Path) -> Result<std::result::Result<Intact, Error>> {
    let bytes = match files::read(path) {
        Ok(bytes) => bytes,
        Err(error) => return Ok(Err(error)),
    };
    let counters = parse(&bytes, path)?;
    Ok(counters.map(|header| Intact { bytes, header }))
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

impl Intact {
    /// How far it is.
    ///
    /// Errors: a counter is missing.
    pub(super) fn counters(&self) -> Result<Counters> {
        let number = |key: &str| -> Result<u64> {
            let value = self.header.get(key).and_then(|value| value.parse().ok());
            value.ok_or_else(|| Error::input(format!("its counter `{key}` is missing")))
        };
        Ok(Counters {
            stage: number("stage")? as usize,
            samples: number("samples")?,
            step: number("step")?,
            run_step: number("run_step")?,
        })
    }

    /// What it was trained on.
    pub(super) fn provenance(&self) -> Provenance {
        let classes = self.header.get(CLASSES);
        Provenance {
            data: self.header.get("data").cloned().unwrap_or_default(),
            classes: classes.and_then(|names| serde_json::from_str(names).ok()),
            algorithms: self.header.get(ALGORITHMS).cloned(),
        }
    }

    /// How its tensors differ from those of a state that is to be filled in; `None` if they do not.
    pub(super) fn difference(&self, state: &State) -> Option<String> {
        difference(&self.bytes, state)
    }

    /// The file.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// The first tensor that a file has and the state to be filled in has not, or the other way round, or in another shape.
fn difference(bytes: &[u8], state: &State) -> Option<String> {
    let tensors = SafeTensors::deserialize(bytes).ok()?;
    let shown = |shape: Option<&Vec<usize>>| match shape {
        Some(shape) => format!("{shape:?}"),
        None => "absent".to_owned(),
    };
    let views = tensors.tensors();
    let saved: BTreeMap<_, _> = views
        .iter()
        .map(|(name, view)| (name.clone(), view.shape().to_vec()))
        .collect();
    let parameters = state.parameters();
    let wanted: BTreeMap<_, _> = parameters
        .iter()
        .zip(&state.optimizer.moments)
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

/// Fills in a state from an intact checkpoint, whose `bytes` are at rank 0 alone. A collective.
pub(super) fn fill(
    state: &mut State,
    counters: Counters,
    bytes: Option<&[u8]>,
    zero: &Zero,
) -> Result<()> {
    let tensors = bytes.map(SafeTensors::deserialize).transpose();
    let tensors = tensors.map_err(|error| Error::failed(error.to_string()))?;
    for (parameter, moments) in state.parameters_mut() {
        let (length, device) = (parameter.value.dims()[0], Device::of(&parameter.value));
        for kind in kinds(moments.average.is_some()) {
            let name = format!("{kind}.{}", parameter.name);
            let values = match &tensors {
                Some(tensors) => {
                    let view = tensors
                        .tensor(&name)
                        .expect("all are there: `difference` has looked");
                    bytemuck::pod_collect_to_vec(view.data())
                }
                None => vec![0.0; length],
            };
            let whole = from_vec(zero.comm().broadcast_f32(values), [length], &device);
            match *kind {
                "weights" => parameter.value = whole,
                "first_moment" => moments.first = zero.part(&whole),
                "second_moment" => moments.second = zero.part(&whole),
                _ => moments.average = Some(zero.part(&whole)),
            }
        }
    }
    state.samples = counters.samples;
    state.optimizer.step = counters.step;
    state.optimizer.run_step = counters.run_step;
    Ok(())
}
