//! Tar files of images and captions, as written by img2dataset and read by WebDataset, plain or gzipped
//! ([`crate::storage::unpack`]).
//!
//! `000000000.jpg`, `.txt` and `.json` with one key are a sample; `.cls` contains its class number.
//! Reading a sample takes one positioned read, or one request to an object store, if its members are close to each
//! other. Only the counts of each shard stay in memory. The locations of its samples are loaded when one is read, from
//! the saved index or by a pass over the headers, and the most recently used indexes are cached.
//! The order of the samples in training is in [`crate::data::loader::order`].

pub mod index;
pub mod recent;
pub mod tar;

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::files::Source;
use crate::image::decode::outcome::Format;
use crate::image::{Examined, Fault, Health, Reason, View, content, decode};
use crate::json;
use crate::storage::store::{Object, Pieces, Requests};
use crate::storage::{pattern, unpack};

use index as shard_index;
use index::{Entry, Saved, ShardIndex, Span, Summary};
use recent::Recent;

/// Samples in cached indexes: about 75 bytes each, so 150 MB.
const MOST_HELD: u64 = 2_000_000;
/// Number of scanned shards from which a notice suggests saving indexes.
const MANY: usize = 200;
/// If at most one in this many samples has no label, those samples are damaged; if more, the data set has no classes.
const FEW_IN: usize = 100;
/// Shards that are kept open.
const MOST_OPEN: u64 = 64;
/// Largest gap in bytes between members that is read along with them, rather than reading twice.
const SMALL_GAP: u64 = 64 * 1024;
/// Bytes of samples that are requested but not read yet. Above this limit, a sample is requested when it is read.
const MOST_ASKED: u64 = 256 << 20;

/// Samples in shards.
#[derive(Debug)]
pub struct Shards {
    shards: Vec<Shard>,
    /// Index of the first sample of each shard, then the number of samples.
    starts: Vec<usize>,
    classes: Vec<String>,
    captioned: bool,
    /// Whether any sample has a label.
    labeled: bool,
    /// Number of samples without a label and without a fault.
    unlabeled: usize,
    notices: Vec<String>,
    indexes: Recent<Arc<ShardIndex>>,
    files: Recent<Arc<Source>>,
    /// Pending requests to stores, oldest first.
    asked: Mutex<VecDeque<((usize, Part), Requests)>>,
}

#[derive(Debug)]
struct Shard {
    object: Object,
    summary: Summary,
}

/// The part of a sample that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Its image.
    Picture,
    /// Its caption.
    Caption,
    /// Image and caption.
    Both,
}

/// The bytes of an image file, and a caption with whether the unused json is broken.
type Contents = (Vec<u8>, Option<(String, bool)>);

/// A sample: its image, and its caption if that was requested and exists.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The image and its oddities.
    pub picture: Examined,
    /// The caption.
    pub caption: Option<String>,
}

