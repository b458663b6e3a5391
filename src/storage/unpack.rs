//! Unpacks gzipped shards and zip entries. Samples are read by offset, which a compressed file does not support. The
//! file is therefore unpacked once, into the local cache, and read from there.
//!
//! The alternative, an index of points where decompression can start, would unpack several megabytes for every sample
//! in random order. A damaged or truncated gzip file is unpacked as far as possible, and its index records that. Remote
//! shards are not supported, since they would be downloaded whole.

use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::Crc;
use flate2::bufread::{DeflateDecoder, GzDecoder};

use super::archive::{DEFLATED, Found, STORED};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::files::{Draft, Source};
use crate::memory;

/// Images are already compressed, and captions compress to a tenth. A file that grows by more than this factor, beyond
/// [`LEAST`] bytes, is a decompression bomb.
const MOST_GROWTH: u64 = 100;
const LEAST: u64 = 1 << 30;

/// Returns whether a file begins like gzip.
pub fn is_gzip(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0x1f, 0x8b])
}

/// Returns a hint on how to unpack a remote shard.
pub fn hint_for_store(url: &str) -> String {
    let plain = plain_name(url);
    match url.split_once("://") {
        Some(("s3", _)) => {
            format!("unpack it there: `aws s3 cp {url} - | gunzip | aws s3 cp - {plain}`")
        }
        Some(("gs", _)) => {
            format!(
                "unpack it there: `gcloud storage cat {url} | gunzip | gcloud storage cp - {plain}`"
            )
        }
        _ => {
            let name = plain.rsplit('/').next().unwrap_or_default();
            format!(
                "download and unpack it: `curl -L {url} | gunzip > {name}`; local gzipped files are supported too"
            )
        }
    }
}

/// Returns the name without the gzip extension.
pub fn plain_name(name: &str) -> String {
    match (name.strip_suffix(".gz"), name.strip_suffix(".tgz")) {
        (Some(plain), _) => plain.to_owned(),
        (None, Some(plain)) => format!("{plain}.tar"),
        (None, None) => name.to_owned(),
    }
}

/// Opens a local shard of version `stamp`: the file itself, or its unpacked copy. Also returns whether that is
/// complete.
///
/// Errors: the file cannot be read, or cannot be unpacked for lack of disk space.
pub fn open(path: &Path, stamp: (u64, u64)) -> Result<(Source, bool)> {
    let file = Source::open(path)?;
    match file.bytes(0, 2)? {
        Some(start) if is_gzip(&start) => {
            unpacked(file, path, stamp).context(|| format!("`{}` is gzipped", path.display()))
        }
        _ => Ok((file, true)),
    }
}

fn unpacked(file: Source, path: &Path, stamp: (u64, u64)) -> Result<(Source, bool)> {
    // The ending records whether the copy is complete.
    let make = |to: PathBuf| unpack(&file, to).map(|(draft, whole)| (draft, usize::from(!whole)));
    let (_, copy, ending) = kept(path, stamp, &["tar", "cut.tar"], make)?;
    Ok((copy, ending == 0))
}

const SPACE: &str = "free space there, or set ADVXL_CACHE to a folder on a larger disk";

/// Opens what was made of version `stamp` of the file `path`, which is kept in the local cache. It is made if it is not
/// there, by `make`, which gets the path to draft and returns the number of the ending to use; other versions are
/// removed. Also returns the path and the number of the ending.
///
/// Errors: those of `make`; a file that has changed; a cache that cannot be written.
pub(crate) fn kept(
    path: &Path,
    stamp: (u64, u64),
    endings: &[&str],
    make: impl FnOnce(PathBuf) -> Result<(Draft, usize)>,
) -> Result<(PathBuf, Source, usize)> {
    let folder = crate::storage::cache::cache("unpacked")?;
    let hash = blake3::hash(absolute(path).as_os_str().as_encoded_bytes()).to_hex();
    let (of_path, version) = (&hash[..16], format!("{}-{}", stamp.0, stamp.1));
    let name = |number: usize| folder.join(format!("{of_path}-{version}.{}", endings[number]));
    let found = || (0..endings.len()).find(|number| name(*number).is_file());
    if found().is_none() {
        files::make_folder(&folder)?;
        // Other processes of the run need the same file.
        let _alone = files::wait_for_lock(&folder.join(format!("{of_path}.lock")))?;
        if found().is_none() {
            files::remove_beginning(&folder, &format!("{of_path}-"))?;
            if files::stamp(path)? != stamp {
                return Err(
                    Error::failed("the file has changed since it was opened").hint("start again")
                );
            }
            let (draft, number) = make(name(0))?;
            draft.finish_as(&name(number))?;
        }
    }
    let number = found().ok_or_else(|| Error::failed("the unpacked file has disappeared"))?;
    Ok((name(number), Source::open(&name(number))?, number))
}

/// Returns an error unless the disk of the file `to` in the cache has room for `needed` bytes.
pub(crate) fn require_space(what: &str, to: &Path, needed: u64) -> Result<()> {
    memory::require_space(to.parent().unwrap_or(to), what, needed, SPACE)
}

