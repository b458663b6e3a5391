//! Configuration of a text tower, and how to read it from open_clip's and Hugging Face's files.
//!
//! Settings that [`crate::text::tower`] does not support are errors, as are unknown settings of open_clip's `text_cfg`.

use serde_json::{Map, Value, json};

use super::clean::Cleaning;
use super::tokenizer::TokenizerConfig;
use crate::error::{Error, Result};
use crate::ops::{Device, Gelu};
use crate::settings::Words;

/// The configuration of a text tower: everything except the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct TextConfig {
    /// Context length: the number of ids in a row.
    pub context: usize,
    /// Vocabulary size: the rows of the token embedding table.
    pub vocabulary: usize,
    /// Width of the token vectors.
    pub width: usize,
    /// Attention heads; must divide the width.
    pub heads: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Width of the hidden layer in the MLPs.
    pub hidden: usize,
    /// Width of the embedding.
    pub embedding: usize,
    /// Whether a token attends only to itself and earlier ones.
    pub causal: bool,
    /// Which token is pooled.
    pub pool: TextPool,
    /// Variant of GELU.
    pub gelu: Gelu,
    /// Epsilon of the layer norms, added to the variance.
    pub eps: f64,
}

impl TextConfig {
    /// Returns an error unless the device supports the tower's blocks.
    pub(crate) fn check_device(&self, device: &Device) -> Result<()> {
        let head = self.width / self.heads.max(1);
        device.check_block("text model", &[self.width, self.hidden], Some(head))
    }
}

/// The token of a row that is pooled to the embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextPool {
    /// The first token.
    First,
    /// The last token of the context, even if it is padding: CLIPA.
    Last,
    /// The first token with the greatest id, which is the end token in OpenAI's vocabulary.
    GreatestId,
    /// The first token with this id, or else the first of the row: Hugging Face's CLIP.
    Token(u32),
}

impl TextPool {
    /// Returns the position of the pooled token in a row.
    pub(crate) fn place(self, row: &[u32]) -> usize {
        match self {
            Self::First => 0,
            Self::Last => row.len() - 1,
            Self::GreatestId => {
                let greatest = row.iter().max();
                row.iter().position(|id| Some(id) == greatest).unwrap_or(0)
            }
            Self::Token(end) => row.iter().position(|id| *id == end).unwrap_or(0),
        }
    }
}

/// A section of a JSON file, with its name for messages.
struct Section<'a> {
    name: &'static str,
    values: &'a Map<String, Value>,
}

impl Section<'_> {
    fn refuse(&self, key: &str, right: &str) -> Error {
        let found = self.values.get(key).unwrap_or(&Value::Null);
        let message = format!("`{}.{key}` is {found}, expected {right}", self.name);
        Error::input(message).hint("only CLIP and CLIPA text towers are supported")
    }

    fn number(&self, key: &str, default: Option<usize>) -> Result<usize> {
        match (self.values.get(key), default) {
            (None | Some(Value::Null), Some(default)) => Ok(default),
            (found, _) => {
                let number = found.and_then(Value::as_u64);
                // Above any realistic size, and far below what overflows.
                let number = number.filter(|number| (1..1 << 31).contains(number));
                let number = number.ok_or_else(|| self.refuse(key, "a whole number above 0"));
                Ok(number? as usize)
            }
        }
    }

    fn float(&self, key: &str, default: f64) -> Result<f64> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(found) => {
                let number = found.as_f64().filter(|number| *number > 0.0);
                number.ok_or_else(|| self.refuse(key, "a number above 0"))
            }
        }
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(found) => found
                .as_bool()
                .ok_or_else(|| self.refuse(key, "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(found) => Ok(Some(
                found.as_str().ok_or_else(|| self.refuse(key, "a string"))?,
            )),
        }
    }

    /// Returns an error for any value except those that have no effect.
    fn off(&self, key: &str, right: &[&str]) -> Result<()> {
        let value = self.values.get(key);
        let off = match value {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::String(text)) => right.contains(&&**text),
            _ => false,
        };
        let words = ["no value"].iter().chain(right).copied();
        let words: Vec<&str> = words.collect();
        off.then_some(())
            .ok_or_else(|| self.refuse(key, &words.join(" or ")))
    }

    fn part(&self, key: &str, name: &'static str) -> Result<Option<Section<'_>>> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(values)) => Ok(Some(Section { name, values })),
            Some(_) => Err(self.refuse(key, "an object")),
        }
    }
}

/// Keys of open_clip's `text_cfg` for towers that are not supported; they must have no effect.
const OTHER_TOWERS: [&str; 11] = [
    "hf_model_name",
    "ls_init_value",
    "embed_cls",
    "proj_bias",
    "final_ln_after_pool",
    "tokenizer_mode",
    "qk_norm",
    "scaled_cosine_attn",
    "scale_heads",
    "scale_attn_inner",
    "scale_attn",
];

