//! The operations on NVIDIA GPUs: `advxl-cuda` on tensors whose values are on the GPU. No mathematics of its own.

mod block;
mod convnext;
pub(crate) mod evaluation;
mod layers;
mod loss;
pub(crate) mod optimizer;
mod pixels;
mod rows;
mod text;
mod tokens;
pub(crate) mod values;

pub(crate) use block::encoder_block;
pub(crate) use convnext::{convnext_block, unfold};
pub(crate) use layers::{gelu, kernel_last, layer_norm, linear};
pub(crate) use loss::{correct, cross_entropy, mean, row_distances, row_dots, scaled_sum};
pub(crate) use optimizer::update;
pub(crate) use pixels::{from_bytes, l2_step, linf_step, mix_rows, patches, start, targets};
pub(crate) use rows::{add, fork, join, scale, select};
pub(crate) use text::{
    clamp, contrastive, embed, project, scaled_similarities, similarities, take, unit_length,
};
pub(crate) use tokens::{keep, pool, tokens};