/// Reads the contents of a zip entry sequentially. At their end, length and checksum are compared.
///
/// Errors of kind [`io::ErrorKind::Other`] are those of reading the archive; all others mean damaged contents.
pub(crate) struct Contents<'a> {
    contents: Packed<'a>,
    checksum: Crc,
    entry: Found,
    left: u64,
}

enum Packed<'a> {
    Stored(Bytes<'a>),
    Deflated(Box<DeflateDecoder<BufReader<Bytes<'a>>>>),
}

impl<'a> Contents<'a> {
    /// Opens an entry; `None` if its compression is not supported.
    pub(crate) fn open(file: &'a Source, entry: Found) -> Option<Self> {
        let bytes = Bytes {
            file,
            at: entry.start,
            end: entry.start + entry.packed,
        };
        let contents = match entry.method {
            _ if entry.encrypted => return None,
            STORED => Packed::Stored(bytes),
            DEFLATED => {
                let buffered = BufReader::with_capacity(1 << 16, bytes);
                Packed::Deflated(Box::new(DeflateDecoder::new(buffered)))
            }
            _ => return None,
        };
        Some(Self {
            contents,
            checksum: Crc::new(),
            entry,
            left: entry.size,
        })
    }
}

impl Read for Contents<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let damaged = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
        if bytes.is_empty() {
            return Ok(0);
        }
        let count = match &mut self.contents {
            Packed::Stored(contents) => contents.read(bytes)?,
            Packed::Deflated(contents) => contents.read(bytes)?,
        };
        self.left = (self.left.checked_sub(count as u64))
            .ok_or_else(|| damaged("it is longer than the archive says"))?;
        self.checksum.update(&bytes[..count]);
        match count {
            0 if self.left > 0 => Err(damaged("it ends early")),
            0 if self.checksum.sum() != self.entry.checksum => Err(damaged("wrong checksum")),
            _ => Ok(count),
        }
    }
}

/// Writes everything that `contents` returns to a file of the cache, which is `size` bytes.
pub(crate) fn drafted(
    mut contents: impl Read,
    size: u64,
    to: &Path,
    what: &str,
    failed: impl FnOnce(io::Error) -> Error,
) -> Result<Draft> {
    require_space(what, to, size)?;
    let mut draft = Draft::create(to)?;
    let (mut at, mut part) = (0, vec![0; 1 << 20]);
    loop {
        match contents.read(&mut part) {
            Ok(0) => return Ok(draft),
            Ok(count) => {
                let written = draft.write(at, &part[..count]);
                written.map_err(|error| error.hint(SPACE))?;
                at += count as u64;
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Unpacks as much as is intact. Also returns whether that is everything.
fn unpack(file: &Source, to: PathBuf) -> Result<(Draft, bool)> {
    let mut draft = Draft::create(&to)?;
    let most = (file.length().saturating_mul(MOST_GROWTH)).max(LEAST);
    let mut packed = BufReader::with_capacity(1 << 16, Bytes::whole(file));
    let (mut at, mut part) = (0, vec![0; 1 << 20]);
    loop {
        let mut member = GzDecoder::new(packed);
        loop {
            let count = match member.read(&mut part) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Other => {
                    return Err(Error::failed(error.to_string()));
                }
                Err(_) => return Ok((draft, false)),
            };
            draft.write(at, &part[..count]).map_err(|error| {
                error.hint(
                    "gzipped shards are unpacked into the cache: free space there, set ADVXL_CACHE to a folder on a larger \
                     disk, or unpack the shard yourself with `gunzip`",
                )
            })?;
            at += count as u64;
            if at > most {
                let message = format!(
                    "the file unpacks to more than {most} bytes, {MOST_GROWTH} times its size"
                );
                return Err(Error::input(message)
                    .hint("if that is expected, unpack it yourself with `gunzip`"));
            }
        }
        packed = member.into_inner();
        // Like gzip, ignore what follows the last member, usually zero padding from tapes.
        match packed.fill_buf() {
            Ok(rest) if is_gzip(rest) => {}
            _ => return Ok((draft, true)),
        }
    }
}

/// Reads a range of a file sequentially.
struct Bytes<'a> {
    file: &'a Source,
    at: u64,
    end: u64,
}

impl<'a> Bytes<'a> {
    fn whole(file: &'a Source) -> Self {
        let end = file.length();
        Self { file, at: 0, end }
    }
}

impl Read for Bytes<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.end - self.at;
        let count = (bytes.len() as u64).min(left) as usize;
        let read = self.file.fill(self.at, &mut bytes[..count]);
        // `ErrorKind::Other` distinguishes a read error from damaged data.
        read.map_err(|error| io::Error::other(error.to_string()))?;
        self.at += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_name_the_object_and_the_plain_tar() {
        assert_eq!(
            hint_for_store("s3://bucket/a/0.tar.gz"),
            "unpack it there: `aws s3 cp s3://bucket/a/0.tar.gz - | gunzip | aws s3 cp - s3://bucket/a/0.tar`"
        );
        let hint = hint_for_store("https://host/0.tgz");
        assert!(
            hint.contains("`curl -L https://host/0.tgz | gunzip > 0.tar`"),
            "{hint}"
        );
        assert_eq!(plain_name("0.tar"), "0.tar");
    }
}
