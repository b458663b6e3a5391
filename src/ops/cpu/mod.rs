//! The operations on the CPU: `advxl-kernels` on the memory of Burn's Flex tensors.
//!
//! The one place that knows Flex primitives. No mathematics of its own.

mod adamw;
mod block;
mod convnext;
pub(crate) mod flex;
mod fp8;
mod gelu;
mod linear;
mod norm;
mod patches;
mod pgd;
mod rows;
#[cfg(test)]
mod testing;
mod unfold;

pub(crate) use adamw::adamw;
pub(crate) use block::encoder_block;
pub(crate) use convnext::convnext_block;
pub(crate) use gelu::gelu;
pub(crate) use linear::linear;
pub(crate) use norm::layer_norm;
pub(crate) use patches::patches;
pub(crate) use pgd::{l2_step, linf_step};
pub(crate) use rows::{momentum, replace_rows, select};
pub(crate) use unfold::unfold;
