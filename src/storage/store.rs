//! Where shards lie and how their bytes come: files of this machine, or objects of a store ([`crate::storage::cloud`]).
//!
//! A file is read in places. An object is asked for ranges, several at once, and waited for; a scan asks for
//! blocks ahead, so that a tar passes by once and little of it is in memory. What is made of an object, its
//! index, is kept in the cache of this machine: nothing is written to a store.
//! Not for what the bytes mean ([`crate::data::shards`]).

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::cache::indexes;
use super::cloud::{Pending, Remote};
use super::{cloud, unpack};
use crate::error::{Error, Result};
use crate::files;
use crate::files::Source;

/// Where a shard lies.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Location {
    /// A path on this machine.
    File(PathBuf),
    /// `s3://`, `gs://`, `https://` or `http://`.
    Url(String),
}

/// How addresses begin.
const SCHEMES: [&str; 4] = ["s3", "gs", "https", "http"];

impl Location {
    /// A path, or an address where it begins as one.
    ///
    /// Errors: an address of another kind.
    pub fn of(name: &str) -> Result<Self> {
        let name = name.strip_prefix("file://").unwrap_or(name);
        let Some((scheme, _)) = name.split_once("://") else {
            return Ok(Self::File(files::expanded(name)));
        };
        if SCHEMES.contains(&scheme) {
            return Ok(Self::Url(name.to_owned()));
        }
        let is_word = scheme.bytes().all(|byte| byte.is_ascii_alphanumeric());
        match is_word && !scheme.is_empty() {
            false => Ok(Self::File(name.into())),
            true => Err(Error::input(format!(
                "`{name}`: `{scheme}` is no kind of store that is read"
            ))
            .hint("stores are `s3://`, `gs://` (Google), `https://` and `http://`")),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Url(url) => f.write_str(url),
        }
    }
}

/// The addresses that fit one with `*` and `?`, sorted.
pub fn list(url: &str) -> Result<Vec<Location>> {
    Ok(cloud::list(url)?.into_iter().map(Location::Url).collect())
}

/// A shard that is there, in the version that it has now.
#[derive(Debug)]
pub enum Object {
    /// A file.
    File {
        /// Where it is.
        path: PathBuf,
        /// Length and time of change.
        stamp: (u64, u64),
    },
    /// An object of a store.
    Remote(Arc<Remote>),
}

impl Object {
    /// Finds shards, those in stores all at once.
    ///
    /// Errors: shards that are not there, told together; those of stores and disks.
    pub fn find(locations: Vec<Location>) -> Result<Vec<Self>> {
        let urls: Vec<String> = locations
            .iter()
            .filter_map(|location| match location {
                Location::Url(url) => Some(url.clone()),
                Location::File(_) => None,
            })
            .collect();
        let stamps: Vec<Option<(u64, u64)>> = locations
            .par_iter()
            .map(|location| match location {
                Location::File(path) => files::stamp(path).map(Some),
                Location::Url(_) => Ok(None),
            })
            .collect::<Result<_>>()?;
        let mut found = Remote::find(&urls)?.into_iter();
        let mut missing = Vec::new();
        let all = locations.len();
        let mut objects = Vec::with_capacity(all);
        for (location, stamp) in locations.into_iter().zip(stamps) {
            match location {
                Location::File(path) => {
                    let stamp = stamp.unwrap_or_default();
                    objects.push(Self::File { path, stamp });
                }
                Location::Url(url) => match found.next().flatten() {
                    Some(remote) => objects.push(Self::Remote(remote)),
                    None => missing.push(format!("`{url}`")),
                },
            }
        }
        if missing.is_empty() {
            return Ok(objects);
        }
        let more = if missing.len() > 3 { ", ..." } else { "" };
        let message = format!(
            "{} of {all} shards are not there: the store answered 404 for {}{more}",
            missing.len(),
            missing[..missing.len().min(3)].join(", ")
        );
        Err(Error::input(message).hint("check bucket or host, path and range; narrow the range"))
    }

