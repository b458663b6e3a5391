//! Cleans captions before tokenization, like open_clip: ftfy's repairs, HTML references, white space.
//!
//! Source: open_clip's `tokenizer.py` (from OpenAI's CLIP), ftfy 6.3.1's `fix_text` with its default settings, Python's
//! `str.split` and `str.lower`. Tested against them by `tests/text.rs`.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::Regex;
use unicode_normalization::{UnicodeNormalization, is_nfc};

use super::html::{unescape, unescape_certain};
use super::mojibake;
use crate::settings::words;

words! {
    /// How captions are cleaned: open_clip's `clean`.
    pub enum Cleaning {
        /// Repair, collapse white space, convert to lower case: CLIP.
        Lower = "lower",
        /// Repair, collapse white space: tokenizers that convert to lower case themselves.
        Whitespace = "whitespace",
        /// Repair, convert to lower case, remove punctuation: SigLIP.
        Canonicalize = "canonicalize",
    }
}

impl Cleaning {
    /// Returns the cleaned caption.
    pub fn clean(self, caption: &str) -> String {
        let repaired = unescape(&unescape(&fix_text(caption)));
        match self {
            Self::Lower => collapsed(&repaired).to_lowercase(),
            Self::Whitespace => collapsed(&repaired),
            Self::Canonicalize => {
                let spaced = strip(&repaired).replace('_', " ");
                let bare = spaced.replace(|letter: char| letter.is_ascii_punctuation(), "");
                collapsed(&bare.to_lowercase())
            }
        }
    }
}

/// Python's white space: Unicode's, and four control characters.
fn is_space(letter: char) -> bool {
    letter.is_whitespace() || ('\x1c'..='\x1f').contains(&letter)
}

fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

fn collapsed(text: &str) -> String {
    let words = text.split(is_space).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// ftfy's `fix_text`: line by line, until nothing changes.
fn fix_text(text: &str) -> String {
    if is_plain(text) {
        return text.to_owned();
    }
    let mut unescape = true;
    let lines = text.split_inclusive('\n').map(|line| {
        // Where there are tags, references are part of the HTML.
        unescape &= !line.contains('<');
        fix_line(line, unescape)
    });
    lines.collect()
}

/// Returns whether a caption needs no repair, like most.
fn is_plain(text: &str) -> bool {
    text.bytes()
        .all(|byte| (0x20..0x7f).contains(&byte) && byte != b'&')
}

fn fix_line(line: &str, unescape: bool) -> String {
    let mut line = line.to_owned();
    loop {
        let mut fixed = match unescape {
            true => unescape_certain(&line),
            false => line.clone(),
        };
        fixed = mojibake::fix_controls(&mojibake::fix(&fixed));
        fixed = fixed.chars().map(standard).collect();
        fixed = fixed.replace("\r\n", "\n");
        fixed = fixed.replace(['\r', '\u{2028}', '\u{2029}', '\u{85}'], "\n");
        fixed = without_terminal_escapes(&fixed).replace(is_unwanted, "");
        if !is_nfc(&fixed) {
            fixed = fixed.nfc().collect();
        }
        if fixed == line {
            return line;
        }
        line = fixed;
    }
}

/// Returns the standard form of a character: ligatures split, full and half width normalized, quotes straight.
fn standard(letter: char) -> Cow<'static, str> {
    // ftfy's order: ligatures, width, quotes. Only U+02BC, which a ligature produces, is changed by a later step.
    let text = match letter {
        'Ĳ' => "IJ",
        'ĳ' => "ij",
        'ŉ' => "'n",
        'Ǳ' => "DZ",
        'ǲ' => "Dz",
        'ǳ' => "dz",
        'Ǆ' => "DŽ",
        'ǅ' => "Dž",
        'ǆ' => "dž",
        'Ǉ' => "LJ",
        'ǈ' => "Lj",
        'ǉ' => "lj",
        'Ǌ' => "NJ",
        'ǋ' => "Nj",
        'ǌ' => "nj",
        'ﬀ' => "ff",
        'ﬁ' => "fi",
        'ﬂ' => "fl",
        'ﬃ' => "ffi",
        'ﬄ' => "ffl",
        'ﬅ' => "ſt",
        'ﬆ' => "st",
        '\u{3000}' => " ",
        '\u{201c}'..='\u{201f}' => "\"",
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => "'",
        '\u{ff01}'..='\u{ffef}' => return letter.nfkc().collect::<String>().into(),
        _ => return letter.to_string().into(),
    };
    text.into()
}

/// Removes terminal escapes such as colors.
fn without_terminal_escapes(text: &str) -> Cow<'_, str> {
    static ESCAPE: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\x1b\[[\d;]*[a-zA-Z]").expect("a regular expression"));
    ESCAPE.replace_all(text, "")
}

/// Returns whether a character is an unintended control character.
fn is_unwanted(letter: char) -> bool {
    matches!(letter,
        '\0'..='\x08' | '\x0b' | '\x0e'..='\x1f' | '\x7f'
        | '\u{206a}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffc}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_are_cleaned() {
        let clean = |text| Cleaning::Lower.clean(text);
        assert_eq!(
            clean("  A\tPhoto\n of &amp;amp; CATS "),
            "a photo of & cats"
        );
        assert_eq!(
            clean("“ﬁne” cafÃ© ＦＵＬＬ\u{3000}x"),
            "\"fine\" café full x"
        );
        assert_eq!(clean("\x1b[36mred\x1b[0m \u{feff}e\u{301}"), "red é");
        assert_eq!(clean("ΟΔΟΣ"), "οδος");
        let bare = Cleaning::Canonicalize.clean("It's snake_case, (really)!");
        assert_eq!(bare, "its snake case really");
        assert_eq!(Cleaning::Whitespace.clean(" A  b"), "A b");
    }
}
