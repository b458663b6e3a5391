//! Named tensors of weights files written by other programs: safetensors and `torch.save`, as one file or as shards
//! with an index.
//!
//! The format is detected from the content of a file, not from its name. Opening a file reads only names and shapes;
//! each tensor is read from disk on demand, so a file is never held in memory next to the model. Nothing in a file is
//! executed (`pickle.rs`), and declared sizes are checked against the file length before memory is allocated.
//!
//! Knows nothing of models: [`crate::weights::import`] checks names and shapes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::tensor::Metadata;

use super::pickle::{Pickle, Value, View};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::files::Source;
use crate::model::config::common::{check_mean, check_std};
use crate::settings::nearest;
use crate::storage::archive::{Archive, Place};

pub use safetensors::Dtype;

pub(crate) use crate::storage::archive::shown;

/// Maximum size of a safetensors header: about 300,000 tensors.
const HEADER_LIMIT: u64 = 32 << 20;
/// Maximum size of a pickle; that of a large model is 100 kB long.
const PICKLE_LIMIT: u64 = 64 << 20;

/// Prefixes that training programs add to every name.
const PREFIXES: [&str; 7] = [
    "module.",
    "base_model.",
    "model.",
    "net.",
    "network.",
    "backbone.",
    "encoder.",
];
/// Parts that module wrappers insert anywhere in names: `torch.compile`, activation checkpointing, FSDP.
const WRAPPERS: [&str; 3] = [
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
];

/// The tensors of a weights file, by name.
#[derive(Debug)]
pub struct StateDict {
    /// One file, or the shards of an index.
    sources: Vec<Source>,
    tensors: BTreeMap<String, Stored>,
    /// Descriptions of the entries that are not tensors, by name.
    others: BTreeMap<String, String>,
    wrapper: Option<String>,
    statistics: Option<Statistics>,
}

/// Channel mean and standard deviation stored with the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    /// The tensors' names, such as `normalize.mean` and `normalize.std`.
    pub names: [String; 2],
    /// Mean of each channel, for pixels in [0, 1].
    pub mean: [f64; 3],
    /// Standard deviation of each channel.
    pub std: [f64; 3],
}

/// Location of a tensor.
#[derive(Debug)]
struct Stored {
    /// Index of its file in `sources`.
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Offset of the first element in the file, in bytes.
    start: u64,
    /// Stride along each dimension, in elements.
    strides: Vec<usize>,
}

