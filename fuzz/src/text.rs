//! Tokenizer files, and captions.

use std::fs;
use std::sync::LazyLock;

use advxl::settings::Words;
use advxl::text::{Cleaning, Tokenizer, TokenizerConfig};

use crate::scratch::{self, golden, parts};

const CAPTIONS: [&str; 3] = [
    "a photo of a cat",
    "It's 9 o'clock\u{1f600}",
    "\u{fffd} [CLS] <|endoftext|> ##ing",
];

fn config(name: Option<&str>) -> TokenizerConfig {
    TokenizerConfig {
        name: name.map(str::to_owned),
        context: 8,
        cleaning: Cleaning::Whitespace,
        strip_separator: false,
    }
}

/// Input: a letter for the kind of file, then the file; `vocab.json` is followed by a zero byte and `merges.txt`. Every
/// caption must become ids of the vocabulary.
pub fn tokenizer(data: &[u8]) {
    let Some((first, file)) = data.split_first() else {
        return;
    };
    let folder = format!("tokenizer{}", first % 4);
    let at = |name: &str| format!("{folder}/{name}");
    let [vocabulary, merges] = parts(file, 0);
    let name = match first % 4 {
        0 => {
            scratch::write(&at("bpe_simple_vocab_16e6.txt.gz"), file);
            None
        }
        1 => {
            scratch::write(&at("vocab.json"), vocabulary);
            scratch::write(&at("merges.txt"), merges);
            None
        }
        2 => {
            scratch::write(&at("tokenizer.json"), file);
            Some("a")
        }
        _ => {
            scratch::write(&at("vocab.txt"), file);
            Some("a")
        }
    };
    let Ok(tokenizer) = Tokenizer::open(&scratch::path(&folder), config(name)) else {
        return;
    };
    let size = tokenizer.vocabulary() as u32;
    for caption in CAPTIONS {
        if let Ok(row) = tokenizer.ids(caption) {
            assert_eq!(row.len(), 8);
            assert!(
                row.iter().all(|id| *id < size),
                "an id that the vocabulary lacks"
            );
        }
    }
    let _ = tokenizer.end();
    tokenizer.hash().unwrap();
}

static CLIP: LazyLock<Tokenizer> = LazyLock::new(|| {
    let name = "clip/bpe_simple_vocab_16e6.txt.gz";
    let path = scratch::write(name, &fs::read(golden("text/merges.txt.gz")).unwrap());
    Tokenizer::open(path.parent().unwrap(), config(None)).unwrap()
});

static WORD_PIECE: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::open(&golden("text/wordpiece"), config(Some("bert"))).unwrap());

/// Checks that any caption is cleaned and becomes ids of the vocabulary.
pub fn caption(data: &[u8]) {
    let caption = String::from_utf8_lossy(data);
    for &cleaning in Cleaning::VALUES {
        let clean = cleaning.clean(&caption);
        assert!(!clean.contains("  "), "white space is not collapsed");
    }
    for tokenizer in [&CLIP, &WORD_PIECE] {
        let row = tokenizer.ids(&caption).unwrap();
        let size = tokenizer.vocabulary() as u32;
        assert!(row.len() == 8 && row.iter().all(|id| *id < size));
    }
}
