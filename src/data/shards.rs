//! Tar files of images and captions, as img2dataset writes them and WebDataset reads them.
//!
//! `000000000.jpg`, `.txt` and `.json` of one key are a sample; `.cls` holds the number of its class.
//! Reading a sample is one positioned read. Of each shard only its counts stay in memory; where its
//! samples lie is read when one is asked for, from the saved index or else by a pass over the
//! headers, and the indexes used last are kept.
//! The order of the samples in training is in [`super::order`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::decode::{self, Examined, Format};
use super::health::{Fault, Health, Reason};
use super::pattern;
use super::picture::View;
use super::recent::Recent;
use super::shard_index::{self, Entry, Saved, ShardIndex, Span, Summary};
use crate::error::{Error, Result};
use crate::files::{self, Source};

/// Samples whose places are held: about 75 bytes each, so 150 MB.
const MOST_HELD: u64 = 2_000_000;
/// Scans from so many on are worth a word about indexes.
const MANY: usize = 200;
/// Shards that are held open.
const MOST_OPEN: u64 = 64;
/// Bytes between image and caption that are read along, rather than reading twice.
const SMALL_GAP: u64 = 64 * 1024;

/// Samples in shards.
#[derive(Debug)]
pub struct Shards {
    shards: Vec<Shard>,
    /// Index of the first sample of each shard, and the number of samples.
    starts: Vec<usize>,
    classes: Vec<String>,
    captioned: bool,
    /// Whether any sample has a label.
    labelled: bool,
    notices: Vec<String>,
    indexes: Recent<Arc<ShardIndex>>,
    files: Recent<Arc<Source>>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    stamp: (u64, u64),
    summary: Summary,
}

/// A picture file, and a caption with whether the json beside it is broken.
type Contents = (Vec<u8>, Option<(String, bool)>);

/// A sample: its picture, and its caption where that was asked for and there is one.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The picture, and what is odd about it.
    pub picture: Examined,
    /// The caption.
    pub caption: Option<String>,
}

impl Shards {
    /// Opens the shards of a pattern. Those without a saved index are scanned.
    ///
    /// Errors: files that are missing or cannot be read; no samples in any of them.
    pub fn open(pattern: &str) -> Result<Self> {
        let paths = pattern::expand(pattern)?;
        let (indexes, files) = (Recent::new(MOST_HELD), Recent::new(MOST_OPEN));
        let opened: Result<Vec<(Shard, bool, Option<Health>)>> = paths
            .into_par_iter()
            .enumerate()
            .map(|(number, path)| {
                let stamp = files::stamp(&path)?;
                let saved = shard_index::saved_summary(&path, stamp);
                let stale = matches!(saved, Saved::Stale);
                if let Saved::Sound(summary) = saved {
                    let shard = Shard {
                        path,
                        stamp,
                        summary,
                    };
                    return Ok((shard, stale, None));
                }
                let index = Arc::new(ShardIndex::scan(&Source::open(&path)?)?);
                let summary = index.summary();
                let health = located(&index, &path);
                indexes.put(number, index, weight(summary));
                let shard = Shard {
                    path,
                    stamp,
                    summary,
                };
                Ok((shard, stale, Some(health)))
            })
            .collect();
        let mut notices = Vec::new();
        let mut health = Health::default();
        let (mut shards, mut starts, mut samples) = (Vec::new(), vec![0], 0);
        let mut stales = Vec::new();
        let opened = opened?;
        let scanned = opened
            .iter()
            .filter(|(_, _, scanned)| scanned.is_some())
            .count();
        if scanned >= MANY {
            notices.push(format!(
                "{scanned} shards were scanned; `advxl data index` saves what was found, so that opening them is quick"
            ));
        }
        for (shard, stale, of_shard) in opened {
            if stale {
                stales.push(shard.path.display().to_string());
            }
            health.join(&of_shard.unwrap_or_default());
            samples += shard.summary.samples as usize;
            starts.push(samples);
            shards.push(shard);
        }
        if let Some(first) = stales.first() {
            notices.push(format!(
                "{} saved indexes are of other files than the shards beside them and were not used, such as that of \
                 `{first}`; `advxl data index` makes them again",
                stales.len()
            ));
        }
        for (reason, count, example) in health.iter().filter(|(reason, ..)| reason.is_damage()) {
            let text = reason.text();
            notices.push(format!(
                "shards are damaged: {text}, {count} times, such as {example}; `advxl data check` tells all"
            ));
        }
        if samples == 0 {
            return Err(
                Error::input(format!("`shards:{pattern}` holds no samples")).hint(
                    "samples are members such as `000.jpg` with `000.txt`, `000.json` or `000.cls`",
                ),
            );
        }
        let all = |count: fn(&Summary) -> u32| -> usize {
            let counts = shards
                .iter()
                .map(|shard: &Shard| count(&shard.summary) as usize);
            counts.sum()
        };
        let captioned = all(|summary| summary.captioned) > 0;
        let labels = all(|summary| summary.labelled);
        let classes = match labels == samples {
            true => {
                let classes = shards.iter().map(|shard| shard.summary.classes).max();
                (0..classes.unwrap_or(0))
                    .map(|class| class.to_string())
                    .collect()
            }
            false => Vec::new(),
        };
        Ok(Self {
            shards,
            starts,
            classes,
            captioned,
            labelled: labels > 0,
            notices,
            indexes,
            files,
        })
    }