impl StateDict {
    /// Reads the names and shapes of a weights file.
    ///
    /// From a checkpoint such as `{"state_dict": ..., "epoch": ...}` the weights are selected, and their average (EMA)
    /// if there is one; see [`Self::wrapper`]. Parts that training programs add to names, such as `module.` and
    /// `_orig_mod.`, are removed, and the mean and std of a normalization layer in front of the model are split off;
    /// see [`Self::statistics`].
    ///
    /// Errors: another kind of file; a damaged file; code instead of weights; no tensors; several dictionaries of
    /// tensors without an average among them.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read_any(path).context(|| format!("`{}`", path.display()))
    }

    fn read_any(path: &Path) -> Result<Self> {
        let mut found = match path.extension().is_some_and(|end| end == "json") {
            true => Self::sharded(path)?,
            false => Self::read(Source::open(path)?)?,
        };
        found.plain_names()?;
        Ok(found)
    }

    /// Reads the shards listed in an index such as `model.safetensors.index.json`.
    fn sharded(index: &Path) -> Result<Self> {
        let again = "copy or download the folder again";
        let broken = |what: &str| Error::input(format!("invalid shard index: {what}")).hint(again);
        let content: serde_json::Value = serde_json::from_slice(&files::read(index)?)
            .map_err(|error| broken(&format!("not valid JSON: {error}")))?;
        let map = content["weight_map"].as_object();
        let map = map
            .filter(|map| !map.is_empty())
            .ok_or_else(|| broken("`weight_map`, the file of each tensor, is missing or empty"))?;
        let mut of_file: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (name, file) in map {
            let file = file.as_str().unwrap_or_default();
            // Shards must be next to the index: a hostile index could point anywhere.
            if Path::new(file).file_name().is_none_or(|own| own != file) {
                return Err(broken(&format!("`{}` is not a file name", shown(file))));
            }
            of_file.entry(file).or_default().insert(name);
        }
        let mut all = Self {
            sources: Vec::new(),
            tensors: BTreeMap::new(),
            others: BTreeMap::new(),
            wrapper: None,
            statistics: None,
        };
        for (file, names) in of_file {
            let path = index.with_file_name(file);
            if !path.is_file() {
                return Err(broken(&format!("shard `{}` is missing", shown(file))));
            }
            let shard =
                Self::read(Source::open(&path)?).context(|| format!("`{}`", shown(file)))?;
            if let Some(name) = names.iter().find(|name| !shard.contains(name)) {
                let (name, file) = (shown(name), shown(file));
                return Err(broken(&format!(
                    "tensor `{name}` is missing from shard `{file}`"
                )));
            }
            let number = all.sources.len();
            all.sources.extend(shard.sources);
            let tensors = shard.tensors.into_iter();
            all.tensors.extend(tensors.map(|(name, stored)| {
                let stored = Stored {
                    file: number,
                    ..stored
                };
                (name, stored)
            }));
        }
        Ok(all)
    }

    fn read(source: Source) -> Result<Self> {
        let length = source.length();
        let start = source
            .bytes(0, source.length().min(64))?
            .unwrap_or_default();
        let found = if start.get(8) == Some(&b'{') {
            Self::safetensors(source)?
        } else if start.starts_with(b"PK") {
            Self::pytorch(source)?
        } else {
            return Err(foreign(&start));
        };
        // Tensors may share storage, but a small file cannot have large contents.
        let sizes = found.tensors.values().map(|tensor| count(&tensor.shape));
        let total = sizes.fold(0usize, |sum, size| sum.saturating_add(size));
        if total as u64 > length {
            let message = format!("the file has {length} bytes, but declares {total} values");
            return Err(Error::input(message).hint("it is damaged, or crafted to exhaust memory"));
        }
        Ok(found)
    }

    fn safetensors(source: Source) -> Result<Self> {
        let (header, data) = header(&source)?;
        let tensors = header.tensors().into_iter().map(|(name, info)| {
            let stored = Stored {
                file: 0,
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data + info.data_offsets.0 as u64,
                strides: contiguous(&info.shape),
            };
            (name, stored)
        });
        Ok(Self {
            tensors: tensors.collect(),
            others: BTreeMap::new(),
            wrapper: None,
            statistics: None,
            sources: vec![source],
        })
    }

    fn pytorch(source: Source) -> Result<Self> {
        let archive = Archive::read(&source, "PyTorch weights files")?;
        let root = archive
            .names()
            .find_map(|name| name.strip_suffix("data.pkl"));
        let Some(root) = root.filter(|root| root.is_empty() || root.ends_with('/')) else {
            return Err(
                Error::input("this is a zip file, but not one written by PyTorch")
                    .hint("unpack it, or give the weights file itself"),
            );
        };
        let place = |name: &str| archive.place(&source, &format!("{root}{name}"));
        if place("constants.pkl")?.is_some() {
            return Err(
                Error::input("this is a TorchScript program, not a weights file")
                    .hint("save `model.state_dict()` with `torch.save`"),
            );
        }
        let content = |name: &str| match place(name)? {
            Some(Place { start, size }) if size <= PICKLE_LIMIT => source.bytes(start, size),
            Some(Place { size, .. }) => Err(Error::input(format!(
                "its pickle of {size} bytes is too large"
            ))
            .hint("save only the weights, `model.state_dict()`")),
            None => Ok(None),
        };
        if content("byteorder")?.is_some_and(|order| order != b"little") {
            return Err(Error::input("the file was saved on a big-endian machine")
                .hint("load it with PyTorch on this machine and save it again"));
        }
        let bytes = content("data.pkl")?.unwrap_or_default();
        let (pickle, saved) = Pickle::read(&bytes)?;
        let (dictionary, wrapper) = unwrap(&pickle, saved)?;
        let (mut tensors, mut others) = (BTreeMap::new(), BTreeMap::new());
        for &(key, value) in pickle.pairs(dictionary) {
            // As in Python, the last value of a repeated key wins.
            match (key, value) {
                (Value::Text(name), Value::Tensor(tensor)) => {
                    tensors.insert(name, pickle.view(tensor));
                }
                (Value::Text(name), other) => {
                    others.insert(shown(name), pickle.describe(other));
                }
                _ => {}
            }
        }
        let mut places = BTreeMap::new();
        let tensors = tensors.into_iter().map(|(name, view)| {
            let stored = view
                .ok_or_else(|| Error::input("invalid shape, strides or offset"))
                .and_then(|view| stored(view, &mut places, &place));
            Ok((
                name.to_owned(),
                stored.context(|| format!("tensor `{}`", shown(name)))?,
            ))
        });
        Ok(Self {
            tensors: tensors.collect::<Result<_>>()?,
            others,
            wrapper,
            statistics: None,
            sources: vec![source],
        })
    }

    /// Removes wrapper parts and prefixes from the names, and splits off the statistics of a normalization layer.
    fn plain_names(&mut self) -> Result<()> {
        self.rename(|name| {
            let parts = name.split('.').filter(|part| !WRAPPERS.contains(part));
            parts.collect::<Vec<_>>().join(".")
        })?;
        // A counter of PyTorch's `AveragedModel`.
        self.tensors.remove("n_averaged");
        loop {
            if let Some(prefix) = self.common_prefix() {
                self.rename(|name| name[prefix.len()..].to_owned())?;
                continue;
            }
            // Without the statistics, the remaining names may share a prefix.
            match self.find_statistics()? {
                Some(statistics) if self.statistics.is_none() => {
                    statistics.names.iter().for_each(|name| {
                        self.tensors.remove(name);
                    });
                    self.statistics = Some(statistics);
                }
                _ => return Ok(()),
            }
        }
    }

    /// Returns the prefix that all names share, if it is used by training programs.
    fn common_prefix(&self) -> Option<String> {
        let (first, _) = self.tensors.keys().next()?.split_once('.')?;
        let prefix = format!("{first}.");
        // `Sequential(Normalize(...), model)` numbers its parts.
        let of_sequence = self.statistics.is_some() && first.parse::<u32>().is_ok();
        let known = of_sequence || PREFIXES.contains(&&prefix[..]);
        let all = || self.tensors.keys().all(|name| name.starts_with(&prefix));
        (known && all()).then_some(prefix)
    }

    /// Renames every tensor.
    ///
    /// Errors: two tensors would have the same name.
    fn rename(&mut self, change: impl Fn(&str) -> String) -> Result<()> {
        for (name, tensor) in std::mem::take(&mut self.tensors) {
            let new = change(&name);
            if self.tensors.insert(new.clone(), tensor).is_some() {
                let message = format!(
                    "two tensors are named `{}` after wrapper prefixes are removed",
                    shown(&new)
                );
                return Err(Error::input(message).hint("save the weights of one model only"));
            }
        }
        Ok(())
    }

    /// Finds the mean and std of the only image normalization layer, as ARES, RobustBench and others save it in front
    /// of the model: three values each.
    ///
    /// Errors: they are invalid as the mean and std of pixels in [0, 1].
    fn find_statistics(&self) -> Result<Option<Statistics>> {
        let is_three = |name: &str| {
            let tensor = self.tensors.get(name);
            tensor.is_some_and(|tensor| count(&tensor.shape) == 3)
        };
        let pairs = self.tensors.keys().filter_map(|name| {
            let (layer, last) = match name.rsplit_once('.') {
                Some((layer, last)) => (format!("{layer}."), last),
                None => (String::new(), &name[..]),
            };
            let other = match last {
                "mean" => "std",
                "mu" => "sigma",
                _ => return None,
            };
            let names = [name.clone(), format!("{layer}{other}")];
            names.iter().all(|name| is_three(name)).then_some(names)
        });
        let pairs: Vec<[String; 2]> = pairs.collect();
        let [names] = &pairs[..] else {
            return Ok(None);
        };
        let three = |name: &str| -> Result<[f64; 3]> {
            let floats = self.floats(name)?;
            Ok([0, 1, 2].map(|channel| {
                // Via the shortest decimal form: widening f32 to f64 directly would show rounding digits.
                let text = floats[channel].to_string();
                text.parse().unwrap_or(f64::NAN)
            }))
        };
        let (mean, std) = (three(&names[0])?, three(&names[1])?);
        for (name, checked) in names.iter().zip([check_mean(&mean), check_std(&std)]) {
            checked.map_err(|(message, hint)| {
                let context = format!("normalization `{}` in the file", shown(name));
                Error::input(message).hint(hint).context(context)
            })?;
        }
        Ok(Some(Statistics {
            names: names.clone(),
            mean,
            std,
        }))
    }

    /// Returns the mean and std of a normalization layer saved with the weights, for example as `normalize.mean`.
    pub fn statistics(&self) -> Option<&Statistics> {
        self.statistics.as_ref()
    }

    /// Keeps only the tensors below a prefix and removes the prefix. Returns `false`, without changes, if there are
    /// none.
    pub fn keep_below(&mut self, prefix: &str) -> bool {
        if !self.tensors.keys().any(|name| name.starts_with(prefix)) {
            return false;
        }
        self.tensors.retain(|name, _| name.starts_with(prefix));
        self.rename(|name| name[prefix.len()..].to_owned()).is_ok()
    }

    /// Returns the total number of elements of all tensors.
    pub fn numbers(&self) -> usize {
        self.tensors
            .values()
            .map(|tensor| count(&tensor.shape))
            .sum()
    }

    /// Returns the names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns whether a tensor of that name exists.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Returns the shape of a tensor.
    ///
    /// Errors: an unknown name.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.get(name)?.shape)
    }

    /// Returns the dtype of a tensor.
    ///
    /// Errors: an unknown name.
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.get(name)?.dtype)
    }

    /// Returns the key under which the weights were found, nested keys joined by dots; `None` if the file holds nothing
    /// else.
    pub fn wrapper(&self) -> Option<&str> {
        self.wrapper.as_deref()
    }

    /// Returns the BLAKE3 hash of the whole file; for several files, the hash of their hashes.
    pub fn hash(&self) -> Result<String> {
        let hashes = self.sources.iter().map(Source::hash);
        let hashes = hashes.collect::<Result<Vec<String>>>()?;
        match &hashes[..] {
            [only] => Ok(only.clone()),
            all => Ok(blake3::hash(all.concat().as_bytes()).to_string()),
        }
    }

    /// Reads the values of one tensor, in the order of its shape.
    ///
    /// Errors: an unknown name, or a dtype other than F32, F16, BF16 or F64.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.get(name)?;
        let Stored { shape, strides, .. } = tensor;
        let size = count(shape);
        if size == 0 {
            return Ok(Vec::new());
        }
        if *strides == contiguous(shape) {
            return self.run_of_floats(name, tensor, size);
        }
        let all = self.run_of_floats(name, tensor, last(shape, strides) + 1)?;
        let element = |index: usize| {
            let mut rest = index;
            let mut at = 0;
            for (size, stride) in shape.iter().zip(strides).rev() {
                at += rest % size * stride;
                rest /= size;
            }
            all[at]
        };
        Ok((0..size).map(element).collect())
    }

    /// Reads `count` consecutive values of the file, starting at the first one of a tensor.
    fn run_of_floats(&self, name: &str, tensor: &Stored, count: usize) -> Result<Vec<f32>> {
        let Stored { dtype, start, .. } = *tensor;
        // In chunks, so that the raw bytes of a large tensor are not held in memory next to its values.
        const PART: usize = 1 << 16;
        let size = dtype.bitsize() / 8;
        let mut values = Vec::with_capacity(count);
        let mut bytes = vec![0; PART.min(count) * size];
        while values.len() < count {
            let part = &mut bytes[..PART.min(count - values.len()) * size];
            self.sources[tensor.file].fill(start + (values.len() * size) as u64, part)?;
            let (twos, fours, eights) =
                (part.as_chunks().0, part.as_chunks().0, part.as_chunks().0);
            match dtype {
                Dtype::F32 => values.extend(fours.iter().map(|b| f32::from_le_bytes(*b))),
                Dtype::F64 => values.extend(eights.iter().map(|b| f64::from_le_bytes(*b) as f32)),
                Dtype::F16 => {
                    values.extend(twos.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()));
                }
                Dtype::BF16 => {
                    values.extend(twos.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()));
                }
                other => {
                    return Err(
                        Error::input(format!("`{name}` has unsupported dtype {other:?}"))
                            .hint("store weights as F32, F16, BF16 or F64"),
                    );
                }
            }
        }
        Ok(values)
    }

    fn get(&self, name: &str) -> Result<&Stored> {
        self.tensors.get(name).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> Error {
        if let Some(other) = self.others.get(name) {
            return Error::input(format!("`{name}` must be a tensor, got {other}"))
                .hint("save only the weights, as plain tensors");
        }
        let error = Error::input(format!("tensor `{name}` is missing"));
        // Names much longer than ours are never close to one of them.
        let names: Vec<&str> = self.names().filter(|name| name.len() < 100).collect();
        match nearest(name, &names) {
            Some(near) => error.hint(format!("the file has `{}`", shown(near))),
            None => error.hint(
                "only plain vision transformers and ConvNeXts can be loaded, with the tensor names of timm, \
                 open_clip or transformers",
            ),
        }
    }
}