/// Keys of `text_cfg` that are read, or that are irrelevant for a tower that is not from Hugging Face's library.
const KNOWN: [&str; 21] = [
    "context_length",
    "vocab_size",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "width",
    "heads",
    "layers",
    "mlp_ratio",
    "pad_id",
    "eos_id",
    "no_causal_mask",
    "pool_type",
    "proj_type",
    "output_tokens",
    "act_kwargs",
    "norm_kwargs",
    "block_type",
    "scale_fc",
    "hf_model_pretrained",
    "hf_proj_type",
    "hf_pooler_type",
];

/// Reads open_clip's `open_clip_config.json`.
pub(crate) fn from_open_clip(json: &Value) -> Result<(TextConfig, TokenizerConfig)> {
    let model = json.get("model_cfg").unwrap_or(json);
    let absent = |key: &str| {
        Error::input(format!("`open_clip_config.json` is missing `{key}`"))
            .hint("use the configuration of an open_clip model")
    };
    let values = model.as_object().ok_or_else(|| absent("model_cfg"))?;
    let model = Section {
        name: "model_cfg",
        values,
    };
    let text = model.part("text_cfg", "text_cfg")?;
    let text = text.ok_or_else(|| absent("text_cfg"))?;
    for key in text.values.keys() {
        if !KNOWN.contains(&&**key) && !OTHER_TOWERS.contains(&&**key) {
            return Err(Error::input(format!("unknown key `text_cfg.{key}`"))
                .hint("only CLIP and CLIPA text towers are supported"));
        }
    }
    for key in OTHER_TOWERS.iter().chain(&["scale_fc"]) {
        text.off(key, &[])?;
    }
    text.off("block_type", &["default"])?;
    text.off("proj_type", &["linear"])?;

    let width = text.number("width", Some(512))?;
    let end = text.number("eos_id", Some(2))?;
    let pool = match text.text("pool_type")?.unwrap_or("argmax") {
        "first" => TextPool::First,
        "last" => TextPool::Last,
        "argmax" => TextPool::GreatestId,
        "eos" => TextPool::Token(end as u32),
        _ => return Err(text.refuse("pool_type", "first, last, argmax or eos")),
    };
    let quick = model.flag("quick_gelu")?;
    let tanh = match text.part("act_kwargs", "text_cfg.act_kwargs")? {
        None => false,
        Some(arguments) => match arguments.text("approximate")?.unwrap_or("none") {
            "tanh" if !quick => true,
            "none" => false,
            _ => return Err(arguments.refuse("approximate", "none, or tanh without quick_gelu")),
        },
    };
    let eps = match text.part("norm_kwargs", "text_cfg.norm_kwargs")? {
        None => 1e-5,
        Some(arguments) => arguments.float("eps", 1e-5)?,
    };
    let config = TextConfig {
        context: text.number("context_length", Some(77))?,
        vocabulary: text.number("vocab_size", Some(49408))?,
        width,
        heads: text.number("heads", Some(8))?,
        depth: text.number("layers", Some(12))?,
        // Truncated, as in open_clip.
        hidden: (width as f64 * text.float("mlp_ratio", 4.0)?) as usize,
        embedding: model.number("embed_dim", None)?,
        causal: !text.flag("no_causal_mask")?,
        pool,
        gelu: match (quick, tanh) {
            (true, _) => Gelu::Quick,
            (_, true) => Gelu::Tanh,
            _ => Gelu::Erf,
        },
        eps,
    };
    let name = text
        .text("hf_tokenizer_name")?
        .filter(|name| !name.is_empty());
    let mut tokenizer = TokenizerConfig {
        name: name.map(str::to_owned),
        context: config.context,
        cleaning: match name {
            Some(_) => Cleaning::Whitespace,
            None => Cleaning::Lower,
        },
        strip_separator: false,
    };
    if let Some(arguments) = text.part("tokenizer_kwargs", "text_cfg.tokenizer_kwargs")? {
        for key in arguments.values.keys() {
            match &**key {
                "strip_sep_token" => tokenizer.strip_separator = arguments.flag(key)?,
                "clean" => {
                    let word = arguments.text(key)?;
                    let known = word.and_then(Cleaning::from_word);
                    tokenizer.cleaning =
                        known.ok_or_else(|| arguments.refuse(key, &Cleaning::listed()))?;
                }
                _ => return Err(arguments.refuse(key, "no such argument")),
            }
        }
    }
    Ok((config.checked()?, tokenizer))
}