    /// Number of samples, the damaged ones included.
    pub fn len(&self) -> usize {
        self.starts[self.shards.len()]
    }

    /// Whether there are no samples, which `open` refuses.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers of the classes when every sample has a `.cls`, else none.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Whether samples have captions. Then one without a caption is damaged.
    pub fn captioned(&self) -> bool {
        self.captioned
    }

    /// What the user should know.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// The index of the first sample of each shard, and after the last the number of samples.
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    /// The class; 0 without a `.cls`.
    pub fn label(&self, sample: usize) -> u32 {
        // A shard whose index cannot be read gives no picture either.
        let entry = self.entry(sample).ok();
        entry.and_then(|entry| entry.label).unwrap_or(0)
    }

    /// The key of a sample, as its members are named; none in a shard that cannot be read any more.
    pub fn key_of(&self, sample: usize) -> Option<String> {
        let (number, place) = self.place(sample);
        let index = self.index(number).ok()?;
        Some(index.name(place).to_owned())
    }

    /// Shard and key of a sample, for messages.
    pub fn name_of(&self, sample: usize) -> String {
        let (number, place) = self.place(sample);
        let path = self.shards[number].path.display();
        match self.index(number) {
            Ok(index) => format!(
                "{path}: {}",
                shard_index::shown(index.name(place).as_bytes())
            ),
            Err(_) => format!("{path}: sample {place}"),
        }
    }

    /// Names of the shards without their folders and their numbers of samples, for the fingerprint.
    pub fn identity(&self) -> impl Iterator<Item = String> {
        self.shards.iter().map(|shard| {
            let name = shard.path.file_name().unwrap_or_default().to_string_lossy();
            format!("{name} {}", shard.summary.samples)
        })
    }

    /// What was met in the tars beside the samples' own faults.
    pub fn health(&self) -> Result<Health> {
        let mut health = Health::default();
        for number in 0..self.shards.len() {
            let index = self.index(number)?;
            let Shard { path, summary, .. } = &self.shards[number];
            health.join(&located(&index, path));
            if self.labelled {
                let missing = u64::from(summary.samples - summary.labelled);
                health.add_times(Reason::MissingLabel, missing, || {
                    format!("`{}`", path.display())
                });
            }
        }
        Ok(health)
    }