/// Reads the header of a safetensors file; returns it with the offset of the data.
///
/// Errors: a damaged file, or a file length that disagrees with the header.
pub(crate) fn header(source: &Source) -> Result<(Metadata, u64)> {
    let broken = |why: &str| {
        Error::input(format!("truncated or invalid safetensors file: {why}"))
            .hint("copy or download it again")
    };
    let Some(size) = source.bytes(0, 8)? else {
        return Err(broken("it ends within its first 8 bytes"));
    };
    let size = u64::from_le_bytes(size.try_into().expect("8 bytes"));
    let header = match size {
        ..=HEADER_LIMIT => source.bytes(8, size)?,
        _ => None,
    };
    let Some(header) = header else {
        let length = source.length();
        let why = format!("header of {size} bytes in a file of {length} bytes");
        return Err(broken(&why));
    };
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|error| broken(&shown(&error.to_string())))?;
    let data = 8 + size;
    let whole = data + header.data_len() as u64;
    if source.length() != whole {
        let why = format!("expected {whole} bytes, got {}", source.length());
        return Err(broken(&why));
    }
    Ok((header, data))
}

/// Prefixes of words in the keys of dictionaries that hold tensors other than weights.
const NO_WEIGHTS: [&str; 8] = [
    "optim", "sched", "scaler", "rng", "random", "callback", "loop", "metric",
];
/// Words in keys under which programs store averaged weights, which are the ones they evaluate.
const AVERAGES: [&str; 5] = ["ema", "teacher", "swa", "averaged", "average"];
/// Words in keys under which programs store the weights.
const WEIGHTS: [&str; 9] = [
    "state", "model", "net", "network", "module", "params", "weights", "student", "backbone",
];

