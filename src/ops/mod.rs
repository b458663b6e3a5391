//! The operations of models, attacks and the optimizer that are more than one of Burn's: patches, unfolding, a linear
//! layer, layer norm, GELU, the encoder block, the ConvNeXt block, an attack's step, the optimizer's update.
//!
//! `dispatch` declares them and chooses, by the tensor, the engine that runs them: on `Device::flex()` the kernels of
//! `advxl-kernels` (`cpu`), each call one node of automatic differentiation (`node`); on every other device Burn's
//! own operations, composed as in `reference`, which is their definition and the test oracle.

mod cpu;
mod device;
mod dispatch;
mod engine;
mod gpu;
mod node;
mod recompute;
mod reference;
mod spec;
mod tensor;
mod words;

pub use advxl_kernels::{BlockWeights, ConvNextWeights, Gelu, Precision, release_buffers};

pub use cpu::{ConvNextCache, WeightCache};
pub use device::{DeviceName, hardware, usable};
pub use dispatch::{
    adamw, convnext_block, encoder_block, gelu, l2_step, layer_norm, linear, linf_step, patches,
    unfold,
};
pub use engine::is_processor;
pub use gpu::from_bytes;
pub use spec::{AdamW, BlockSpec, ConvNextSpec, Moments, PatchSpec, PathScale};
pub use tensor::{Stored, from_vec, sum_of_bits, sums_of_squares, to_vec};
