//! Models: images in [0, 1] to logits. Normalisation is the first layer.
//!
//! Knows nothing of attacks, data sets or training.

mod init;
pub mod parameter;
pub mod position;
pub mod sizes;
pub mod tokens;
pub mod vit;
pub mod weights;

pub use parameter::Parameter;
pub use sizes::{ModelConfig, Pool, Position};
pub use tokens::{Kept, Masking};
pub use vit::{DropPath, Pass, Vit};
