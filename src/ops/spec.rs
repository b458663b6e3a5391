//! What the operations are, apart from their tensors.

use advxl_kernels::Gelu;
use burn::tensor::Tensor;

use super::words::{Numerics, Precision};

/// How images become patches.
#[derive(Clone, Copy, Debug)]
pub struct PatchSpec {
    /// Pixels on a side of a patch.
    pub patch: usize,
    /// Subtracted from each channel.
    pub mean: [f64; 3],
    /// Each channel is then divided by it.
    pub std: [f64; 3],
}

impl PatchSpec {
    /// The channels' means and the factors `1 / std`.
    pub(crate) fn affine(&self) -> [[f32; 3]; 2] {
        [
            self.mean.map(|mean| mean as f32),
            self.std.map(|std| (1.0 / std) as f32),
        ]
    }
}

/// The rows of each image's tokens that stay where others are masked out.
#[derive(Clone, Copy, Debug)]
pub struct KeptRows<'a> {
    /// Row numbers, `[batch, kept]`.
    pub rows: &'a [usize],
    /// Images.
    pub batch: usize,
}

impl KeptRows<'_> {
    /// Rows that stay in each image.
    pub fn count(&self) -> usize {
        self.rows.len() / self.batch.max(1)
    }
}

/// Position embeddings, as tokens get them.
#[derive(Clone, Debug)]
pub struct Places<'a> {
    /// `[rows, width]`, flat: of the class token, if it has one there, then of the patches in reading order.
    pub table: Tensor<1>,
    /// Whether the first row is the class token's; without one the class token has no position.
    pub has_class_row: bool,
    /// What makes the patches' rows of those in the table, `[patches, rows]`; they are the table's rows if absent.
    pub resampling: Option<Tensor<2>>,
    /// The patches that stay, if some are masked out.
    pub kept: Option<KeptRows<'a>>,
}

/// The random streams of a batch: of (seed, purpose, an image's key, second key).
#[derive(Clone, Copy, Debug)]
pub struct Streams<'a> {
    /// Of the run.
    pub seed: u64,
    /// What the numbers are for.
    pub purpose: u32,
    /// One an image.
    pub keys: &'a [u64],
    /// The same for all images.
    pub sub_key: u64,
}

/// What an encoder block is, apart from its weights.
#[derive(Clone, Debug)]
pub struct BlockSpec {
    /// Attention heads; they divide the width.
    pub heads: usize,
    /// Width of the hidden layer of the MLP.
    pub hidden: usize,
    /// Which GELU.
    pub gelu: Gelu,
    /// Added to the variance in the norms.
    pub eps: f64,
    /// Whether a token attends only to itself and those before it.
    pub causal: bool,
    /// Arithmetic; that of causal blocks on the CPU is always f32.
    pub numerics: Numerics,
    /// Whether the backward pass recomputes the block's activations instead of keeping them (activation
    /// checkpointing): a third more work in a training pass, and memory for one block in place of all.
    pub recompute: bool,
}

/// Factors of the two residual branches, one per image: 0 where drop path left the branch out, else 1 / (1 - rate).
#[derive(Clone, Debug)]
pub struct PathScale {
    /// Of the attention branch.
    pub attention: Vec<f32>,
    /// Of the MLP branch.
    pub mlp: Vec<f32>,
}

/// What a ConvNeXt block is, apart from its weights.
#[derive(Clone, Debug)]
pub struct ConvNextSpec {
    /// Width of the hidden layer of the MLP.
    pub hidden: usize,
    /// Pixels on a side of the depthwise kernel: odd, 7 in the paper.
    pub kernel: usize,
    /// Which GELU.
    pub gelu: Gelu,
    /// Added to the variance in the norm.
    pub eps: f64,
    /// Arithmetic of the matrix products.
    pub precision: Precision,
    /// Whether the backward pass recomputes the block's activations instead of keeping them.
    pub recompute: bool,
}

/// The numbers of one update of all tensors; see [`crate::optim`].
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this update.
    pub learning_rate: f64,
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Number of this update, from 1, for the correction of the moments' bias.
    pub step: u64,
    /// The gradient is multiplied by this first (clipping).
    pub gradient_scale: f64,
    /// Decay of the running average of the weights, if one is kept.
    pub average_decay: f64,
    /// Whether products take the new weights in bf16: an NVIDIA GPU rounds them with the update.
    pub rounded: bool,
}

/// One tensor of an update.
#[derive(Clone, Debug)]
pub struct TensorUpdate {
    /// The weights.
    pub weights: Tensor<1>,
    /// The gradient of the loss for them.
    pub gradient: Tensor<1>,
    /// What the optimizer keeps for them.
    pub moments: Moments,
    /// Decoupled weight decay, multiplied by the learning rate; 0 for tensors without decay.
    pub weight_decay: f64,
    /// Factor of the learning rate.
    pub rate: f64,
}

/// What the optimizer keeps for one tensor.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Running mean of the gradient.
    pub first: Tensor<1>,
    /// Running mean of its square.
    pub second: Tensor<1>,
    /// Running average of the weights, if one is kept.
    pub average: Option<Tensor<1>>,
}
