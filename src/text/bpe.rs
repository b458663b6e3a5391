//! CLIP's byte-pair encoding: converts the words of a cleaned caption to ids.
//!
//! The bytes of a word are merged pair by pair, in the order of the pairs in a file. The last byte of a word is a
//! different symbol from the same byte elsewhere. Reads OpenAI's `bpe_simple_vocab_16e6.txt.gz`, Hugging Face's
//! `vocab.json` with `merges.txt`, and the same two in a `tokenizer.json`. Does not clean captions.
//! Source: OpenAI's `SimpleTokenizer` (Radford et al. 2021); tested against it by `tests/text.rs`.

use std::collections::HashMap;
use std::io::Read;

use regex::Regex;
use serde_json::Value;

use crate::error::{Context, Error, Result};
use crate::json;

/// Names of the start and end tokens: OpenAI's, and open_clip's for the same two.
pub(crate) const OPENAI: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];
const OPEN_CLIP: [&str; 2] = ["<start_of_text>", "<end_of_text>"];

/// Merges that are read from a file: OpenAI's vocabulary has 49,152 tokens and these two.
const MOST_MERGES: usize = 49152 - 256 - 2;

/// First line of transformers' `merges.txt`.
const TITLE: &str = "#version: 0.2";

/// A byte-pair vocabulary.
#[derive(Debug)]
pub struct BytePairs {
    /// Symbol of each byte within a word. As the last byte of a word, its symbol is 256 higher.
    of_byte: [u16; 256],
    /// Rank and merged symbol of each pair.
    merges: HashMap<(u32, u32), (u32, u32)>,
    /// Token of each symbol, or `None` if `vocab.json` lacks it.
    tokens: Vec<Option<u32>>,
    /// Token for symbols that `vocab.json` lacks.
    unknown: u32,
    special: [(&'static str, u32); 2],
    words: Regex,
    /// One more than the greatest id.
    size: usize,
}

impl BytePairs {
    /// Reads OpenAI's compressed file, whose merges alone define the vocabulary.
    pub fn from_compressed(bytes: &[u8]) -> Result<Self> {
        Self::new(merges_of(bytes)?, None)
    }

    /// Reads Hugging Face's `vocab.json` and `merges.txt`.
    pub fn from_vocabulary(vocabulary: &[u8], merges: &str) -> Result<Self> {
        let ids = json::parse(vocabulary)
            .map_err(|error| Error::input(format!("`vocab.json` is not valid JSON: {error}")))?;
        let titled = merges
            .lines()
            .next()
            .is_some_and(|line| line.contains("#version:"));
        let lines = merges.split('\n').enumerate().skip(usize::from(titled));
        let merges = pairs(lines).context(|| "`merges.txt`".into())?;
        Self::new(merges, Some(ids_of(&ids)?))
    }

    /// Reads the `model` of a `tokenizer.json`.
    ///
    /// Errors: a byte-pair encoding other than CLIP's.
    pub fn from_json(model: &Value) -> Result<Self> {
        if model["end_of_word_suffix"] != "</w>" {
            let message = format!(
                "`end_of_word_suffix` is {}, expected `</w>`",
                model["end_of_word_suffix"]
            );
            return Err(Error::input(message).hint("only CLIP's byte-pair encoding is supported"));
        }
        let merges = model["merges"].as_array().cloned().unwrap_or_default();
        let text = |merge: &Value| match merge {
            Value::String(text) => text.clone(),
            Value::Array(two) => {
                let parts = two.iter().map(|part| part.as_str().unwrap_or_default());
                parts.collect::<Vec<_>>().join(" ")
            }
            _ => "?".into(),
        };
        let lines: Vec<String> = merges.iter().map(text).collect();
        let merges = pairs(lines.iter().map(String::as_str).enumerate())?;
        Self::new(merges, Some(ids_of(&model["vocab"])?))
    }

    fn new(merges: Vec<(String, String)>, ids: Option<HashMap<String, u32>>) -> Result<Self> {
        let letters = letters_of_bytes();
        let mut texts: Vec<String> = letters.iter().map(char::to_string).collect();
        texts.extend(letters.iter().map(|letter| format!("{letter}</w>")));
        let mut symbols: HashMap<String, u32> = texts.iter().cloned().zip(0..).collect();
        let mut made = HashMap::with_capacity(merges.len());
        // Tokens in the order of the merges. The last position of a repeated text counts, as in a Python dictionary.
        let mut places: Vec<u32> = (0..512).collect();
        for (rank, (left, right)) in merges.iter().enumerate() {
            let symbol = |text: &String| {
                symbols.get(text).copied().ok_or_else(|| {
                    let message = format!(
                        "merge {} joins `{text}`, which no earlier merge makes",
                        rank + 1
                    );
                    Error::input(message).hint("the file is damaged; copy or download it again")
                })
            };
            let pair = (symbol(left)?, symbol(right)?);
            let text = format!("{left}{right}");
            let next = symbols.len() as u32;
            let whole = *symbols.entry(text.clone()).or_insert(next);
            if whole == next {
                texts.push(text);
                places.push(0);
            }
            places[whole as usize] = 512 + rank as u32;
            made.insert(pair, (rank as u32, whole));
        }
        let (tokens, special, size): (Vec<Option<u32>>, _, _) = match ids {
            None => {
                let first = 512 + merges.len() as u32;
                let special = [(OPEN_CLIP[0], first), (OPEN_CLIP[1], first + 1)];
                let tokens = places.into_iter().map(Some).collect();
                (tokens, special, first as usize + 2)
            }
            Some(ids) => {
                let id = |name: &&'static str| Some((*name, *ids.get(*name)?));
                let of = |names: [&'static str; 2]| Some([id(&names[0])?, id(&names[1])?]);
                let special = of(OPENAI).or_else(|| of(OPEN_CLIP)).ok_or_else(|| {
                    Error::input("the vocabulary is missing `<|startoftext|>` and `<|endoftext|>`")
                        .hint("use the vocabulary of a CLIP model")
                })?;
                let size = ids.values().max().map_or(0, |id| *id as usize + 1);
                let tokens = texts.iter().map(|text| ids.get(text).copied()).collect();
                (tokens, special, size)
            }
        };
        let names = special.map(|(name, _)| regex::escape(name)).join("|");
        let words = format!(
            r"(?i){names}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"
        );
        let mut of_byte = [0; 256];
        for (byte, symbol) in bytes_in_order().into_iter().zip(0..) {
            of_byte[usize::from(byte)] = symbol;
        }
        Ok(Self {
            of_byte,
            merges: made,
            tokens,
            unknown: special[1].1,
            special,
            words: Regex::new(&words).expect("a regular expression"),
            size,
        })
    }

    /// Returns the vocabulary size: one more than the greatest id.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Returns the start token and the end token.
    pub fn special(&self) -> [u32; 2] {
        self.special.map(|(_, id)| id)
    }

    /// Returns the names and ids of the start token and the end token.
    pub(crate) fn named_special(&self) -> [(&'static str, u32); 2] {
        self.special
    }

    /// Returns the tokens of a cleaned caption, without start and end tokens.
    pub fn tokens(&self, caption: &str) -> Vec<u32> {
        let mut tokens = Vec::with_capacity(caption.len() / 4);
        for word in self.words.find_iter(caption) {
            match self.special.iter().find(|(name, _)| *name == word.as_str()) {
                Some((_, id)) => tokens.push(*id),
                None => self.merge(word.as_str(), &mut tokens),
            }
        }
        tokens
    }

    /// Merges the symbols of a word, the earliest merge first.
    fn merge(&self, word: &str, tokens: &mut Vec<u32>) {
        let bytes = word.bytes();
        let mut symbols: Vec<u32> = bytes
            .map(|byte| self.of_byte[usize::from(byte)].into())
            .collect();
        if let Some(last) = symbols.last_mut() {
            *last += 256;
        }
        loop {
            let neighbors = symbols.windows(2).map(|pair| (pair[0], pair[1]));
            let known = neighbors.filter_map(|pair| Some((self.merges.get(&pair)?, pair)));
            let Some((&(_, whole), pair)) = known.min_by_key(|(merge, _)| merge.0) else {
                break;
            };
            let (mut from, mut to) = (0, 0);
            while from < symbols.len() {
                let joins = symbols[from] == pair.0 && symbols.get(from + 1) == Some(&pair.1);
                symbols[to] = if joins { whole } else { symbols[from] };
                from += if joins { 2 } else { 1 };
                to += 1;
            }
            symbols.truncate(to);
        }
        let ids = symbols.iter().map(|symbol| self.tokens[*symbol as usize]);
        tokens.extend(ids.map(|id| id.unwrap_or(self.unknown)));
    }
}

/// Reads the merges of OpenAI's compressed file.
fn merges_of(bytes: &[u8]) -> Result<Vec<(String, String)>> {
    let mut text = String::new();
    // OpenAI's file has 3 MB.
    let read = flate2::read::GzDecoder::new(bytes)
        .take(64 << 20)
        .read_to_string(&mut text);
    read.map_err(|error| {
        Error::input(format!("not a gzip-compressed text: {error}"))
            .hint("copy or download the file again")
    })?;
    // The first line is a title.
    pairs(text.split('\n').enumerate().skip(1).take(MOST_MERGES))
}

/// Converts OpenAI's compressed file to transformers' `vocab.json` and `merges.txt`, with the same ids.
pub(crate) fn to_vocabulary(bytes: &[u8]) -> Result<(Value, String)> {
    let merges = merges_of(bytes)?;
    let letters = letters_of_bytes();
    let single = letters.iter().map(char::to_string);
    let last = letters.iter().map(|letter| format!("{letter}</w>"));
    let joined = merges.iter().map(|(left, right)| format!("{left}{right}"));
    let special = OPENAI.iter().map(|name| (*name).to_owned());
    let all = single.chain(last).chain(joined).chain(special);
    // The last position of a repeated text counts, as in a Python dictionary.
    let vocabulary: serde_json::Map<String, Value> = all.zip((0u32..).map(Value::from)).collect();
    let mut text = format!("{TITLE}\n");
    for (left, right) in &merges {
        text += &format!("{left} {right}\n");
    }
    Ok((Value::Object(vocabulary), text))
}

/// Returns a `merges.txt` whose title, if it has one, is a comment to transformers: OpenAI's is not.
pub(crate) fn titled(merges: &str) -> String {
    match merges.split_once('\n') {
        Some((title, rest)) if title.contains("#version:") => format!("{TITLE}\n{rest}"),
        _ => merges.to_owned(),
    }
}

/// Returns bytes in the order of the vocabulary: visible Latin-1 characters first.
fn bytes_in_order() -> [u8; 256] {
    let visible = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=255u8).filter(|byte| !visible(byte));
    let order = (0..=255u8).filter(visible).chain(others);
    order
        .collect::<Vec<_>>()
        .try_into()
        .expect("every byte once")
}

/// Returns the characters that represent the bytes in files, in the order of [`bytes_in_order`].
fn letters_of_bytes() -> Vec<char> {
    let bytes = bytes_in_order();
    let visible = 188;
    let shown = bytes[..visible].iter().map(|byte| char::from(*byte));
    let others = (256..).take(256 - visible).filter_map(char::from_u32);
    shown.chain(others).collect()
}

/// Parses the two symbols of each line.
fn pairs<'a>(lines: impl Iterator<Item = (usize, &'a str)>) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let mut lines = lines.peekable();
    while let Some((place, line)) = lines.next() {
        let line = line.trim_end_matches('\r');
        if line.is_empty() && lines.peek().is_none() {
            break;
        }
        let mut parts = line.split_whitespace();
        let (Some(left), Some(right), None) = (parts.next(), parts.next(), parts.next()) else {
            let shown: String = line.chars().take(40).collect();
            let message = format!(
                "line {} is `{shown}`, expected two symbols to merge",
                place + 1
            );
            return Err(Error::input(message).hint("the file is damaged, or of another kind"));
        };
        found.push((left.to_owned(), right.to_owned()));
    }
    match found.is_empty() {
        true => Err(Error::input("the file lists no merges").hint("copy or download it again")),
        false => Ok(found),
    }
}

