//! Checkpoints: the complete state of a run in one file, written atomically.
//!
//! `checkpoints/000000226560.safetensors` contains the weights, moments and EMA under the published names of the
//! weights. Its header contains the counters and a hash over everything. A file that does not match its hash is
//! reported, and the previous checkpoint is used instead.

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
use crate::ops::{Device, Moments, from_vec, to_vec};

const SCHEMA: &str = "1";
/// The header entry that contains the counters.
pub(crate) const HEADER: &str = "advxl";
/// The counter that contains the class names.
const CLASSES: &str = "classes";
/// The counter that contains the algorithms of matrix products on a GPU.
const ALGORITHMS: &str = "algorithms";

/// The data and GPU algorithms that a checkpoint's state was trained with.
#[derive(Clone, Debug, Default)]
pub struct Provenance {
    /// Hash of the data set.
    pub data: String,
    /// Class names; empty for captions, `None` in checkpoints of old versions.
    pub classes: Option<Vec<String>>,
    /// On NVIDIA GPUs: the cuBLASLt algorithms used for matrix products. Other algorithms round differently.
    pub algorithms: Option<String>,
}

/// Progress of a run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Counters {
    /// Index of the stage, from 0.
    pub stage: usize,
    /// Number of samples seen by the run.
    pub samples: u64,
    step: u64,
    run_step: u64,
}

/// Saves a checkpoint to a folder and removes all but the last `keep`. Collective.
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

/// Returns the file name of a checkpoint. File names sort in the order of samples.
pub fn file_name(samples: u64) -> String {
    format!("{samples:012}.safetensors")
}

/// Lists the checkpoints in a folder, oldest first.
pub(super) fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = files::list(folder)?;
    paths.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "safetensors")
    });
    Ok(paths)
}

/// A tensor of a checkpoint. Its bytes are gathered from all ranks when they are needed.
#[derive(Clone, Copy)]
struct Entry<'a> {
    /// The whole tensor, or this rank's part of it.
    values: &'a Tensor<1>,
    shape: &'a [usize],
    /// Gathers the parts; `None` if every rank has the whole tensor.
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

