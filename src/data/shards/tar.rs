//! The members of a tar file: names, offsets and lengths, read from the headers alone.
//!
//! Reads ustar, GNU long names, and pax paths and sizes. After damage, reading continues at the next header with a
//! valid checksum, at any offset, so a bad block only costs its own member.
//! Every size is checked against the length of the file; contents are never read. Sparse files of GNU tar and links are
//! reported as damage: their contents are not in the tar as plain bytes.
//! Not for unpacking or for the meaning of the members ([`crate::data::shards`]).
//!
//! Source: POSIX.1-2001, `pax`; GNU tar's manual, "Basic Tar Format" and "Storing Sparse Files". Compared with Python's
//! `tarfile` by `tests/shards.rs`.

use crate::error::Result;
use crate::image::Reason;
use crate::storage::store::Reader;

const BLOCK: usize = 512;
/// Bytes that are read at a time; enough for a caption, a json and their headers.
const WINDOW: usize = 8 * 1024;
/// Longest extended header that is read. Names need a few kilobytes; the headers may also contain attributes of macOS
/// and maps of sparse files.
const LONGEST_HEADER: u64 = 1 << 20;

/// An entry that a scan finds, in the order of the file.
#[derive(Clone, Debug, PartialEq)]
pub enum TarEntry {
    /// A regular file that is completely within the tar.
    Member {
        /// Path as bytes, which are not necessarily UTF-8.
        name: Vec<u8>,
        /// Offset of its contents.
        at: u64,
        /// Length of its contents in bytes.
        length: u64,
    },
    /// Damage or an oddity.
    Damage {
        /// Kind of damage.
        reason: Reason,
        /// Offset of the damage.
        at: u64,
        /// Name of the member that is lost, if known.
        name: Option<Vec<u8>>,
    },
}

/// Calls `each` for all members and all damage of a tar file.
///
/// Errors: those of reading the file.
pub fn scan(file: &Reader, mut each: impl FnMut(TarEntry)) -> Result<()> {
    let mut blocks = Blocks::new(file);
    let mut at = 0;
    let mut zeros = 0;
    let mut sound = true;
    let mut next = Next::default();
    let damage = |reason, at, name| TarEntry::Damage { reason, at, name };
    while at < file.length() {
        let Some(block) = blocks.at(at)? else {
            if !blocks.rest_is_zero(at)? {
                each(damage(Reason::TruncatedHeader, at, None));
                sound = false;
            }
            break;
        };
        if block.iter().all(|byte| *byte == 0) {
            zeros += 1;
            at += BLOCK as u64;
            continue;
        }
        if zeros > 0 {
            each(damage(
                Reason::ZerosBetween,
                at - zeros * BLOCK as u64,
                None,
            ));
            zeros = 0;
        }
        let Some(header) = Header::read(&block) else {
            let reason = match &block[257..262] {
                b"ustar" => Reason::BadChecksum,
                _ => Reason::Garbage,
            };
            each(damage(reason, at, None));
            at = blocks.next_header(at + 1)?;
            (next, sound) = (Next::default(), at < file.length());
            continue;
        };
        let data = at + BLOCK as u64 * (1 + blocks.of_sparse_map(at, &header)?);
        let size = match header.kind {
            // Links, devices and folders have no contents, regardless of the size field.
            b'1'..=b'6' => Some(0),
            b'L' | b'K' | b'x' | b'g' => header.size,
            _ => next.size.unwrap_or(header.size),
        };
        let fits = |size: &u64| {
            let end = data.checked_add(*size);
            end.is_some_and(|end| end <= file.length())
        };
        let Some(size) = size.filter(fits) else {
            let name = is_file(header.kind).then(|| next.name.take().unwrap_or(header.name));
            let behind = blocks.next_header(at + 1)?;
            let ends = behind == file.length() && size.is_some();
            let reason = match ends {
                true => Reason::TruncatedMember,
                false => Reason::SizePastEnd,
            };
            each(damage(reason, at, name));
            at = behind;
            (next, sound) = (Next::default(), !ends);
            continue;
        };
        // Relative to the header: after inserted bytes, headers no longer start at multiples of a block.
        at = data + size.next_multiple_of(BLOCK as u64);
        match header.kind {
            b'L' | b'x' if size > LONGEST_HEADER => {
                each(damage(Reason::MemberTooLarge, data, None));
                next.is_unknown = true;
            }
            b'L' => {
                let name = file.bytes(data, size)?.unwrap_or_default();
                next.name = Some(until_zero(&name).to_vec());
            }
            b'x' => next.read(&file.bytes(data, size)?.unwrap_or_default()),
            b'K' | b'g' => {}
            kind => {
                let next = std::mem::take(&mut next);
                let name = next.name.unwrap_or(header.name);
                match kind {
                    _ if next.is_unknown => {}
                    _ if is_file(kind) && !next.is_sparse && kind != b'S' => {
                        each(TarEntry::Member {
                            name,
                            at: data,
                            length: size,
                        })
                    }
                    _ if is_file(kind) => each(damage(Reason::SparseMember, data, Some(name))),
                    b'1' | b'2' => each(damage(Reason::LinkMember, data, Some(name))),
                    _ => {}
                }
            }
        }
    }
    if sound && zeros == 0 && file.length() > 0 {
        each(damage(Reason::NoEndMarker, file.length(), None));
    }
    Ok(())
}