    /// Reads a sample: of its picture at least what `view` asks for, and its caption if that is asked for.
    ///
    /// Errors: whatever makes it unusable, by kind.
    pub fn read(
        &self,
        sample: usize,
        caption: bool,
        view: View,
    ) -> std::result::Result<Sample, Fault> {
        let (bytes, caption) = self.bytes(sample, caption)?;
        let (caption, spare_broken) = match caption {
            Some((caption, spare_broken)) => (Some(caption), spare_broken),
            None => (None, false),
        };
        let mut picture = decode::examine_part(&bytes, view)?;
        let named = self.entry(sample)?.format;
        if Some(named) != Format::of_bytes(&bytes) {
            picture.odd.push(Reason::WrongExtension);
        }
        if spare_broken {
            picture.odd.push(Reason::SpareJsonBroken);
        }
        Ok(Sample { picture, caption })
    }

    /// The bytes of a sample's picture file.
    pub fn image_bytes(&self, sample: usize) -> std::result::Result<Vec<u8>, Fault> {
        Ok(self.bytes(sample, false)?.0)
    }

    /// A sample's caption; none where no sample has one.
    ///
    /// Errors: it is missing, empty, no UTF-8 or within a broken json.
    pub fn caption(&self, sample: usize) -> std::result::Result<Option<String>, Fault> {
        if !self.captioned {
            return Ok(None);
        }
        let entry = self.entry(sample)?;
        if let Some(fault) =
            shard_index::fault_of(&entry).filter(|fault| fault.reason != Reason::MissingImage)
        {
            return Err(fault);
        }
        let file = self.file(self.place(sample).0)?;
        let read = |span: Span| -> std::result::Result<Vec<u8>, Fault> {
            let bytes = file.bytes(span.at, u64::from(span.length))?;
            bytes.ok_or_else(changed)
        };
        Ok(Some(caption_of(&entry, read)?.0))
    }

    /// Image, and caption with whether the json beside it is broken: in one read where they lie together.
    fn bytes(&self, sample: usize, caption: bool) -> std::result::Result<Contents, Fault> {
        let entry = self.entry(sample)?;
        if let Some(fault) = shard_index::fault_of(&entry) {
            return Err(fault);
        }
        let file = self.file(self.place(sample).0)?;
        let read = |span: Span| -> std::result::Result<Vec<u8>, Fault> {
            let bytes = file.bytes(span.at, u64::from(span.length))?;
            bytes.ok_or_else(changed)
        };
        if !caption || !self.captioned {
            return Ok((read(entry.image)?, None));
        }
        let texts = [entry.text, entry.json]
            .into_iter()
            .filter(|span| span.exists());
        let end = texts
            .clone()
            .fold(entry.image.end(), |end, span| end.max(span.end()));
        let first = texts.clone().all(|span| span.at > entry.image.at);
        let sum = texts.fold(u64::from(entry.image.length), |sum, span| {
            sum + u64::from(span.length)
        });
        let length = end - entry.image.at;
        if !first || length > sum + SMALL_GAP {
            let caption = caption_of(&entry, read)?;
            return Ok((read(entry.image)?, Some(caption)));
        }
        let mut bytes = file.bytes(entry.image.at, length)?.ok_or_else(changed)?;
        let caption = caption_of(&entry, |span| {
            let from = (span.at - entry.image.at) as usize;
            Ok(bytes[from..from + span.length as usize].to_vec())
        })?;
        bytes.truncate(entry.image.length as usize);
        Ok((bytes, Some(caption)))
    }

    /// Shard and place within it.
    fn place(&self, sample: usize) -> (usize, usize) {
        // Empty shards begin where the next one begins, hence the last that does.
        let number = self.starts.partition_point(|start| *start <= sample) - 1;
        (number, sample - self.starts[number])
    }

    fn entry(&self, sample: usize) -> Result<Entry> {
        let (number, place) = self.place(sample);
        Ok(self.index(number)?.entries()[place])
    }

    fn index(&self, number: usize) -> Result<Arc<ShardIndex>> {
        if let Some(index) = self.indexes.get(number) {
            return Ok(index);
        }
        let shard = &self.shards[number];
        let index = match ShardIndex::load(&shard.path, shard.stamp) {
            Some(index) => index,
            None => ShardIndex::scan(&Source::open(&shard.path)?)?,
        };
        if index.summary() != shard.summary {
            return Err(changed()
                .context(format!("`{}`", shard.path.display()))
                .error);
        }
        let index = Arc::new(index);
        self.indexes
            .put(number, index.clone(), weight(shard.summary));
        Ok(index)
    }