impl Shards {
    /// Opens the shards of a pattern. Shards without a saved index are scanned.
    ///
    /// Errors: files that are missing or cannot be read; no samples, or no usable ones.
    pub fn open(pattern: &str) -> Result<Self> {
        let objects = Object::find(pattern::expand(pattern)?)?;
        let saved = shard_index::saved_summaries(&objects)?;
        let (indexes, files) = (Recent::new(MOST_HELD), Recent::new(MOST_OPEN));
        let opened: Result<Vec<(Shard, bool, Option<Scanned>)>> = objects
            .into_par_iter()
            .zip(saved)
            .enumerate()
            .map(|(number, (object, saved))| {
                let stale = matches!(saved, Saved::Stale);
                if let Saved::Sound(summary) = saved {
                    return Ok((Shard { object, summary }, stale, None));
                }
                let index = Arc::new(ShardIndex::of(&object)?);
                let summary = index.summary();
                let scanned = Scanned {
                    health: located(&index, &object),
                    // Scanning an object in a store again is slow; scanning a file is not.
                    kept: object.is_remote().then(|| index.save(&object)),
                };
                indexes.put(number, index, weight(summary));
                Ok((Shard { object, summary }, stale, Some(scanned)))
            })
            .collect();
        let mut notices = Vec::new();
        let mut health = Health::default();
        let (mut shards, mut starts, mut samples) = (Vec::new(), vec![0], 0);
        let mut stales = Vec::new();
        let opened = opened?;
        let (mut scanned, mut kept, mut unkept) = (0, 0, None);
        for (shard, stale, of_shard) in opened {
            if stale {
                stales.push(shard.object.to_string());
            }
            if let Some(of_shard) = of_shard {
                health.join(&of_shard.health);
                match of_shard.kept {
                    None => scanned += 1,
                    Some(Ok(())) => kept += 1,
                    Some(Err(error)) => unkept = Some(error),
                }
            }
            samples += shard.summary.samples as usize;
            starts.push(samples);
            shards.push(shard);
        }
        if scanned >= MANY {
            notices.push(format!(
                "{scanned} shards were scanned; run `advxl data index` to save their indexes, so that they open faster"
            ));
        }
        if let (1.., Ok(folder)) = (kept, crate::storage::cache::indexes()) {
            notices.push(format!(
                "{kept} shards were read once to index them; the indexes are cached in `{}`",
                folder.display()
            ));
        }
        if let Some(error) = unkept {
            let error = error.to_string().replace("\n  hint:", ";");
            notices.push(format!(
                "cannot cache the indexes of shards in stores, so the next start reads these shards again: {error}"
            ));
        }
        if let Some(first) = stales.first() {
            notices.push(format!(
                "{} saved indexes do not match their shards or were written by an older version, and were not used, \
                 such as that of `{first}`; run `advxl data index` to rebuild them",
                stales.len()
            ));
        }
        for (reason, count, example) in health.iter().filter(|(reason, ..)| reason.is_damage()) {
            let text = reason.text();
            notices.push(format!(
                "damaged shards: {text}, {count} times, such as {example}; run `advxl data check` for details"
            ));
        }
        if samples == 0 {
            return Err(no_samples(pattern, &shards)?);
        }
        let all = |count: fn(&Summary) -> u32| -> usize {
            let counts = shards
                .iter()
                .map(|shard: &Shard| count(&shard.summary) as usize);
            counts.sum()
        };
        let captioned = all(|summary| summary.captioned) > 0;
        let (usable, labeled) = (
            all(|summary| summary.usable),
            all(|summary| summary.labeled),
        );
        let unlabeled = all(|summary| summary.unlabeled);
        let classes = match labeled > 0 && (unlabeled * FEW_IN) as u64 <= samples as u64 {
            true => {
                let classes = shards.iter().map(|shard| shard.summary.classes).max();
                (0..classes.unwrap_or(0))
                    .map(|class| class.to_string())
                    .collect()
            }
            false => Vec::new(),
        };
        let shards = Self {
            shards,
            starts,
            classes,
            captioned,
            labeled: labeled > 0,
            unlabeled,
            notices,
            indexes,
            files,
            asked: Mutex::default(),
        };
        match usable {
            0 => Err(shards.nothing_usable(pattern)?),
            _ => Ok(shards),
        }
    }

    /// Returns the error that no sample can be used, with the fault of the first sample.
    fn nothing_usable(&self, pattern: &str) -> Result<Error> {
        let entry = self.entry(0).map_err(|fault| fault.error)?;
        let fault = shard_index::fault_of(&entry).unwrap_or_else(changed).error;
        let (name, len) = (self.name_of(0), self.len());
        Ok(fault.context(format!(
            "none of the {len} samples of `shards:{pattern}` can be used, such as `{name}`"
        )))
    }

    /// Returns the number of samples, including damaged ones.
    pub fn len(&self) -> usize {
        self.starts[self.shards.len()]
    }

