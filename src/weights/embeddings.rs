//! Caption embedding files, read row by row so that they need not fit into memory.
//!
//! A safetensors file with `embeddings` f32 or f16 `[n, width]`, not normalized, and optionally `token_ids` i32
//! `[n, context]` and `keys` u8: the sample keys, one per line. The metadata `text_model` and `context` identify the
//! model that made it. Any program that reads safetensors can read it.
//!
//! WebDataset keys of a tar made with `tar cf x.tar .` begin with `./`, ours do not: both are the same key. Keys are
//! looked up in an in-memory index of 24 bytes per key, built when the file is opened: 24 GB for a billion keys. If the
//! keys do not fit into memory, make one file per shard. Access by row number needs no memory.

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, json};

use super::state_dict::header;
use crate::error::{Context, Error, Result};
use crate::files::{Draft, Source};

/// The text model that made a file of embeddings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MadeBy {
    /// Hash of the [`crate::text::model::TextModel`].
    pub text_model: String,
    /// Context length: token ids per row.
    pub context: usize,
}

/// An embedding file open for reading; threads may share it.
#[derive(Debug)]
pub struct EmbeddingFile {
    source: Source,
    name: String,
    rows: usize,
    width: usize,
    half: bool,
    start: u64,
    made_by: Option<MadeBy>,
    keys: Option<Keys>,
}

/// Location of the keys.
#[derive(Debug)]
struct Keys {
    start: u64,
    /// Start of each key, followed by the end of the last.
    ends: Vec<u64>,
    /// Hash and row of each key, sorted by hash.
    index: Vec<(u64, u64)>,
}

impl EmbeddingFile {
    /// Opens a file and reads its header, and its keys if it has any.
    ///
    /// Errors: an invalid safetensors file, missing `embeddings`, keys that are not one per row or not unique.
    pub fn open(path: &Path) -> Result<Self> {
        let source = Source::open(path)?;
        Self::read(source, path).context(|| format!("`{}`", path.display()))
    }

    fn read(source: Source, path: &Path) -> Result<Self> {
        let (header, data) = header(&source)?;
        let tensors = header.tensors();
        let Some(embeddings) = tensors.get("embeddings") else {
            return Err(Error::input("tensor `embeddings` is missing")
                .hint("create the file with `advxl embed`"));
        };
        let half = match embeddings.dtype {
            Dtype::F16 => true,
            Dtype::F32 => false,
            other => {
                let message = format!("`embeddings` has dtype {other}, expected F32 or F16");
                return Err(Error::input(message));
            }
        };
        let [rows, width] = embeddings.shape[..] else {
            let message = format!(
                "`embeddings` has shape {:?}, expected [n, width]",
                embeddings.shape
            );
            return Err(Error::input(message));
        };
        if rows == 0 || width == 0 {
            return Err(Error::input("`embeddings` is empty"));
        }
        let metadata = header.metadata().as_ref();
        let stated = |key: &str| metadata.and_then(|entries| entries.get(key));
        let made_by = stated("text_model").zip(stated("context"));
        let made_by = made_by.and_then(|(text_model, context)| {
            Some(MadeBy {
                text_model: text_model.clone(),
                context: context.parse().ok()?,
            })
        });
        let keys = match tensors.get("keys") {
            None => None,
            Some(keys) if keys.dtype == Dtype::U8 => {
                let (from, to) = keys.data_offsets;
                Some(Keys::read(
                    &source,
                    data + from as u64,
                    (to - from) as u64,
                    rows,
                )?)
            }
            Some(keys) => {
                let message = format!("`keys` has dtype {}, expected U8", keys.dtype);
                return Err(Error::input(message).hint("store them as bytes, one key per line"));
            }
        };
        Ok(Self {
            name: path.display().to_string(),
            rows,
            width,
            half,
            start: data + embeddings.data_offsets.0 as u64,
            made_by,
            keys,
            source,
        })
    }

