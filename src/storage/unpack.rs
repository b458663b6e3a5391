//! Gzipped shards. Samples are read at their places, which a compressed file does not have: it is unpacked once, into
//! the cache of this machine, and read from there.
//!
//! The other way, an index of points where unpacking can begin, would unpack some megabytes for every sample of a random
//! order. A gzip file that is damaged or cut short is unpacked as far as it goes, and its index says so.
//! Not for shards in stores, which would be fetched whole.

use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::GzDecoder;

use crate::error::{Context, Error, Result};
use crate::files;
use crate::files::{Draft, Source};

/// Pictures are compressed already, and captions to a tenth. What grows more than this, from [`LEAST`] bytes on, is
/// made to fill disks.
const MOST_GROWTH: u64 = 100;
const LEAST: u64 = 1 << 30;

/// Whether a file begins as gzip does.
pub fn is_gzip(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0x1f, 0x8b])
}

/// How to unpack a shard that lies in a store.
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
                "unpack it here: `curl -L {url} | gunzip > {name}`; gzipped files are read as well"
            )
        }
    }
}

/// The name without gzip's ending.
pub fn plain_name(name: &str) -> String {
    match (name.strip_suffix(".gz"), name.strip_suffix(".tgz")) {
        (Some(plain), _) => plain.to_owned(),
        (None, Some(plain)) => format!("{plain}.tar"),
        (None, None) => name.to_owned(),
    }
}

/// Opens a shard of this machine, `stamp` being its version: the file itself, or what was unpacked of it, with whether
/// that is all.
///
/// Errors: the file cannot be read, or not be unpacked for lack of room.
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
    let folder = crate::storage::cache::cache("unpacked")?;
    let hash = blake3::hash(absolute(path).as_os_str().as_encoded_bytes()).to_hex();
    let (of_path, version) = (&hash[..16], format!("{}-{}", stamp.0, stamp.1));
    // The ending holds whether it is all.
    let name = |ending: &str| folder.join(format!("{of_path}-{version}.{ending}"));
    let found = || {
        [("tar", true), ("cut.tar", false)]
            .into_iter()
            .find(|(ending, _)| name(ending).is_file())
    };
    if found().is_none() {
        files::make_folder(&folder)?;
        // Other processes of the run want the same.
        let _alone = files::wait_for_lock(&folder.join(format!("{of_path}.lock")))?;
        if found().is_none() {
            files::remove_beginning(&folder, &format!("{of_path}-"))?;
            if files::stamp(path)? != stamp {
                return Err(Error::failed("it has changed since it was opened").hint("start again"));
            }
            let (draft, whole) = unpack(&file, name("tar"))?;
            draft.finish_as(&name(if whole { "tar" } else { "cut.tar" }))?;
        }
    }
    let (ending, whole) = found().ok_or_else(|| Error::failed("what was unpacked has vanished"))?;
    Ok((Source::open(&name(ending))?, whole))
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Unpacks all that is sound; whether that is all.
fn unpack(file: &Source, to: PathBuf) -> Result<(Draft, bool)> {
    let mut draft = Draft::create(&to)?;
    let most = (file.length().saturating_mul(MOST_GROWTH)).max(LEAST);
    let mut packed = BufReader::with_capacity(1 << 16, Bytes { file, at: 0 });
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
                    "it is unpacked into the cache: free space there, set ADVXL_CACHE to a folder on a larger disk, \
                     or unpack the shard yourself with `gunzip`",
                )
            })?;
            at += count as u64;
            if at > most {
                let message =
                    format!("it unpacks to more than {most} bytes, {MOST_GROWTH} times its size");
                return Err(
                    Error::input(message).hint("unpack it yourself if that is right: `gunzip`")
                );
            }
        }
        packed = member.into_inner();
        // gzip itself ignores what follows the last member, mostly zeros of tapes.
        match packed.fill_buf() {
            Ok(rest) if is_gzip(rest) => {}
            _ => return Ok((draft, true)),
        }
    }
}

/// The bytes of a file one after another.
struct Bytes<'a> {
    file: &'a Source,
    at: u64,
}

impl Read for Bytes<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.file.length() - self.at;
        let count = bytes.len().min(left as usize);
        let read = self.file.fill(self.at, &mut bytes[..count]);
        // Told from what is wrong with the data by its kind.
        read.map_err(|error| io::Error::other(error.to_string()))?;
        self.at += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_name_the_object_and_the_plain_tar() {
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
