//! What lies where in one shard: a sample's image, caption and label, from one pass over the headers.
//!
//! An index can be saved beside its shard as `NAME.tar.index`, so that opening many shards reads 64
//! bytes of each. It belongs to a tar of one length and time of change, and is not used for another.
//! That of a shard in a store is saved in this machine's cache, or found beside the shard.
//! Not for reading the samples ([`crate::data::shards`]) nor for tar headers ([`crate::data::shards::tar`]).
//!
//! The file: magic with version; as little-endian numbers length and time of the tar, or what a store says of its
//! version ([`Object::stamp`]) (u64), samples,
//! labels, classes, captions, sound samples, those without label, bytes of names, bytes of health (u32); the first 8 bytes of the BLAKE3
//! hash of these; the entries; the names; health as JSON; 16 bytes of the hash of all that.

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

/// Where a member lies in the tar.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Span {
    /// Where its contents begin; 0, where no contents can be, says that there is none.
    pub at: u64,
    /// Bytes.
    pub length: u32,
}

impl Span {
    /// Whether there is such a member.
    pub fn exists(self) -> bool {
        self.at != 0
    }

    /// Its bytes in the tar. An index that was damaged on purpose may tell any place.
    pub fn range(self) -> Range<u64> {
        self.at..self.at.saturating_add(u64::from(self.length))
    }
}

/// One sample.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Entry {
    /// The picture file.
    pub image: Span,
    /// The `.txt`.
    pub text: Span,
    /// The `.json`.
    pub json: Span,
    /// From the `.cls`.
    pub label: Option<u32>,
    /// What its name says the picture is.
    pub format: Format,
    /// What was wrong with it in the tar, and costs it.
    pub fault: Option<Reason>,
    /// Where the name ends; it begins where the one before ends.
    name_end: u32,
}

/// Counts that are known without the entries.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Samples, the damaged ones included.
    pub samples: u32,
    /// Samples with a label.
    pub labelled: u32,
    /// One more than the greatest label.
    pub classes: u32,
    /// Samples with a member for a caption.
    pub captioned: u32,
    /// Samples in which the index found no fault.
    pub usable: u32,
    /// Those of them without a label.
    pub unlabelled: u32,
}

/// The index of a shard.
#[derive(Debug, Default, PartialEq)]
pub struct ShardIndex {
    entries: Vec<Entry>,
    names: String,
    summary: Summary,
    health: Health,
}

/// Larger files than any picture below the cap of pixels.
const MOST_IMAGE: u64 = 1 << 30;
/// Longest caption or json.
const MOST_TEXT: u64 = 1 << 20;
/// As many classes as `tensors:` takes.
const MOST_CLASSES: u32 = 1_000_000;
/// Bytes that tell what a file is instead of a tar.
const START: u64 = 512;
/// Zeros that a tar without members has, by GNU tar's usual blocks.
const ENDS: u64 = 10 * 1024;

impl ShardIndex {
    /// Makes the index of a shard by one pass over its headers.
    pub fn of(shard: &Object) -> Result<Self> {
        let reader = shard.reader()?;
        if let (Some(remote), Some(start)) = (shard.remote(), reader.bytes(0, 2)?)
            && unpack::is_gzip(&start)
        {
            let url = remote.url();
            let message =
                format!("`{url}` is gzipped, and a store cannot be asked for parts of that");
            return Err(Error::input(message).hint(unpack::hint_for_store(url)));
        }
        Self::scan(&reader)
    }

    /// Makes the index of a tar by one pass over its headers.
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

    /// The samples.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The key of a sample, with its folder.
    pub fn name(&self, sample: usize) -> &str {
        let start = match sample {
            0 => 0,
            _ => self.entries[sample - 1].name_end as usize,
        };
        &self.names[start..self.entries[sample].name_end as usize]
    }

    /// Counts.
    pub fn summary(&self) -> Summary {
        self.summary
    }

    /// What was met in the tar beside the samples' own faults.
    pub fn health(&self) -> &Health {
        &self.health
    }
}

/// What a file without any member is instead of a tar; none of an empty one.
pub fn instead(file: &Reader) -> Result<Option<Content>> {
    let start = file.bytes(0, file.length().min(START))?.unwrap_or_default();
    if start.is_empty() || &start[..start.len().min(262)][start.len().min(257)..] == b"ustar" {
        return Ok(None);
    }
    // A tar without members is zeros, too.
    let zeros = start.iter().all(|byte| *byte == 0) && file.length() <= ENDS;
    let is_image = Format::of_bytes(&start).is_some().then_some(Content {
        what: "an image",
        hint: "pack images as a tar, or name the folder of their class folders without `shards:`",
    });
    let other = Content {
        what: "not a tar file",
        hint: "copy or download it again",
    };
    let found = content::of(&start).or(is_image).unwrap_or(other);
    Ok((!zeros).then_some(found))
}