fn is_file(kind: u8) -> bool {
    matches!(kind, b'0' | 0 | b'7' | b'S')
}

/// What extended headers specify for the next member.
#[derive(Default)]
struct Next {
    name: Option<Vec<u8>>,
    /// The inner value is none if the size is not a number.
    size: Option<Option<u64>>,
    /// Whether the contents are parts of a sparse file, possibly preceded by a map of them.
    is_sparse: bool,
    /// Whether a header was too long to be read, so that neither name nor size is known.
    is_unknown: bool,
}

impl Next {
    /// Reads the records of a pax header.
    fn read(&mut self, records: &[u8]) {
        if let Some(path) = pax_value(records, b"path") {
            self.name = Some(path.to_vec());
        }
        let size = pax_value(records, b"size");
        self.size = size.map(|size| std::str::from_utf8(size).ok()?.parse().ok());
        self.is_sparse = pax_records(records).any(|(key, _)| key.starts_with(b"GNU.sparse."));
        // `path` is an artificial name such as `GNUSparseFile.0/000.png`.
        if let Some(path) = pax_value(records, b"GNU.sparse.name") {
            self.name = Some(path.to_vec());
        }
    }
}

/// The header fields that are used.
struct Header {
    name: Vec<u8>,
    /// None if the field is not a number.
    size: Option<u64>,
    kind: u8,
    /// Whether more blocks of the map of an old-format sparse file follow.
    has_map: bool,
}

impl Header {
    /// Parses a header; none if the checksum is wrong.
    fn read(block: &[u8]) -> Option<Self> {
        let stored = number(&block[148..156])?;
        let blank = 32 * 8;
        let (before, after) = (&block[..148], &block[156..]);
        let parts = || before.iter().chain(after);
        let sum: u64 = parts().map(|byte| u64::from(*byte)).sum();
        // Some old programs sum signed bytes.
        let signed: i64 = parts().map(|byte| i64::from(*byte as i8)).sum();
        if stored != sum + blank && i64::try_from(stored) != Ok(signed + blank as i64) {
            return None;
        }
        let mut name = until_zero(&block[..100]).to_vec();
        let prefix = until_zero(&block[345..500]);
        // The GNU format has times where ustar has the prefix.
        if &block[257..263] == b"ustar\0" && !prefix.is_empty() {
            name = [prefix, b"/", &name].concat();
        }
        Some(Self {
            name,
            size: number(&block[124..136]),
            kind: block[156],
            has_map: block[482] != 0,
        })
    }
}

fn until_zero(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Parses an octal number padded with spaces and zeros, or GNU's big-endian number after a byte of 0x80.
fn number(field: &[u8]) -> Option<u64> {
    if let [0x80, rest @ ..] = field {
        let (high, low) = rest.split_at(rest.len().checked_sub(8)?);
        return high
            .iter()
            .all(|byte| *byte == 0)
            .then(|| low.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)));
    }
    let digits = until_zero(field).trim_ascii();
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |sum, digit| match digit {
        b'0'..=b'7' => sum.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// Returns the last value of a key in pax records.
fn pax_value<'a>(records: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let found = pax_records(records).filter(|(name, _)| *name == key);
    found.last().map(|(_, value)| value)
}

/// Iterates over the keys and values of pax records, `LENGTH key=value\n`. Iteration ends at the first broken record.
fn pax_records(mut records: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    std::iter::from_fn(move || {
        let space = records.iter().position(|byte| *byte == b' ')?;
        let length = std::str::from_utf8(&records[..space]).ok()?;
        let length = length.parse::<usize>().ok()?;
        let record = records.get(space + 1..length)?;
        records = &records[length..];
        let record = record.strip_suffix(b"\n").unwrap_or(record);
        let equals = record.iter().position(|byte| *byte == b'=');
        Some(equals.map_or((record, &[][..]), |at| (&record[..at], &record[at + 1..])))
    })
}

