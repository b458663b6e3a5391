//! `advxl embed`.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::device::device;
use super::inputs::inputs;
use super::print::{note, print_json};
use super::screen::Terminal;
use crate::distributed::Comm;
use crate::error::{Context, Error, Result};
use crate::files::Lines;
use crate::ops::to_vec;
use crate::output::Content;
use crate::screen::Screen;
use crate::text::TextModel;
use crate::weights::EmbeddingWriter;
use crate::weights::embeddings::{Layout, MadeBy, plain_key};

/// Embed captions with a text model; embeddings are not normalized
#[derive(clap::Args)]
pub(crate) struct Embed {
    /// open_clip or Hugging Face folder with a CLIP or CLIPA text tower and its tokenizer
    #[arg(value_name = "TEXT_MODEL")]
    model: PathBuf,
    /// File with one caption per line
    #[arg(long, value_name = "FILE")]
    captions: PathBuf,
    /// Write `embeddings` [n, d] to this safetensors file
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// File with the sample key of each caption, one per line, to write as `keys`
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    /// Also write `token_ids`, i32 [n, context]
    #[arg(long)]
    tokens: bool,
    /// Round the embeddings to f16
    #[arg(long)]
    f16: bool,
    /// Captions per forward pass; changes results by rounding only
    #[arg(long, default_value_t = 128, value_name = "N")]
    batch: usize,
}

/// Number of batches whose captions are sorted by length together, so that short captions are not computed at the
/// length of long ones.
const BATCHES_TOGETHER: usize = 16;

impl Embed {
    pub(crate) fn run(&self, json: bool, comm: &Comm) -> Result<()> {
        if self.batch == 0 {
            return Err(Error::input("--batch must be at least 1, got 0"));
        }
        comm.all_ok(match comm.is_main() {
            true => self.check_out(),
            false => Ok(()),
        })?;
        let (rows, _) = counted(&self.captions)?;
        if rows == 0 {
            let message = format!("`{}` has no captions", self.captions.display());
            return Err(Error::input(message).hint("write one caption per line"));
        }
        let key_bytes = match &self.keys {
            None => 0,
            Some(path) => {
                let (keys, bytes) = counted_keys(path)?;
                if keys != rows {
                    let message =
                        format!("`{}` has {keys} keys for {rows} captions", path.display());
                    return Err(Error::input(message).hint("write one key per line"));
                }
                bytes
            }
        };
        let model = TextModel::load(&self.model, &device()?)?;
        let config = model.tower.config().clone();
        let layout = Layout {
            rows,
            width: config.embedding,
            half: self.f16,
            token_ids: self.tokens,
            key_bytes,
            made_by: MadeBy {
                text_model: model.hash.clone(),
                context: config.context,
            },
        };
        let mut writer = match comm.is_main() {
            true => Some(EmbeddingWriter::create(&self.out, layout)?),
            false => None,
        };
        let mut captions = Lines::open(&self.captions)?.map(trimmed);
        let mut keys = match &self.keys {
            None => None,
            Some(path) => Some(Lines::open(path)?.map(trimmed)),
        };
        let mut screen = Terminal::new();
        let started = std::time::Instant::now();
        let mut at = 0;
        // Pieces come in order; the lines between them belong to other ranks.
        let work = |piece: Range<usize>| {
            let (skipped, count) = (piece.start - at, piece.len());
            at = piece.end;
            let some = captions.by_ref().skip(skipped).take(count);
            let some = some.collect::<Result<Vec<_>>>()?;
            let of_these = match &mut keys {
                None => Vec::new(),
                Some(keys) => {
                    let some = keys.by_ref().skip(skipped).take(count);
                    some.collect::<Result<Vec<_>>>()?
                }
            };
            if some.len() != count || (keys.is_some() && of_these.len() != count) {
                let message = "captions or keys changed while being read";
                return Err(Error::failed(message).hint("run the same command again"));
            }
            let ids = model.tokenizer.rows(&some)?;
            let embeddings = self.embeddings(&model, &ids)?;
            Ok((embeddings, ids, of_these))
        };
        let mut done = 0;
        let take = |(embeddings, ids, keys): (Vec<f32>, Vec<u32>, Vec<String>)| {
            if let Some(writer) = &mut writer {
                writer
                    .push(&embeddings, &ids, &keys)
                    .context(|| format!("`{}`", self.captions.display()))?;
            }
            done += embeddings.len() / config.embedding;
            let text = format!("{done} of {rows} captions");
            screen.progress(done as u64, rows as u64, &text);
            Ok(())
        };
        comm.map_in_order(rows, self.batch * BATCHES_TOGETHER, work, take)?;
        drop(screen);
        if let Some(writer) = writer {
            writer.finish()?;
        }
        let seconds = started.elapsed().as_secs_f64();
        note(&format!(
            "{done} captions in {seconds:.1} s, {:.0} captions/s",
            done as f64 / seconds
        ));
        if json {
            print_json(&json!({
                "out": self.out.display().to_string(),
                "captions": done,
                "width": config.embedding,
                "context": config.context,
                "text_model": model.hash,
            }));
        }
        Ok(())
    }

