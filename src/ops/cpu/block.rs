//! The encoder block as one operation, with gradients of the input alone or of the weights too.

use std::sync::Arc;

use advxl_kernels::{
    BlockGradients, BlockSaved, BlockShape, BlockWeights, Floats, Gelu, PackedBlock, Wanted,
    block_backward, block_forward,
};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::cache::WeightCache;
use super::flex::{from_floats, gradients, primitive, slice};
use super::gelu::gelu;
use super::linear::linear;
use super::norm::layer_norm;
use crate::ops::node::{Differentiable, parents, record};
use crate::ops::reference::{self, Layers};
use crate::ops::spec::{BlockSpec, PathScale};

/// See [`crate::ops::encoder_block`].
pub(crate) fn encoder_block(
    x: Tensor<3>,
    weights: &BlockWeights<Tensor<1>>,
    spec: &BlockSpec,
    path: Option<&PathScale>,
    cache: &WeightCache,
) -> Tensor<3> {
    if spec.causal {
        return reference::block_of(LAYERS, x, weights, spec, path);
    }
    let [batch, tokens, width] = x.dims();
    let parents = parents::<Flex, 3>(&x, weights);
    let values = weights.clone().map(primitive);
    let call = Call {
        shape: BlockShape {
            batch,
            tokens,
            width,
            heads: spec.heads,
            hidden: spec.hidden,
        },
        packed: cache.packed(values.iter().cloned().collect(), spec.precision, || {
            PackedBlock::new(spec.heads, &values.as_ref().map(slice), spec.precision)
        }),
        gelu: spec.gelu,
        eps: spec.eps as f32,
        path: path.cloned(),
    };
    let x = primitive(x);
    record(parents, |wanted| {
        let wanted = if spec.recompute {
            Wanted::Nothing
        } else {
            wanted
        };
        let (y, saved) = call.forward(&x, wanted);
        let saved = match saved {
            Some(saved) => Saved::Activations(Arc::new(saved)),
            None => Saved::Input(x),
        };
        (y, BlockGradient { call, saved })
    })
}

/// A causal block has no kernel of its own: its attention is Burn's, and the rest are the operations outside of blocks.
const LAYERS: Layers = Layers {
    layer_norm,
    linear: |_, x, weight, bias| linear(x, weight, bias),
    gelu,
};

/// One use of a block: everything that forward and backward share.
#[derive(Clone, Debug)]
struct Call {
    shape: BlockShape,
    packed: Arc<PackedBlock>,
    gelu: Gelu,
    eps: f32,
    path: Option<PathScale>,
}

impl Call {
    fn forward(&self, x: &FlexTensor, wanted: Wanted) -> (FlexTensor, Option<BlockSaved>) {
        let mut y = Floats::new(self.shape.elements());
        let path = self.path.as_ref();
        let path = path.map(|path| (&path.attention[..], &path.mlp[..]));
        let saved = block_forward(
            self.shape,
            &self.packed,
            self.gelu,
            self.eps,
            path,
            slice(x),
            &mut y,
            wanted,
        );
        (self.output(y), saved)
    }

    /// A tensor of the shape that input, output and their gradients have.
    fn output(&self, values: Floats) -> FlexTensor {
        let BlockShape {
            batch,
            tokens,
            width,
            ..
        } = self.shape;
        from_floats(values, &[batch, tokens, width])
    }
}

#[derive(Clone, Debug)]
struct BlockGradient {
    call: Call,
    saved: Saved,
}

/// What a forward pass leaves for the backward pass.
#[derive(Clone, Debug)]
enum Saved {
    Activations(Arc<BlockSaved>),
    /// From which the activations are recomputed.
    Input(FlexTensor),
}

impl Differentiable for BlockGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, wanted: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self { call, saved } = self;
        let wanted = match wanted.len() {
            1 => Wanted::Input,
            _ => Wanted::Weights,
        };
        let saved = match saved {
            Saved::Activations(saved) => saved,
            Saved::Input(x) => {
                let (_, saved) = call.forward(&x, wanted);
                Arc::new(saved.expect("activations were asked for"))
            }
        };
        let dy = dy.to_contiguous();
        let BlockShape { width, hidden, .. } = call.shape;
        let mut dx = Floats::new(call.shape.elements());
        let mut weights = (wanted == Wanted::Weights).then(|| BlockGradients::new(width, hidden));
        block_backward(&call.packed, &saved, slice(&dy), &mut dx, weights.as_mut());
        gradients(call.output(dx), weights.into_iter().flatten())
    }
}
