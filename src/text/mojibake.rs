//! Repairs UTF-8 text that was decoded in another encoding, like ftfy: `cafÃ©` to `café`.
//!
//! ftfy's regular expression for suspicious neighbors and its lists of characters are in `tables/mojibake.txt`, which
//! `tests/golden/make_text.py --tables` generates from ftfy (Apache License 2.0, Robyn Speer).
//! The steps are those of ftfy's `fix_encoding`.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use regex::bytes::Regex as BytesRegex;
use regex::{Captures, Regex};

use super::html::characters;

/// ftfy's tables.
struct Tables {
    bad: Regex,
    first: [HashSet<char>; 3],
    continuation: HashSet<char>,
    strict: HashSet<char>,
    encodings: Vec<Encoding>,
}

/// A single-byte encoding.
struct Encoding {
    name: &'static str,
    characters: Vec<char>,
    bytes: HashMap<char, u8>,
}

static TABLES: LazyLock<Tables> = LazyLock::new(|| {
    let (mut sets, mut bad, mut encodings) = (HashMap::new(), None, Vec::new());
    for line in include_str!("tables/mojibake.txt").lines() {
        let (word, rest) = line.split_once(' ').expect("a word and its value");
        match word {
            "badness" => bad = Some(Regex::new(rest).expect("a regular expression")),
            "encoding" => {
                let (name, codes) = rest.split_once(' ').expect("a name and 256 characters");
                let characters: Vec<char> = characters(codes).chars().collect();
                let pairs = characters.iter().zip(0..=255u8);
                let bytes = pairs.map(|(letter, byte)| (*letter, byte)).collect();
                encodings.push(Encoding {
                    name,
                    characters,
                    bytes,
                });
            }
            _ => drop(sets.insert(word, characters(rest).chars().collect())),
        }
    }
    let mut set = |name: &str| sets.remove(name).expect("a set of the table");
    Tables {
        bad: bad.expect("the expression of the table"),
        first: [
            set("utf8_first_of_2"),
            set("utf8_first_of_3"),
            set("utf8_first_of_4"),
        ],
        continuation: set("utf8_continuation"),
        strict: set("utf8_continuation_strict"),
        encodings,
    }
});

/// Sequences that would be UTF-8 if their space were byte A0.
static ALTERED: LazyLock<BytesRegex> = LazyLock::new(|| {
    bytes_regex(concat!(
        r"[\xc2\xc3\xc5\xce\xd0\xd9][ ]",
        r"|[\xe2\xe3][ ][\x80-\x84\x86-\x9f\xa1-\xbf]",
        r"|[\xe0-\xe3][\x80-\x84\x86-\x9f\xa1-\xbf][ ]",
        r"|[\xf0][ ][\x80-\xbf][\x80-\xbf]",
        r"|[\xf0][\x80-\xbf][ ][\x80-\xbf]",
        r"|[\xf0][\x80-\xbf][\x80-\xbf][ ]",
    ))
});

/// UTF-8 with lost bytes; byte 1A represents U+FFFD.
static LOSSY: LazyLock<BytesRegex> = LazyLock::new(|| {
    bytes_regex(concat!(
        r"[\xc2-\xdf][\x1a]",
        r"|[\xc2-\xc3][?]",
        r"|\xed[\xa0-\xaf][\x1a?]\xed[\xb0-\xbf][\x1a?\x80-\xbf]",
        r"|\xed[\xa0-\xaf][\x1a?\x80-\xbf]\xed[\xb0-\xbf][\x1a?]",
        r"|[\xe0-\xef][\x1a?][\x1a\x80-\xbf]",
        r"|[\xe0-\xef][\x1a\x80-\xbf][\x1a?]",
        r"|[\xf0-\xf4][\x1a?][\x1a\x80-\xbf][\x1a\x80-\xbf]",
        r"|[\xf0-\xf4][\x1a\x80-\xbf][\x1a?][\x1a\x80-\xbf]",
        r"|[\xf0-\xf4][\x1a\x80-\xbf][\x1a\x80-\xbf][\x1a?]",
        r"|\x1a",
    ))
});

