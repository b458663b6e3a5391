//! The header of a NumPy array (`.npy`): dtype, order and shape.
//!
//! A header is a Python dictionary as text, such as
//! `{'descr': '|u1', 'fortran_order': False, 'shape': (10, 32, 32, 3), }`. It is parsed, never evaluated.
//! Source: NumPy Enhancement Proposal 1, versions 1.0 to 3.0 of the format.

use crate::error::{Error, Result};

/// The first bytes of an array.
pub const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// Number of leading bytes of an array that hold its header. Real headers have 128 bytes; only those of structured
/// arrays, which are not images, are longer.
pub const LIMIT: u64 = 64 << 10;

/// The header of an array.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The dtype, such as `<i8`; that of a structured array is the text of a list.
    pub dtype: String,
    /// Whether the first axis varies fastest.
    pub is_fortran: bool,
    /// The length of each axis.
    pub shape: Vec<u64>,
    /// Offset of the values.
    pub start: u64,
}

impl Header {
    /// Reads the header from the first bytes of an array, [`LIMIT`] or all of them.
    ///
    /// Errors: anything but a header.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let wrong = |what: &str| {
            Error::input(format!("invalid NumPy array: {what}"))
                .hint("write the file again with `numpy.savez`")
        };
        let Some(rest) = bytes.strip_prefix(MAGIC) else {
            return Err(wrong("it does not begin like one"));
        };
        let (length, begin) = match rest {
            [1, _, a, b, ..] => (u64::from(u16::from_le_bytes([*a, *b])), 10),
            [2 | 3, _, a, b, c, d, ..] => (u64::from(u32::from_le_bytes([*a, *b, *c, *d])), 12),
            [1..=3, ..] | [] => return Err(wrong("the header is truncated")),
            [version, ..] => {
                return Err(wrong(&format!("unknown version {version} of the format")));
            }
        };
        let start = begin as u64 + length;
        if start > LIMIT {
            return Err(wrong(&format!("its header of {length} bytes is too long")));
        }
        let Some(text) = bytes.get(begin..start as usize) else {
            return Err(wrong("the header is truncated"));
        };
        let text = String::from_utf8_lossy(text);
        let (dtype, is_fortran, shape) = dictionary(&text).ok_or_else(|| {
            let shown: String = text
                .trim()
                .chars()
                .take(80)
                .flat_map(char::escape_debug)
                .collect();
            wrong(&format!("the header `{shown}` is not understood"))
        })?;
        Ok(Self {
            dtype,
            is_fortran,
            shape,
            start,
        })
    }

    /// Returns the number of values, if it is a number of 64 bits.
    pub fn count(&self) -> Option<u64> {
        self.shape
            .iter()
            .try_fold(1_u64, |product, side| product.checked_mul(*side))
    }
}

/// Reads the three values of a header.
fn dictionary(text: &str) -> Option<(String, bool, Vec<u64>)> {
    let mut rest = text.trim().strip_prefix('{')?.strip_suffix('}')?.trim();
    let (mut dtype, mut order, mut shape) = (None, None, None);
    while !rest.is_empty() {
        let (key, after) = quoted(rest)?;
        let after = after.trim_start().strip_prefix(':')?.trim_start();
        let after = match key {
            "descr" => {
                let (value, after) = match after.starts_with('[') {
                    true => after.split_at(list_end(after)?),
                    false => quoted(after)?,
                };
                dtype = Some(value.to_owned());
                after
            }
            "fortran_order" => {
                let (value, after) = match after.strip_prefix("False") {
                    Some(after) => (false, after),
                    None => (true, after.strip_prefix("True")?),
                };
                order = Some(value);
                after
            }
            "shape" => {
                let (value, after) = after.strip_prefix('(')?.split_once(')')?;
                shape = Some(sides(value)?);
                after
            }
            _ => return None,
        };
        let after = after.trim_start();
        rest = match after.strip_prefix(',') {
            Some(after) => after.trim_start(),
            None if after.is_empty() => after,
            None => return None,
        };
    }
    Some((dtype?, order?, shape?))
}

