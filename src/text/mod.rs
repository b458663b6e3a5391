//! Text: captions to token ids, frozen text towers, files of embeddings.
//!
//! A [`TextModel`] is a tower and the tokenizer that belongs to it, from a folder that open_clip or Hugging Face users
//! made, or that [`TextModel::save`] wrote. Knows nothing of images, attacks, data sets or training.

pub mod bpe;
pub mod clean;
pub mod config;
pub mod html;
pub mod model;
pub(crate) mod mojibake;
pub mod tokenizer;
pub mod tower;
pub mod zero_shot;

pub use clean::Cleaning;
pub use config::{TextConfig, TextPool};
pub use model::TextModel;
pub use tokenizer::{Tokenizer, TokenizerConfig};
pub use tower::TextTower;
pub use zero_shot::ZeroShot;
