//! Replaces HTML character references in captions, like Python's `html.unescape` and ftfy.
//!
//! The names are those of Python's `html.entities.html5`, with and without semicolon.
//! `tests/golden/make_text.py --tables` generates `tables/entities.txt`. Tags are not parsed.

use std::collections::HashMap;
use std::sync::LazyLock;

/// Names without `&`, most with `;`, and numbers that mean a different character, such as `#128`.
static NAMES: LazyLock<HashMap<&'static str, String>> = LazyLock::new(|| {
    let lines = include_str!("tables/entities.txt").lines();
    let entry = |line: &'static str| {
        let (name, codes) = line.split_once(' ').expect("a name and its characters");
        (name, characters(codes))
    };
    lines.map(entry).collect()
});

/// Uppercase names, such as `EACUTE;`, that ftfy accepts for capital letters.
static CAPITALS: LazyLock<HashMap<String, String>> = LazyLock::new(|| {
    let small = NAMES
        .iter()
        .filter(|(name, _)| name.ends_with(';') && **name == name.to_lowercase());
    let entry = |(name, text): (&&str, &String)| {
        let capital = name.to_uppercase();
        let reference = format!("&{capital}");
        (unescape(&reference) == reference).then(|| (capital, text.to_uppercase()))
    };
    small.filter_map(entry).collect()
});

/// Converts hexadecimal code points, separated by spaces, to characters.
pub(crate) fn characters(codes: &str) -> String {
    let code = |word| u32::from_str_radix(word, 16).expect("a hexadecimal number");
    let letter = |word| char::from_u32(code(word)).expect("a character");
    codes.split(' ').map(letter).collect()
}

/// Replaces every HTML reference like a browser: the longest known name if the semicolon is missing, and U+FFFD for
/// invalid code points.
///
/// Source: Python's `html.unescape`.
pub fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let length = reference(rest);
        let (found, after) = rest.split_at(length);
        match found {
            "" => out.push('&'),
            _ if found.starts_with('#') => numbered(found, &mut out),
            _ => named(found, &mut out),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Returns the length in bytes of a possible reference after the `&`.
fn reference(text: &str) -> usize {
    let semicolon = |length: usize| length + usize::from(text[length..].starts_with(';'));
    let run = |text: &str, belongs: fn(&char) -> bool, most: usize| -> usize {
        let letters = text.chars().take(most).take_while(belongs);
        letters.map(char::len_utf8).sum()
    };
    let Some(number) = text.strip_prefix('#') else {
        let ends = |letter: &char| !"\t\n\x0c <&#;".contains(*letter);
        return match run(text, ends, 32) {
            0 => 0,
            length => semicolon(length),
        };
    };
    let decimal = run(number, char::is_ascii_digit, usize::MAX);
    if decimal > 0 {
        return semicolon(1 + decimal);
    }
    let digits = number.strip_prefix(['x', 'X']).unwrap_or_default();
    match run(digits, char::is_ascii_hexdigit, usize::MAX) {
        0 => 0,
        length => semicolon(2 + length),
    }
}

fn named(found: &str, out: &mut String) {
    // Names without semicolon have at least two letters.
    let ends = found.char_indices().map(|(at, _)| at).skip(2);
    let ends = ends.chain([found.len()]).collect::<Vec<_>>();
    for end in ends.into_iter().rev() {
        if let Some(text) = NAMES.get(&found[..end]) {
            out.push_str(text);
            out.push_str(&found[end..]);
            return;
        }
    }
    out.push('&');
    out.push_str(found);
}

fn numbered(found: &str, out: &mut String) {
    let digits = found[1..].trim_end_matches(';');
    let (digits, base) = match digits.strip_prefix(['x', 'X']) {
        Some(digits) => (digits, 16),
        None => (digits, 10),
    };
    // Parsing digits can only fail by overflow.
    let number = u32::from_str_radix(digits, base).unwrap_or(u32::MAX);
    if let Some(text) = NAMES.get(&*format!("#{number}")) {
        return out.push_str(text);
    }
    match char::from_u32(number) {
        None => out.push('\u{fffd}'),
        Some(_) if is_dropped(number) => {}
        Some(letter) => out.push(letter),
    }
}

/// Returns whether HTML drops a number: control characters and Unicode noncharacters.
fn is_dropped(number: u32) -> bool {
    matches!(number, 0x1..=0x8 | 0xb | 0xe..=0x1f | 0x7f..=0x9f | 0xfdd0..=0xfdef)
        || number & 0xfffe == 0xfffe
}

/// Replaces only unambiguous references: those with a semicolon, including uppercase names.
///
/// Source: ftfy's `unescape_html`.
pub(crate) fn unescape_certain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let number = usize::from(rest[1..].starts_with('#'));
        let name = rest[1 + number..].bytes();
        let length = name
            .take(25)
            .take_while(|byte| byte.is_ascii_alphanumeric())
            .count();
        let end = 1 + number + length;
        if !(1..=24).contains(&length) || !rest[end..].starts_with(';') {
            out.push('&');
            rest = &rest[1..];
            continue;
        }
        let (found, after) = rest.split_at(end + 1);
        let name = &found[1..];
        match NAMES.get(name).or_else(|| CAPITALS.get(name)) {
            Some(text) => out.push_str(text),
            None if number == 1 => match unescape(found) {
                // Only part of it was a number.
                text if text.contains(';') => out.push_str(found),
                text => out.push_str(&text),
            },
            None => out.push_str(found),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_replaced_as_in_browsers() {
        for (text, right) in [
            ("&amp;&lt;&copy 2020", "&<© 2020"),
            ("&notit; &notin; &unknown; &", "¬it; ∉ &unknown; &"),
            ("&#39;&#x27;&#128;&#xD800;&#1;&#x;", "''€\u{fffd}&#x;"),
            ("&#99999999999999999999;", "\u{fffd}"),
            ("&é&&#é;", "&é&&#é;"),
        ] {
            assert_eq!(unescape(text), right, "{text}");
        }
    }

    #[test]
    fn certain_references_need_their_semicolon() {
        assert_eq!(unescape_certain("&amp &eacute; &EACUTE;"), "&amp é É");
        assert_eq!(
            unescape_certain("&#38;#39; &#38a; &&gt;"),
            "&#39; &#38a; &>"
        );
    }
}