/// Splits a key into its words, in lower case.
fn words(key: &str) -> impl Iterator<Item = String> {
    key.split(['_', '-', '.']).map(str::to_ascii_lowercase)
}

/// A dictionary of tensors and the keys that lead to it.
struct Candidate<'a> {
    keys: Vec<&'a str>,
    dictionary: Value<'a>,
}

impl Candidate<'_> {
    fn path(&self) -> String {
        let keys = self.keys.iter().map(|key| shown(key));
        keys.collect::<Vec<_>>().join(".")
    }

    fn is_average(&self) -> bool {
        self.has_word(&AVERAGES)
    }

    fn has_word(&self, known: &[&str]) -> bool {
        let mut words = self.keys.iter().flat_map(|key| words(key));
        words.any(|word| known.contains(&&word[..]))
    }
}

/// Finds the dictionary of weights in a saved value; returns it with the keys that lead to it.
fn unwrap<'a>(pickle: &Pickle<'a>, saved: Value<'a>) -> Result<(Value<'a>, Option<String>)> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    candidates(pickle, saved, &mut Vec::new(), &mut found, &mut seen);
    let averages = found.iter().filter(|one| one.is_average()).count();
    if averages > 0 {
        found.retain(Candidate::is_average);
    }
    if holds_tensors(pickle, saved) {
        // The top level holds the weights itself, unless a key names an inner dictionary as weights.
        found.retain(|one| one.is_average() || one.has_word(&WEIGHTS));
        if found.is_empty() {
            return Ok((saved, None));
        }
    }
    match &found[..] {
        [one] => Ok((one.dictionary, Some(one.path()))),
        [] => Err(without_weights(pickle, saved)),
        several => {
            let paths = several.iter().map(|one| format!("`{}`", one.path()));
            let paths: Vec<String> = paths.take(8).collect();
            let message = format!("it holds several sets of weights: {}", paths.join(", "));
            let hint =
                "save the one to load by itself, such as `torch.save(torch.load(FILE)[KEY], NEW)`";
            Err(Error::input(message).hint(hint))
        }
    }
}

