//! Named tensors of other programs' weight files: safetensors, and what `torch.save` writes, also in several files with an
//! index (shards).
//!
//! A file is known by its content, not by its name. Opening reads names and shapes alone; each
//! tensor comes from the disk when it is asked for, so that the file never lies in memory beside the
//! model. Nothing in a file is run (`pickle.rs`), and what a file says of sizes is held
//! against its length before memory is taken.
//!
//! Knows nothing of models: names and shapes are judged by [`crate::weights::import`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::tensor::Metadata;

use super::archive::{Archive, Place};
use super::pickle::{Pickle, Value, View};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::files::Source;
use crate::model::config::common::{check_mean, check_std};
use crate::settings::nearest;

pub use safetensors::Dtype;

pub(crate) use crate::weights::archive::shown;

/// The longest header of a safetensors file that is read: that of some 300,000 tensors.
const HEADER_LIMIT: u64 = 32 << 20;
/// The longest pickle that is read; that of a large model is 100 kB long.
const PICKLE_LIMIT: u64 = 64 << 20;

/// What training programs put before every name.
const PREFIXES: [&str; 7] = [
    "module.",
    "base_model.",
    "model.",
    "net.",
    "network.",
    "backbone.",
    "encoder.",
];
/// What wrappers of modules put anywhere into names: `torch.compile`, activation checkpointing, FSDP.
const WRAPPERS: [&str; 3] = [
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
];

/// The tensors of a weight file, by name.
#[derive(Debug)]
pub struct StateDict {
    /// One file, or the shards of an index.
    sources: Vec<Source>,
    tensors: BTreeMap<String, Stored>,
    /// What lies between the tensors and is none, in words.
    others: BTreeMap<String, String>,
    wrapper: Option<String>,
    statistics: Option<Statistics>,
}

/// Mean and standard deviation of the channels that lie beside the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    /// The tensors' names, such as `normalize.mean` and `normalize.std`.
    pub names: [String; 2],
    /// Mean of each channel, for pixels in [0, 1].
    pub mean: [f64; 3],
    /// Standard deviation of each channel.
    pub std: [f64; 3],
}

/// Where a tensor is.
#[derive(Debug)]
struct Stored {
    /// Which of the files it is in.
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Place of the first element in the file, in bytes.
    start: u64,
    /// Elements from one entry to the next along each dimension.
    strides: Vec<usize>,
}

impl StateDict {
    /// Reads the names and shapes of a weight file.
    ///
    /// Of the weights in `{"state_dict": ..., "epoch": ...}` and the like, the average is taken
    /// where there is one; see [`Self::wrapper`]. What training programs put before names, `module.` and `_orig_mod.` for
    /// instance, is dropped, and the mean and deviation of a normalization in front of the model are taken out; see
    /// [`Self::statistics`].
    ///
    /// Errors: another kind of file, damage, code in the place of weights, no tensors, several dictionaries of tensors of
    /// which none is the average of another.
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

