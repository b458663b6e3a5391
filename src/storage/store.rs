//! Reads shards: local files, or objects of an object store or web server ([`crate::storage::cloud`]).
//!
//! A file is read at offsets. An object is read by range requests, several at once. A scan requests blocks ahead, so
//! that a tar is streamed once and little of it is in memory. The index of an object is kept in the local cache:
//! nothing is written to a store. [`crate::data::shards`] interprets the bytes.

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

/// Where a shard is stored.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Location {
    /// A local path.
    File(PathBuf),
    /// `s3://`, `gs://`, `https://` or `http://`.
    Url(String),
}

/// Supported URL schemes.
const SCHEMES: [&str; 4] = ["s3", "gs", "https", "http"];

impl Location {
    /// Parses a path or URL.
    ///
    /// Errors: a URL with an unsupported scheme.
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
            true => Err(
                Error::input(format!("`{name}`: unsupported URL scheme `{scheme}`"))
                    .hint("use `s3://`, `gs://` (Google), `https://` or `http://`"),
            ),
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

/// Returns the URLs that match one with `*` and `?`, sorted.
pub fn list(url: &str) -> Result<Vec<Location>> {
    Ok(cloud::list(url)?.into_iter().map(Location::Url).collect())
}

/// An existing shard, in its current version.
#[derive(Debug)]
pub enum Object {
    /// A file.
    File {
        /// Its path.
        path: PathBuf,
        /// Length and modification time.
        stamp: (u64, u64),
    },
    /// An object in a store or on a web server.
    Remote(Arc<Remote>),
}

impl Object {
    /// Looks up shards, all remote ones concurrently.
    ///
    /// Errors: missing shards, reported together; errors of stores and disks.
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
            "{} of {all} shards do not exist: the store returned 404 for {}{more}",
            missing.len(),
            missing[..missing.len().min(3)].join(", ")
        );
        Err(Error::input(message)
            .hint("check the bucket or host, the path and the range; narrow the range"))
    }

    /// Returns whether the shard is remote.
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::Remote(_))
    }

    /// Returns the remote object, if the shard is one.
    pub fn remote(&self) -> Option<&Arc<Remote>> {
        match self {
            Self::Remote(remote) => Some(remote),
            Self::File { .. } => None,
        }
    }

    /// Returns the file name: the part after the last `/`.
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

    /// Returns a stamp that identifies this version; indexes store it.
    pub fn stamp(&self) -> (u64, u64) {
        match self {
            Self::File { stamp, .. } => *stamp,
            Self::Remote(remote) => remote.stamp(),
        }
    }

    /// Returns whether an index with this stamp belongs to this version.
    pub fn accepts(&self, stamp: (u64, u64)) -> bool {
        match self {
            Self::File { stamp: own, .. } => stamp == *own,
            Self::Remote(remote) => remote.accepts(stamp),
        }
    }

    /// Returns the local path of its index: next to a file, or in the cache for an object.
    ///
    /// Errors: a remote object, and no cache folder is configured.
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

    /// Opens the shard for reading from start to end.
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

/// Reads the bytes of a shard sequentially.
#[derive(Debug)]
pub enum Reader {
    /// A file, read at offsets.
    File(Source),
    /// The part of a damaged gzip file that could be unpacked.
    Cut(Source),
    /// A remote object, streamed.
    Passing(Passing),
}

impl Reader {
    /// Returns the length in bytes.
    pub fn length(&self) -> u64 {
        match self {
            Self::File(file) | Self::Cut(file) => file.length(),
            Self::Passing(passing) => passing.remote.length(),
        }
    }

    /// Returns whether this is only the intact start of a damaged gzip file.
    pub fn is_cut(&self) -> bool {
        matches!(self, Self::Cut(_))
    }

    /// Fills a buffer with the bytes from offset `at`. All of them must exist.
    pub fn fill(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        match self {
            Self::File(file) | Self::Cut(file) => file.fill(at, bytes),
            Self::Passing(passing) => passing.fill(at, bytes),
        }
    }

    /// Returns `count` bytes from offset `at`, or `None` if the shard ends before that.
    pub fn bytes(&self, at: u64, count: u64) -> Result<Option<Vec<u8>>> {
        if at.checked_add(count).is_none_or(|end| end > self.length()) {
            return Ok(None);
        }
        let mut bytes = vec![0; count as usize];
        self.fill(at, &mut bytes)?;
        Ok(Some(bytes))
    }
}

/// Bytes per request of a scan: one request for a small shard, and few for a large one.
const BLOCK: u64 = 4 << 20;

/// Blocks requested at a time. With the last two received, five are in memory.
const BLOCKS_AHEAD: u64 = 3;