/// Reads Hugging Face's `config.json` of a CLIP model or its text tower.
pub(crate) fn from_hugging_face(json: &Value) -> Result<(TextConfig, TokenizerConfig)> {
    let kind = json["model_type"].as_str().unwrap_or_default();
    let (values, name) = match (kind, &json["text_config"]) {
        ("clip", Value::Object(values)) => (Some(values), "text_config"),
        ("clip_text_model", _) => (json.as_object(), "config"),
        _ => (None, ""),
    };
    let Some(values) = values else {
        let message = format!("`config.json` has model type `{kind}`, expected a CLIP text tower");
        return Err(Error::input(message)
            .hint("use a folder of Hugging Face's CLIP, or one with an `open_clip_config.json`"));
    };
    let text = Section { name, values };
    let embedding = match json.get("projection_dim").filter(|_| kind == "clip") {
        // In a whole model, the projections use the top-level value.
        Some(found) => found.as_u64().unwrap_or_default() as usize,
        None => text.number("projection_dim", Some(512))?,
    };
    let pool = match text.values.get("eos_token_id") {
        None | Some(Value::Null) => TextPool::Token(49407),
        // Folders from before 2023 have a wrong id, and pool the greatest one.
        Some(id) => match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(2) => TextPool::GreatestId,
            Some(id) => TextPool::Token(id),
            None => return Err(text.refuse("eos_token_id", "a single id")),
        },
    };
    let config = TextConfig {
        context: text.number("max_position_embeddings", Some(77))?,
        vocabulary: text.number("vocab_size", Some(49408))?,
        width: text.number("hidden_size", Some(512))?,
        heads: text.number("num_attention_heads", Some(8))?,
        depth: text.number("num_hidden_layers", Some(12))?,
        hidden: text.number("intermediate_size", Some(2048))?,
        embedding,
        causal: true,
        pool,
        gelu: match text.text("hidden_act")?.unwrap_or("quick_gelu") {
            "quick_gelu" => Gelu::Quick,
            "gelu" => Gelu::Erf,
            "gelu_new" | "gelu_pytorch_tanh" => Gelu::Tanh,
            _ => return Err(text.refuse("hidden_act", "quick_gelu, gelu or gelu_pytorch_tanh")),
        },
        eps: text.float("layer_norm_eps", 1e-5)?,
    };
    let tokenizer = TokenizerConfig {
        name: None,
        context: config.context,
        cleaning: Cleaning::Lower,
        strip_separator: false,
    };
    Ok((config.checked()?, tokenizer))
}