    /// Whether it lies in a store.
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::Remote(_))
    }

    /// The object of a store.
    pub fn remote(&self) -> Option<&Arc<Remote>> {
        match self {
            Self::Remote(remote) => Some(remote),
            Self::File { .. } => None,
        }
    }

    /// Its name without what is before the last `/`.
    pub fn name(&self) -> String {
        match self {
            Self::File { path, .. } => {
                let name = path.file_name().unwrap_or_default();
                name.to_string_lossy().into_owned()
            }
            Self::Remote(remote) => {
                let name = remote.url().rsplit('/').next();
                name.unwrap_or_default().to_owned()
            }
        }
    }

    /// What tells this version from others; an index holds it.
    pub fn stamp(&self) -> (u64, u64) {
        match self {
            Self::File { stamp, .. } => *stamp,
            Self::Remote(remote) => remote.stamp(),
        }
    }

    /// Whether an index with this stamp is one of this version.
    pub fn accepts(&self, stamp: (u64, u64)) -> bool {
        match self {
            Self::File { stamp: own, .. } => stamp == *own,
            Self::Remote(remote) => remote.accepts(stamp),
        }
    }

    /// Where its index is kept on this machine: beside a file, in the cache for an object.
    ///
    /// Errors: an object, and no folder for the cache is known.
    pub fn index_path(&self) -> Result<PathBuf> {
        match self {
            Self::File { path, .. } => {
                let mut name = path.as_os_str().to_owned();
                name.push(".index");
                Ok(name.into())
            }
            Self::Remote(remote) => {
                let (folder, name) = remote.url().rsplit_once('/').unwrap_or_default();
                let hash = blake3::hash(folder.as_bytes()).to_hex();
                Ok(indexes()?.join(&hash[..16]).join(format!("{name}.index")))
            }
        }
    }

    /// Opens it for reading from its beginning to its end.
    pub fn reader(&self) -> Result<Reader> {
        Ok(match self {
            Self::File { path, stamp } => match unpack::open(path, *stamp)? {
                (file, true) => Reader::File(file),
                (file, false) => Reader::Cut(file),
            },
            Self::Remote(remote) => Reader::Passing(Passing {
                remote: remote.clone(),
                blocks: Mutex::default(),
            }),
        })
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, .. } => write!(f, "{}", path.display()),
            Self::Remote(remote) => f.write_str(remote.url()),
        }
    }
}

/// The bytes of a shard for one who goes through it.
#[derive(Debug)]
pub enum Reader {
    /// A file, read in places.
    File(Source),
    /// What could be unpacked of a damaged gzip file.
    Cut(Source),
    /// An object that passes by.
    Passing(Passing),
}

impl Reader {
    /// Length in bytes.
    pub fn length(&self) -> u64 {
        match self {
            Self::File(file) | Self::Cut(file) => file.length(),
            Self::Passing(passing) => passing.remote.length(),
        }
    }

    /// Whether it is the sound beginning of a gzip file that is damaged.
    pub fn is_cut(&self) -> bool {
        matches!(self, Self::Cut(_))
    }

    /// Fills a buffer with the bytes from a place on, all of which must be there.
    pub fn fill(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        match self {
            Self::File(file) | Self::Cut(file) => file.fill(at, bytes),
            Self::Passing(passing) => passing.fill(at, bytes),
        }
    }

    /// The bytes from a place on; none where the shard ends before.
    pub fn bytes(&self, at: u64, count: u64) -> Result<Option<Vec<u8>>> {
        if at.checked_add(count).is_none_or(|end| end > self.length()) {
            return Ok(None);
        }
        let mut bytes = vec![0; count as usize];
        self.fill(at, &mut bytes)?;
        Ok(Some(bytes))
    }
}

/// What a scan asks for at a time: one request for many small shards, and few for large ones.
const BLOCK: u64 = 4 << 20;

/// Blocks that are asked for at a time; with the last two that came, five are in memory.
const BLOCKS_AHEAD: u64 = 3;

/// An object that is gone through from its beginning to its end. Steps back within a block cost nothing.
#[derive(Debug)]
pub struct Passing {
    remote: Arc<Remote>,
    blocks: Mutex<BTreeMap<u64, Block>>,
}

#[derive(Debug)]
enum Block {
    Asked(Pending<Vec<u8>>),
    Here(Vec<u8>),
}

impl Passing {
    fn fill(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut at, mut bytes) = (at, bytes);
        while !bytes.is_empty() {
            let number = at / BLOCK;
            let block = self.block(&mut blocks, number)?;
            let from = (at % BLOCK) as usize;
            let count = bytes.len().min(block.len().saturating_sub(from));
            if count == 0 {
                let message = format!("`{}` ends at byte {at}", self.remote.url());
                return Err(Error::failed(message));
            }
            let (now, later) = bytes.split_at_mut(count);
            now.copy_from_slice(&block[from..from + count]);
            (at, bytes) = (at + count as u64, later);
        }
        Ok(())
    }

    fn block<'a>(&self, blocks: &'a mut BTreeMap<u64, Block>, number: u64) -> Result<&'a [u8]> {
        let length = self.remote.length();
        let end = (number + BLOCKS_AHEAD).min(length.div_ceil(BLOCK));
        blocks.retain(|known, _| (number.saturating_sub(1)..end).contains(known));
        for wanted in number..end {
            if let Entry::Vacant(place) = blocks.entry(wanted) {
                let range = wanted * BLOCK..((wanted + 1) * BLOCK).min(length);
                place.insert(Block::Asked(self.remote.ask(range)?));
            }
        }
        let here = match blocks.remove(&number) {
            Some(Block::Asked(pending)) => pending.wait()?,
            Some(Block::Here(bytes)) => bytes,
            None => Vec::new(),
        };
        match blocks.entry(number).or_insert(Block::Here(here)) {
            Block::Here(bytes) => Ok(bytes),
            Block::Asked(_) => Ok(&[]),
        }
    }
}

/// Bytes of a few places of a shard.
#[derive(Debug, Default)]
pub struct Pieces(Vec<(u64, Vec<u8>)>);