    fn file(&self, number: usize) -> Result<Arc<Source>> {
        if let Some(file) = self.files.get(number) {
            return Ok(file);
        }
        let file = Arc::new(Source::open(&self.shards[number].path)?);
        self.files.put(number, file.clone(), 1);
        Ok(file)
    }
}

/// Makes the indexes of all shards of a pattern anew where they are absent or stale, and saves them.
///
/// Gives the number of shards, of samples, and of indexes that were written; `progress` is told how many shards are done.
pub fn save_indexes(
    pattern: &str,
    progress: impl Fn(usize, usize) + Sync,
) -> Result<(usize, u64, usize)> {
    let paths = pattern::expand(pattern)?;
    let (total, done) = (paths.len(), std::sync::atomic::AtomicUsize::new(0));
    let counts: Result<Vec<(u64, usize)>> = paths
        .par_iter()
        .map(|path| {
            let stamp = files::stamp(path)?;
            let saved = ShardIndex::load(path, stamp);
            let (summary, written) = match saved {
                Some(index) => (index.summary(), 0),
                None => {
                    let index = ShardIndex::scan(&Source::open(path)?)?;
                    index.save(path, stamp)?;
                    (index.summary(), 1)
                }
            };
            progress(
                done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1,
                total,
            );
            Ok((u64::from(summary.samples), written))
        })
        .collect();
    let counts = counts?;
    let samples = counts.iter().map(|(samples, _)| samples).sum();
    Ok((
        total,
        samples,
        counts.iter().map(|(_, written)| written).sum(),
    ))
}

fn weight(summary: Summary) -> u64 {
    u64::from(summary.samples) + 1
}

/// What was met in a shard, with the shard in the examples.
fn located(index: &ShardIndex, path: &Path) -> Health {
    index.health().at(&path.display().to_string())
}

fn changed() -> Fault {
    Fault::new(
        Reason::Unreadable,
        "the shard has changed since it was opened",
    )
    .hint("start again")
}

/// The caption, and whether the json beside it is broken.
fn caption_of(
    entry: &Entry,
    read: impl Fn(Span) -> std::result::Result<Vec<u8>, Fault>,
) -> std::result::Result<(String, bool), Fault> {
    if entry.text.exists() {
        let text = String::from_utf8(read(entry.text)?).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            let message = format!("the caption is not UTF-8 text: byte {at} cannot be read");
            Fault::new(Reason::CaptionNotUtf8, message).hint("save captions as UTF-8")
        })?;
        let spare_broken = entry.json.exists()
            && serde_json::from_slice::<serde_json::Value>(&read(entry.json)?).is_err();
        return Ok((not_empty(&text)?, spare_broken));
    }
    if !entry.json.exists() {
        return Err(Fault::new(
            Reason::MissingCaption,
            "there is no caption: neither `.txt` nor `.json`",
        )
        .hint("other samples have one; leave this one out or add it"));
    }
    let json: serde_json::Value = serde_json::from_slice(&read(entry.json)?).map_err(|error| {
        Fault::new(Reason::JsonBroken, format!("the json is broken: {error}"))
            .hint("there is no `.txt`, so the caption must come from the json")
    })?;
    match json.get("caption").and_then(serde_json::Value::as_str) {
        Some(caption) => Ok((not_empty(caption)?, false)),
        None => Err(Fault::new(
            Reason::MissingCaption,
            "the json has no text under `caption`",
        )
        .hint("img2dataset writes it there")),
    }
}

fn not_empty(text: &str) -> std::result::Result<String, Fault> {
    match text.trim_start_matches('\u{feff}').trim() {
        "" => {
            Err(Fault::new(Reason::CaptionEmpty, "the caption is empty")
                .hint("leave the sample out"))
        }
        text => Ok(text.to_owned()),
    }
}
