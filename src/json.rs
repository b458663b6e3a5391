//! Reads JSON as written by Python's `json` module and Windows tools.
//!
//! Accepts beyond the standard: a byte order mark, UTF-16 after one, `NaN`, `Infinity`, `-Infinity` and numbers too
//! large for 64 bits, which all become null, and lone surrogates, which become U+FFFD. Everything else is up to
//! serde_json: comments, single quotes and nesting deeper than 128 are errors. advxl's own files are plain JSON and do
//! not need this module.
//!
//! No crate reads all of this: lenient parsers fail on `NaN` or lone surrogates. `tests/shards.rs` compares with
//! Python.

use serde_json::{Error, Value};

/// Parses a JSON text.
pub fn parse(bytes: &[u8]) -> Result<Value, Error> {
    let utf8 = from_utf16(bytes);
    let bytes = utf8.as_deref().unwrap_or(bytes);
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    // Almost all texts are plain JSON, which needs no copy.
    serde_json::from_slice(bytes).or_else(|_| serde_json::from_slice(&plain(bytes)))
}

/// Converts UTF-16 after a byte order mark, as written by PowerShell, to UTF-8. Returns None for other text.
fn from_utf16(bytes: &[u8]) -> Option<Vec<u8>> {
    let unit = match bytes.get(..2)? {
        [0xff, 0xfe] => u16::from_le_bytes,
        [0xfe, 0xff] => u16::from_be_bytes,
        _ => return None,
    };
    let units = bytes[2..].as_chunks().0.iter().map(|two| unit(*two));
    let letters = char::decode_utf16(units).map(|letter| letter.unwrap_or('\u{fffd}'));
    Some(letters.collect::<String>().into_bytes())
}

/// Converts the text to plain JSON. Invalid JSON stays invalid.
fn plain(bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some(first) = rest.first() {
        let (length, instead): (usize, &[u8]) = match first {
            b'"' => {
                rest = string(rest, &mut plain);
                continue;
            }
            b'N' | b'I' | b'-' | b'0'..=b'9' => {
                let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-.".contains(byte);
                let length = rest.iter().take_while(|byte| is_word(byte)).count();
                match is_not_finite(&rest[..length]) {
                    true => (length, b"null"),
                    false => (length, &rest[..length]),
                }
            }
            _ => (1, &rest[..1]),
        };
        plain.extend(instead);
        rest = &rest[length..];
    }
    plain
}

/// Returns whether a word is `NaN` or an infinity in Python, or a number too large for 64 bits.
fn is_not_finite(word: &[u8]) -> bool {
    let parsed = |word| std::str::from_utf8(word).ok()?.parse::<f64>().ok();
    match word {
        b"NaN" | b"Infinity" | b"-Infinity" => true,
        [.., last] if last.is_ascii_digit() => parsed(word).is_some_and(f64::is_infinite),
        _ => false,
    }
}

/// Copies the string at the start of a text to `plain`, and returns the rest of the text.
fn string<'a>(text: &'a [u8], plain: &mut Vec<u8>) -> &'a [u8] {
    plain.push(b'"');
    let mut rest = &text[1..];
    loop {
        let length = match rest {
            [] => return rest,
            [b'"', behind @ ..] => {
                plain.push(b'"');
                return behind;
            }
            [b'\\', b'u', ..] => match (escaped(rest), rest.get(6..).and_then(escaped)) {
                (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => 12,
                (Some(0xd800..=0xdfff), _) => {
                    plain.extend(b"\\ufffd");
                    rest = &rest[6..];
                    continue;
                }
                _ => 2,
            },
            [b'\\', _, ..] => 2,
            // A surrogate encoded in UTF-8, as by Python's `surrogatepass`.
            [0xed, 0xa0..=0xbf, 0x80..=0xbf, ..] => {
                plain.extend("\u{fffd}".as_bytes());
                rest = &rest[3..];
                continue;
            }
            _ => 1,
        };
        plain.extend(&rest[..length]);
        rest = &rest[length..];
    }
}

/// Returns the UTF-16 unit of an escape such as `\ud83d` at the start of a text.
fn escaped(text: &[u8]) -> Option<u16> {
    let digits = text.strip_prefix(b"\\u")?.get(..4)?;
    let digit = |value: u16, byte: &u8| Some(value << 4 | char::from(*byte).to_digit(16)? as u16);
    digits.iter().try_fold(0, digit)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn same(text: &[u8], value: Value) {
        assert_eq!(parse(text).unwrap(), value, "{}", text.escape_ascii());
    }

    #[test]
    fn pythons_nan_and_infinities_become_null() {
        same(
            br#"{"caption": "a cat", "pwatermark": NaN}"#,
            json!({"caption": "a cat", "pwatermark": null}),
        );
        same(b"[Infinity,-Infinity , 1e999, -1e999, 1e300]", {
            json!([null, null, null, null, 1e300])
        });
        same(br#"{"NaN": "NaN, -Infinity", "a\"": NaN}"#, {
            json!({"NaN": "NaN, -Infinity", "a\"": null})
        });
        for wrong in ["nan", "-NaN", "NaNa", "+1", ".5", "01", "Infinit", "[NaN"] {
            assert!(parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn lone_surrogates_are_replaced_and_pairs_are_decoded() {
        same(br#"["\ud83d", "\ude00 x", NaN]"#, {
            json!(["\u{fffd}", "\u{fffd} x", null])
        });
        same(
            br#"["\ud83d\ud83d\ude00\ud83d\u0041"]"#,
            json!(["\u{fffd}😀\u{fffd}A"]),
        );
        same(
            br#"["\\ud83d", "\ud83d\n"]"#,
            json!(["\\ud83d", "\u{fffd}\n"]),
        );
        same(b"[\"\xed\xa0\xbd\", NaN]", json!(["\u{fffd}", null]));
        for wrong in [
            &br#"["\ud83d"#[..],
            br#"["\ud8"]"#,
            b"[\"\\",
            b"[\"\xe9\"]",
            b"\"",
        ] {
            assert!(parse(wrong).is_err(), "{}", wrong.escape_ascii());
        }
    }

    #[test]
    fn byte_order_marks_are_removed() {
        same(b"\xef\xbb\xbf{\"a\": NaN}", json!({"a": null}));
        let units: Vec<u16> = "\u{feff}[\"é😀\", NaN]".encode_utf16().collect();
        let little: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        let big: Vec<u8> = units.iter().flat_map(|unit| unit.to_be_bytes()).collect();
        same(&little, json!(["é😀", null]));
        same(&big, json!(["é😀", null]));
        assert!(parse(b"\xff\xfe").is_err() && parse(b"\xfe").is_err());
    }

    #[test]
    fn deep_nesting_and_empty_text_are_errors() {
        let deep = [vec![b'['; 100_000], b"NaN".to_vec(), vec![b']'; 100_000]].concat();
        assert!(parse(&deep).is_err());
        assert!(parse(b"").is_err() && parse(b"{'a': 1}").is_err());
    }
}