    /// Returns whether there are no samples. [`Self::open`] refuses such shards.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the class names, which are numbers.
    ///
    /// There are none if no sample has a `.cls`, or if more than 1 % of the samples are usable but have none. Otherwise
    /// a sample without a `.cls` is damaged.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Returns the number of samples that have no `.cls` and no fault.
    pub fn unlabeled(&self) -> usize {
        self.unlabeled
    }

    /// Returns whether any sample has a caption. Then a sample without a caption is damaged.
    pub fn captioned(&self) -> bool {
        self.captioned
    }

    /// Returns what the user should know about the shards.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Returns the index of the first sample of each shard, then the number of samples.
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    /// Returns the label of a sample.
    ///
    /// Errors: a sample without a `.cls`; a shard's index that can no longer be read.
    pub fn label(&self, sample: usize) -> Result<u32> {
        let entry = self.entry(sample).map_err(|fault| fault.error)?;
        entry.label.ok_or_else(|| {
            Error::input(format!("`{}` has no label", self.name_of(sample)))
                .hint("add a member such as `000.cls` with its class number")
        })
    }

    /// Returns the shard's name and the key of a sample, such as `00000.tar/000000012`. The shard's folder is not
    /// included.
    ///
    /// Errors: a shard's index that can no longer be read.
    pub fn id_of(&self, sample: usize) -> Result<String> {
        let (number, place) = self.place(sample);
        let index = self.index(number)?;
        Ok(format!(
            "{}/{}",
            self.shards[number].object.name(),
            index.name(place)
        ))
    }

    /// Returns the key of a sample, the common name of its members.
    ///
    /// Errors: a shard's index that can no longer be read.
    pub fn key_of(&self, sample: usize) -> Result<String> {
        let (number, place) = self.place(sample);
        Ok(self.index(number)?.name(place).to_owned())
    }

    /// Calls a function with the index and the key of every sample in which the indexes found no fault, from many
    /// threads.
    ///
    /// Errors: those of the function; shard indexes that can no longer be read.
    pub fn each_key(&self, call: impl Fn(usize, &str) -> Result<()> + Sync) -> Result<()> {
        (0..self.shards.len())
            .into_par_iter()
            .try_for_each(|number| {
                let index = self.index(number)?;
                let sound = index.entries().iter().enumerate();
                let mut sound = sound.filter(|(_, entry)| entry.fault.is_none());
                sound
                    .try_for_each(|(place, _)| call(self.starts[number] + place, index.name(place)))
            })
    }

    /// Returns the shard and the key of a sample, for messages.
    pub fn name_of(&self, sample: usize) -> String {
        let (number, place) = self.place(sample);
        let path = &self.shards[number].object;
        match self.index(number) {
            Ok(index) => format!(
                "{path}: {}",
                shard_index::shown(index.name(place).as_bytes())
            ),
            Err(_) => format!("{path}: sample {place}"),
        }
    }

    /// Returns the paths or URLs of the shards.
    pub fn places(&self) -> impl Iterator<Item = String> {
        self.shards.iter().map(|shard| shard.object.to_string())
    }

    /// Returns the names of the shards without folders and their sample counts, for the fingerprint.
    pub fn identity(&self) -> impl Iterator<Item = String> {
        // The same for a gzipped and an unpacked shard.
        let name = |shard: &Shard| unpack::plain_name(&shard.object.name());
        self.shards
            .iter()
            .map(move |shard| format!("{} {}", name(shard), shard.summary.samples))
    }