    /// Returns the number of embeddings.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Returns whether there are none, which `open` refuses.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Returns the size of an embedding.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns the text model that made the file, if the file states it.
    pub fn made_by(&self) -> Option<&MadeBy> {
        self.made_by.as_ref()
    }

    /// Returns whether rows can be found by key.
    pub fn has_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// Checks that the given text model made this file.
    pub fn check(&self, model: &MadeBy) -> Result<()> {
        let hint = "embed the captions again with `advxl embed`";
        match &self.made_by {
            Some(found) if found == model => Ok(()),
            Some(found) => {
                let short = |hash: &str| hash.chars().take(12).collect::<String>();
                let message = format!(
                    "`{}` was made by text model {} with context length {}, not by {} with {}",
                    self.name,
                    short(&found.text_model),
                    found.context,
                    short(&model.text_model),
                    model.context
                );
                Err(Error::input(message).hint(hint))
            }
            None => {
                let message = format!("`{}` does not state which text model made it", self.name);
                Err(Error::input(message).hint(hint))
            }
        }
    }

    /// Reads the embeddings of some rows, concatenated.
    ///
    /// Shapes: `[rows.len() * width]`.
    /// Errors: rows out of range, non-finite values.
    pub fn rows(&self, rows: &[usize]) -> Result<Vec<f32>> {
        let size = if self.half { 2 } else { 4 };
        let mut values = Vec::with_capacity(rows.len() * self.width);
        let mut bytes = vec![0; self.width * size];
        for row in rows {
            if *row >= self.rows {
                let message = format!(
                    "`{}` has {} rows, row {row} is out of range",
                    self.name, self.rows
                );
                return Err(Error::input(message));
            }
            let at = self.start + (*row as u64) * (self.width * size) as u64;
            self.source.fill(at, &mut bytes)?;
            let before = values.len();
            match self.half {
                true => {
                    let twos = bytes.as_chunks().0.iter();
                    values.extend(twos.map(|two| half::f16::from_le_bytes(*two).to_f32()));
                }
                false => {
                    let fours = bytes.as_chunks().0.iter();
                    values.extend(fours.map(|four| f32::from_le_bytes(*four)));
                }
            }
            if values[before..].iter().any(|value| !value.is_finite()) {
                let message = format!("`{}`, row {row}: non-finite values", self.name);
                return Err(Error::input(message).hint("create the file again"));
            }
        }
        Ok(values)
    }

    /// Returns the row of a sample's key.
    ///
    /// Errors: a file without keys, an unknown key.
    pub fn row_of(&self, key: &str) -> Result<usize> {
        let Some(keys) = &self.keys else {
            return Err(Error::input(format!("`{}` has no keys", self.name))
                .hint("create it with `advxl embed --keys FILE`"));
        };
        let row = keys.find(&self.source, key)?;
        row.ok_or_else(|| {
            Error::input(format!(
                "`{}` has no embedding for sample `{key}`",
                self.name
            ))
            .hint("embed every caption of the dataset")
        })
    }
}

/// Strips the `./` that WebDataset keeps in front of some keys.
pub fn plain_key(key: &[u8]) -> &[u8] {
    key.strip_prefix(b"./").unwrap_or(key)
}

fn hash(key: &[u8]) -> u64 {
    let hash = blake3::hash(plain_key(key));
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("8 of 32 bytes"))
}

