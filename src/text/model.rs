//! A text tower with its tokenizer.

use burn::tensor::Tensor;

use super::tokenizer::Tokenizer;
use super::tower::TextTower;
use crate::error::Result;

/// A text tower and its tokenizer. [`crate::weights::text`] loads and saves it.
#[derive(Debug)]
pub struct TextModel {
    /// Maps token ids to embeddings.
    pub tower: TextTower,
    /// Maps captions to token ids.
    pub tokenizer: Tokenizer,
    /// Hash of everything that determines an embedding: weights, configuration, tokenizer.
    pub hash: String,
}

impl TextModel {
    /// Returns the embeddings of captions, not normalized.
    ///
    /// Shapes: `[captions.len(), embedding]`.
    /// Errors: no captions.
    pub fn embed(&self, captions: &[String]) -> Result<Tensor<2>> {
        self.tower.encode(&self.tokenizer.rows(captions)?)
    }
}
