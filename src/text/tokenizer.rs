//! Converts captions to rows of token ids, with the tokenizer files of a model folder.
//!
//! CLIP's byte-pair encoding: start token, tokens, end token, zeros. BERT's WordPiece, for CLIPA: `[CLS]`, tokens,
//! `[SEP]` or a zero instead, padding. Rows have the length of the tower's context; longer captions are truncated
//! before the end token. WordPiece itself is implemented by the crate `tokenizers`, which transformers uses too.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::json;

use super::bpe::{self, BytePairs};
use super::clean::Cleaning;
use crate::error::{Context, Error, Result};
use crate::{files, json};

const COMPRESSED: &str = "bpe_simple_vocab_16e6.txt.gz";

/// The tokenizer settings in a model's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerConfig {
    /// Name of a Hugging Face tokenizer, such as `bert-base-uncased`, or `None` for CLIP's own.
    pub name: Option<String>,
    /// Context length: the number of ids in a row.
    pub context: usize,
    /// How captions are cleaned before tokenization.
    pub cleaning: Cleaning,
    /// Whether `[SEP]` is replaced by zero.
    pub strip_separator: bool,
}

/// Converts captions to rows of token ids.
#[derive(Debug)]
pub struct Tokenizer {
    kind: Kind,
    config: TokenizerConfig,
    /// The files it was loaded from.
    files: Vec<PathBuf>,
}

#[derive(Debug)]
enum Kind {
    BytePairs(Box<BytePairs>),
    WordPiece {
        pieces: Box<tokenizers::Tokenizer>,
        start: u32,
        separator: u32,
        padding: u32,
    },
}

impl Tokenizer {
    /// Loads the tokenizer of a model folder.
    ///
    /// Errors: missing, damaged or unsupported tokenizer files; a context too short for the start and end tokens.
    pub fn open(folder: &Path, config: TokenizerConfig) -> Result<Self> {
        let found = Self::find(folder, config.clone())?;
        found.ok_or_else(|| missing(folder, &config))
    }

    /// Does the same as [`Self::open`], but returns `None` if the folder has no tokenizer files.
    pub(crate) fn find(folder: &Path, config: TokenizerConfig) -> Result<Option<Self>> {
        if config.context < 2 {
            let (folder, context) = (folder.display(), config.context);
            let message =
                format!("`{folder}`: context {context} is too short for the start and end tokens");
            return Err(Error::input(message));
        }
        let path = |name: &str| folder.join(name);
        let has = |name: &str| path(name).is_file();
        let at = |name: &str| {
            let path = path(name).display().to_string();
            move || format!("`{path}`")
        };
        let (kind, names): (Kind, &[&str]) = if config.name.is_none() && has(COMPRESSED) {
            let pairs = BytePairs::from_compressed(&files::read(&path(COMPRESSED))?);
            (
                Kind::BytePairs(Box::new(pairs.context(at(COMPRESSED))?)),
                &[COMPRESSED],
            )
        } else if config.name.is_some() && has("tokenizer.json") {
            (
                from_json(&path("tokenizer.json")).context(at("tokenizer.json"))?,
                &["tokenizer.json"],
            )
        } else if has("vocab.json") && has("merges.txt") {
            let vocabulary = files::read(&path("vocab.json"))?;
            let pairs =
                BytePairs::from_vocabulary(&vocabulary, &files::read_text(&path("merges.txt"))?);
            let pairs = pairs.context(|| format!("`{}`", folder.display()))?;
            (
                Kind::BytePairs(Box::new(pairs)),
                &["vocab.json", "merges.txt"],
            )
        } else if config.name.is_some() && has("vocab.txt") {
            let kind = from_list(&path("vocab.txt"), lower_case(folder)?);
            (
                kind.context(at("vocab.txt"))?,
                &["vocab.txt", "tokenizer_config.json"],
            )
        } else if has("tokenizer.json") {
            (
                from_json(&path("tokenizer.json")).context(at("tokenizer.json"))?,
                &["tokenizer.json"],
            )
        } else {
            return Ok(None);
        };
        let files = names.iter().map(|name| path(name));
        Ok(Some(Self {
            kind,
            config,
            files: files.filter(|path| path.is_file()).collect(),
        }))
    }

    /// Returns the number of ids in a row.
    pub fn context(&self) -> usize {
        self.config.context
    }

    /// Returns the tokenizer settings of the model's configuration.
    pub fn config(&self) -> &TokenizerConfig {
        &self.config
    }

