//! Weights in the formats of timm, open_clip, transformers and PyTorch, and the models they describe.
//!
//! Nothing in a weights file is executed: pickles are interpreted by a restricted stack machine.
//!
//! | module | purpose |
//! |--------|---------|
//! | [`import`] | loads a folder or file as a model |
//! | [`text`] | text towers and tokenizers, loaded and saved |
//! | [`names`] | each program's parameter names |
//! | [`describe`] [`architecture`] | the architecture, from shapes and configuration files |
//! | [`config_json`] [`open_clip_json`] [`hugging_face_json`] [`preprocessing`] | configuration files |
//! | [`outputs`] | whether a model outputs logits or embeddings |
//! | [`state_dict`] [`pickle`] | tensor files: safetensors, PyTorch |
//! | [`embeddings`] | caption embedding files |

pub mod architecture;
pub mod config_json;
pub mod describe;
pub mod embeddings;
pub mod export;
pub mod hugging_face_json;
pub mod import;
pub mod names;
pub mod open_clip_json;
pub mod outputs;
pub mod pickle;
pub mod preprocessing;
pub mod state_dict;
pub mod stated;
pub mod text;

pub use embeddings::{EmbeddingFile, EmbeddingWriter};
pub use import::{Loaded, load, load_any, load_body, load_file, save};
pub use outputs::Outputs;
pub use preprocessing::StatedPreprocessing;
pub use state_dict::StateDict;