    /// The files that an index such as `model.safetensors.index.json` names.
    fn sharded(index: &Path) -> Result<Self> {
        let again = "copy or download the folder again";
        let broken = |what: &str| Error::input(format!("this index of shards {what}")).hint(again);
        let content: serde_json::Value = serde_json::from_slice(&files::read(index)?)
            .map_err(|error| broken(&format!("is not JSON: {error}")))?;
        let map = content["weight_map"].as_object();
        let map = map
            .filter(|map| !map.is_empty())
            .ok_or_else(|| broken("has no `weight_map`, which tells the file of each tensor"))?;
        let mut of_file: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (name, file) in map {
            let file = file.as_str().unwrap_or_default();
            // Beside the index, wherever a hostile one points.
            if Path::new(file).file_name().is_none_or(|own| own != file) {
                return Err(broken(&format!("has `{}` for a file", shown(file))));
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
                return Err(broken(&format!(
                    "names `{}`, which is missing",
                    shown(file)
                )));
            }
            let shard =
                Self::read(Source::open(&path)?).context(|| format!("`{}`", shown(file)))?;
            if let Some(name) = names.iter().find(|name| !shard.contains(name)) {
                let (name, file) = (shown(name), shown(file));
                return Err(broken(&format!(
                    "has `{name}` in `{file}`, which is without it"
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
        // Tensors may share numbers, but a small file cannot have large contents.
        let sizes = found.tensors.values().map(|tensor| count(&tensor.shape));
        let total = sizes.fold(0usize, |sum, size| sum.saturating_add(size));
        if total as u64 > length {
            let message = format!("its {length} bytes tell of {total} numbers");
            return Err(Error::input(message).hint("it is damaged, or made to fill the memory"));
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
        let archive = Archive::read(&source)?;
        let root = archive
            .names()
            .find_map(|name| name.strip_suffix("data.pkl"));
        let Some(root) = root.filter(|root| root.is_empty() || root.ends_with('/')) else {
            return Err(
                Error::input("this is a zip file, but none that PyTorch wrote")
                    .hint("unpack it, or give the file of weights itself"),
            );
        };
        let place = |name: &str| archive.place(&source, &format!("{root}{name}"));
        if place("constants.pkl")?.is_some() {
            return Err(
                Error::input("this is a TorchScript program, not a file of weights")
                    .hint("save `model.state_dict()` with `torch.save`"),
            );
        }
        let content = |name: &str| match place(name)? {
            Some(Place { start, size }) if size <= PICKLE_LIMIT => source.bytes(start, size),
            Some(Place { size, .. }) => {
                Err(Error::input(format!("its pickle is {size} bytes long"))
                    .hint("save the weights alone, `model.state_dict()`"))
            }
            None => Ok(None),
        };
        if content("byteorder")?.is_some_and(|order| order != b"little") {
            return Err(Error::input("it was saved on a big-endian machine")
                .hint("load and save it with PyTorch on this one"));
        }
        let bytes = content("data.pkl")?.unwrap_or_default();
        let (pickle, saved) = Pickle::read(&bytes)?;
        let (dictionary, wrapper) = unwrap(&pickle, saved)?;
        let (mut tensors, mut others) = (BTreeMap::new(), BTreeMap::new());
        for &(key, value) in pickle.pairs(dictionary) {
            // A key that is set again has its last value, as in Python.
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
                .ok_or_else(|| Error::input("its sizes are not sizes"))
                .and_then(|view| stored(view, &mut places, &place));
            Ok((
                name.to_owned(),
                stored.context(|| format!("the tensor `{}`", shown(name)))?,
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

    /// Drops what wrappers and programs put into names, and takes the statistics of a normalization out.
    fn plain_names(&mut self) -> Result<()> {
        self.rename(|name| {
            let parts = name.split('.').filter(|part| !WRAPPERS.contains(part));
            parts.collect::<Vec<_>>().join(".")
        })?;
        // The count that PyTorch's `AveragedModel` keeps.
        self.tensors.remove("n_averaged");
        loop {
            if let Some(prefix) = self.common_prefix() {
                self.rename(|name| name[prefix.len()..].to_owned())?;
                continue;
            }
            // Without it, what is left may have a beginning in common.
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

    /// What all names begin with and no program that is known here has in its names.
    fn common_prefix(&self) -> Option<String> {
        let (first, _) = self.tensors.keys().next()?.split_once('.')?;
        let prefix = format!("{first}.");
        // `Sequential(Normalize(...), model)` numbers its parts.
        let of_sequence = self.statistics.is_some() && first.parse::<u32>().is_ok();
        let known = of_sequence || PREFIXES.contains(&&prefix[..]);
        let all = || self.tensors.keys().all(|name| name.starts_with(&prefix));
        (known && all()).then_some(prefix)
    }

    /// Gives every tensor another name.
    ///
    /// Errors: two would have the same.
    fn rename(&mut self, change: impl Fn(&str) -> String) -> Result<()> {
        for (name, tensor) in std::mem::take(&mut self.tensors) {
            let new = change(&name);
            if self.tensors.insert(new.clone(), tensor).is_some() {
                let message = format!(
                    "without what wrappers put into names, two tensors are called `{}`",
                    shown(&new)
                );
                return Err(Error::input(message).hint("save the weights of one model alone"));
            }
        }
        Ok(())
    }

    /// The mean and deviation of the one normalization layer for images, as ARES, RobustBench and others save it before
    /// the model: three numbers each.
    ///
    /// Errors: they are no mean and deviation of pixels in [0, 1].
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
                // As it was written in decimal, which f64 would show with its own rounding.
                let text = floats[channel].to_string();
                text.parse().unwrap_or(f64::NAN)
            }))
        };
        let (mean, std) = (three(&names[0])?, three(&names[1])?);
        for (name, checked) in names.iter().zip([check_mean(&mean), check_std(&std)]) {
            checked.map_err(|(message, hint)| {
                let context = format!("the normalization `{}` of the file", shown(name));
                Error::input(message).hint(hint).context(context)
            })?;
        }
        Ok(Some(Statistics {
            names: names.clone(),
            mean,
            std,
        }))
    }

    /// Mean and deviation of a normalization that was saved with the weights, for instance as `normalize.mean`.
    pub fn statistics(&self) -> Option<&Statistics> {
        self.statistics.as_ref()
    }

    /// Keeps the tensors below a prefix alone, without it; `false`, and nothing changes, where there are none.
    pub fn keep_below(&mut self, prefix: &str) -> bool {
        if !self.tensors.keys().any(|name| name.starts_with(prefix)) {
            return false;
        }
        self.tensors.retain(|name, _| name.starts_with(prefix));
        self.rename(|name| name[prefix.len()..].to_owned()).is_ok()
    }

    /// Numbers that all tensors have together.
    pub fn numbers(&self) -> usize {
        self.tensors
            .values()
            .map(|tensor| count(&tensor.shape))
            .sum()
    }

    /// The names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Shape of a tensor.
    ///
    /// Errors: there is none of that name.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.get(name)?.shape)
    }

    /// Type of the numbers of a tensor.
    ///
    /// Errors: there is none of that name.
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.get(name)?.dtype)
    }

    /// The key, or keys with dots between, that the weights were found under; `None` where the
    /// file holds nothing else.
    pub fn wrapper(&self) -> Option<&str> {
        self.wrapper.as_deref()
    }

    /// BLAKE3 hash of the whole file; of several, of their hashes.
    pub fn hash(&self) -> Result<String> {
        let hashes = self.sources.iter().map(Source::hash);
        let hashes = hashes.collect::<Result<Vec<String>>>()?;
        match &hashes[..] {
            [only] => Ok(only.clone()),
            all => Ok(blake3::hash(all.concat().as_bytes()).to_string()),
        }
    }

    /// Reads the numbers of one tensor, in the order of its shape.
    ///
    /// Errors: there is none of that name, or its numbers are not F32, F16, BF16 or F64.
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

    /// Numbers that follow each other in the file, from a tensor's first on.
    fn run_of_floats(&self, name: &str, tensor: &Stored, count: usize) -> Result<Vec<f32>> {
        let Stored { dtype, start, .. } = *tensor;
        // In parts, so that the bytes of a large tensor are not kept beside its numbers.
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
                    return Err(Error::input(format!("`{name}` is stored as {other:?}"))
                        .hint("store weights as F32, F16, BF16 or F64"));
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
            return Error::input(format!("`{name}` is not a tensor but {other}"))
                .hint("save the weights alone, as plain tensors");
        }
        let error = Error::input(format!("the tensor `{name}` is missing"));
        // Names much longer than ours are never near.
        let names: Vec<&str> = self.names().filter(|name| name.len() < 100).collect();
        match nearest(name, &names) {
            Some(near) => error.hint(format!("the file has `{}`", shown(near))),
            None => error.hint("only plain vision transformers and ConvNeXts can be loaded, under the names of timm, open_clip or transformers"),
        }
    }
}

/// The header of a safetensors file, and where its data begin.
///
/// Errors: damage; a file of another length than the header tells.
pub(crate) fn header(source: &Source) -> Result<(Metadata, u64)> {
    let broken = |why: &str| {
        Error::input(format!("this is not a whole safetensors file: {why}"))
            .hint("copy or download it again")
    };
    let Some(size) = source.bytes(0, 8)? else {
        return Err(broken("it ends in its first 8 bytes"));
    };
    let size = u64::from_le_bytes(size.try_into().expect("8 bytes"));
    let header = match size {
        ..=HEADER_LIMIT => source.bytes(8, size)?,
        _ => None,
    };
    let Some(header) = header else {
        let length = source.length();
        let why = format!("a header of {size} bytes, in a file of {length}");
        return Err(broken(&why));
    };
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|error| broken(&shown(&error.to_string())))?;
    let data = 8 + size;
    let whole = data + header.data_len() as u64;
    if source.length() != whole {
        let why = format!("it has {} bytes of {whole}", source.length());
        return Err(broken(&why));
    }
    Ok((header, data))
}

/// Beginnings of the words in keys whose dictionaries hold tensors that are no weights.
const NO_WEIGHTS: [&str; 8] = [
    "optim", "sched", "scaler", "rng", "random", "callback", "loop", "metric",
];
/// ConfigKeys in keys under which programs keep the average of the weights, which is what they evaluate.
const AVERAGES: [&str; 5] = ["ema", "teacher", "swa", "averaged", "average"];
/// ConfigKeys in keys under which programs keep the weights.
const WEIGHTS: [&str; 9] = [
    "state", "model", "net", "network", "module", "params", "weights", "student", "backbone",
];

/// The words of a key.
fn words(key: &str) -> impl Iterator<Item = String> {
    key.split(['_', '-', '.']).map(str::to_ascii_lowercase)
}

/// A dictionary of tensors, and the keys that lead to it.
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

/// The dictionary of tensors in what was saved, and the keys that led there.
fn unwrap<'a>(pickle: &Pickle<'a>, saved: Value<'a>) -> Result<(Value<'a>, Option<String>)> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    candidates(pickle, saved, &mut Vec::new(), &mut found, &mut seen);
    let averages = found.iter().filter(|one| one.is_average()).count();
    if averages > 0 {
        found.retain(Candidate::is_average);
    }
    if holds_tensors(pickle, saved) {
        // Weights with something beside them, unless the names say the opposite.
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
                "save the one that you mean, such as `torch.save(torch.load(FILE)[KEY], NEW)`";
            Err(Error::input(message).hint(hint))
        }
    }
}

