//! What the outputs of a loaded model mean.

use serde::Serialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// What the outputs of a model are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outputs {
    /// Logits of classes.
    Logits,
    /// An embedding, which is compared with those of text.
    Embedding,
}

impl Outputs {
    /// As our own `config.json` has it.
    pub(crate) fn named(found: &Value) -> Result<Self> {
        match found.as_str() {
            Some("logits") => Ok(Self::Logits),
            Some("embedding") => Ok(Self::Embedding),
            _ => Err(Error::input(format!("`config.json` has outputs = {found}"))
                .hint("use \"logits\" or \"embedding\"")),
        }
    }
}

/// What describes an open_clip model in its folder.
pub(crate) const OPEN_CLIP_CONFIG: &str = "open_clip_config.json";
