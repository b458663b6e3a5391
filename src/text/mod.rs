//! Text: captions to token ids, frozen text towers, files of embeddings.
//!
//! A [`TextModel`] is a tower and the tokenizer that belongs to it, from a folder that open_clip or Hugging Face users
//! made, or that [`TextModel::save`] wrote. Knows nothing of images, attacks, data sets or training.

pub mod bpe;
pub mod clean;
pub mod config;
pub mod embedding;
pub mod html;
mod mojibake;
pub mod tokenizer;
pub mod tower;
pub mod weights;
pub mod zero_shot;

pub use clean::Cleaning;
pub use config::{TextConfig, TextPool};
pub use embedding::{EmbeddingFile, EmbeddingWriter};
pub use tokenizer::{Tokenizer, TokenizerConfig};
pub use tower::TextTower;
pub use weights::TextModel;
pub use zero_shot::ZeroShot;