    /// Returns the vocabulary size: one more than the greatest id.
    pub fn vocabulary(&self) -> usize {
        match &self.kind {
            Kind::BytePairs(pairs) => pairs.size(),
            Kind::WordPiece { pieces, .. } => {
                let ids = pieces.get_vocab(true).into_values();
                ids.max().map_or(0, |id| id as usize + 1)
            }
        }
    }

    /// Returns the token that ends a caption, if any.
    pub fn end(&self) -> Option<u32> {
        match &self.kind {
            Kind::BytePairs(pairs) => Some(pairs.special()[1]),
            Kind::WordPiece { separator, .. } => {
                (!self.config.strip_separator).then_some(*separator)
            }
        }
    }

    /// Returns the names and ids of CLIP's start and end tokens; `None` for WordPiece.
    pub(crate) fn byte_pair_ends(&self) -> Option<[(&'static str, u32); 2]> {
        match &self.kind {
            Kind::BytePairs(pairs) => Some(pairs.named_special()),
            Kind::WordPiece { .. } => None,
        }
    }

    /// Writes the tokenizer as transformers' `CLIPTokenizer` reads it: its files if they are transformers' own, or
    /// else `vocab.json` and `merges.txt` with the same ids, and a `tokenizer_config.json` unless the folder has one.
    ///
    /// Returns `false` and writes nothing for WordPiece.
    pub(crate) fn write_for_transformers(&self, folder: &Path) -> Result<bool> {
        let Some(ends) = self.byte_pair_ends() else {
            return Ok(false);
        };
        let first = self.files.first().map(PathBuf::as_path).unwrap_or(folder);
        let (write, mut ends) = (
            |name: &str, text: &str| files::write(&folder.join(name), text.as_bytes()),
            ends.map(|(name, _)| name),
        );
        if first.ends_with(COMPRESSED) {
            let (vocabulary, merges) = bpe::to_vocabulary(&files::read(first)?)?;
            ends = bpe::OPENAI;
            write("vocab.json", &format!("{vocabulary}\n"))?;
            write("merges.txt", &merges)?;
        } else {
            self.copy_to(folder)?;
            let merges = folder.join("merges.txt");
            if merges.is_file() {
                write("merges.txt", &bpe::titled(&files::read_text(&merges)?))?;
            }
            let next_to = |name: &&str| first.with_file_name(name);
            let others = ["tokenizer_config.json", "special_tokens_map.json"];
            for path in others.iter().map(next_to).filter(|path| path.is_file()) {
                let name = path.file_name().unwrap_or_default();
                files::write(&folder.join(name), &files::read(&path)?)?;
            }
        }
        let name = "tokenizer_config.json";
        if !folder.join(name).is_file() {
            let [start, end] = ends;
            let config = json!({
                "tokenizer_class": "CLIPTokenizer", "model_max_length": self.config.context,
                "bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end,
            });
            write(name, &format!("{config:#}\n"))?;
        }
        Ok(true)
    }

    /// Tokenizes a caption to a row of ids.
    ///
    /// Shapes: `[context]`.
    pub fn ids(&self, caption: &str) -> Result<Vec<u32>> {
        let context = self.config.context;
        let cleaned = self.config.cleaning.clean(caption);
        let (start, mut tokens, end, padding) = match &self.kind {
            Kind::BytePairs(pairs) => {
                // Hugging Face tokenizers convert to lower case themselves.
                let tokens = match self.config.cleaning {
                    Cleaning::Whitespace if self.config.name.is_some() => {
                        pairs.tokens(&cleaned.to_lowercase())
                    }
                    _ => pairs.tokens(&cleaned),
                };
                let [start, end] = pairs.special();
                (start, tokens, end, 0)
            }
            Kind::WordPiece {
                pieces,
                start,
                separator,
                padding,
            } => {
                let encoding = pieces
                    .encode_fast(cleaned, false)
                    .map_err(|error| Error::input(format!("cannot tokenize a caption: {error}")))?;
                (*start, encoding.get_ids().to_vec(), *separator, *padding)
            }
        };
        tokens.truncate(context - 2);
        let mut row = Vec::with_capacity(context);
        row.push(start);
        row.append(&mut tokens);
        row.push(end);
        row.resize(context, padding);
        if let Kind::WordPiece { separator, .. } = &self.kind
            && self.config.strip_separator
        {
            row.iter_mut()
                .filter(|id| *id == separator)
                .for_each(|id| *id = 0);
        }
        Ok(row)
    }

    /// Tokenizes captions to concatenated rows.
    ///
    /// Shapes: `[captions.len() * context]`.
    pub fn rows(&self, captions: &[String]) -> Result<Vec<u32>> {
        let rows = captions.par_iter().map(|caption| self.ids(caption));
        Ok(rows.collect::<Result<Vec<_>>>()?.concat())
    }

    /// Returns a hash of the files and settings that determine the ids.
    pub fn hash(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{:?}", self.config).as_bytes());
        for path in &self.files {
            hasher.update(blake3::hash(&files::read(path)?).as_bytes());
        }
        Ok(hasher.finalize().to_string())
    }

    /// Copies the tokenizer files to another model folder.
    pub fn copy_to(&self, folder: &Path) -> Result<()> {
        for path in &self.files {
            let name = path.file_name().unwrap_or_default();
            files::write(&folder.join(name), &files::read(path)?)?;
        }
        Ok(())
    }
}

fn missing(folder: &Path, config: &TokenizerConfig) -> Error {
    let message = format!("no tokenizer files in `{}`", folder.display());
    Error::input(message).hint(match &config.name {
        Some(name) => format!("add the `tokenizer.json` or `vocab.txt` of `{name}` to the folder"),
        None => format!(
            "add `{COMPRESSED}` of OpenAI's CLIP or open_clip to the folder, or `vocab.json` and `merges.txt`"
        ),
    })
}

fn from_json(path: &Path) -> Result<Kind> {
    let json = json::parse(&files::read(path)?)
        .map_err(|error| Error::input(format!("not valid JSON: {error}")))?;
    match json["model"]["type"].as_str() {
        Some("BPE") => {
            let pairs = BytePairs::from_json(&json["model"])?;
            Ok(Kind::BytePairs(Box::new(pairs)))
        }
        Some("WordPiece") => word_pieces(parse(&json.to_string())?),
        other => {
            let message = match other {
                Some(kind) => format!("unsupported tokenizer type `{kind}`"),
                None => "missing tokenizer type".into(),
            };
            Err(Error::input(message)
                .hint("only CLIP's byte-pair encoding and WordPiece are supported"))
        }
    }
}

/// Builds WordPiece from a list of tokens, one per line, configured like transformers' `BertTokenizer`.
fn from_list(path: &Path, lower_case: bool) -> Result<Kind> {
    let text = files::read_text(path)?;
    let lines = text.strip_suffix('\n').unwrap_or(&text).split('\n');
    let ids: HashMap<&str, u32> = lines.zip(0..).collect();
    let special = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"];
    let added = special.iter().filter_map(|name| {
        let id = ids.get(name)?;
        Some(json!({
            "id": id, "content": name, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false,
        }))
    });
    let description = json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": lower_case,
        },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": ids,
        },
    });
    word_pieces(parse(&description.to_string())?)
}