impl Pieces {
    /// Reads ranges of a file; none where one leads beyond its end.
    pub fn read(file: &Source, ranges: &[Range<u64>]) -> Result<Option<Self>> {
        let mut pieces = Vec::with_capacity(ranges.len());
        for range in ranges {
            match file.bytes(range.start, range.end - range.start)? {
                Some(bytes) => pieces.push((range.start, bytes)),
                None => return Ok(None),
            }
        }
        Ok(Some(Self(pieces)))
    }

    /// The bytes of a place, if they were read.
    pub fn get(&self, range: Range<u64>) -> Option<&[u8]> {
        self.0.iter().find_map(|(at, bytes)| {
            let from = range.start.checked_sub(*at)?;
            bytes.get(from as usize..(range.end - at) as usize)
        })
    }

    /// The same for the last who asks: not copied where a piece begins there.
    pub fn take(mut self, range: Range<u64>) -> Option<Vec<u8>> {
        let whole = self.0.iter().position(|(at, _)| *at == range.start);
        match whole {
            None => self.get(range).map(<[u8]>::to_vec),
            Some(place) => {
                let mut bytes = self.0.swap_remove(place).1;
                let length = (range.end - range.start) as usize;
                bytes.truncate(length);
                (bytes.len() == length).then_some(bytes)
            }
        }
    }
}

/// Pieces of an object that were asked for.
#[derive(Debug)]
pub struct Requests(Vec<(Range<u64>, Pending<Vec<u8>>)>);

impl Requests {
    /// Asks for ranges, which must lie within the object.
    pub fn of(remote: &Arc<Remote>, ranges: &[Range<u64>]) -> Result<Self> {
        let asked = ranges
            .iter()
            .map(|range| Ok((range.clone(), remote.ask(range.clone())?)));
        Ok(Self(asked.collect::<Result<_>>()?))
    }

    /// Bytes of all of them.
    pub fn length(&self) -> u64 {
        self.0
            .iter()
            .map(|(range, _)| range.end - range.start)
            .sum()
    }

    /// Waits for all of them.
    pub fn wait(self) -> Result<Pieces> {
        let pieces = self
            .0
            .into_iter()
            .map(|(range, pending)| Ok((range.start, pending.wait()?)));
        Ok(Pieces(pieces.collect::<Result<_>>()?))
    }
}

/// Samples that are asked for before they are needed: as many as requests are under way at a time, and as
/// many that wait for a thread, about 15 MB of photographs.
const SAMPLES_AHEAD: u64 = 128;

/// How far threads that go through samples in order have asked ahead.
#[derive(Debug)]
pub struct Ahead {
    until: Mutex<u64>,
    end: u64,
}

impl Ahead {
    /// Nothing is asked for yet of the places before `end`.
    pub fn new(end: u64) -> Self {
        let until = Mutex::default();
        Self { until, end }
    }

    /// One is about to read `places`: asks for those, and some after them, that nobody has asked for yet.
    pub fn ask(&self, places: Range<u64>, ask: impl FnMut(u64)) {
        let until = (places.end + SAMPLES_AHEAD).min(self.end).max(places.end);
        // Held while it is asked, or another thread would read what is about to be asked for, and it would come twice.
        let mut asked = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        (places.start.max(*asked)..until).for_each(ask);
        *asked = until.max(*asked);
    }
}

/// Locations that are named twice, which would count samples double.
pub fn twice(locations: &[Location]) -> Option<&Location> {
    let mut seen = BTreeSet::new();
    locations.iter().find(|location| !seen.insert(*location))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_from_paths() {
        let of =
            |name: &str| Location::of(name).map(|location| matches!(location, Location::Url(_)));
        assert!(of("s3://bucket/0.tar").unwrap() && of("http://host/0.tar").unwrap());
        assert!(!of("data/0.tar").unwrap() && !of("./a b://0.tar").unwrap());
        let error = of("hdfs://host/0.tar").unwrap_err().to_string();
        assert!(error.contains("`hdfs` is no kind of store"), "{error}");
    }

    #[test]
    fn every_sample_is_asked_for_once_and_before_it_is_read() {
        let ahead = Ahead::new(1000);
        let asked = |places: Range<u64>| {
            let mut asked = Vec::new();
            ahead.ask(places, |place| asked.push(place));
            asked
        };
        assert!(asked(16..32).into_iter().eq(16..160));
        assert!(asked(32..48).into_iter().eq(160..176));
        // Another thread is late: all its samples were asked for.
        assert!(asked(20..30).is_empty());
        assert!(asked(990..1000).into_iter().eq(990..1000));
        assert!(asked(990..1000).is_empty());
    }

    #[test]
    fn pieces_give_what_was_read_and_nothing_else() {
        let pieces = || Pieces(vec![(10, vec![1, 2, 3]), (20, vec![4])]);
        assert_eq!(pieces().get(11..13), Some(&[2, 3][..]));
        assert_eq!(pieces().get(12..14), None);
        assert_eq!(pieces().take(10..12), Some(vec![1, 2]));
        assert_eq!(pieces().take(11..13), Some(vec![2, 3]));
        assert_eq!(pieces().take(20..22), None);
        assert_eq!(pieces().take(9..10), None);
    }
}
