//! CUDA kernels for vision transformers: `advxl-kernels` on device memory.
//!
//! A [`Gpu`] runs work in order behind the host; [`Values`] are numbers in its memory. The operations are those of
//! `advxl-kernels` by the same names: layer norm, GELU, attention, whole encoder blocks forward and backward, patches and
//! tokens, cross entropy, the steps of an attack, AdamW.
//!
//! Building needs no CUDA toolkit, and a program with this crate starts without any library of NVIDIA's: the driver,
//! cuBLASLt and NVRTC are looked for when a GPU is opened. Kernels are CUDA sources in the binary (`cuda/`), compiled for the
//! GPU at hand at first use and kept on disk. Products are cuBLASLt's.
//!
//! The same work on the same GPU model with the same libraries gives the same bits: no kernel uses atomics, and the
//! algorithms that products use are kept.
//!
//! Tests need no GPU: [`Gpu::soft`] compiles the same kernels for the CPU and runs them.
//!
//! Lengths are checked at the public edge; a wrong one panics with both numbers. Failures of the device are not panics: see
//! [`Gpu::check`].

mod adamw;
mod attention;
mod bindings;
mod block;
mod collectives;
mod communicator;
mod compiler;
mod contrastive;
mod convnext;
mod depthwise;
mod distance;
mod error;
pub mod evaluation;
mod events;
pub mod fab;
mod fp8;
mod gpu;
mod images;
mod lazy;
mod libraries;
mod linear;
mod loss;
mod machine;
pub mod measure;
mod messages;
pub mod mixing;
mod norm;
pub mod pgd;
mod products;
mod programs;
mod real;
mod rows;
mod selftest;
mod soft;
pub mod square;
mod text;
mod unfold;
mod uploads;
mod values;
mod vectors;

pub use adamw::{AdamW, Parameter, sum_of_squares};
pub use attention::{AttentionSaved, AttentionShape, attention, attention_gradient};
pub use block::{Block, BlockSaved, BlockShape, BlockWeights, Wanted, block_backward, block_forward};
pub use collectives::{Collectives, Pending, Plan, Share, Sum};
pub use communicator::{UniqueId, Watch};
pub use compiler::cache_folder;
pub use contrastive::{
    ContrastiveSaved, UnitSaved, contrastive, contrastive_gradient, unit_length, unit_length_gradient,
};
pub use convnext::{ConvNext, ConvNextSaved, ConvNextShape, ConvNextWeights, convnext_backward, convnext_forward};
pub use depthwise::{Depthwise, DepthwiseShape, depthwise, depthwise_input_gradient, depthwise_weight_gradient};
pub use distance::{RowDistance, row_distances, row_distances_gradient};
pub use error::{Error, ErrorKind, Result};
pub use evaluation::Norm;
pub use fp8::{Fp8Block, Fp8Saved, fp8_block_forward, fp8_block_input_gradient};
pub use gpu::{Gpu, Traffic};
pub use images::{Kept, Patches, Pool, Tokens};
pub use lazy::{caught, fail, lazy_bytes, values_of};
pub use libraries::has_driver;
pub use linear::Linear;
pub use loss::{cross_entropy, cross_entropy_gradient, cross_entropy_losses, right, total};
pub use machine::{Facts, Kind, Stream};
pub use messages::pairwise_sum;
pub use norm::{NormSaved, layer_norm, layer_norm_gradient};
pub use rows::{Gelu, add, gelu, gelu_gradient, resize_rows, sum_of_rows};
pub use text::{EmbedSaved, embed, embed_gradient, take_rows, take_rows_gradient};
pub use unfold::Unfold;
pub use uploads::{Upload, Uploads};
pub use values::Values;
pub use vectors::{Transposed, matmul, row_dots, sum, swap_axes, times_rows};

/// The format of a product's operands. Sums, and everything but products and what lies between them, are f32 in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32, without TF32.
    F32,
    /// f32 in memory, rounded to TF32 (10 bits of fraction) by the products.
    Tf32,
    /// Operands and saved activations rounded to bf16, weights and their gradients f32.
    Bf16,
}

impl Precision {
    /// The format in memory.
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 | Self::Tf32 => Kind::F32,
            Self::Bf16 => Kind::Bf16,
        }
    }
}

/// Launches a kernel with its arguments in the order of the source.
macro_rules! launch {
    ($gpu:expr, $program:expr, $name:expr, $grid:expr, $threads:expr, $shared:expr, $($argument:expr),* $(,)?) => {
        $gpu.launch($program, $name, $grid, $threads, $shared, &[$($crate::machine::Argument::from($argument)),*])
    };
}
pub(crate) use launch;
