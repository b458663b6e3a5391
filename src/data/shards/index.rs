//! The index of one shard: the location of each sample's image, caption and label, from one pass over the headers.
//!
//! An index can be saved next to its shard as `NAME.tar.index`, so that opening many shards only reads 64 bytes of each
//! index. It belongs to a tar of one length and modification time and is not used for any other.
//! The index of a shard in an object store is saved in this machine's cache, or found next to the shard.
//! Not for reading the samples ([`crate::data::shards`]) or for tar headers ([`crate::data::shards::tar`]).
//!
//! File format: magic with version; length and modification time of the tar, or a store's version of it
//! ([`Object::stamp`]) (u64); numbers of samples, labels, classes, captions, usable samples and usable samples without
//! a label, bytes of the names, bytes of the health (u32); the first 8 bytes of the BLAKE3 hash of all this; the
//! entries; the names; the health as JSON; 16 bytes of the hash of everything before. Numbers are little-endian.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use rayon::prelude::*;

use super::tar;
use super::tar::TarEntry;
use crate::error::{Error, Result};
use crate::files;
use crate::files::Source;
use crate::image::content::Content;
use crate::image::decode::outcome::Format;
use crate::image::{Fault, Health, Reason, content};
use crate::storage::store::{Object, Reader};
use crate::storage::unpack;

/// Location of a member in the tar.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Span {
    /// Offset of its contents. 0, which is never the offset of contents, means that there is no such member.
    pub at: u64,
    /// Length in bytes.
    pub length: u32,
}

impl Span {
    /// Returns whether there is such a member.
    pub fn exists(self) -> bool {
        self.at != 0
    }

    /// Returns its byte range in the tar. A maliciously crafted index may contain any offset.
    pub fn range(self) -> Range<u64> {
        self.at..self.at.saturating_add(u64::from(self.length))
    }
}

/// One sample.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Entry {
    /// The image file.
    pub image: Span,
    /// The `.txt` member.
    pub text: Span,
    /// The `.json` member.
    pub json: Span,
    /// The label from the `.cls` member.
    pub label: Option<u32>,
    /// The image format that the name suggests.
    pub format: Format,
    /// The damage in the tar that makes the sample unusable.
    pub fault: Option<Reason>,
    /// End of the name, which starts at the end of the previous name.
    name_end: u32,
}

/// Counts that are available without reading the entries.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Samples, including damaged ones.
    pub samples: u32,
    /// Samples with a label.
    pub labeled: u32,
    /// One more than the largest label.
    pub classes: u32,
    /// Samples with a `.txt` or `.json` member.
    pub captioned: u32,
    /// Samples in which the index found no fault.
    pub usable: u32,
    /// Usable samples without a label.
    pub unlabeled: u32,
}

/// The index of a shard.
#[derive(Debug, Default, PartialEq)]
pub struct ShardIndex {
    entries: Vec<Entry>,
    names: String,
    summary: Summary,
    health: Health,
}

/// Largest image file; larger than any image within the pixel limit.
const MOST_IMAGE: u64 = 1 << 30;
/// Longest caption or json.
const MOST_TEXT: u64 = 1 << 20;
/// Largest number of classes, the same as for `tensors:`.
const MOST_CLASSES: u32 = 1_000_000;
/// Leading bytes that identify a file that is not a tar.
const START: u64 = 512;
/// Length of a tar without members, which is all zeros, with GNU tar's default blocking.
const ENDS: u64 = 10 * 1024;

impl ShardIndex {
    /// Builds the index of a shard in one pass over its headers.
    pub fn of(shard: &Object) -> Result<Self> {
        let reader = shard.reader()?;
        if let (Some(remote), Some(start)) = (shard.remote(), reader.bytes(0, 2)?)
            && unpack::is_gzip(&start)
        {
            let url = remote.url();
            let message =
                format!("`{url}` is gzipped, so parts of it cannot be requested from a store");
            return Err(Error::input(message).hint(unpack::hint_for_store(url)));
        }
        Self::scan(&reader)
    }