fn parse(description: &str) -> Result<tokenizers::Tokenizer> {
    let parsed = description.parse::<tokenizers::Tokenizer>();
    parsed.map_err(|error| Error::input(format!("invalid tokenizer: {error}")))
}

fn word_pieces(mut pieces: tokenizers::Tokenizer) -> Result<Kind> {
    // Rows are truncated and padded by `Tokenizer::ids`.
    pieces.with_padding(None);
    let cut = pieces.with_truncation(None).map(|_| ());
    cut.map_err(|error| Error::input(format!("invalid tokenizer: {error}")))?;
    let id = |name: &str| {
        pieces.token_to_id(name).ok_or_else(|| {
            Error::input(format!("the vocabulary is missing `{name}`"))
                .hint("a BERT WordPiece vocabulary has `[PAD]`, `[UNK]`, `[CLS]` and `[SEP]`")
        })
    };
    // Words that the vocabulary cannot spell become this token.
    id("[UNK]")?;
    let (start, separator, padding) = (id("[CLS]")?, id("[SEP]")?, id("[PAD]")?);
    Ok(Kind::WordPiece {
        start,
        separator,
        padding,
        pieces: Box::new(pieces),
    })
}

/// Returns whether a folder's WordPiece converts to lower case.
fn lower_case(folder: &Path) -> Result<bool> {
    let path = folder.join("tokenizer_config.json");
    if !path.is_file() {
        return Ok(true);
    }
    let json = json::parse(&files::read(&path)?).map_err(|error| {
        Error::input(format!("`{}` is not valid JSON: {error}", path.display()))
    })?;
    Ok(json["do_lower_case"].as_bool().unwrap_or(true))
}