    /// Returns the names of the shards without folders, and without the extension of gzipped shards.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let names = self.shards.iter().map(|shard| shard.object.name());
        names.map(|name| unpack::plain_name(&name))
    }

    /// Returns whether the name of a sample's image is that of a PNM, the format of packed shards.
    pub fn is_pnm(&self, sample: usize) -> bool {
        self.entry(sample)
            .is_ok_and(|entry| entry.fault.is_none() && entry.format == Format::Pnm)
    }

    /// Returns damage and oddities of the tars other than the faults of the samples.
    pub fn health(&self) -> Result<Health> {
        let mut health = Health::default();
        for number in 0..self.shards.len() {
            let index = self.index(number)?;
            let Shard { object, summary } = &self.shards[number];
            health.join(&located(&index, object));
            // In a data set with classes, samples without a label are damaged and counted when they are read.
            if self.labeled && self.classes.is_empty() {
                let missing = u64::from(summary.unlabeled);
                health.add_times(Reason::MissingLabel, missing, || format!("`{object}`"));
            }
        }
        Ok(health)
    }

    /// Requests a sample that will be read soon from its store. Files are fast and are not prefetched.
    ///
    /// Errors are reported when the sample is read.
    pub fn ask(&self, sample: usize, part: Part) {
        let (number, _) = self.place(sample);
        let Some(remote) = self.shards[number].object.remote() else {
            return;
        };
        let part = self.part(part);
        let Ok(entry) = self.entry(sample) else {
            return;
        };
        let ranges = ranges(&entry, part);
        let within = ranges.iter().all(|range| range.end <= remote.length());
        if shard_index::fault_of(&entry).is_some() || !within {
            return;
        }
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting: u64 = asked.iter().map(|(_, pieces)| pieces.length()).sum();
        if waiting >= MOST_ASKED {
            return;
        }
        if let Ok(pieces) = Requests::of(remote, &ranges) {
            asked.push_back(((sample, part), pieces));
        }
    }

    /// Drops requests that were not read.
    pub fn forget_asked(&self) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.clear();
    }

    /// Reads a sample: at least the part of its image that `view` requests, and its caption if that is requested.
    ///
    /// Errors: anything that makes the sample unusable, by kind.
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

    /// Returns the bytes of a sample's image file.
    pub fn image_bytes(&self, sample: usize) -> std::result::Result<Vec<u8>, Fault> {
        Ok(self.bytes(sample, false)?.0)
    }

    /// Returns the caption of a sample; none if no sample has one.
    ///
    /// Errors: a caption that is missing, empty, not UTF-8 or in a broken json.
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
        let pieces = self.pieces(sample, &entry, Part::Caption)?;
        Ok(Some(caption_of(&entry, &pieces)?.0))
    }

    /// Returns the bytes of the image, and the caption with whether the unused json is broken.
    fn bytes(&self, sample: usize, caption: bool) -> std::result::Result<Contents, Fault> {
        let entry = self.entry(sample)?;
        if let Some(fault) = shard_index::fault_of(&entry) {
            return Err(fault);
        }
        let part = self.part(match caption {
            true => Part::Both,
            false => Part::Picture,
        });
        let pieces = self.pieces(sample, &entry, part)?;
        let caption = match part {
            Part::Picture => None,
            Part::Both | Part::Caption => Some(caption_of(&entry, &pieces)?),
        };
        let bytes = pieces.take(entry.image.range()).ok_or_else(changed)?;
        Ok((bytes, caption))
    }

    /// Returns the requested part, without captions if no sample has one.
    fn part(&self, requested: Part) -> Part {
        match requested {
            Part::Both if !self.captioned => Part::Picture,
            part => part,
        }
    }

    /// Returns the bytes of a part of a sample: reads them from a file, or waits for a request that was made ahead, or
    /// makes the request now.
    fn pieces(
        &self,
        sample: usize,
        entry: &Entry,
        part: Part,
    ) -> std::result::Result<Pieces, Fault> {
        let (number, _) = self.place(sample);
        let ranges = ranges(entry, part);
        let Some(remote) = self.shards[number].object.remote() else {
            let pieces = Pieces::read(&*self.file(number)?, &ranges)?;
            return pieces.ok_or_else(changed);
        };
        if ranges.iter().any(|range| range.end > remote.length()) {
            return Err(changed());
        }
        let asked = {
            let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            let place = asked.iter().position(|(key, _)| *key == (sample, part));
            place.and_then(|place| asked.remove(place))
        };
        let asked = match asked {
            Some((_, asked)) => Ok(asked),
            None => Requests::of(remote, &ranges),
        };
        asked
            .and_then(Requests::wait)
            .map_err(|error| self.fault(number, error))
    }

    /// Turns an error of a shard into a fault of a sample; for shards in stores it is an outage.
    fn fault(&self, number: usize, error: Error) -> Fault {
        Fault {
            outage: self.shards[number].object.is_remote(),
            ..error.into()
        }
    }

    /// Returns the shard of a sample and the index within the shard.
    fn place(&self, sample: usize) -> (usize, usize) {
        // An empty shard starts where the next one starts, hence the last shard that starts there.
        let number = self.starts.partition_point(|start| *start <= sample) - 1;
        (number, sample - self.starts[number])
    }

    fn entry(&self, sample: usize) -> std::result::Result<Entry, Fault> {
        let (number, place) = self.place(sample);
        let index = self.index(number);
        let index = index.map_err(|error| self.fault(number, error))?;
        let mut entry = index.entries()[place];
        if entry.label.is_none() && !self.classes.is_empty() {
            entry.fault.get_or_insert(Reason::BadLabel);
        }
        Ok(entry)
    }

    fn index(&self, number: usize) -> Result<Arc<ShardIndex>> {
        if let Some(index) = self.indexes.get(number) {
            return Ok(index);
        }
        let Shard { object, summary } = &self.shards[number];
        let index = match ShardIndex::load(object)? {
            Some(index) => index,
            None => ShardIndex::of(object)?,
        };
        if index.summary() != *summary {
            return Err(changed().context(format!("`{object}`")).error);
        }
        let index = Arc::new(index);
        self.indexes.put(number, index.clone(), weight(*summary));
        Ok(index)
    }

    fn file(&self, number: usize) -> Result<Arc<Source>> {
        if let Some(file) = self.files.get(number) {
            return Ok(file);
        }
        let Object::File { path, stamp } = &self.shards[number].object else {
            return Err(Error::failed("an object in a store is not a file"));
        };
        let file = Arc::new(unpack::open(path, *stamp)?.0);
        self.files.put(number, file.clone(), 1);
        Ok(file)
    }
}

