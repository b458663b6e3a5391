//! What the model outputs in each stage.

use crate::weights::Outputs;

/// What the model outputs in a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageOutputs {
    /// Logits of classes, or embeddings.
    pub kind: Outputs,
    /// Number of classes, or dimension of an embedding.
    pub count: usize,
}
