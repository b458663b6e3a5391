//! Gradients of a block's weights.

use crate::block::forward::Sizes;
use crate::block::{BlockShape, PackedBlock};
use crate::buffer::Floats;
use crate::cells::Element;
use crate::factors::{Factors, LayerTarget, NormSums, NormTarget, add_gradients};
use crate::mlp::MlpGradients;
use crate::weights::BlockWeights;

/// Gradients of the weights, same names and layouts.
pub type BlockGradients = BlockWeights<Floats>;

impl BlockGradients {
    /// Room for those of a block of this width and hidden length; not yet set.
    pub fn new(width: usize, hidden: usize) -> Self {
        Self {
            norm1_weight: Floats::new(width),
            norm1_bias: Floats::new(width),
            qkv_weight: Floats::new(3 * width * width),
            qkv_bias: Floats::new(3 * width),
            proj_weight: Floats::new(width * width),
            proj_bias: Floats::new(width),
            norm2_weight: Floats::new(width),
            norm2_bias: Floats::new(width),
            fc1_weight: Floats::new(hidden * width),
            fc1_bias: Floats::new(hidden),
            fc2_weight: Floats::new(width * hidden),
            fc2_bias: Floats::new(width),
        }
    }

    /// Adds the products of the factors of a group of chunks; the `first` group sets, and after the `last` the
    /// gradients are whole.
    pub(super) fn add(
        &mut self,
        shape: &BlockShape,
        weights: &PackedBlock,
        chunks: &[ChunkGradients],
        first: bool,
        last: bool,
    ) {
        let (width, hidden) = (shape.width, shape.hidden);
        if self.norm1_weight.len() != width || self.fc1_bias.len() != hidden {
            *self = Self::new(width, hidden);
        }
        let mlp = &weights.mlp;
        let norms = vec![
            NormTarget {
                chunks: chunks.iter().map(|chunk| &chunk.norm1).collect(),
                weight: &mut self.norm1_weight,
                bias: &mut self.norm1_bias,
            },
            NormTarget {
                chunks: chunks.iter().map(|chunk| &chunk.mlp.norm).collect(),
                weight: &mut self.norm2_weight,
                bias: &mut self.norm2_bias,
            },
        ];
        let layers = vec![
            LayerTarget {
                layer: &weights.qkv,
                norm: Some(&weights.norm1),
                chunks: chunks.iter().map(|chunk| &chunk.qkv).collect(),
                weight: &mut self.qkv_weight,
                bias: &mut self.qkv_bias,
            },
            LayerTarget {
                layer: &weights.proj,
                norm: None,
                chunks: chunks.iter().map(|chunk| &chunk.proj).collect(),
                weight: &mut self.proj_weight,
                bias: &mut self.proj_bias,
            },
            LayerTarget {
                layer: &mlp.fc1,
                norm: Some(&mlp.norm),
                chunks: chunks.iter().map(|chunk| &chunk.mlp.fc1).collect(),
                weight: &mut self.fc1_weight,
                bias: &mut self.fc1_bias,
            },
            LayerTarget {
                layer: &mlp.fc2,
                norm: None,
                chunks: chunks.iter().map(|chunk| &chunk.mlp.fc2).collect(),
                weight: &mut self.fc2_weight,
                bias: &mut self.fc2_bias,
            },
        ];
        add_gradients((weights.isa, weights.precision), norms, layers, first, last);
    }
}

/// What a chunk contributes to the gradients of the weights.
pub(super) struct ChunkGradients {
    pub(super) norm1: NormSums,
    pub(super) qkv: Factors,
    pub(super) proj: Factors,
    pub(super) mlp: MlpGradients,
}

impl ChunkGradients {
    pub(super) fn new<P: Element>(sizes: &Sizes) -> Self {
        let (rows, width, inner) = (sizes.rows, sizes.width(), sizes.heads.inner());
        Self {
            norm1: NormSums::new(width),
            qkv: Factors::new::<P>(rows, 3 * inner, width),
            proj: Factors::new::<P>(rows, width, inner),
            mlp: MlpGradients::new::<P>(rows, width, sizes.hidden()),
        }
    }
}
