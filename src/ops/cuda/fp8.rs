//! The encoder block of FP8 training attacks as one operation.

use std::sync::Arc;

use advxl_cuda::{
    BlockShape, BlockWeights as CudaWeights, Fp8Block, Fp8Saved, Gelu, Gpu, Values, fail,
    fp8_block_forward, fp8_block_input_gradient,
};
use advxl_kernels::BlockWeights;
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::values::{flex, primitive, sent, values};
use crate::ops::cache::WeightCache;
use crate::ops::node::{Differentiable, parents, record};
use crate::ops::spec::BlockSpec;
use crate::ops::words::gelu_on_cuda;

/// See [`crate::ops::encoder_block`], with [`crate::ops::Numerics::AttackFp8`].
///
/// # Panics
/// When gradients of weights are wanted.
pub(crate) fn encoder_block(
    gpu: &Gpu,
    x: Tensor<3>,
    weights: &BlockWeights<Tensor<1>>,
    spec: &BlockSpec,
    cache: &WeightCache,
) -> Tensor<3> {
    let dims = x.dims();
    let [batch, tokens, width] = dims;
    let parents = parents::<Flex, 3>(&x, weights);
    assert!(parents.len() <= 1, "attacks want gradients of images alone");
    let primitives: Vec<FlexTensor> = weights.iter().map(flex).collect();
    let of_weights = || {
        let all = primitives.iter().map(|weight| sent(gpu, weight));
        let all: [Values; 12] = all
            .collect::<Vec<_>>()
            .try_into()
            .expect("a block has twelve weights");
        Fp8Block::new(&CudaWeights::of(all)).unwrap_or_else(|error| fail(error))
    };
    let call = Call {
        shape: BlockShape {
            batch,
            tokens,
            width,
            heads: spec.heads,
            hidden: spec.hidden,
            causal: spec.causal,
        },
        weights: cache.form(primitives.clone(), spec.numerics, of_weights),
        gelu: gelu_on_cuda(spec.numerics.gelu(spec.gelu)),
        eps: spec.eps as f32,
    };
    let x = values(gpu, &x);
    record(parents, |_| {
        let (y, saved) = call.forward(&x);
        let saved = match spec.recompute {
            true => Saved::Input(x),
            false => Saved::Activations(saved),
        };
        (primitive(y, &dims), BlockGradient { call, dims, saved })
    })
}

/// One use of a block: everything that forward and backward share.
#[derive(Clone, Debug)]
struct Call {
    shape: BlockShape,
    weights: Arc<Fp8Block>,
    gelu: Gelu,
    eps: f32,
}

impl Call {
    fn forward(&self, x: &Values) -> (Values, Fp8Saved) {
        fp8_block_forward(self.shape, &self.weights, self.gelu, self.eps, x)
    }
}

#[derive(Clone, Debug)]
struct BlockGradient {
    call: Call,
    dims: [usize; 3],
    saved: Saved,
}

/// What a forward pass leaves for the backward pass.
#[derive(Clone, Debug)]
// The larger kind is the common one.
#[allow(clippy::large_enum_variant)]
enum Saved {
    Activations(Fp8Saved),
    /// From which the activations are recomputed.
    Input(Values),
}

impl Differentiable for BlockGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self { call, dims, saved } = self;
        let saved = match saved {
            Saved::Activations(saved) => saved,
            Saved::Input(x) => call.forward(&x).1,
        };
        let dy = sent(saved.gpu(), &dy);
        let dx = fp8_block_input_gradient(&call.weights, &saved, &dy);
        vec![Some(primitive(dx, &dims))]
    }
}