/// A sliding window over the file.
struct Blocks<'a> {
    file: &'a Reader,
    start: u64,
    window: Vec<u8>,
}

impl<'a> Blocks<'a> {
    fn new(file: &'a Reader) -> Self {
        Self {
            file,
            start: 0,
            window: Vec::new(),
        }
    }

    /// Returns the block at an offset; none if less than a block is left.
    fn at(&mut self, at: u64) -> Result<Option<[u8; BLOCK]>> {
        let from = self.show(at)?;
        let block = self.window.get(from..from + BLOCK);
        Ok(block.and_then(|block| block.try_into().ok()))
    }

    /// Moves the window so that it contains the block at an offset, or all that is left. Returns the position of the
    /// offset in the window.
    fn show(&mut self, at: u64) -> Result<usize> {
        let end = self.start + self.window.len() as u64;
        if at < self.start || at + BLOCK as u64 > end {
            let length = (self.file.length() - at).min(WINDOW as u64);
            self.window.resize(length as usize, 0);
            self.file.fill(at, &mut self.window)?;
            self.start = at;
        }
        Ok((at - self.start) as usize)
    }

    /// Returns the number of blocks between a header and its contents, which only old-format sparse files have.
    fn of_sparse_map(&mut self, at: u64, header: &Header) -> Result<u64> {
        let (mut count, mut more) = (0, header.kind == b'S' && header.has_map);
        while more {
            count += 1;
            let block = self.at((at + count * BLOCK as u64).min(self.file.length()))?;
            more = block.is_some_and(|block| block[504] != 0);
        }
        Ok(count)
    }

    fn rest_is_zero(&mut self, at: u64) -> Result<bool> {
        let from = self.show(at)?;
        Ok(self.window[from..].iter().all(|byte| *byte == 0))
    }

    /// Returns the offset of the next valid header at or after an offset, or the end of the file.
    ///
    /// Headers with a magic are found at any offset, those without only at multiples of a block.
    fn next_header(&mut self, mut at: u64) -> Result<u64> {
        loop {
            if at + BLOCK as u64 > self.file.length() {
                return Ok(self.file.length());
            }
            let from = self.show(at)?;
            let last = self.window.len() - BLOCK;
            for place in from..=last {
                let block = &self.window[place..place + BLOCK];
                let here = self.start + place as u64;
                let aligned = here.is_multiple_of(BLOCK as u64);
                let likely = &block[257..262] == b"ustar" || (aligned && block[0] != 0);
                if likely && Header::read(block).is_some() {
                    return Ok(here);
                }
            }
            at = self.start + last as u64 + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary_after_a_mark() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   17 \0\0"), Some(0o17));
        assert_eq!(number(b"77777777777"), Some((1 << 33) - 1));
        assert_eq!(
            number(b"\x80\0\0\0\0\0\0\x02\0\0\0\x05"),
            Some((2 << 32) + 5)
        );
        // Above 64 bits, negative, no digits, other digits.
        assert_eq!(number(b"\x80\0\0\x01\0\0\0\0\0\0\0\0"), None);
        assert_eq!(
            number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
            None
        );
        assert_eq!(number(b"\0\0\0\0"), None);
        assert_eq!(number(b"0000009\0"), None);
    }

    #[test]
    fn the_last_value_of_a_pax_key_is_used_and_a_broken_record_ends_the_iteration() {
        let records = b"9 size=7\n14 path=a/b=c\n11 size=12\n";
        assert_eq!(pax_value(records, b"size"), Some(&b"12"[..]));
        assert_eq!(pax_value(b"14 path=a/b=c\n", b"path"), Some(&b"a/b=c"[..]));
        for broken in [
            &b"99 path=a\n"[..],
            b"x path=a\n",
            b"0 path=a\n",
            b"1 path",
            b" ",
            b"",
        ] {
            assert_eq!(pax_value(broken, b"path"), None);
        }
    }

    #[test]
    fn a_header_with_a_signed_checksum_is_read() {
        let mut block = [0_u8; BLOCK];
        block[..2].copy_from_slice(b"\xe9a");
        block[124..136].copy_from_slice(b"00000000005\0");
        let sum = |block: &[u8]| block.iter().map(|byte| i64::from(*byte as i8)).sum::<i64>() + 256;
        let text = format!("{:06o}\0 ", sum(&block));
        block[148..156].copy_from_slice(text.as_bytes());
        let header = Header::read(&block).unwrap();
        assert_eq!(
            (header.name.as_slice(), header.size),
            (&b"\xe9a"[..], Some(5))
        );
        block[0] ^= 1;
        assert!(Header::read(&block).is_none());
    }
}
