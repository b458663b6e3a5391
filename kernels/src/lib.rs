//! CPU kernels for vision transformers and ConvNeXts on plain slices.
//!
//! What a robust trainer spends its time in: matrix products, norms, GELU, attention, convolutions, whole encoder and
//! ConvNeXt blocks forward and backward, the optimizer, the steps of an attack, and the pixels of JPEG files. There are no tensors here,
//! no autodiff, no files and no configuration; callers bring slices and get slices.
//!
//! Every kernel is written once (`src/lanes.rs`) and compiled for AVX-512 with and without bf16, for AVX2
//! and for any processor; [`detect`](mod@detect) chooses at run time. Work is shared by rayon's global pool, which
//! the program configures. Results have the same bits for any number of threads and on every run of
//! one path, and no sample's result depends on the other samples of its batch.
//!
//! What watches over the `unsafe`: it is confined to intrinsics behind detection, the register tile of
//! `src/gemm.rs` and `src/gemm/avx512.rs` whose bounds are asserted above it, and casts between u32, f32 and bytes.
//! `scripts/test` runs all tests under the address sanitizer too, on every path the processor has.
//!
//! Lengths are checked at the public edge; a wrong one panics with both numbers.

mod adamw;
mod attention;
mod block;
mod buffer;
mod cells;
mod convnext;
mod depthwise;
pub mod detect;
mod factors;
mod gelu;
mod gemm;
pub mod jpeg;
mod lanes;
mod linear;
mod matmul;
mod mlp;
mod norm;
mod pack;
mod patches;
mod peak;
pub mod pgd;
mod reduce;
mod rounding;
mod softmax;
mod unfold;
mod weights;

pub use adamw::AdamW;
pub use attention::{AttentionSaved, AttentionShape, attention, attention_gradient};
pub use block::{BlockGradients, BlockSaved, BlockShape, PackedBlock, block_backward, block_forward};
pub use buffer::{Floats, release_buffers};
pub use convnext::{
    ConvNextGradients, ConvNextSaved, ConvNextShape, PackedConvNext, convnext_backward, convnext_forward,
};
pub use depthwise::{DepthwiseShape, PackedDepthwise, depthwise, depthwise_input_gradient, depthwise_weight_gradient};
pub use detect::{Path, bf16_is_faster, detect, with_path};
pub use gelu::{Gelu, gelu, gelu_gradient};
pub use matmul::{Finish, Layout, PackedMatrix, gemm, gemm_packed};
pub use mlp::Wanted;
pub use norm::{layer_norm, layer_norm_gradient};
pub use patches::Patches;
pub use peak::peak_flops;
pub use reduce::{sum, sum_of_rows, sum_of_squares};
pub use rounding::{Fp8, round_rows, round_to_bf16};
pub use softmax::softmax;
pub use unfold::Unfold;
pub use weights::{BlockWeights, ConvNextWeights};

/// The format of a product's operands. Sums, and everything but products, are f32 in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Operands as they are.
    F32,
    /// Operands rounded to bf16, to nearest and to even. Saved activations are bf16 too.
    Bf16,
}