/// Collects all dictionaries of tensors below a value, none twice and none nested in another.
fn candidates<'a>(
    pickle: &Pickle<'a>,
    value: Value<'a>,
    keys: &mut Vec<&'a str>,
    found: &mut Vec<Candidate<'a>>,
    seen: &mut BTreeSet<usize>,
) {
    let Value::Dictionary(place) = value else {
        return;
    };
    // No program nests deeper, and a dictionary can contain itself.
    if keys.len() > 4 || !seen.insert(place) {
        return;
    }
    if !keys.is_empty() && holds_tensors(pickle, value) {
        let keys = keys.clone();
        return found.push(Candidate {
            keys,
            dictionary: value,
        });
    }
    // As in Python, the last value of a repeated key wins.
    let pairs = pickle.pairs(value).iter();
    let inside: BTreeMap<&str, Value> = pairs
        .filter_map(|pair| match pair.0 {
            Value::Text(key) => Some((key, pair.1)),
            _ => None,
        })
        .collect();
    let is_other =
        |key: &str| words(key).any(|word| NO_WEIGHTS.iter().any(|begin| word.starts_with(begin)));
    for (key, inner) in inside.into_iter().filter(|(key, _)| !is_other(key)) {
        keys.push(key);
        candidates(pickle, inner, keys, found, seen);
        keys.pop();
    }
}