/// Splits off a string in quotes.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|first| "'\"".contains(*first))?;
    text[1..].split_once(quote)
}

/// Returns the length of the list at the beginning of a text. Brackets in field names are counted too: such an array is
/// refused either way.
fn list_end(text: &str) -> Option<usize> {
    let mut depth = 0_u32;
    for (at, letter) in text.char_indices() {
        match letter {
            '[' => depth += 1,
            ']' => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth == 0 {
            return Some(at + 1);
        }
    }
    None
}

/// Reads the numbers of a tuple; Python 2 wrote `10L`.
fn sides(text: &str) -> Option<Vec<u64>> {
    let text = text.trim();
    if text.is_empty() {
        return Some(Vec::new());
    }
    let text = text.strip_suffix(',').unwrap_or(text);
    let numbers = text.split(',').map(|part| {
        let part = part.trim();
        part.strip_suffix('L').unwrap_or(part).parse().ok()
    });
    numbers.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Header> {
        let length = (text.len() as u16).to_le_bytes();
        Header::read(&[&MAGIC[..], &[1, 0], &length, text.as_bytes()].concat())
    }

    #[test]
    fn headers_of_every_version_are_read() {
        let text = "{'descr': '|u1', 'fortran_order': False, 'shape': (10, 32, 32, 3), }   \n";
        let header = read(text).unwrap();
        assert_eq!((header.dtype.as_str(), header.is_fortran), ("|u1", false));
        assert_eq!(
            (&header.shape[..], header.count()),
            (&[10, 32, 32, 3][..], Some(30720))
        );
        assert_eq!(header.start, 10 + text.len() as u64);
        let length = (text.len() as u32).to_le_bytes();
        let second = [&MAGIC[..], &[2, 0], &length, text.as_bytes()].concat();
        assert_eq!(Header::read(&second).unwrap().start, header.start + 2);
        let header = read("{\"shape\":(5L,),'fortran_order': True,'descr':'<i8'}").unwrap();
        assert_eq!((&header.shape[..], header.is_fortran), (&[5][..], true));
        let header = read(
            "{'descr': [('a', '<i4', (2,)), ('b', '|u1')], 'fortran_order': False, 'shape': ()}",
        );
        assert_eq!(header.unwrap().dtype, "[('a', '<i4', (2,)), ('b', '|u1')]");
    }

    #[test]
    fn anything_else_is_refused() {
        let message = |result: Result<Header>| {
            let error = result.unwrap_err();
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        };
        assert!(message(Header::read(b"PK")).contains("does not begin like one"));
        assert!(message(Header::read(b"\x93NUMPY\x01\x00")).contains("the header is truncated"));
        assert!(
            message(Header::read(b"\x93NUMPY\x01\x00\x09\x00{"))
                .contains("the header is truncated")
        );
        assert!(message(Header::read(b"\x93NUMPY\x04\x00\x00\x00")).contains("unknown version 4"));
        assert!(
            message(Header::read(b"\x93NUMPY\x02\x00\x00\x00\x00\xff")).contains("is too long")
        );
        for text in [
            "",
            "{}",
            "{'descr': '|u1', 'fortran_order': False}",
            "{'descr': '|u1', 'fortran_order': 0, 'shape': (1,)}",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (1,,)}",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (1,), 'x': 1}",
            "{'descr': [[['a', 'fortran_order': False, 'shape': (1,)}",
            "__import__('os')",
        ] {
            assert!(message(read(text)).contains("is not understood"), "{text}");
        }
        let huge =
            read("{'descr': '|u1', 'fortran_order': False, 'shape': (4294967296, 4294967296)}");
        assert_eq!(huge.unwrap().count(), None);
    }
}
