//! Text models: tokenization of captions, text towers, zero-shot classification.
//!
//! A [`TextModel`] is a tower with its tokenizer, from a model folder in the layout of open_clip or Hugging Face, or
//! one written by [`TextModel::save`]. Independent of images, attacks, data sets and training.

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
