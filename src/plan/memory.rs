//! The memory of a device, by part.

use serde::Serialize;

/// Elements of one part of the memory, at most: more than any machine has.
pub(super) const LARGEST_PART: u128 = 1 << 56;

/// Bytes that a device holds, by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Weights, f32.
    pub weights: u64,
    /// Their gradients.
    pub gradients: u64,
    /// The optimizer's two moments.
    pub moments: u64,
    /// The average of the weights.
    pub average: u64,
    /// Gradients and weights on their way between devices.
    pub exchange: u64,
    /// The weights as products take them: packed for both directions on the CPU, rounded to bf16 on a GPU.
    pub packed: u64,
    /// What the backward pass needs of the forward pass.
    pub activations: u64,
    /// The program and batches on their way; without the data set itself.
    pub base: u64,
}

impl Memory {
    /// The parts by name.
    pub fn parts(&self) -> [(&'static str, u64); 8] {
        [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.moments),
            ("average", self.average),
            ("exchange", self.exchange),
            ("packed weights", self.packed),
            ("activations", self.activations),
            ("batches, program", self.base),
        ]
    }

    /// All parts.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }
}