/// Writes a state to a file. Collective, since each rank has parts of the state; rank 0 writes.
pub(super) fn write(
    path: &Path,
    state: &State,
    provenance: &Provenance,
    zero: &Zero,
) -> Result<()> {
    let mut tensors: Vec<(String, Entry)> = Vec::new();
    for (parameter, moments) in state.with_moments() {
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
        let Some(moments) = moments else {
            continue;
        };
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
    // All in one entry: the entries of a safetensors header have no fixed order, but the same state must give the same
    // bytes.
    let counters = serde_json::to_string(&counters).expect("strings are JSON");
    let metadata = HashMap::from([(HEADER.to_owned(), counters)]);
    if zero.comm().is_main() {
        return files::write_tensors(path, tensors, &metadata);
    }
    // Same order as in the file: by name.
    tensors.sort_by(|(left, _), (right, _)| left.cmp(right));
    tensors.iter().for_each(|(_, entry)| drop(entry.data()));
    Ok(())
}

/// Computes a hash over counters and tensors, independent of their order in the file.
pub(crate) fn hash<'a, V: View + 'a>(
    counters: &BTreeMap<String, String>,
    tensors: impl Iterator<Item = (&'a str, V)>,
) -> String {
    let mut tensors: Vec<(&str, HashPart<V>)> = tensors
        .map(|(name, view)| (name, HashPart::Tensor(view)))
        .collect();
    let counters = counters.iter().filter(|(key, _)| *key != "hash");
    tensors.extend(counters.map(|(key, value)| (&key[..], HashPart::Counter(value))));
    // Names are unique.
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

/// Reads a checkpoint. The inner error means that it is damaged.
///
/// Errors: the checkpoint is intact but was written by another version.
pub(super) fn read(path: &Path) -> Result<std::result::Result<Intact, Error>> {
    let bytes = match files::read(path) {
        Ok(bytes) => bytes,
        Err(error) => return Ok(Err(error)),
    };
    let counters = parse(&bytes, path)?;
    Ok(counters.map(|header| Intact { bytes, header }))
}

/// Returns the counters of a checkpoint whose content matches its hash. Errors are those of [`read`].
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
    let text = header.metadata().as_ref().and_then(|all| all.get(HEADER));
    let counters: Option<BTreeMap<String, String>> =
        text.and_then(|text| serde_json::from_str(text).ok());
    let Some(counters) = counters else {
        return damaged("invalid checkpoint header");
    };
    let views = tensors.tensors();
    let parts = views.iter().map(|(name, view)| (&name[..], view.clone()));
    if counters.get("hash") != Some(&hash(&counters, parts)) {
        return damaged("content does not match its hash");
    }
    if counters.get("schema").map(String::as_str) != Some(SCHEMA) {
        let message = format!(
            "`{}` was written by another version of advxl",
            path.display()
        );
        return Err(
            Error::input(message).hint("continue with that version, or choose another --out")
        );
    }
    Ok(Ok(counters))
}

impl Intact {
    /// Returns the counters.
    ///
    /// Errors: a counter is missing.
    pub(super) fn counters(&self) -> Result<Counters> {
        let number = |key: &str| -> Result<u64> {
            let value = self.header.get(key).and_then(|value| value.parse().ok());
            value.ok_or_else(|| Error::input(format!("counter `{key}` is missing")))
        };
        Ok(Counters {
            stage: number("stage")? as usize,
            samples: number("samples")?,
            step: number("step")?,
            run_step: number("run_step")?,
        })
    }

    /// Returns the provenance.
    pub(super) fn provenance(&self) -> Provenance {
        let classes = self.header.get(CLASSES);
        Provenance {
            data: self.header.get("data").cloned().unwrap_or_default(),
            classes: classes.and_then(|names| serde_json::from_str(names).ok()),
            algorithms: self.header.get(ALGORITHMS).cloned(),
        }
    }

    /// Describes how the tensors differ from those of the state to fill in; `None` if they do not.
    pub(super) fn difference(&self, state: &State) -> Option<String> {
        difference(&self.bytes, state)
    }

    /// Returns the bytes of the file.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// Describes the first tensor that is missing in the file or in the state to fill in, or has another shape.
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
    let expected: BTreeMap<_, _> = state
        .with_moments()
        .flat_map(|(parameter, moments)| {
            let kinds = kinds(moments).iter();
            kinds.map(|kind| {
                (
                    format!("{kind}.{}", parameter.name),
                    parameter.shape.clone(),
                )
            })
        })
        .collect();
    let names: BTreeSet<_> = saved.keys().chain(expected.keys()).collect();
    let is_other = |name: &&String| saved.get(*name) != expected.get(*name);
    let other: Vec<&String> = names.into_iter().filter(is_other).collect();
    // Prefer weights to moments, which sort first.
    let is_weight = |name: &&&String| name.starts_with("weights.");
    let name = *other.iter().find(is_weight).or(other.first())?;
    let more = match other.len() - 1 {
        0 => String::new(),
        more => format!(", and {more} more tensors differ"),
    };
    Some(format!(
        "`{name}` is {} in the checkpoint but {} in the recipe{more}",
        shown(saved.get(name)),
        shown(expected.get(name))
    ))
}

/// Returns the kinds of tensors stored for every weight.
fn kinds(moments: Option<&Moments>) -> &'static [&'static str] {
    match moments {
        None => &["weights"],
        Some(moments) if moments.average.is_some() => {
            &["weights", "first_moment", "second_moment", "average"]
        }
        Some(_) => &["weights", "first_moment", "second_moment"],
    }
}

/// Fills in a state from an intact checkpoint, whose `bytes` only rank 0 has. Collective.
pub(super) fn fill(
    state: &mut State,
    counters: Counters,
    bytes: Option<&[u8]>,
    zero: &Zero,
) -> Result<()> {
    let tensors = bytes.map(SafeTensors::deserialize).transpose();
    let tensors = tensors.map_err(|error| Error::failed(error.to_string()))?;
    for (parameter, mut moments) in state.with_moments_mut() {
        let (length, device) = (parameter.value.dims()[0], Device::of(&parameter.value));
        for kind in kinds(moments.as_deref()) {
            let name = format!("{kind}.{}", parameter.name);
            let values = match &tensors {
                Some(tensors) => {
                    let view = tensors.tensor(&name).expect("checked by `difference`");
                    bytemuck::pod_collect_to_vec(view.data())
                }
                None => vec![0.0; length],
            };
            let whole = from_vec(zero.comm().broadcast_f32(values), [length], &device);
            match (*kind, &mut moments) {
                ("first_moment", Some(moments)) => moments.first = zero.part(&whole),
                ("second_moment", Some(moments)) => moments.second = zero.part(&whole),
                ("average", Some(moments)) => moments.average = Some(zero.part(&whole)),
                _ => parameter.value = whole,
            }
        }
    }
    state.samples = counters.samples;
    state.optimizer.step = counters.step;
    state.optimizer.run_step = counters.run_step;
    Ok(())
}