/// Members on their way into samples.
#[derive(Default)]
struct Grouping {
    index: ShardIndex,
    places: HashMap<String, usize>,
    /// Keys of pictures that are left out since their names have more dots.
    dotted: HashSet<String>,
}

impl Grouping {
    fn damage(&mut self, reason: Reason, at: u64, name: Option<&[u8]>) {
        // A member that is known to be lost marks its sample, so that training names it.
        if let Some((key, kind)) = name.and_then(split)
            && Kind::of(&kind).is_some()
        {
            self.entry(key).fault.get_or_insert(reason);
            return;
        }
        // Nobody wants the contents of other members.
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
            // Places in the names are 32 bits; 4 GiB of names in one shard are no data set.
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
        // A picture that is left out is missed where there is no other under its key: else it is a mask, or the like.
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
            summary.labelled += u32::from(entry.label.is_some());
            let usable = entry.fault.is_none();
            summary.usable += u32::from(usable);
            summary.unlabelled += u32::from(usable && entry.label.is_none());
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

/// The number of a class, which may have white space around it, as Python's `int` reads it.
fn label(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    let text = text.trim_start_matches('\u{feff}').trim();
    text.parse().ok().filter(|label| *label < MOST_CLASSES)
}

/// What a member is to a sample.
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

/// The key, which is all up to the first dot of the last part, and what follows that dot.
fn split(name: &[u8]) -> Option<(String, String)> {
    let name = String::from_utf8_lossy(name);
    let name = name.strip_prefix("./").unwrap_or(&name);
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = name[last..].find('.')?;
    let key = (dot > 0).then(|| name[..last + dot].to_owned())?;
    Some((key, name[last + dot + 1..].to_ascii_lowercase()))
}

/// A name for messages: letters that would move the cursor are spelt out.
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
    /// Saves the index of a tar beside it, or that of an object in the cache.
    pub fn save(&self, tar: &Object) -> Result<()> {
        let (path, stamp) = (tar.index_path()?, tar.stamp());
        let health = serde_json::json!(self.health).to_string();
        let mut bytes = Vec::with_capacity(HEADER + self.entries.len() * ENTRY);
        bytes.extend(MAGIC);
        bytes.extend(stamp.0.to_le_bytes());
        bytes.extend(stamp.1.to_le_bytes());
        let Summary {
            samples,
            labelled,
            classes,
            captioned,
            usable,
            unlabelled,
        } = self.summary;
        let lengths = [self.names.len() as u32, health.len() as u32];
        let counts = [samples, labelled, classes, captioned, usable, unlabelled];
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

    /// The saved index of a tar; none where there is none, or it is damaged or of another tar.
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

/// What is known of a saved index.
pub enum Saved {
    /// There is none.
    Absent,
    /// It is of another tar, or damaged.
    Stale,
    /// Its counts.
    Sound(Summary),
}

/// The counts of the saved indexes of tars, from their first bytes. What lies in stores is asked for all at once.
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
        // The store may have a newer one; nobody but this program looks after the cache.
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
        labelled: short(fields, 28),
        classes: short(fields, 32),
        captioned: short(fields, 36),
        usable: short(fields, 40),
        unlabelled: short(fields, 44),
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

/// The message for what an index found wrong with a sample.
pub fn fault_of(entry: &Entry) -> Option<Fault> {
    entry.fault.map(|reason| {
        Fault::new(reason, reason.text()).hint(match reason {
            Reason::DottedKey => {
                "WebDataset's key is the name up to the first dot, so `22.05.0.jpg` has the key `22` and the extension \
                 `05.0.jpg`; rename members so that the only dot is before `jpg`, such as `22_05_0.jpg`"
            }
            Reason::SparseMember => "make the tar again without `--sparse`",
            Reason::LinkMember => "make the tar again with `--dereference --hard-dereference`",
            Reason::BadLabel => {
                "a `.cls` holds the number of the class in decimal digits, not its name"
            }
            _ => "leave the sample out, or make the shard again; `advxl data check` lists all",
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_goes_up_to_the_first_dot_of_the_last_part() {
        let of = |name: &str| split(name.as_bytes());
        let pair = |key: &str, end: &str| Some((key.to_owned(), end.to_owned()));
        assert_eq!(of("000.jpg"), pair("000", "jpg"));
        assert_eq!(of("./a.b/000.seg.PNG"), pair("a.b/000", "seg.png"));
        assert_eq!(of("a.b/000"), None);
        assert_eq!(of("a/.hidden"), None);
    }

    #[test]
    fn names_in_messages_are_short_and_hold_no_control_letters() {
        assert_eq!(shown(b"a\x1b[2Jb\n"), "a\\u{1b}[2Jb\\n");
        assert!(shown(&[b'x'; 1000]).len() == 120);
        assert_eq!(shown(b"\xff"), "\u{fffd}");
    }

    #[test]
    fn entries_are_read_as_they_are_written() {
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