/// Returns the error that there are no samples, and what the first shard is if it is not a tar.
fn no_samples(pattern: &str, shards: &[Shard]) -> Result<Error> {
    let message = format!("`shards:{pattern}` contains no samples");
    let first = shards.first().map(|shard| &shard.object);
    let hint = "samples are members such as `000.jpg` with `000.txt`, `000.json` or `000.cls`";
    let Some(first) = first else {
        return Ok(Error::input(message).hint(hint));
    };
    let reader = first.reader()?;
    let found = match reader.length() {
        0 => content::of(b""),
        _ => shard_index::instead(&reader)?,
    };
    Ok(match found {
        None => Error::input(message).hint(hint),
        Some(found) => {
            let name = first.to_string();
            let hint = found.hint.replace("FILE", &name);
            Error::input(format!("{message}: `{name}` is {}", found.what)).hint(hint)
        }
    })
}

/// The result of scanning a shard.
struct Scanned {
    health: Health,
    /// For an object in a store: whether its index could be cached.
    kept: Option<Result<()>>,
}

/// The result of [`save_indexes`].
#[derive(Clone, Debug)]
pub struct Indexed {
    /// Number of shards.
    pub shards: usize,
    /// Number of samples.
    pub samples: u64,
    /// Number of indexes that were written.
    pub written: usize,
    /// Folder to which the indexes of shards in stores were written, if any.
    pub kept: Option<PathBuf>,
}

