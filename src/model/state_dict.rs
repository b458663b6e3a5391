//! Named tensors of other programs' weight files: safetensors, and what `torch.save` writes.
//!
//! A file is known by its content, not by its name. Opening reads names and shapes alone; each
//! tensor comes from the disk when it is asked for, so that the file never lies in memory beside the
//! model. Nothing in a file is run (`pickle.rs`), and what a file says of sizes is held
//! against its length before memory is taken.
//!
//! Knows nothing of models: names and shapes are judged by [`super::weights`].

use std::collections::BTreeMap;
use std::path::Path;

pub use safetensors::Dtype;
use safetensors::tensor::Metadata;

pub(crate) use super::archive::shown;
use super::archive::{Archive, Place};
use super::pickle::{Pickle, Value, View};
use crate::error::{Context, Error, Result};
use crate::files::Source;
use crate::settings::nearest;

/// The longest header of a safetensors file that is read: that of some 300,000 tensors.
const HEADER_LIMIT: u64 = 32 << 20;
/// The longest pickle that is read; that of a large model is 100 kB long.
const PICKLE_LIMIT: u64 = 64 << 20;

/// Keys under which training programs keep weights among other things. The average of the weights
/// goes first, since it is what such programs evaluate.
const WRAPPERS: [&str; 4] = ["state_dict_ema", "model_ema", "state_dict", "model"];
/// What training programs put before every name.
const PREFIXES: [&str; 3] = ["module.", "base_model.", "model."];

/// The tensors of a weight file, by name.
#[derive(Debug)]
pub struct StateDict {
    source: Source,
    tensors: BTreeMap<String, Stored>,
    /// What lies between the tensors and is none, in words.
    others: BTreeMap<String, String>,
    wrapper: Option<String>,
}

/// Where a tensor is.
#[derive(Debug)]
struct Stored {
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
    /// where there is one; see [`Self::wrapper`]. The prefixes `module.`, `base_model.` and `model.`
    /// are dropped where all names have them.
    ///
    /// Errors: another kind of file, damage, code in the place of weights, no tensors.
    pub fn open(path: &Path) -> Result<Self> {
        let source = Source::open(path)?;
        Self::read(source).context(|| format!("`{}`", path.display()))
    }

    fn read(source: Source) -> Result<Self> {
        let start = source
            .bytes(0, source.length().min(64))?
            .unwrap_or_default();
        let mut found = if start.get(8) == Some(&b'{') {
            Self::safetensors(source)?
        } else if start.starts_with(b"PK") {
            Self::pytorch(source)?
        } else {
            return Err(foreign(&start));
        };
        found.drop_prefixes();
        // Tensors may share numbers, but a small file cannot have large contents.
        let sizes = found.tensors.values().map(|tensor| count(&tensor.shape));
        let total = sizes.fold(0usize, |sum, size| sum.saturating_add(size));
        if total as u64 > found.source.length() {
            let length = found.source.length();
            let message = format!("its {length} bytes tell of {total} numbers");
            return Err(Error::input(message).hint("it is damaged, or made to fill the memory"));
        }
        Ok(found)
    }

    fn safetensors(source: Source) -> Result<Self> {
        let (header, data) = header(&source)?;
        let tensors = header.tensors().into_iter().map(|(name, info)| {
            let stored = Stored {
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
            source,
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
            source,
        })
    }

    fn drop_prefixes(&mut self) {
        let common = |tensors: &BTreeMap<String, Stored>| {
            let all = |prefix: &&str| tensors.keys().all(|name| name.starts_with(*prefix));
            PREFIXES
                .into_iter()
                .find(all)
                .filter(|_| !tensors.is_empty())
        };
        while let Some(prefix) = common(&self.tensors) {
            let tensors = std::mem::take(&mut self.tensors).into_iter();
            self.tensors = tensors
                .map(|(name, tensor)| (name[prefix.len()..].to_owned(), tensor))
                .collect();
        }
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

    /// BLAKE3 hash of the whole file.
    pub fn hash(&self) -> Result<String> {
        self.source.hash()
    }

    /// Reads the numbers of one tensor, in the order of its shape.
    ///
    /// Errors: there is none of that name, or its numbers are not F32, F16, BF16 or F64.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.get(name)?;
        let Stored {
            dtype,
            shape,
            start,
            strides,
        } = tensor;
        let size = count(shape);
        if size == 0 {
            return Ok(Vec::new());
        }
        if *strides == contiguous(shape) {
            return self.run_of_floats(name, *dtype, *start, size);
        }
        let all = self.run_of_floats(name, *dtype, *start, last(shape, strides) + 1)?;
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

    /// Numbers that follow each other in the file.
    fn run_of_floats(
        &self,
        name: &str,
        dtype: Dtype,
        start: u64,
        count: usize,
    ) -> Result<Vec<f32>> {
        // In parts, so that the bytes of a large tensor are not kept beside its numbers.
        const PART: usize = 1 << 16;
        let size = dtype.bitsize() / 8;
        let mut values = Vec::with_capacity(count);
        let mut bytes = vec![0; PART.min(count) * size];
        while values.len() < count {
            let part = &mut bytes[..PART.min(count - values.len()) * size];
            self.source
                .fill(start + (values.len() * size) as u64, part)?;
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

/// The dictionary of tensors in what was saved, and the keys that led there.
fn unwrap<'a>(pickle: &Pickle<'a>, saved: Value<'a>) -> Result<(Value<'a>, Option<String>)> {
    let (mut found, mut keys) = (saved, Vec::new());
    // No program wraps more often, and a dictionary can hold itself.
    for _ in 0..4 {
        let inside = |key: &str| {
            let mut pairs = pickle.pairs(found).iter();
            let pair = pairs.rfind(|pair| matches!(pair.0, Value::Text(text) if text == key));
            pair.map(|pair| pair.1)
                .filter(|value| !pickle.pairs(*value).is_empty())
        };
        let Some((key, value)) = WRAPPERS.iter().find_map(|key| Some((*key, inside(key)?))) else {
            break;
        };
        keys.push(key);
        found = value;
    }
    let pairs = pickle.pairs(found);
    if pairs.iter().any(|pair| matches!(pair.1, Value::Tensor(_))) {
        return Ok((found, (!keys.is_empty()).then(|| keys.join("."))));
    }
    let hint = "save `model.state_dict()` with `torch.save`";
    let Value::Dictionary(_) = found else {
        let message = format!("it holds {}, not weights by name", pickle.describe(found));
        return Err(Error::input(message).hint(hint));
    };
    let names = pairs.iter().filter_map(|pair| match pair.0 {
        Value::Text(name) => Some(format!("`{}`", shown(name))),
        _ => None,
    });
    let names: Vec<String> = names.take(5).collect();
    let message = match &names[..] {
        [] => "it holds an empty dictionary".to_owned(),
        names => format!("it holds no tensors, but {}", names.join(", ")),
    };
    Err(Error::input(message).hint(hint))
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
