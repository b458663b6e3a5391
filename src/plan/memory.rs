//! Memory of a device, by part.

use serde::Serialize;

/// Upper limit for one part of the memory: more than any machine has.
pub(super) const LARGEST_PART: u128 = 1 << 56;

/// Memory of a device in bytes, by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Weights, f32.
    pub weights: u64,
    /// Gradients.
    pub gradients: u64,
    /// The optimizer's two moments.
    pub moments: u64,
    /// Weight average (EMA).
    pub average: u64,
    /// Buffers for communication of gradients and weights.
    pub exchange: u64,
    /// Weights as used by products: packed for both directions on the CPU, rounded to bf16 on a GPU.
    pub packed: u64,
    /// The frozen reference of an objective, with its weights as used by products.
    pub reference: u64,
    /// Activations kept for the backward pass.
    pub activations: u64,
    /// The program and batches in flight, without the data set itself.
    pub base: u64,
}

impl Memory {
    /// Returns the parts by name.
    pub fn parts(&self) -> [(&'static str, u64); 9] {
        [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.moments),
            ("average", self.average),
            ("exchange", self.exchange),
            ("packed weights", self.packed),
            ("reference", self.reference),
            ("activations", self.activations),
            ("batches, program", self.base),
        ]
    }

    /// Returns the sum of all parts.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }
}