impl Keys {
    fn read(source: &Source, start: u64, length: u64, rows: usize) -> Result<Self> {
        const PART: u64 = 1 << 20;
        // Every key takes at least a byte and its line feed.
        if (rows as u64) > length {
            let message = format!("{rows} embeddings, but only {length} bytes of keys");
            return Err(Error::input(message).hint("give one key per line"));
        }
        let (mut ends, mut index) = (vec![0], Vec::with_capacity(rows));
        let (mut at, mut key) = (0, Vec::new());
        while at < length {
            let mut part = vec![0; PART.min(length - at) as usize];
            source.fill(start + at, &mut part)?;
            for byte in part {
                at += 1;
                if byte != b'\n' {
                    key.push(byte);
                    continue;
                }
                index.push((hash(&key), ends.len() as u64 - 1));
                ends.push(at);
                key.clear();
            }
        }
        if !key.is_empty() {
            index.push((hash(&key), ends.len() as u64 - 1));
            // As if the last line ended with a line feed.
            ends.push(at + 1);
        }
        if index.len() != rows {
            let message = format!("{rows} embeddings, but {} keys", index.len());
            return Err(Error::input(message).hint("give one key per line"));
        }
        index.sort_unstable();
        let keys = Self { start, ends, index };
        for pair in keys.index.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
            let key = keys.text(source, pair[0].1)?;
            if plain_key(&key) == plain_key(&keys.text(source, pair[1].1)?) {
                let key = String::from_utf8_lossy(plain_key(&key));
                let (first, second) = (pair[0].1, pair[1].1);
                let message = format!("rows {first} and {second} have the same key `{key}`");
                return Err(Error::input(message).hint("give each sample a unique key"));
            }
        }
        Ok(keys)
    }

    /// Reads the key of a row.
    fn text(&self, source: &Source, row: u64) -> Result<Vec<u8>> {
        let (from, to) = (self.ends[row as usize], self.ends[row as usize + 1] - 1);
        let mut key = vec![0; (to - from) as usize];
        source.fill(self.start + from, &mut key)?;
        Ok(key)
    }

    fn find(&self, source: &Source, key: &str) -> Result<Option<usize>> {
        let target = hash(key.as_bytes());
        let first = self.index.partition_point(|(hash, _)| *hash < target);
        let same = self.index[first..].iter();
        for (_, row) in same.take_while(|(hash, _)| *hash == target) {
            // Different keys may have the same hash.
            if plain_key(&self.text(source, *row)?) == plain_key(key.as_bytes()) {
                return Ok(Some(*row as usize));
            }
        }
        Ok(None)
    }
}

/// Contents of an embedding file to be written.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Number of embeddings.
    pub rows: usize,
    /// Size of an embedding.
    pub width: usize,
    /// Whether embeddings are rounded to f16.
    pub half: bool,
    /// Whether token ids are stored too.
    pub token_ids: bool,
    /// Bytes of all keys with a line feed after each; 0 for no keys.
    pub key_bytes: u64,
    /// The text model.
    pub made_by: MadeBy,
}

/// Writes an embedding file in batches of rows; the file appears only when complete.
#[derive(Debug)]
pub struct EmbeddingWriter {
    draft: Draft,
    layout: Layout,
    /// Offsets of the next token ids, embeddings and keys.
    next: [u64; 3],
    /// Offset of the end of the keys.
    end: u64,
    done: usize,
}

impl EmbeddingWriter {
    /// Creates a file and writes its header.
    pub fn create(path: &Path, layout: Layout) -> Result<Self> {
        let Layout {
            rows,
            width,
            half,
            made_by,
            ..
        } = &layout;
        let (rows, context) = (*rows as u64, made_by.context as u64);
        let size = if *half { 2 } else { 4 };
        let ids = if layout.token_ids {
            rows * context * 4
        } else {
            0
        };
        let mut header = Map::new();
        let metadata = json!({
            "text_model": made_by.text_model,
            "context": context.to_string(),
            "normalized": "false",
        });
        header.insert("__metadata__".into(), metadata);
        // Wider dtypes first, so that each tensor starts at a multiple of its element size.
        let mut places = [0; 4];
        for (index, (name, dtype, shape, bytes)) in [
            ("token_ids", "I32", json!([rows, context]), ids),
            (
                "embeddings",
                if *half { "F16" } else { "F32" },
                json!([rows, width]),
                rows * *width as u64 * size,
            ),
            ("keys", "U8", json!([layout.key_bytes]), layout.key_bytes),
        ]
        .into_iter()
        .enumerate()
        {
            let (from, to) = (places[index], places[index] + bytes);
            places[index + 1] = to;
            if bytes > 0 {
                header.insert(
                    name.into(),
                    json!({ "dtype": dtype, "shape": shape, "data_offsets": [from, to] }),
                );
            }
        }
        let mut text = serde_json::Value::Object(header).to_string();
        // The tensors start at a multiple of eight bytes.
        let fill = text.len().next_multiple_of(8) - text.len();
        text.extend(std::iter::repeat_n(' ', fill));
        let data = 8 + text.len() as u64;
        let mut draft = Draft::create(path)?;
        draft.write(0, &(text.len() as u64).to_le_bytes())?;
        draft.write(8, text.as_bytes())?;
        let [ids, embeddings, keys, end] = places.map(|place| data + place);
        Ok(Self {
            draft,
            layout,
            next: [ids, embeddings, keys],
            end,
            done: 0,
        })
    }