/// Returns whether a dictionary directly holds tensors with axes; a scalar such as the best accuracy has none.
fn holds_tensors(pickle: &Pickle, value: Value) -> bool {
    pickle.pairs(value).iter().any(|pair| match pair {
        (Value::Text(_), Value::Tensor(tensor)) => pickle
            .view(*tensor)
            .is_none_or(|view| !view.shape.is_empty()),
        _ => false,
    })
}

fn without_weights(pickle: &Pickle, saved: Value) -> Error {
    let hint = "save `model.state_dict()` with `torch.save`";
    let Value::Dictionary(_) = saved else {
        let message = format!(
            "expected a dictionary of weights, got {}",
            pickle.describe(saved)
        );
        return Error::input(message).hint(hint);
    };
    let pairs = pickle.pairs(saved).iter();
    let keys = pairs.filter_map(|(key, value)| match key {
        Value::Text(key) => Some(format!("`{}` ({})", shown(key), pickle.describe(*value))),
        _ => None,
    });
    let keys: Vec<String> = keys.take(5).collect();
    let message = match &keys[..] {
        [] => "expected a dictionary of weights, got an empty one".to_owned(),
        keys => format!("no dictionary of tensors found, only {}", keys.join(", ")),
    };
    Error::input(message).hint(hint)
}

