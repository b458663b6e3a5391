//! Reads the central directory of a zip archive and locates the bytes of each entry.
//!
//! Supports what the files of PyTorch and NumPy need: stored and deflated entries, in archives of any size (zip64).
//! Nothing is decompressed here, and checksums are not verified: [`super::unpack`] does both.
//!
//! Source: PKWARE's APPNOTE 6.3, sections 4.3 and 4.5.3.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::files::Source;

/// Maximum size of the central directory: about 500,000 entries.
const TABLE_LIMIT: u64 = 64 << 20;

/// The entries of an archive by name.
pub(crate) struct Archive {
    entries: BTreeMap<String, Entry>,
    /// What the archive is, for messages.
    kind: &'static str,
}

/// Byte range of an entry.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) start: u64,
    pub(crate) size: u64,
}

/// An entry and the byte range of its contents as they are in the archive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    /// Compression method: [`STORED`], [`DEFLATED`] or another one.
    pub(crate) method: u16,
    pub(crate) encrypted: bool,
    /// Offset of the contents.
    pub(crate) start: u64,
    /// Length in the archive.
    pub(crate) packed: u64,
    /// Length once decompressed.
    pub(crate) size: u64,
    /// CRC-32 of the decompressed contents.
    pub(crate) checksum: u32,
}

/// The compression method of uncompressed entries.
pub(crate) const STORED: u16 = 0;
/// The compression method of entries in Deflate.
pub(crate) const DEFLATED: u16 = 8;

struct Entry {
    method: u16,
    encrypted: bool,
    packed: u64,
    size: u64,
    checksum: u32,
    /// Offset of the local file header, which precedes the bytes.
    header: u64,
}