    /// Builds the index of a tar in one pass over its headers.
    pub fn scan(file: &Reader) -> Result<Self> {
        let mut grouping = Grouping::default();
        let (mut failed, mut members) = (None, false);
        tar::scan(file, |found| match found {
            TarEntry::Member { name, at, length } => {
                members = true;
                if let Err(error) = grouping.add(file, &name, at, length) {
                    failed.get_or_insert(error);
                }
            }
            TarEntry::Damage { reason, at, name } => {
                members |= name.is_some();
                grouping.damage(reason, at, name.as_deref());
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let mut index = grouping.finish();
        if !members && let Some(found) = instead(file)? {
            index.health = Health::default();
            index
                .health
                .add(Reason::NotATar, || format!("this is {}", found.what));
        }
        if file.is_cut() {
            index.health.add(Reason::DamagedGzip, String::new);
        }
        Ok(index)
    }

    /// Returns the samples.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Returns the key of a sample, with its folder.
    pub fn name(&self, sample: usize) -> &str {
        let start = match sample {
            0 => 0,
            _ => self.entries[sample - 1].name_end as usize,
        };
        &self.names[start..self.entries[sample].name_end as usize]
    }

    /// Returns the counts.
    pub fn summary(&self) -> Summary {
        self.summary
    }

    /// Returns damage and oddities of the tar other than the faults of the samples.
    pub fn health(&self) -> &Health {
        &self.health
    }
}

/// Identifies a file without members that is not a tar; none for an empty file or an empty tar.
pub fn instead(file: &Reader) -> Result<Option<Content>> {
    let start = file.bytes(0, file.length().min(START))?.unwrap_or_default();
    if start.is_empty() || &start[..start.len().min(262)][start.len().min(257)..] == b"ustar" {
        return Ok(None);
    }
    // A tar without members is also all zeros.
    let zeros = start.iter().all(|byte| *byte == 0) && file.length() <= ENDS;
    let is_image = Format::of_bytes(&start).is_some().then_some(Content {
        what: "an image",
        hint: "pack the images as a tar, or use the folder of their class folders without `shards:`",
    });
    let other = Content {
        what: "not a tar file",
        hint: "copy or download it again",
    };
    let found = content::of(&start).or(is_image).unwrap_or(other);
    Ok((!zeros).then_some(found))
}

/// Groups members into samples.
#[derive(Default)]
struct Grouping {
    index: ShardIndex,
    places: HashMap<String, usize>,
    /// Keys of images that are ignored because their names have more dots.
    dotted: HashSet<String>,
}

impl Grouping {
    fn damage(&mut self, reason: Reason, at: u64, name: Option<&[u8]>) {
        // If the name of the lost member is known, its sample is marked as broken, so that training reports it.
        if let Some((key, kind)) = name.and_then(split)
            && Kind::of(&kind).is_some()
        {
            self.entry(key).fault.get_or_insert(reason);
            return;
        }
        // The contents of other members are not used.
        let reason = match reason {
            Reason::SparseMember | Reason::LinkMember => Reason::UnusedMember,
            other => other,
        };
        self.index.health.add(reason, || match name {
            Some(name) => format!("byte {at} ({})", shown(name)),
            None => format!("byte {at}"),
        });
    }

    fn add(&mut self, file: &Reader, name: &[u8], at: u64, length: u64) -> Result<()> {
        let unsafe_name = name.starts_with(b"/")
            || name.split(|byte| *byte == b'/').any(|part| part == b"..")
            || name.iter().any(|byte| *byte < b' ' || *byte == b'\\');
        let health = &mut self.index.health;
        if unsafe_name {
            health.add(Reason::UnsafeName, || shown(name));
        }
        let Some((key, end)) = split(name) else {
            health.add(Reason::NoExtension, || shown(name));
            return Ok(());
        };
        let Some(kind) = Kind::of(&end) else {
            health.add(Reason::UnusedMember, || shown(name));
            let last = end.rsplit('.').next().unwrap_or_default();
            if Format::of_extension(last).is_some() {
                self.dotted.insert(key);
            }
            return Ok(());
        };
        let most = match kind {
            Kind::Image(_) => MOST_IMAGE,
            _ => MOST_TEXT,
        };
        let entry = self.entry(key);
        let span = Span {
            at,
            length: length.min(most) as u32,
        };
        let taken = match kind {
            Kind::Image(_) => entry.image.exists(),
            Kind::Text => entry.text.exists(),
            Kind::Json => entry.json.exists(),
            Kind::Label => entry.label.is_some(),
        };
        let fault = match length {
            _ if taken => Some(Reason::DuplicateKey),
            0 if matches!(kind, Kind::Image(_)) => Some(Reason::EmptyMember),
            _ if length > most => Some(Reason::MemberTooLarge),
            _ => None,
        };
        if let Some(fault) = fault {
            entry.fault.get_or_insert(fault);
        }
        match kind {
            _ if taken => {}
            Kind::Image(format) => (entry.image, entry.format) = (span, format),
            Kind::Text => entry.text = span,
            Kind::Json => entry.json = span,
            Kind::Label => {
                let text = file.bytes(at, length.min(MOST_LABEL))?.unwrap_or_default();
                entry.label = label(&text);
                if entry.label.is_none() {
                    entry.fault.get_or_insert(Reason::BadLabel);
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, key: String) -> &mut Entry {
        let index = &mut self.index;
        let place = *self.places.entry(key).or_insert_with_key(|key| {
            // Offsets into the names have 32 bits; no real shard has 4 GiB of names.
            if index.names.len() + key.len() < u32::MAX as usize {
                index.names.push_str(key);
            }
            index.entries.push(Entry {
                name_end: index.names.len() as u32,
                ..Entry::default()
            });
            index.entries.len() - 1
        });
        &mut index.entries[place]
    }

    fn finish(mut self) -> ShardIndex {
        // An ignored image is a fault only if its key has no other image; otherwise it is a mask or similar.
        let mut dotted: Vec<String> = std::mem::take(&mut self.dotted).into_iter().collect();
        dotted.sort();
        for key in dotted {
            let entry = self.entry(key);
            if !entry.image.exists() {
                entry.fault.get_or_insert(Reason::DottedKey);
            }
        }
        let summary = &mut self.index.summary;
        for entry in &mut self.index.entries {
            if !entry.image.exists() {
                entry.fault.get_or_insert(Reason::MissingImage);
            }
            summary.samples += 1;
            summary.captioned += u32::from(entry.text.exists() || entry.json.exists());
            summary.labeled += u32::from(entry.label.is_some());
            let usable = entry.fault.is_none();
            summary.usable += u32::from(usable);
            summary.unlabeled += u32::from(usable && entry.label.is_none());
            let above = entry.label.map_or(0, |label| label + 1);
            summary.classes = summary.classes.max(above);
        }
        if summary.samples == 0 {
            self.index.health.add(Reason::EmptyShard, String::new);
        }
        self.index.names.shrink_to_fit();
        self.index.entries.shrink_to_fit();
        self.index
    }
}

/// Longest `.cls`, white space included.
const MOST_LABEL: u64 = 64;

/// Parses a class number, possibly surrounded by white space, as Python's `int` does.
fn label(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    let text = text.trim_start_matches('\u{feff}').trim();
    text.parse().ok().filter(|label| *label < MOST_CLASSES)
}

/// The role of a member in a sample.
enum Kind {
    Image(Format),
    Text,
    Json,
    Label,
}

impl Kind {
    fn of(end: &str) -> Option<Self> {
        Some(match end {
            "txt" => Kind::Text,
            "json" => Kind::Json,
            "cls" => Kind::Label,
            _ => Kind::Image(Format::of_extension(end)?),
        })
    }
}

/// Splits a name into the key, which ends before the first dot of the last component, and the extension after that dot.
fn split(name: &[u8]) -> Option<(String, String)> {
    let name = String::from_utf8_lossy(name);
    let name = name.strip_prefix("./").unwrap_or(&name);
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = name[last..].find('.')?;
    let key = (dot > 0).then(|| name[..last + dot].to_owned())?;
    Some((key, name[last + dot + 1..].to_ascii_lowercase()))
}

/// Formats a name for messages: at most 120 characters, with control characters escaped.
pub fn shown(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    let end = name
        .char_indices()
        .nth(120)
        .map_or(name.len(), |(at, _)| at);
    name[..end].escape_debug().to_string()
}

pub(crate) const MAGIC: &[u8; 8] = b"ADVXLIX2";
pub(crate) const HEADER: usize = 64;
pub(crate) const ENTRY: usize = 48;

impl ShardIndex {
    /// Saves the index of a file next to it, or the index of an object in a store in the cache.
    pub fn save(&self, tar: &Object) -> Result<()> {
        let (path, stamp) = (tar.index_path()?, tar.stamp());
        let health = serde_json::json!(self.health).to_string();
        let mut bytes = Vec::with_capacity(HEADER + self.entries.len() * ENTRY);
        bytes.extend(MAGIC);
        bytes.extend(stamp.0.to_le_bytes());
        bytes.extend(stamp.1.to_le_bytes());
        let Summary {
            samples,
            labeled,
            classes,
            captioned,
            usable,
            unlabeled,
        } = self.summary;
        let lengths = [self.names.len() as u32, health.len() as u32];
        let counts = [samples, labeled, classes, captioned, usable, unlabeled];
        for number in counts.into_iter().chain(lengths) {
            bytes.extend(number.to_le_bytes());
        }
        let hash = blake3::hash(&bytes);
        bytes.extend(&hash.as_bytes()[..8]);
        self.entries.iter().for_each(|entry| put(entry, &mut bytes));
        bytes.extend(self.names.as_bytes());
        bytes.extend(health.as_bytes());
        let hash = blake3::hash(&bytes);
        bytes.extend(&hash.as_bytes()[..16]);
        if let (true, Some(folder)) = (tar.is_remote(), path.parent()) {
            files::make_folder(folder)?;
        }
        files::write(&path, &bytes)
    }

    /// Loads the saved index of a tar; none if there is none, or if it is damaged or belongs to another tar.
    ///
    /// Errors: those of a store.
    pub fn load(tar: &Object) -> Result<Option<Self>> {
        let near = tar.index_path().and_then(|path| files::read(&path));
        let near = near.ok().and_then(|bytes| Self::read(&bytes, tar));
        match (near, tar.remote()) {
            (None, Some(remote)) => {
                let bytes = remote.ask_index(None)?.wait()?;
                Ok(bytes.and_then(|bytes| Self::read(&bytes, tar)))
            }
            (near, _) => Ok(near),
        }
    }

    pub(crate) fn read(bytes: &[u8], tar: &Object) -> Option<Self> {
        let (summary, [names_len, health_len]) = header(bytes.get(..HEADER)?, tar)?;
        let (body, hash) = bytes.split_at(bytes.len().checked_sub(16)?);
        if blake3::hash(body).as_bytes()[..16] != *hash {
            return None;
        }
        let entries_len = summary.samples as usize * ENTRY;
        let rest = body.get(HEADER..)?;
        if rest.len() != entries_len + names_len + health_len {
            return None;
        }
        let (entries, rest) = rest.split_at(entries_len);
        let (names, health) = rest.split_at(names_len);
        let names = String::from_utf8(names.to_vec()).ok()?;
        let mut before = 0;
        let entries = entries.chunks_exact(ENTRY).map(|bytes| {
            let entry = take(bytes)?;
            let end = entry.name_end as usize;
            let sound = before <= end && names.is_char_boundary(end);
            before = end;
            sound.then_some(entry)
        });
        Some(Self {
            entries: entries.collect::<Option<_>>()?,
            health: serde_json::from_slice(health).ok()?,
            names,
            summary,
        })
    }
}

/// The state of a saved index.
pub enum Saved {
    /// There is no saved index.
    Absent,
    /// The index belongs to another tar, or is damaged.
    Stale,
    /// The index is valid and has these counts.
    Sound(Summary),
}

/// Reads the counts of the saved indexes of tars from their first bytes. Indexes in stores are requested all at once.
///
/// Errors: those of stores.
pub fn saved_summaries(tars: &[Object]) -> Result<Vec<Saved>> {
    let near: Vec<Saved> = tars.par_iter().map(saved_near).collect();
    let asked = tars.iter().zip(near).map(|(tar, near)| {
        let asked = match (tar.remote(), &near) {
            (Some(remote), Saved::Absent) => Some(remote.ask_index(Some(HEADER as u64))?),
            _ => None,
        };
        Ok((tar, near, asked))
    });
    let asked: Vec<_> = asked.collect::<Result<_>>()?;
    let saved = asked.into_iter().map(|(tar, near, asked)| {
        Ok(match asked {
            None => near,
            Some(pending) => match pending.wait()? {
                None => Saved::Absent,
                Some(start) => Saved::of(&start, tar),
            },
        })
    });
    saved.collect()
}

fn saved_near(tar: &Object) -> Saved {
    let path = tar.index_path().ok().filter(|path| path.is_file());
    let Some(path) = path else {
        return Saved::Absent;
    };
    let start = Source::open(&path).and_then(|file| file.bytes(0, HEADER as u64));
    match Saved::of(&start.ok().flatten().unwrap_or_default(), tar) {
        // The store may have a newer index. A stale one in the cache is not reported, since only this program writes
        // there.
        Saved::Stale if tar.is_remote() => Saved::Absent,
        saved => saved,
    }
}

impl Saved {
    fn of(start: &[u8], tar: &Object) -> Self {
        match start.get(..HEADER).and_then(|start| header(start, tar)) {
            Some((summary, _)) => Self::Sound(summary),
            None => Self::Stale,
        }
    }
}

fn header(bytes: &[u8], tar: &Object) -> Option<(Summary, [usize; 2])> {
    let (fields, hash) = bytes.split_at(HEADER - 8);
    if !fields.starts_with(MAGIC) || blake3::hash(fields).as_bytes()[..8] != *hash {
        return None;
    }
    if !tar.accepts((long(fields, 8), long(fields, 16))) {
        return None;
    }
    let summary = Summary {
        samples: short(fields, 24),
        labeled: short(fields, 28),
        classes: short(fields, 32),
        captioned: short(fields, 36),
        usable: short(fields, 40),
        unlabeled: short(fields, 44),
    };
    let lengths = [short(fields, 48) as usize, short(fields, 52) as usize];
    Some((summary, lengths))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes[at..at + 8].iter().rev();
    eight.fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn short(bytes: &[u8], at: usize) -> u32 {
    let four = bytes[at..at + 4].iter().rev();
    four.fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}

fn put(entry: &Entry, bytes: &mut Vec<u8>) {
    let spans = [entry.image, entry.text, entry.json];
    spans
        .iter()
        .for_each(|span| bytes.extend(span.at.to_le_bytes()));
    spans
        .iter()
        .for_each(|span| bytes.extend(span.length.to_le_bytes()));
    bytes.extend(entry.label.unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(entry.name_end.to_le_bytes());
    let fault = entry.fault.map_or(0, |reason| reason.number() + 1);
    bytes.extend([entry.format as u8, fault, 0, 0]);
}

fn take(bytes: &[u8]) -> Option<Entry> {
    let span = |number: usize| Span {
        at: long(bytes, 8 * number),
        length: short(bytes, 24 + 4 * number),
    };
    let fault = match bytes[45] {
        0 => None,
        number => Some(Reason::numbered(number - 1)?),
    };
    let label = short(bytes, 36);
    Some(Entry {
        image: span(0),
        text: span(1),
        json: span(2),
        label: (label != u32::MAX).then_some(label),
        format: Format::numbered(bytes[44])?,
        fault,
        name_end: short(bytes, 40),
    })
}

/// Returns the fault that the index found in a sample, with a hint.
pub fn fault_of(entry: &Entry) -> Option<Fault> {
    entry.fault.map(|reason| {
        Fault::new(reason, reason.text()).hint(match reason {
            Reason::DottedKey => {
                "WebDataset's key is the name up to the first dot, so `22.05.0.jpg` has the key `22` and the extension \
                 `05.0.jpg`; rename members so that the only dot is before `jpg`, such as `22_05_0.jpg`"
            }
            Reason::SparseMember => "recreate the tar without `--sparse`",
            Reason::LinkMember => "recreate the tar with `--dereference --hard-dereference`",
            Reason::BadLabel => {
                "a `.cls` must contain the class number in decimal digits, not the class name"
            }
            _ => "leave the sample out, or recreate the shard; `advxl data check` lists all",
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_ends_at_the_first_dot_of_the_last_component() {
        let of = |name: &str| split(name.as_bytes());
        let pair = |key: &str, end: &str| Some((key.to_owned(), end.to_owned()));
        assert_eq!(of("000.jpg"), pair("000", "jpg"));
        assert_eq!(of("./a.b/000.seg.PNG"), pair("a.b/000", "seg.png"));
        assert_eq!(of("a.b/000"), None);
        assert_eq!(of("a/.hidden"), None);
    }

    #[test]
    fn names_in_messages_are_short_and_without_control_characters() {
        assert_eq!(shown(b"a\x1b[2Jb\n"), "a\\u{1b}[2Jb\\n");
        assert!(shown(&[b'x'; 1000]).len() == 120);
        assert_eq!(shown(b"\xff"), "\u{fffd}");
    }

    #[test]
    fn written_entries_are_read_back() {
        let entry = Entry {
            image: Span {
                at: 1 << 40,
                length: 7,
            },
            text: Span { at: 512, length: 1 },
            json: Span::default(),
            label: Some(3),
            format: Format::Webp,
            fault: Some(Reason::DuplicateKey),
            name_end: 9,
        };
        let mut bytes = Vec::new();
        put(&entry, &mut bytes);
        assert_eq!((bytes.len(), take(&bytes)), (ENTRY, Some(entry)));
    }
}