/// Locates the elements of a tensor in the file. `places` caches the byte ranges of storages.
fn stored<'a>(
    view: View<'a>,
    places: &mut BTreeMap<&'a str, Place>,
    place: &dyn Fn(&str) -> Result<Option<Place>>,
) -> Result<Stored> {
    let View {
        storage,
        offset,
        shape,
        strides,
    } = view;
    let Place { start, size: bytes } = match places.get(storage.key) {
        Some(known) => *known,
        None => {
            let found = place(&format!("data/{}", storage.key))?;
            let found = found.ok_or_else(|| Error::input("its data is missing from the file"))?;
            places.insert(storage.key, found);
            found
        }
    };
    let size = storage.dtype.bitsize() / 8;
    let available = bytes / size as u64;
    let elements = shape
        .iter()
        .try_fold(1usize, |product, size| product.checked_mul(*size));
    // With overlapping strides, a tiny file could declare a tensor larger than memory.
    if elements.is_none_or(|elements| elements as u64 > available) {
        let message = format!("it has shape {shape:?}, but only {available} values are stored");
        return Err(
            Error::input(message).hint("save it as a contiguous tensor, or copy the file again")
        );
    }
    let end = if elements == Some(0) {
        Some(offset)
    } else {
        let steps = shape.iter().zip(&strides);
        steps
            .map(|(size, stride)| (size - 1).checked_mul(*stride))
            .try_fold(offset, |sum, step| sum.checked_add(step?))
            .and_then(|last| last.checked_add(1))
    };
    if end.is_none_or(|end| end as u64 > available) {
        let message = format!("it extends past the {available} values that are stored");
        return Err(Error::input(message).hint("copy or download the file again"));
    }
    Ok(Stored {
        file: 0,
        dtype: storage.dtype,
        start: start + (offset * size) as u64,
        shape,
        strides,
    })
}

/// Returns the number of elements of a shape that was already checked against the file.
fn count(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// Returns the strides of a contiguous tensor.
fn contiguous(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for place in (1..shape.len()).rev() {
        strides[place - 1] = strides[place].saturating_mul(shape[place]);
    }
    strides
}

/// Returns the offset of the last element from the first; the tensor must not be empty.
fn last(shape: &[usize], strides: &[usize]) -> usize {
    let steps = shape.iter().zip(strides);
    steps.map(|(size, stride)| (size - 1) * stride).sum()
}

/// Identifies a file without weights by its first bytes.
fn foreign(start: &[u8]) -> Error {
    let download =
        "download the file itself; sites return a web page if the login or the link is wrong";
    let (message, hint) = if start.is_empty() {
        ("this file is empty", "copy or download it again")
    } else if start.trim_ascii_start().starts_with(b"<") {
        ("this is a web page, not a weights file", download)
    } else if start.starts_with(b"version https://git-lfs") {
        let hint = "fetch the file itself with `git lfs pull`";
        ("this is a git-lfs pointer, not a weights file", hint)
    } else if start.starts_with(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19") {
        let message = "unsupported file format, written by PyTorch before 1.6";
        (
            message,
            "load it with PyTorch 1.6 or newer and save it again with `torch.save`",
        )
    } else if matches!(start, [0x80, 2..=5, ..]) {
        let message = "this is a bare Python pickle, not a file written by `torch.save`";
        (
            message,
            "save the weights with `torch.save` or as safetensors",
        )
    } else {
        let message = "this is neither a safetensors file nor a file written by `torch.save`";
        (message, "copy or download it again")
    };
    Error::input(message).hint(hint)
}