impl Archive {
    /// Reads the directory. `kind` completes "the format of ...".
    pub(crate) fn read(source: &Source, kind: &'static str) -> Result<Self> {
        let read = || -> Result<Option<BTreeMap<String, Entry>>> {
            let Some((count, size, at)) = table(source)? else {
                return Ok(None);
            };
            if size > TABLE_LIMIT {
                let message = format!("the zip directory of {size} bytes is too large");
                return Err(
                    Error::input(message).hint(format!("no file of {kind} has that many entries"))
                );
            }
            let Some(table) = source.bytes(at, size)? else {
                return Ok(None);
            };
            let mut rest = Fields(&table);
            Ok((0..count).map(|_| rest.entry()).collect())
        };
        let entries = read()?.ok_or_else(|| broken(kind))?;
        Ok(Self { entries, kind })
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Returns an entry, or `None` if it does not exist.
    pub(crate) fn find(&self, source: &Source, name: &str) -> Result<Option<Found>> {
        let broken = || broken(self.kind);
        let Some(entry) = self.entries.get(name) else {
            return Ok(None);
        };
        let header = source.bytes(entry.header, 30)?.ok_or_else(broken)?;
        let mut fields = Fields(&header);
        if fields.take(4) != Some(b"PK\x03\x04") {
            return Err(broken());
        }
        fields.take(22);
        let (name, extra) = (fields.u16(), fields.u16());
        let skipped = 30 + u64::from(name.unwrap_or(0)) + u64::from(extra.unwrap_or(0));
        let start = entry.header.saturating_add(skipped);
        let end = start.checked_add(entry.packed);
        if end.is_none_or(|end| end > source.length()) {
            return Err(broken());
        }
        Ok(Some(Found {
            method: entry.method,
            encrypted: entry.encrypted,
            start,
            packed: entry.packed,
            size: entry.size,
            checksum: entry.checksum,
        }))
    }

    /// Returns the byte range of an uncompressed entry, or `None` if the entry does not exist.
    pub(crate) fn place(&self, source: &Source, name: &str) -> Result<Option<Place>> {
        let Some(found) = self.find(source, name)? else {
            return Ok(None);
        };
        if found.method != STORED || found.encrypted {
            let message = format!("zip entry `{}` is compressed or encrypted", shown(name));
            return Err(Error::input(message).hint(
                "PyTorch stores weights uncompressed; load the file in PyTorch and save it again",
            ));
        }
        match found.packed == found.size {
            true => Ok(Some(Place {
                start: found.start,
                size: found.size,
            })),
            false => Err(broken(self.kind)),
        }
    }
}

/// Truncates a name from a file to 80 characters and escapes control characters, so that it is safe to print.
pub(crate) fn shown(name: &str) -> String {
    let mut text: String = name.chars().take(80).flat_map(char::escape_debug).collect();
    if text.len() < name.len() {
        text.push_str("...");
    }
    text
}

fn broken(kind: &str) -> Error {
    Error::input(format!(
        "truncated or invalid zip file, the format of {kind}"
    ))
    .hint("copy or download it again")
}

/// Returns the number of entries, the size and the offset of the central directory; `None` if there is none.
fn table(source: &Source) -> Result<Option<(u64, u64, u64)>> {
    // The end-of-central-directory record has 22 bytes and a comment of up to 65,535.
    let tail_size = source.length().min(22 + 0xffff);
    let tail_at = source.length() - tail_size;
    let tail = source.bytes(tail_at, tail_size)?.unwrap_or_default();
    let record = (0..tail.len().saturating_sub(21)).rev().find(|at| {
        let comment = u16::from_le_bytes([tail[at + 20], tail[at + 21]]);
        tail[*at..].starts_with(b"PK\x05\x06") && at + 22 + usize::from(comment) == tail.len()
    });
    let Some(record) = record else {
        return Ok(None);
    };
    let mut fields = Fields(&tail[record + 10..]);
    let short = (fields.u16(), fields.u32(), fields.u32());
    let (Some(count), Some(size), Some(at)) = short else {
        return Ok(None);
    };
    if count != u16::MAX && size != u32::MAX && at != u32::MAX {
        return Ok(Some((count.into(), size.into(), at.into())));
    }
    // Zip64: a locator of 20 bytes precedes the record and holds the offset of the zip64 record.
    let Some(locator_at) = (tail_at + record as u64).checked_sub(20) else {
        return Ok(None);
    };
    let locator = source.bytes(locator_at, 20)?.unwrap_or_default();
    let Some(long_at) = locator.get(8..).and_then(|rest| Fields(rest).u64()) else {
        return Ok(None);
    };
    let long = source.bytes(long_at, 56)?.unwrap_or_default();
    if !locator.starts_with(b"PK\x06\x07") || !long.starts_with(b"PK\x06\x06") {
        return Ok(None);
    }
    let mut fields = Fields(&long[32..]);
    Ok(match (fields.u64(), fields.u64(), fields.u64()) {
        (Some(count), Some(size), Some(at)) => Some((count, size, at)),
        _ => None,
    })
}

/// Reads consecutive little-endian fields; every read returns `None` past the end of the bytes.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Reads one entry of the central directory.
    fn entry(&mut self) -> Option<(String, Entry)> {
        if self.take(4)? != b"PK\x01\x02" {
            return None;
        }
        self.take(4)?; // Versions.
        let (flags, method) = (self.u16()?, self.u16()?);
        self.take(4)?; // Time and date.
        let checksum = self.u32()?;
        let (packed, size) = (self.u32()?, self.u32()?);
        let lengths = [self.u16()?, self.u16()?, self.u16()?];
        self.take(8)?; // Disk and attributes.
        let header = self.u32()?;
        let [name, mut extra, _comment] = lengths.map(|length| self.take(length.into()));
        let name = String::from_utf8(name?.to_vec()).ok()?;
        // Values that do not fit into 32 bits are stored in extra field 1.
        let mut long = Fields(&[]);
        while let Some(bytes) = extra.filter(|bytes| !bytes.is_empty()) {
            let mut field = Fields(bytes);
            let (kind, length) = (field.u16()?, field.u16()?);
            let content = field.take(length.into())?;
            if kind == 1 {
                long = Fields(content);
            }
            extra = Some(field.0);
        }
        let mut widened = |short: u32| match short {
            u32::MAX => long.u64(),
            _ => Some(short.into()),
        };
        let size = widened(size)?;
        let packed = widened(packed)?;
        let header = widened(header)?;
        let entry = Entry {
            method,
            encrypted: flags & 1 == 1,
            packed,
            size,
            checksum,
            header,
        };
        Some((name, entry))
    }
}
