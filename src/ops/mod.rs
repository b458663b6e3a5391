//! The operations of models, attacks and the optimizer that are more than one of Burn's: patches, unfolding, a linear
//! layer, layer norm, GELU, the encoder block, the ConvNeXt block, an attack's step, the optimizer's update.
//!
//! `dispatch`, and `evaluation` for evaluation attacks, declare them and choose, by the tensor, the engine that runs them: on
//! `Device::cpu()` the kernels of `advxl-kernels` (`cpu`), on an NVIDIA GPU those of `advxl-cuda` (`cuda`), each call one
//! node of automatic differentiation (`node`); on every other device Burn's own operations, composed as in `reference`,
//! which is their definition and the test oracle.

mod cache;
mod cpu;
mod cuda;
mod device;
mod dispatch;
mod engine;
mod evaluation;
mod gpu;
mod node;
mod open;
mod plain;
mod rate;
mod recompute;
mod reference;
mod spec;
mod tensor;
mod upload;
mod words;

pub use advxl_kernels::{BlockWeights, ConvNextWeights, Gelu};

pub use advxl_cuda::mixing::Mix as RowMix;
pub use advxl_cuda::{Norm, RowDistance};

pub(crate) use cuda::targets;
pub use cuda::values::{tensor as of_gpu_values, values as gpu_values};

pub use cache::WeightCache;
pub use device::Device;
pub use dispatch::{
    adamw, add, clamp, contrastive, convnext_block, count_correct, cross_entropy, embed,
    encoder_block, fork, from_bytes, gelu, join, keep, kernel_last, l2_start, l2_step, layer_norm,
    linear, linf_start, linf_step, mean, mix_rows, patches, pool, predictions, project,
    row_distances, row_dots, scale, scaled_similarities, scaled_sum, select, select_columns,
    similarities, sum, take, tokens, unfold, unit_length,
};
pub use evaluation::{
    Exchange, Motif, Squares, Window, add_clamped, changed_pixels, distances, dual_lengths,
    fab_step, finite, l1_project, l1_sparse_step, l1_start, l1_step, logits_by_text, momentum,
    pull_back, put_rows, replace_rows, surface_start,
};
pub use open::{Api, DeviceName, Opened, hardware, usable, usable_in_attacks};
pub use rate::peak_flops;
pub use spec::{
    AdamW, BlockSpec, ConvNextSpec, KeptRows, Moments, PatchSpec, PathScale, Places, Streams,
    TensorUpdate,
};
pub use tensor::{Stored, from_vec, sum_of_bits, sum_of_squares, to_vec, zeros};
pub use upload::{Upload, Uploads};
pub use words::{AttackPrecision, Numerics, Precision};
