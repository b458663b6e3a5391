//! Reads the central directory of a zip archive and locates the bytes of each entry.
//!
//! Supports only what PyTorch files need: uncompressed entries, in archives of any size (zip64). Nothing is
//! decompressed, and checksums are not verified.
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
}

/// Byte range of an entry.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) start: u64,
    pub(crate) size: u64,
}

struct Entry {
    /// Compression method; 0 means uncompressed.
    method: u16,
    encrypted: bool,
    size: u64,
    /// Offset of the local file header, which precedes the bytes.
    header: u64,
}

impl Archive {
    pub(crate) fn read(source: &Source) -> Result<Self> {
        let (count, size, at) = table(source)?;
        if size > TABLE_LIMIT {
            let message = format!("the zip directory of {size} bytes is too large");
            return Err(Error::input(message).hint("no weights file has that many entries"));
        }
        let table = source.bytes(at, size)?.ok_or_else(broken)?;
        let mut rest = Fields(&table);
        let mut entries = BTreeMap::new();
        for _ in 0..count {
            let (name, entry) = rest.entry().ok_or_else(broken)?;
            entries.insert(name, entry);
        }
        Ok(Self { entries })
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Returns the byte range of an entry, or `None` if the entry does not exist.
    pub(crate) fn place(&self, source: &Source, name: &str) -> Result<Option<Place>> {
        let Some(entry) = self.entries.get(name) else {
            return Ok(None);
        };
        if entry.method != 0 || entry.encrypted {
            let message = format!("zip entry `{}` is compressed or encrypted", shown(name));
            return Err(Error::input(message).hint(
                "PyTorch stores weights uncompressed; load the file in PyTorch and save it again",
            ));
        }
        let header = source.bytes(entry.header, 30)?.ok_or_else(broken)?;
        let mut fields = Fields(&header);
        if fields.take(4) != Some(b"PK\x03\x04") {
            return Err(broken());
        }
        fields.take(22);
        let (name, extra) = (fields.u16(), fields.u16());
        let skipped = 30 + u64::from(name.unwrap_or(0)) + u64::from(extra.unwrap_or(0));
        let start = entry.header.saturating_add(skipped);
        let end = start.checked_add(entry.size);
        if end.is_none_or(|end| end > source.length()) {
            return Err(broken());
        }
        Ok(Some(Place {
            start,
            size: entry.size,
        }))
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

fn broken() -> Error {
    Error::input("truncated or invalid zip file, the format of PyTorch weights files")
        .hint("copy or download it again")
}

/// Returns the number of entries, the size and the offset of the central directory.
fn table(source: &Source) -> Result<(u64, u64, u64)> {
    // The end-of-central-directory record has 22 bytes and a comment of up to 65,535.
    let tail_size = source.length().min(22 + 0xffff);
    let tail_at = source.length() - tail_size;
    let tail = source.bytes(tail_at, tail_size)?.ok_or_else(broken)?;
    let record = (0..tail.len().saturating_sub(21)).rev().find(|at| {
        let comment = u16::from_le_bytes([tail[at + 20], tail[at + 21]]);
        tail[*at..].starts_with(b"PK\x05\x06") && at + 22 + usize::from(comment) == tail.len()
    });
    let record = record.ok_or_else(broken)?;
    let mut fields = Fields(&tail[record + 10..]);
    let short = (fields.u16(), fields.u32(), fields.u32());
    let (Some(count), Some(size), Some(at)) = short else {
        return Err(broken());
    };
    if count != u16::MAX && size != u32::MAX && at != u32::MAX {
        return Ok((count.into(), size.into(), at.into()));
    }
    // Zip64: a locator of 20 bytes precedes the record and holds the offset of the zip64 record.
    let locator = (tail_at + record as u64)
        .checked_sub(20)
        .ok_or_else(broken)?;
    let locator = source.bytes(locator, 20)?.ok_or_else(broken)?;
    let long = Fields(&locator[8..]).u64().ok_or_else(broken)?;
    let long = source.bytes(long, 56)?.ok_or_else(broken)?;
    if !locator.starts_with(b"PK\x06\x07") || !long.starts_with(b"PK\x06\x06") {
        return Err(broken());
    }
    let mut fields = Fields(&long[32..]);
    match (fields.u64(), fields.u64(), fields.u64()) {
        (Some(count), Some(size), Some(at)) => Ok((count, size, at)),
        _ => Err(broken()),
    }
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
        self.take(8)?; // Time, date and checksum.
        let (stored, size) = (self.u32()?, self.u32()?);
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
        widened(stored)?;
        let header = widened(header)?;
        let entry = Entry {
            method,
            encrypted: flags & 1 == 1,
            size,
            header,
        };
        Some((name, entry))
    }
}
