//! Meaning of a loaded model's outputs.

use serde::Serialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// Meaning of a model's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outputs {
    /// Class logits.
    Logits,
    /// An embedding, which is compared with text embeddings.
    Embedding,
}

impl Outputs {
    /// Parses the value in advxl's own `config.json`.
    pub(crate) fn named(found: &Value) -> Result<Self> {
        match found.as_str() {
            Some("logits") => Ok(Self::Logits),
            Some("embedding") => Ok(Self::Embedding),
            _ => Err(
                Error::input(format!("`config.json` has invalid outputs = {found}"))
                    .hint("use \"logits\" or \"embedding\""),
            ),
        }
    }
}

/// File that describes the model of an open_clip folder.
pub(crate) const OPEN_CLIP_CONFIG: &str = "open_clip_config.json";