    /// Appends rows.
    ///
    /// Shapes: `embeddings` `[n, width]`; `token_ids` `[n, context]`, used only if they are stored; `keys` n or none.
    /// Errors: values that are not finite in the dtype of the file; keys that are empty or contain a line feed.
    ///
    /// # Panics
    /// If shapes do not agree.
    pub fn push(&mut self, embeddings: &[f32], token_ids: &[u32], keys: &[String]) -> Result<()> {
        let Layout { width, half, .. } = self.layout;
        assert_eq!(embeddings.len() % width, 0, "rows must be complete");
        let count = embeddings.len() / width;
        let mut bytes = Vec::with_capacity(embeddings.len() * 4);
        for (at, value) in embeddings.iter().enumerate() {
            let finite = match half {
                true => {
                    let value = half::f16::from_f32(*value);
                    bytes.extend(value.to_le_bytes());
                    value.is_finite()
                }
                false => {
                    bytes.extend(value.to_le_bytes());
                    value.is_finite()
                }
            };
            if !finite {
                let row = self.done + at / width;
                let message = format!("the embedding of row {row} contains {value}");
                return Err(match half && value.is_finite() {
                    true => Error::input(message + ", which is out of range for f16")
                        .hint("omit --f16 to write f32"),
                    false => Error::failed(message),
                });
            }
        }
        self.append(1, &bytes)?;
        if self.layout.token_ids {
            let context = self.layout.made_by.context;
            assert_eq!(
                token_ids.len(),
                count * context,
                "one row of ids for each embedding"
            );
            let bytes: Vec<u8> = token_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            self.append(0, &bytes)?;
        }
        if self.layout.key_bytes > 0 {
            assert_eq!(keys.len(), count, "one key for each embedding");
            if let Some(at) = keys
                .iter()
                .position(|key| key.is_empty() || key.contains('\n'))
            {
                let message = format!(
                    "the key of row {} is empty or contains a line feed",
                    self.done + at
                );
                return Err(Error::input(message).hint("give each sample a unique key"));
            }
            self.append(2, (keys.join("\n") + "\n").as_bytes())?;
        }
        self.done += count;
        Ok(())
    }

    fn append(&mut self, part: usize, bytes: &[u8]) -> Result<()> {
        self.draft.write(self.next[part], bytes)?;
        self.next[part] += bytes.len() as u64;
        Ok(())
    }