/// Parses a vocabulary: the id of each token.
fn ids_of(vocabulary: &Value) -> Result<HashMap<String, u32>> {
    let wrong = |what: String| {
        Error::input(format!("the vocabulary {what}")).hint("it must map each token to its id")
    };
    let entries = vocabulary.as_object();
    let entries = entries.ok_or_else(|| wrong("is not a JSON object".into()))?;
    let id = |(token, id): (&String, &Value)| {
        // A damaged id must not make the vocabulary too large for memory.
        let number = id.as_u64().filter(|id| *id < 1 << 24);
        let number =
            number.ok_or_else(|| wrong(format!("has the invalid id {id} for `{token}`")))?;
        Ok((token.clone(), number as u32))
    };
    entries.iter().map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(result: Result<BytePairs>) -> String {
        let error = result.expect_err("it is refused");
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    }

    #[test]
    fn the_earliest_merge_goes_first_and_words_end() {
        let vocabulary = br#"{"a":0,"b":1,"b</w>":2,"ab":3,"ab</w>":4,"aab</w>":5,"<|startoftext|>":6,"<|endoftext|>":7}"#;
        let pairs =
            BytePairs::from_vocabulary(vocabulary, "#version: 0.2\na b</w>\na b\na ab</w>\n")
                .unwrap();
        assert_eq!(pairs.tokens("ab abab aab"), [4, 3, 4, 5]);
        assert_eq!(
            pairs.tokens("<|endoftext|> a"),
            [7, 7],
            "`a` at an end is unknown"
        );
        assert_eq!((pairs.size(), pairs.special()), (8, [6, 7]));
    }

    #[test]
    fn damaged_files_are_reported_with_the_line() {
        let vocabulary = br#"{"<|startoftext|>":0,"<|endoftext|>":1}"#;
        let of = |merges| refusal(BytePairs::from_vocabulary(vocabulary, merges));
        let text = of("#version: 0.2\na b\nbroken\n");
        assert!(
            text.contains("`merges.txt`: line 3 is `broken`, expected two symbols"),
            "{text}"
        );
        let text = of("a bc\n");
        assert!(
            text.contains("merge 1 joins `bc`, which no earlier merge makes"),
            "{text}"
        );
        assert!(of("").contains("no merges"));
        let text = refusal(BytePairs::from_vocabulary(b"{}", "a b\n"));
        assert!(text.contains("missing `<|startoftext|>`"), "{text}");
        let text = refusal(BytePairs::from_vocabulary(br#"{"a":-1}"#, "a b\n"));
        assert!(text.contains("has the invalid id -1 for `a`"), "{text}");
        let text = refusal(BytePairs::from_compressed(b"plain text"));
        assert!(text.contains("not a gzip-compressed text"), "{text}");
    }
}