    fn check_out(&self) -> Result<()> {
        let mut inputs = inputs(Some(&self.model), None)?;
        inputs.add("--captions", &self.captions);
        self.keys.iter().for_each(|keys| inputs.add("--keys", keys));
        inputs.check_file("--out", &self.out, Content::Tensors("embeddings"))
    }

    /// Returns the embeddings of rows of token ids, in the same order.
    fn embeddings(&self, model: &TextModel, ids: &[u32]) -> Result<Vec<f32>> {
        let config = model.tower.config();
        let rows: Vec<&[u32]> = ids.chunks_exact(config.context).collect();
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|row| model.tower.length(rows[*row]));
        let width = config.embedding;
        let mut embeddings = vec![0.0; rows.len() * width];
        for batch in order.chunks(self.batch) {
            let some: Vec<u32> = batch.iter().flat_map(|row| rows[*row]).copied().collect();
            let found = to_vec(model.tower.encode(&some)?);
            for (row, values) in batch.iter().zip(found.chunks_exact(width)) {
                embeddings[row * width..][..width].copy_from_slice(values);
            }
        }
        Ok(embeddings)
    }
}

/// Removes the carriage return that Windows files have at the end of a line.
fn trimmed(line: Result<String>) -> Result<String> {
    line.map(|mut line| {
        if line.ends_with('\r') {
            line.pop();
        }
        line
    })
}

/// Counts the lines of a file, and their bytes including one line feed per line.
fn counted(path: &Path) -> Result<(usize, u64)> {
    let mut lines = Lines::open(path)?.map(trimmed);
    lines.try_fold((0, 0), |(count, bytes), line| {
        Ok((count + 1, bytes + line?.len() as u64 + 1))
    })
}

/// Same as [`counted`] for keys, which must be unique, since otherwise a sample would have two embeddings.
fn counted_keys(path: &Path) -> Result<(usize, u64)> {
    let mut seen = HashSet::new();
    for line in Lines::open(path)?.map(trimmed) {
        let line = line?;
        let key = plain_key(line.as_bytes());
        let hash = <[u8; 16]>::try_from(&blake3::hash(key).as_bytes()[..16]);
        if !seen.insert(hash.expect("16 of 32 bytes")) {
            return Err(twice(path, key)?);
        }
    }
    counted(path)
}

/// Returns the error for a duplicate key, with its line numbers.
fn twice(path: &Path, key: &[u8]) -> Result<Error> {
    let lines = Lines::open(path)?
        .map(trimmed)
        .collect::<Result<Vec<_>>>()?;
    let same = (1..).zip(&lines);
    let mut same = same.filter(|(_, line)| plain_key(line.as_bytes()) == key);
    let mut next = || same.next().map_or(0, |(number, _)| number);
    let (first, second, key) = (next(), next(), String::from_utf8_lossy(key));
    let path = path.display();
    let message = format!("`{path}`: lines {first} and {second} have the same key `{key}`");
    Ok(Error::input(message).hint("give each sample a unique key, across all shards"))
}
