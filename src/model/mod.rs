//! Models: images in [0, 1] to logits. Normalisation is the first layer.
//!
//! Knows nothing of attacks, data sets or training.

mod archive;
mod init;
pub mod parameter;
mod pickle;
pub mod position;
pub mod sizes;
pub mod state_dict;
pub mod tokens;
pub mod vit;
pub mod weights;

pub use parameter::Parameter;
pub use sizes::{ModelConfig, Pool, Position};
pub use state_dict::StateDict;
pub use tokens::{Kept, Masking};
pub use vit::{DropPath, Pass, Vit};
