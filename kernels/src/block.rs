//! A whole pre-norm encoder block, forward and backward.
//!
//! ```text
//! x1 = x  + s1 * proj(attention(qkv(norm1(x))))
//! y  = x1 + s2 * fc2(gelu(fc1(norm2(x1))))
//! ```
//!
//! The batch is cut into chunks of a few samples, and each chunk goes through the whole block in one
//! task, so that its activations stay in the cache. The cut depends on the shape alone, never on the
//! number of threads; with it every result has the same bits on any number of threads.
//!
//! | file        | holds                                                              |
//! |-------------|--------------------------------------------------------------------|
//! | `packed`    | [`PackedBlock`]: weights ready for both directions                 |
//! | `forward`   | [`block_forward`], and what it saves                               |
//! | `backward`  | [`block_backward`]: gradient of the input, factors of the others   |
//! | `gradients` | [`BlockGradients`]: sums of the products of those factors          |
//!
//! What it shares with other blocks is in `linear.rs`, `mlp.rs` and `factors.rs`.
//!
//! One code serves both precisions (generic over the operand's format) and both gradient modes.

mod backward;
mod forward;
mod gradients;
mod packed;

pub use backward::block_backward;
pub use forward::{BlockSaved, block_forward};
pub use gradients::BlockGradients;
pub use packed::PackedBlock;

use crate::attention::Heads;

/// Sizes of a block and of the batch that goes through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockShape {
    /// Samples.
    pub batch: usize,
    /// Tokens of a sample, class token included.
    pub tokens: usize,
    /// Length of a token.
    pub width: usize,
    /// Attention heads; they divide `width`.
    pub heads: usize,
    /// Length of a token inside the MLP.
    pub hidden: usize,
}

impl BlockShape {
    /// Elements of the input, `[batch, tokens, width]`.
    pub fn elements(&self) -> usize {
        self.batch * self.tokens * self.width
    }

    /// Useful work of a forward pass: `2 (12 n w^2 + 2 n^2 w)` per sample for an MLP of `4 w`. The
    /// gradient of the input is as much again, so are the gradients of the weights.
    pub fn flops(&self) -> f64 {
        let [n, w, hidden] = [self.tokens, self.width, self.hidden].map(|size| size as f64);
        self.batch as f64 * 2.0 * (4.0 * n * w * w + 2.0 * n * w * hidden + 2.0 * n * n * w)
    }

    pub(crate) fn attention(&self) -> Heads {
        Heads { tokens: self.tokens, heads: self.heads, head_dim: self.width / self.heads }
    }

    /// Samples of a chunk: about 144 rows, and a number of chunks that several threads can share.
    fn chunk_samples(&self) -> usize {
        const ROWS: usize = 144;
        let chunks = (self.batch * self.tokens).div_ceil(ROWS).next_multiple_of(4);
        (self.batch / chunks.max(1)).max(1)
    }
}