fn bytes_regex(pattern: &str) -> BytesRegex {
    BytesRegex::new(&format!("(?-u){pattern}")).expect("a regular expression")
}

/// Repairs mojibake, repeatedly until nothing changes.
pub(crate) fn fix(text: &str) -> String {
    let mut text = text.to_owned();
    while let Some(better) = step(&text) {
        text = better;
    }
    text
}

fn is_bad(text: &str) -> bool {
    !text.is_ascii() && TABLES.bad.is_match(text)
}

/// Takes one step. Returns `None` if nothing changes.
fn step(text: &str) -> Option<String> {
    if !is_bad(text) {
        return None;
    }
    let changed = |fixed: String| (fixed != text).then_some(fixed);
    let mut is_latin = false;
    for encoding in &TABLES.encodings {
        let bytes = text.chars().map(|letter| encoding.bytes.get(&letter));
        let Some(bytes) = bytes.map(|byte| byte.copied()).collect::<Option<Vec<u8>>>() else {
            continue;
        };
        is_latin |= encoding.name == "latin-1";
        if let Some(fixed) = decoded(bytes, encoding.name) {
            return changed(fixed);
        }
    }
    if let Some(fixed) = changed(fix_parts(text)) {
        return Some(fixed);
    }
    if is_latin {
        // Characters of Latin-1 that Windows-1252 lacks are unwanted control characters.
        let windows = text.chars().map(|letter| {
            let unassigned = matches!(letter, '\u{81}' | '\u{8d}' | '\u{8f}' | '\u{90}' | '\u{9d}');
            (!unassigned).then(|| windows(letter))
        });
        if let Some(fixed) = windows.collect::<Option<String>>().and_then(changed) {
            return Some(fixed);
        }
    }
    changed(fix_controls(text))
}

/// Decodes UTF-8, including damage done by other programs.
fn decoded(mut bytes: Vec<u8>, encoding: &str) -> Option<String> {
    // In MacRoman this would match an en dash before a space.
    if encoding != "macroman" && ALTERED.is_match(&bytes) {
        bytes = restore_spaces(bytes);
    }
    if encoding.starts_with("sloppy") {
        bytes = LOSSY
            .replace_all(&bytes, "\u{fffd}".as_bytes())
            .into_owned();
    }
    match bytes.contains(&0xed) || bytes.contains(&0xc0) {
        true => decode_variants(&bytes),
        false => String::from_utf8(bytes).ok(),
    }
}

/// Restores byte A0 where it was replaced by a space.
fn restore_spaces(bytes: Vec<u8>) -> Vec<u8> {
    let mut with_grave = Vec::with_capacity(bytes.len() + 8);
    let mut rest = &bytes[..];
    while let Some((first, after)) = rest.split_first() {
        let word = rest.strip_prefix(b"\xc3 ");
        // `à` is a separate word, except in Portuguese `às`, `àquele` and the like.
        let joined: [&[u8]; 5] = [b" ", b"quele", b"quela", b"quilo", b"s "];
        match word {
            Some(next) if !joined.iter().any(|joined| next.starts_with(joined)) => {
                with_grave.extend(b"\xc3\xa0 ");
                rest = next;
            }
            _ => {
                with_grave.push(*first);
                rest = after;
            }
        }
    }
    let restored = ALTERED.replace_all(&with_grave, |found: &regex::bytes::Captures| {
        let bytes = found[0].iter();
        bytes
            .map(|byte| if *byte == b' ' { 0xa0 } else { *byte })
            .collect::<Vec<u8>>()
    });
    restored.into_owned()
}