/// All dictionaries of tensors below a value, none twice and none within another.
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
    // No program wraps more often, and a dictionary can hold itself.
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
    // A key that is set again has its last value, as in Python.
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

/// Whether a dictionary itself has tensors with axes, which a number such as the best accuracy has not.
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
        let message = format!("it holds {}, not weights by name", pickle.describe(saved));
        return Error::input(message).hint(hint);
    };
    let pairs = pickle.pairs(saved).iter();
    let keys = pairs.filter_map(|(key, value)| match key {
        Value::Text(key) => Some(format!("`{}` ({})", shown(key), pickle.describe(*value))),
        _ => None,
    });
    let keys: Vec<String> = keys.take(5).collect();
    let message = match &keys[..] {
        [] => "it holds an empty dictionary".to_owned(),
        keys => format!("no dictionary of tensors is in it, but {}", keys.join(", ")),
    };
    Error::input(message).hint(hint)
}

/// Where the elements of a tensor are in the file. `places` keeps what is known of storages.
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
            let found = found.ok_or_else(|| Error::input("its numbers are not in the file"))?;
            places.insert(storage.key, found);
            found
        }
    };
    let size = storage.dtype.bitsize() / 8;
    let available = bytes / size as u64;
    let elements = shape
        .iter()
        .try_fold(1usize, |product, size| product.checked_mul(*size));
    // A tensor that repeats numbers could be larger than memory in the smallest of files.
    if elements.is_none_or(|elements| elements as u64 > available) {
        let message = format!("it has the shape {shape:?}, and {available} numbers are stored");
        return Err(Error::input(message).hint("save it contiguous, or copy the file again"));
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
        let message = format!("it reaches beyond the {available} numbers that are stored");
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

/// Number of elements of a shape that was held against the file before.
fn count(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// Strides of a tensor whose elements follow each other.
fn contiguous(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for place in (1..shape.len()).rev() {
        strides[place - 1] = strides[place].saturating_mul(shape[place]);
    }
    strides
}

/// Place of the last element after the first, of a tensor that has elements.
fn last(shape: &[usize], strides: &[usize]) -> usize {
    let steps = shape.iter().zip(strides);
    steps.map(|(size, stride)| (size - 1) * stride).sum()
}

/// What a file is that holds no weights, by its first bytes.
fn foreign(start: &[u8]) -> Error {
    let download =
        "download the file itself; sites give a web page where a login or a link is wrong";
    let (message, hint) = if start.is_empty() {
        ("this file is empty", "copy or download it again")
    } else if start.trim_ascii_start().starts_with(b"<") {
        ("this is a web page, not a file of weights", download)
    } else if start.starts_with(b"version https://git-lfs") {
        let hint = "fetch the file itself with `git lfs pull`";
        ("this is a git-lfs pointer, not a file of weights", hint)
    } else if start.starts_with(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19") {
        let message = "this is PyTorch's file format from before 1.6, which is not read";
        (
            message,
            "load it with PyTorch 1.6 or newer and save it again with `torch.save`",
        )
    } else if matches!(start, [0x80, 2..=5, ..]) {
        let message = "this is a bare Python pickle, not a file that `torch.save` wrote";
        (
            message,
            "save the weights with `torch.save` or as safetensors",
        )
    } else {
        let message = "this is not a whole safetensors file, nor one that `torch.save` wrote";
        (message, "copy or download it again")
    };
    Error::input(message).hint(hint)
}