/// Builds and saves the missing and stale indexes of the shards of a pattern: next to files, and in the cache for
/// shards in stores.
///
/// `progress` is called with the number of finished shards and the number of all shards.
pub fn save_indexes(pattern: &str, progress: impl Fn(usize, usize) + Sync) -> Result<Indexed> {
    let objects = Object::find(pattern::expand(pattern)?)?;
    let (total, done) = (objects.len(), std::sync::atomic::AtomicUsize::new(0));
    let counts: Result<Vec<(u64, usize, bool)>> = objects
        .par_iter()
        .map(|object| {
            let saved = ShardIndex::load(object)?;
            let (summary, written) = match saved {
                Some(index) => (index.summary(), 0),
                None => {
                    let index = ShardIndex::of(object)?;
                    index.save(object)?;
                    (index.summary(), 1)
                }
            };
            progress(
                done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1,
                total,
            );
            let kept = written > 0 && object.is_remote();
            Ok((u64::from(summary.samples), written, kept))
        })
        .collect();
    let counts = counts?;
    let kept = counts.iter().any(|(_, _, kept)| *kept);
    Ok(Indexed {
        shards: total,
        samples: counts.iter().map(|(samples, ..)| samples).sum(),
        written: counts.iter().map(|(_, written, _)| written).sum(),
        kept: kept.then(crate::storage::cache::indexes).transpose()?,
    })
}

fn weight(summary: Summary) -> u64 {
    u64::from(summary.samples) + 1
}

/// Returns the health of a shard, with the shard's name in the examples.
fn located(index: &ShardIndex, object: &Object) -> Health {
    index.health().at(&object.to_string())
}

/// Returns the ranges to read for a part of a sample: a single one if its members are close to each other.
fn ranges(entry: &Entry, part: Part) -> Vec<Range<u64>> {
    let members = match part {
        Part::Picture => vec![entry.image],
        Part::Caption => vec![entry.text, entry.json],
        Part::Both => vec![entry.image, entry.text, entry.json],
    };
    let members = members.into_iter().filter(|span| span.exists());
    let mut spans: Vec<_> = members.map(Span::range).collect();
    spans.sort_by_key(|range| range.start);
    let mut ranges: Vec<Range<u64>> = Vec::with_capacity(spans.len());
    for span in spans {
        match ranges.last_mut() {
            Some(last) if span.start <= last.end + SMALL_GAP => last.end = last.end.max(span.end),
            _ => ranges.push(span),
        }
    }
    ranges
}

fn changed() -> Fault {
    Fault::new(
        Reason::Unreadable,
        "the shard has changed since it was opened",
    )
    .hint("run the same command again")
}

/// Returns the caption, and whether a json that is not used for it is broken.
fn caption_of(entry: &Entry, pieces: &Pieces) -> std::result::Result<(String, bool), Fault> {
    let read = |span: Span| pieces.get(span.range()).ok_or_else(changed);
    if entry.text.exists() {
        let text = std::str::from_utf8(read(entry.text)?).map_err(|error| {
            let at = error.valid_up_to();
            let message = format!("the caption is not UTF-8 text: byte {at} is invalid");
            Fault::new(Reason::CaptionNotUtf8, message).hint("save captions as UTF-8")
        })?;
        let spare_broken = entry.json.exists() && json::parse(read(entry.json)?).is_err();
        return Ok((not_empty(text)?, spare_broken));
    }
    if !entry.json.exists() {
        return Err(Fault::new(
            Reason::MissingCaption,
            "missing caption: neither `.txt` nor `.json`",
        )
        .hint("other samples have captions; add one, or leave this sample out"));
    }
    let json = json::parse(read(entry.json)?).map_err(|error| {
        Fault::new(Reason::JsonBroken, format!("the json is broken: {error}"))
            .hint("without a `.txt`, the caption must come from the json")
    })?;
    match json.get("caption").and_then(serde_json::Value::as_str) {
        Some(caption) => Ok((not_empty(caption)?, false)),
        None => Err(Fault::new(
            Reason::MissingCaption,
            "the json has no string under `caption`",
        )
        .hint("img2dataset writes the caption there")),
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