impl TextConfig {
    /// Checks the sizes.
    ///
    /// Errors: a size of 0; heads that do not divide the width.
    pub fn checked(self) -> Result<Self> {
        let sizes = [
            ("context", self.context),
            ("vocabulary", self.vocabulary),
            ("width", self.width),
            ("heads", self.heads),
            ("depth", self.depth),
            ("hidden", self.hidden),
            ("embedding", self.embedding),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::input(format!(
                "the text tower's {name} is 0, expected at least 1"
            )));
        }
        let Self { width, heads, .. } = self;
        if width % heads != 0 {
            let message =
                format!("the text tower's width {width} is not a multiple of its {heads} heads");
            return Err(Error::input(message).hint("correct the number of heads"));
        }
        Ok(self)
    }

    /// Returns the `CLIPTextConfig` of transformers, given the ids of the start and the end token if they are known.
    /// [`from_hugging_face`] reads the same configuration back.
    ///
    /// Errors: a tower that is not CLIP's.
    pub(crate) fn to_hugging_face(&self, ends: Option<[u32; 2]>) -> Result<Value> {
        let end = match self.pool {
            // Stands for the greatest id, since OpenAI's configurations state it.
            TextPool::GreatestId => Ok(2),
            TextPool::Token(2) => Err("pools the token with id 2"),
            TextPool::Token(end) => Ok(end),
            TextPool::First => Err("pools the first token, not the end token"),
            TextPool::Last => Err("pools the last token of the context, not the end token"),
        };
        let obstacles = [end.err(), (!self.causal).then_some("has no causal mask")];
        let (obstacles, end): (Vec<&str>, _) = (obstacles.into_iter().flatten().collect(), end);
        let (Ok(end), true) = (end, obstacles.is_empty()) else {
            let message = format!(
                "transformers' CLIP cannot represent this text tower, which {}",
                obstacles.join(" and ")
            );
            return Err(Error::input(message).hint(
                "remove --text to export the image tower alone, or export both with --to open-clip",
            ));
        };
        let mut config = json!({
            "model_type": "clip_text_model",
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "hidden_act": match self.gelu {
                Gelu::Quick => "quick_gelu",
                Gelu::Erf => "gelu",
                Gelu::Tanh => "gelu_pytorch_tanh",
            },
            "layer_norm_eps": self.eps,
            "projection_dim": self.embedding,
            "eos_token_id": end,
        });
        if let Some([start, end]) = ends {
            config["bos_token_id"] = start.into();
            config["pad_token_id"] = end.into();
        }
        Ok(config)
    }

    /// Returns open_clip's `open_clip_config.json`. [`crate::text::model::TextModel::load`] reads the same
    /// configuration back.
    pub(crate) fn to_open_clip(&self, tokenizer: &TokenizerConfig) -> Value {
        let (pool, end) = match self.pool {
            TextPool::First => ("first", None),
            TextPool::Last => ("last", None),
            TextPool::GreatestId => ("argmax", None),
            TextPool::Token(end) => ("eos", Some(end)),
        };
        let mut ratio = self.hidden as f64 / self.width as f64;
        if (ratio * self.width as f64) as usize != self.hidden {
            ratio = ratio.next_up();
        }
        let mut text = json!({
            "context_length": self.context,
            "vocab_size": self.vocabulary,
            "width": self.width,
            "heads": self.heads,
            "layers": self.depth,
            "mlp_ratio": ratio,
            "pool_type": pool,
            "no_causal_mask": !self.causal,
            "norm_kwargs": { "eps": self.eps },
        });
        if let Some(end) = end {
            text["eos_id"] = json!(end);
        }
        if self.gelu == Gelu::Tanh {
            text["act_kwargs"] = json!({ "approximate": "tanh" });
        }
        let mut arguments = json!({ "clean": tokenizer.cleaning });
        if let Some(name) = &tokenizer.name {
            text["hf_tokenizer_name"] = json!(name);
            arguments["strip_sep_token"] = json!(tokenizer.strip_separator);
        }
        text["tokenizer_kwargs"] = arguments;
        json!({ "model_cfg": {
            "embed_dim": self.embedding,
            "quick_gelu": self.gelu == Gelu::Quick,
            "text_cfg": text,
        } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsupported_settings_are_refused_by_name() {
        let of = |text: Value| {
            let json = json!({ "model_cfg": { "embed_dim": 8, "text_cfg": text } });
            from_open_clip(&json).unwrap_err().to_string()
        };
        for (text, right) in [
            (
                json!({ "heads": 7 }),
                "the text tower's width 512 is not a multiple of its 7 heads",
            ),
            (
                json!({ "embed_cls": true }),
                "`text_cfg.embed_cls` is true, expected no value",
            ),
            (
                json!({ "hf_model_name": "roberta" }),
                "`text_cfg.hf_model_name` is \"roberta\"",
            ),
            (
                json!({ "pool_type": "mean" }),
                "`text_cfg.pool_type` is \"mean\", expected first, last",
            ),
            (
                json!({ "width": -1 }),
                "`text_cfg.width` is -1, expected a whole number above 0",
            ),
            (
                json!({ "act_kwargs": { "approximate": "x" } }),
                "`text_cfg.act_kwargs.approximate`",
            ),
            (
                json!({ "tokenizer_kwargs": { "x": 1 } }),
                "`text_cfg.tokenizer_kwargs.x` is 1",
            ),
            (json!({ "depht": 3 }), "unknown key `text_cfg.depht`"),
        ] {
            let message = of(text);
            assert!(message.contains(right), "{message}");
        }
        let message = from_hugging_face(&json!({ "model_type": "bert" })).unwrap_err();
        assert!(message.to_string().contains("type `bert`"), "{message}");
    }

    #[test]
    fn a_saved_configuration_loads_back_unchanged() {
        for (causal, pool, gelu, name) in [
            (true, TextPool::Token(7), Gelu::Quick, None),
            (
                false,
                TextPool::Last,
                Gelu::Tanh,
                Some("bert-base-uncased".to_owned()),
            ),
            (true, TextPool::GreatestId, Gelu::Erf, None),
        ] {
            for hidden in [40, 47, 2731] {
                let config = TextConfig {
                    context: 9,
                    vocabulary: 30,
                    width: 49,
                    heads: 7,
                    depth: 2,
                    hidden,
                    embedding: 5,
                    causal,
                    pool,
                    gelu,
                    eps: 1e-6,
                };
                let tokenizer = TokenizerConfig {
                    context: 9,
                    cleaning: match name {
                        Some(_) => Cleaning::Whitespace,
                        None => Cleaning::Lower,
                    },
                    strip_separator: name.is_some(),
                    name: name.clone(),
                };
                let json = config.to_open_clip(&tokenizer);
                assert_eq!(from_open_clip(&json).unwrap(), (config, tokenizer));
            }
        }
    }

    #[test]
    fn each_pooling_finds_its_token() {
        let row = [9, 3, 8, 9, 0];
        assert_eq!(TextPool::GreatestId.place(&row), 0);
        assert_eq!(TextPool::Token(8).place(&row), 2);
        assert_eq!(TextPool::Token(5).place(&row), 0);
        assert_eq!(
            (TextPool::First.place(&row), TextPool::Last.place(&row)),
            (0, 4)
        );
    }
}
