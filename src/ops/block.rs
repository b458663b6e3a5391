//! The encoder block as one operation, with gradients of the input alone or of the weights too.

use std::fmt;
use std::sync::Arc;

use advxl_kernels::{
    BlockGradients, BlockSaved, BlockShape, BlockWeights, Floats, PackedBlock, Wanted,
    block_backward, block_forward,
};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops};
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::cache::WeightCache;
use super::{
    Gelu, Precision, node, nodes_of, on_kernels, primitive, recorded, reference as plain,
    register_all, reusable, slice, wanted,
};

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
    /// Arithmetic of the matrix products.
    pub precision: Precision,
    /// Whether the backward pass computes the block's activations anew instead of keeping them:
    /// a third more work in a training pass, and memory for one block in place of all.
    pub recompute: bool,
}

/// Factors of the two residual branches, one an image: 0 where drop path left the branch out,
/// else 1 / (1 - rate).
#[derive(Clone, Debug)]
pub struct PathScale {
    /// Of the attention branch.
    pub attention: Vec<f32>,
    /// Of the MLP branch.
    pub mlp: Vec<f32>,
}

fn kernel_weights(weights: &[FlexTensor; 12]) -> BlockWeights<'_> {
    let [
        norm1_weight,
        norm1_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        norm2_weight,
        norm2_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
    ] = weights.each_ref().map(slice);
    BlockWeights {
        norm1_weight,
        norm1_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        norm2_weight,
        norm2_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
    }
}

/// The gradients in the order of the weights.
fn in_order(gradients: BlockGradients) -> [Floats; 12] {
    [
        gradients.norm1_weight,
        gradients.norm1_bias,
        gradients.qkv_weight,
        gradients.qkv_bias,
        gradients.proj_weight,
        gradients.proj_bias,
        gradients.norm2_weight,
        gradients.norm2_bias,
        gradients.fc1_weight,
        gradients.fc1_bias,
        gradients.fc2_weight,
        gradients.fc2_bias,
    ]
}

/// A pre-norm encoder block: attention and MLP, each after a layer norm and around a residual.
///
/// Gradients of the weights are computed when the weights take part in automatic differentiation,
/// and only then: an attack passes plain weights and pays for the gradient of its input alone.
///
/// Shapes: `x` and the result `[batch, tokens, width]`; `weights` flat, in timm's order from
/// `norm1.weight` to `mlp.fc2.bias`, matrices `[out, in]`.
/// Source: Dosovitskiy et al. 2021, equations 2 and 3.
pub fn encoder_block(
    x: Tensor<3>,
    weights: &[Tensor<1>; 12],
    spec: &BlockSpec,
    path: Option<&PathScale>,
    cache: &WeightCache,
) -> Tensor<3> {
    if !on_kernels(&x) {
        return plain::encoder_block(x, weights, spec, path);
    }
    let [batch, tokens, width] = x.dims();
    let shape = BlockShape {
        batch,
        tokens,
        width,
        heads: spec.heads,
        hidden: spec.hidden,
    };
    let call = Call {
        shape,
        packed: cache.packed(weights.clone().map(primitive), spec.precision, |weights| {
            PackedBlock::new(spec.heads, &kernel_weights(weights), spec.precision)
        }),
        gelu: spec.gelu,
        eps: spec.eps as f32,
        path: path.cloned(),
    };
    let input = node(&x);
    if weights[0].is_autodiff() {
        call.tracked(primitive(x), nodes_of::<13>(input, weights), spec.recompute)
    } else if x.is_autodiff() {
        call.tracked(primitive(x), [input], spec.recompute)
    } else {
        Tensor::from_primitive::<Flex>(call.forward(&primitive(x), Wanted::Nothing).0)
    }
}

/// One use of a block: everything that forward and backward share.
#[derive(Clone)]
struct Call {
    shape: BlockShape,
    packed: Arc<PackedBlock>,
    gelu: Gelu,
    eps: f32,
    path: Option<PathScale>,
}

impl Call {
    fn forward(&self, x: &FlexTensor, wanted: Wanted) -> (FlexTensor, Option<BlockSaved>) {
        let BlockShape {
            batch,
            tokens,
            width,
            ..
        } = self.shape;
        let mut y = Floats::new(batch * tokens * width);
        let path = self
            .path
            .as_ref()
            .map(|path| (&path.attention[..], &path.mlp[..]));
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
        (reusable(y, &[batch, tokens, width]), saved)
    }

    fn tracked<const N: usize>(
        self,
        x: FlexTensor,
        nodes: [NodeGuard; N],
        recompute: bool,
    ) -> Tensor<3>
    where
        BlockBackward: Backward<Flex, N, State = State>,
    {
        recorded(BlockBackward, nodes, |tracked| {
            if !tracked || recompute {
                let (y, _) = self.forward(&x, Wanted::Nothing);
                let call = self;
                let kept = Kept::Input(x);
                return (y, tracked.then_some(State { call, kept }));
            }
            let (y, saved) = self.forward(&x, wanted::<N>());
            let kept = Kept::Activations(Arc::new(saved.expect("asked to save")));
            (y, Some(State { call: self, kept }))
        })
    }
}

#[derive(Clone)]
struct State {
    call: Call,
    kept: Kept,
}

/// What a forward pass leaves for the backward pass.
#[derive(Clone)]
enum Kept {
    Activations(Arc<BlockSaved>),
    /// To compute the activations from once more.
    Input(FlexTensor),
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "encoder block {:?}", self.call.shape)
    }
}

#[derive(Debug)]
struct BlockBackward;

impl<const N: usize> Backward<Flex, N> for BlockBackward {
    type State = State;

    fn backward(self, ops: Ops<State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let State { call, kept } = ops.state;
        let saved = match kept {
            Kept::Activations(saved) => saved,
            Kept::Input(x) => {
                let (_, saved) = call.forward(&x, wanted::<N>());
                Arc::new(saved.expect("asked to save"))
            }
        };
        let dy = grads.consume::<Flex>(&ops.node).to_contiguous();
        let BlockShape {
            batch,
            tokens,
            width,
            hidden,
            ..
        } = call.shape;
        let mut dx = Floats::new(batch * tokens * width);
        let mut weights = (N > 1).then(|| BlockGradients::new(width, hidden));
        block_backward(&call.packed, &saved, slice(&dy), &mut dx, weights.as_mut());
        // Their memory serves the next block.
        drop(saved);

        let parents = ops.parents.map(|parent| parent.map(|parent| parent.id));
        let weights = weights.into_iter().flat_map(in_order);
        register_all(grads, parents, (dx, &[batch, tokens, width]), weights);
    }
}