/// A remote object that is read from start to end. Seeking back within a block is free.
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
        for ahead in number..end {
            if let Entry::Vacant(place) = blocks.entry(ahead) {
                let range = ahead * BLOCK..((ahead + 1) * BLOCK).min(length);
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

/// Some byte ranges of a shard.
#[derive(Debug, Default)]
pub struct Pieces(Vec<(u64, Vec<u8>)>);

impl Pieces {
    /// Reads ranges of a file. Returns `None` if one extends past its end.
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

    /// Returns the bytes of a range, if they were read.
    pub fn get(&self, range: Range<u64>) -> Option<&[u8]> {
        self.0.iter().find_map(|(at, bytes)| {
            let from = range.start.checked_sub(*at)?;
            bytes.get(from as usize..(range.end - at) as usize)
        })
    }

    /// Like [`Self::get`], for the last use: avoids a copy if a piece begins at the range.
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

/// Pending requests for ranges of an object.
#[derive(Debug)]
pub struct Requests(Vec<(Range<u64>, Pending<Vec<u8>>)>);

impl Requests {
    /// Requests ranges, which must lie within the object.
    pub fn of(remote: &Arc<Remote>, ranges: &[Range<u64>]) -> Result<Self> {
        let asked = ranges
            .iter()
            .map(|range| Ok((range.clone(), remote.ask(range.clone())?)));
        Ok(Self(asked.collect::<Result<_>>()?))
    }

    /// Returns the total number of bytes requested.
    pub fn length(&self) -> u64 {
        self.0
            .iter()
            .map(|(range, _)| range.end - range.start)
            .sum()
    }

    /// Waits for all responses.
    pub fn wait(self) -> Result<Pieces> {
        let pieces = self
            .0
            .into_iter()
            .map(|(range, pending)| Ok((range.start, pending.wait()?)));
        Ok(Pieces(pieces.collect::<Result<_>>()?))
    }
}

/// Samples requested before they are needed: as many as there are concurrent requests, and as many again that wait for
/// a thread. About 15 MB of photographs.
const SAMPLES_AHEAD: u64 = 128;

/// How far ahead samples have been requested by threads that read them in order.
#[derive(Debug)]
pub struct Ahead {
    until: Mutex<u64>,
    end: u64,
}

impl Ahead {
    /// Starts with no requests, for samples before `end`.
    pub fn new(end: u64) -> Self {
        let until = Mutex::default();
        Self { until, end }
    }

    /// Requests `places`, which are about to be read, and some samples after them, each unless already requested.
    pub fn ask(&self, places: Range<u64>, ask: impl FnMut(u64)) {
        let until = (places.end + SAMPLES_AHEAD).min(self.end).max(places.end);
        // The lock is held during the requests. Otherwise another thread could read a sample that is about to be
        // requested, and it would be fetched twice.
        let mut asked = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        (places.start.max(*asked)..until).for_each(ask);
        *asked = until.max(*asked);
    }
}

/// Returns the first location that is listed twice, whose samples would be counted twice.
pub fn twice(locations: &[Location]) -> Option<&Location> {
    let mut seen = BTreeSet::new();
    locations.iter().find(|location| !seen.insert(*location))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_distinguished_from_paths() {
        let of =
            |name: &str| Location::of(name).map(|location| matches!(location, Location::Url(_)));
        assert!(of("s3://bucket/0.tar").unwrap() && of("http://host/0.tar").unwrap());
        assert!(!of("data/0.tar").unwrap() && !of("./a b://0.tar").unwrap());
        let error = of("hdfs://host/0.tar").unwrap_err().to_string();
        assert!(error.contains("unsupported URL scheme `hdfs`"), "{error}");
    }

    #[test]
    fn every_sample_is_requested_once_and_before_it_is_read() {
        let ahead = Ahead::new(1000);
        let asked = |places: Range<u64>| {
            let mut asked = Vec::new();
            ahead.ask(places, |place| asked.push(place));
            asked
        };
        assert!(asked(16..32).into_iter().eq(16..160));
        assert!(asked(32..48).into_iter().eq(160..176));
        // A late thread: all its samples were already requested.
        assert!(asked(20..30).is_empty());
        assert!(asked(990..1000).into_iter().eq(990..1000));
        assert!(asked(990..1000).is_empty());
    }

    #[test]
    fn pieces_return_only_bytes_that_were_read() {
        let pieces = || Pieces(vec![(10, vec![1, 2, 3]), (20, vec![4])]);
        assert_eq!(pieces().get(11..13), Some(&[2, 3][..]));
        assert_eq!(pieces().get(12..14), None);
        assert_eq!(pieces().take(10..12), Some(vec![1, 2]));
        assert_eq!(pieces().take(11..13), Some(vec![2, 3]));
        assert_eq!(pieces().take(20..22), None);
        assert_eq!(pieces().take(9..10), None);
    }
}