/// Decodes UTF-8 in which characters above U+FFFF may be surrogate pairs, and zero two bytes (CESU-8, Java).
fn decode_variants(bytes: &[u8]) -> Option<String> {
    let mut out = String::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        if let [
            0xed,
            high @ 0xa0..=0xaf,
            high_low @ 0x80..=0xbf,
            0xed,
            low @ 0xb0..=0xbf,
            low_low @ 0x80..=0xbf,
            after @ ..,
        ] = rest
        {
            let part = |byte: &u8, bits: u32| u32::from(*byte) & ((1 << bits) - 1);
            let code = (part(high, 4) << 16)
                + (part(high_low, 6) << 10)
                + (part(low, 4) << 6)
                + part(low_low, 6)
                + 0x10000;
            out.push(char::from_u32(code)?);
            rest = after;
        } else if let [0xc0, 0x80, after @ ..] = rest {
            out.push('\0');
            rest = after;
        } else {
            let length = match rest[0] {
                0..0x80 => 1,
                0xc2..0xe0 => 2,
                0xe0..0xf0 => 3,
                0xf0..0xf5 => 4,
                _ => return None,
            };
            let (letter, after) = rest.split_at_checked(length)?;
            out.push_str(std::str::from_utf8(letter).ok()?);
            rest = after;
        }
    }
    Some(out)
}

/// Repairs sequences that look like UTF-8 within text that does not.
fn fix_parts(text: &str) -> String {
    let letters: Vec<char> = text.chars().collect();
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    while at < letters.len() {
        let length = match at > 0 && TABLES.strict.contains(&letters[at - 1]) {
            true => 0,
            false => suspicious(&letters[at..]),
        };
        if length == 0 {
            out.push(letters[at]);
            at += 1;
            continue;
        }
        let part: String = letters[at..at + length].iter().collect();
        match length < letters.len() && is_bad(&part) {
            true => out.push_str(&fix(&part)),
            false => out.push_str(&part),
        }
        at += length;
    }
    out
}

/// Returns how many characters, from the first, look like UTF-8 decoded in another encoding.
fn suspicious(letters: &[char]) -> usize {
    let mut end = 0;
    'next: while end < letters.len() {
        for (first, count) in TABLES.first.iter().zip(1..) {
            let Some(following) = letters.get(end + 1..=end + count) else {
                continue;
            };
            let all = following
                .iter()
                .all(|letter| TABLES.continuation.contains(letter));
            if first.contains(&letters[end]) && all {
                end += 1 + count;
                continue 'next;
            }
        }
        break;
    }
    end
}

/// Returns the Windows-1252 character with the same byte as a Latin-1 character.
fn windows(letter: char) -> char {
    let encodings = &TABLES.encodings;
    let mut named = encodings
        .iter()
        .filter(|one| one.name == "sloppy-windows-1252");
    match (named.next(), u8::try_from(letter)) {
        (Some(encoding), Ok(byte)) if byte >= 0x80 => encoding.characters[usize::from(byte)],
        _ => letter,
    }
}

/// Interprets control characters 80 to 9F as Windows-1252, like browsers.
pub(crate) fn fix_controls(text: &str) -> String {
    static CONTROL: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"[\x{80}-\x{9f}]").expect("a regular expression"));
    let windows = |found: &Captures| found[0].chars().map(windows).collect::<String>();
    CONTROL.replace_all(text, windows).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_decoded_in_the_wrong_encoding_is_repaired() {
        for (text, right) in [
            ("cafÃ©", "café"),
            ("ÃƒÂ©", "é"),
            ("voilÃ le travail", "voilà le travail"),
            ("â€œlostâ€\u{fffd}", "“lost\u{fffd}"),
            ("ðŸ˜€", "😀"),
            ("café “ok” Å", "café “ok” Å"),
            ("í\u{a0}½í¸\u{80}", "😀"),
        ] {
            assert_eq!(fix(text), right, "{text}");
        }
    }
}
