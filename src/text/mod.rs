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

pub use crate::text::clean::Cleaning;
pub use crate::text::config::{TextConfig, TextPool};
pub use crate::text::model::TextModel;
pub use crate::text::tokenizer::{Tokenizer, TokenizerConfig};
pub use crate::text::tower::TextTower;
pub use crate::text::zero_shot::ZeroShot;