    /// Moves the complete file into place.
    ///
    /// Errors: fewer or more rows or keys than the layout states.
    pub fn finish(self) -> Result<()> {
        if self.done != self.layout.rows || self.next[2] != self.end {
            let message = format!(
                "{} rows were written, expected {}",
                self.done, self.layout.rows
            );
            return Err(
                Error::failed(message).hint("an input changed while it was read; try again")
            );
        }
        self.draft.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made_by() -> MadeBy {
        MadeBy {
            text_model: "0123456789abcdef".into(),
            context: 3,
        }
    }

    fn write(path: &Path, values: &[f32], half: bool, keys: &[&str]) -> Result<()> {
        let keys: Vec<String> = keys.iter().map(|key| (*key).into()).collect();
        let layout = Layout {
            rows: values.len() / 2,
            width: 2,
            half,
            token_ids: true,
            key_bytes: keys.iter().map(|key| key.len() as u64 + 1).sum(),
            made_by: made_by(),
        };
        let mut writer = EmbeddingWriter::create(path, layout)?;
        for row in 0..values.len() / 2 {
            let ids = [row as u32, 1, 2];
            writer.push(
                &values[2 * row..][..2],
                &ids,
                keys.get(row..=row).unwrap_or_default(),
            )?;
        }
        writer.finish()
    }

    #[test]
    fn rows_are_found_by_number_and_by_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write(
            &path,
            &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            false,
            &["b", "aé", "c/1"],
        )
        .unwrap();
        let file = EmbeddingFile::open(&path).unwrap();
        assert_eq!((file.len(), file.width()), (3, 2));
        assert_eq!(file.rows(&[2, 0]).unwrap(), [5.0, 6.0, 1.0, 2.0]);
        assert_eq!(file.row_of("c/1").unwrap(), 2);
        assert_eq!(file.row_of("./c/1").unwrap(), 2);
        assert_eq!(file.row_of("aé").unwrap(), 1);
        file.check(&made_by()).unwrap();
        let other = MadeBy {
            text_model: "ffff".into(),
            context: 3,
        };
        let text = file.check(&other).unwrap_err().to_string();
        assert!(
            text.contains("made by text model 0123456789ab with context length 3"),
            "{text}"
        );
        let text = file.row_of("d").unwrap_err().to_string();
        assert!(text.contains("no embedding for sample `d`"), "{text}");
        let text = file.rows(&[3]).unwrap_err().to_string();
        assert!(text.contains("has 3 rows, row 3 is out of range"), "{text}");
        // Other programs can read it too.
        let bytes = crate::files::read(&path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.tensor("token_ids").unwrap().shape(), [3, 3]);
        assert_eq!(
            tensors.tensor("keys").unwrap().data(),
            "b\naé\nc/1\n".as_bytes()
        );
    }

    #[test]
    fn f16_rounds_to_nearest_and_out_of_range_values_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        // Between 1 and the next larger f16; ties go to even.
        let step = 2f32.powi(-10);
        write(
            &path,
            &[
                1.0 + 0.5 * step,
                1.0 + 1.5 * step,
                1.0 + 0.51 * step,
                -65504.0,
            ],
            true,
            &[],
        )
        .unwrap();
        let file = EmbeddingFile::open(&path).unwrap();
        let right = [1.0, 1.0 + 2.0 * step, 1.0 + step, -65504.0];
        assert_eq!(file.rows(&[0, 1]).unwrap(), right);
        assert!(
            file.row_of("a")
                .unwrap_err()
                .to_string()
                .contains("has no keys")
        );
        let text = write(&path, &[0.0, 7e4], true, &[])
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("row 0 contains 70000, which is out of range for f16"),
            "{text}"
        );
        let text = write(&path, &[0.0, f32::NAN], false, &[])
            .unwrap_err()
            .to_string();
        assert!(text.contains("contains NaN"), "{text}");
        assert_eq!(
            file.rows(&[0]).unwrap(),
            right[..2],
            "the old file is still intact"
        );
    }

    #[test]
    fn damaged_files_and_keys_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let refusal = || EmbeddingFile::open(&path).unwrap_err().to_string();
        for twice in [["a", "a"], ["./a", "a"]] {
            write(&path, &[0.0; 4], false, &twice).unwrap();
            assert!(refusal().contains("rows 0 and 1 have the same key `a`"));
        }
        write(&path, &[0.0; 4], false, &["a", "b"]).unwrap();
        let bytes = crate::files::read(&path).unwrap();
        crate::files::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(refusal().contains("truncated or invalid safetensors file"));
        let mut one_line = bytes.clone();
        let length = one_line.len();
        one_line[length - 3] = b'x';
        crate::files::write(&path, &one_line).unwrap();
        assert!(
            refusal().contains("2 embeddings, but 1 keys"),
            "{}",
            refusal()
        );
        let text = write(&path, &[0.0; 4], false, &["a", "b\nc"])
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("key of row 1 is empty or contains a line feed"),
            "{text}"
        );
    }
}
