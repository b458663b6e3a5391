//! The encoder block as one operation.

use std::sync::Arc;

use advxl_cuda::{
    Block, BlockSaved, BlockShape, BlockWeights as CudaWeights, Gpu, Values, Wanted,
    block_backward, block_forward,
};
use advxl_kernels::BlockWeights;
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::values::{flex, gradients, primitive, sent, values, wanted};
use crate::ops::cache::WeightCache;
use crate::ops::node::{Differentiable, parents, record};
use crate::ops::spec::{BlockSpec, PathScale};
use crate::ops::words::{Numerics, gelu_on_cuda};

/// See [`crate::ops::encoder_block`].
pub(crate) fn encoder_block(
    gpu: &Gpu,
    x: Tensor<3>,
    weights: &BlockWeights<Tensor<1>>,
    spec: &BlockSpec,
    path: Option<&PathScale>,
    cache: &WeightCache,
) -> Tensor<3> {
    if spec.numerics == Numerics::AttackFp8 {
        assert!(path.is_none(), "attacks pass in evaluation mode");
        return super::fp8::encoder_block(gpu, x, weights, spec, cache);
    }
    let [batch, tokens, width] = x.dims();
    let parents = parents::<Flex, 3>(&x, weights);
    let primitives: Vec<FlexTensor> = weights.iter().map(flex).collect();
    let products = spec.numerics.products();
    let of_weights = || {
        let all = primitives
            .iter()
            .map(|weight| sent(gpu, weight))
            .collect::<Vec<_>>();
        let all: [Values; 12] = all.try_into().expect("a block has twelve weights");
        Block::new(spec.heads, &CudaWeights::of(all), products.on_cuda())
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
        weights: cache.form(primitives.clone(), products.into(), of_weights),
        gelu: gelu_on_cuda(spec.numerics.gelu(spec.gelu)),
        eps: spec.eps as f32,
        path: path
            .map(|path| [&path.attention, &path.mlp].map(|factors| Values::send(gpu, factors))),
    };
    let x = values(gpu, &x);
    record(parents, |asked| {
        let asked = match spec.recompute {
            true => Wanted::Nothing,
            false => wanted(asked),
        };
        let (y, saved) = call.forward(&x, asked);
        let saved = match saved {
            Some(saved) => Saved::Activations(saved),
            None => Saved::Input(x),
        };
        (y, BlockGradient { call, saved })
    })
}

/// One use of a block: everything that forward and backward share.
#[derive(Clone, Debug)]
struct Call {
    shape: BlockShape,
    weights: Arc<Block>,
    gelu: advxl_cuda::Gelu,
    eps: f32,
    path: Option<[Values; 2]>,
}

impl Call {
    fn forward(&self, x: &Values, wanted: Wanted) -> (FlexTensor, Option<BlockSaved>) {
        let path = self.path.as_ref().map(|[attention, mlp]| (attention, mlp));
        let (y, saved) = block_forward(
            self.shape,
            &self.weights,
            self.gelu,
            self.eps,
            path,
            x,
            wanted,
        );
        (self.output(y), saved)
    }

    fn output(&self, values: Values) -> FlexTensor {
        let BlockShape {
            batch,
            tokens,
            width,
            ..
        } = self.shape;
        primitive(values, &[batch, tokens, width])
    }
}

#[derive(Clone, Debug)]
struct BlockGradient {
    call: Call,
    saved: Saved,
}

/// What a forward pass leaves for the backward pass.
#[derive(Clone, Debug)]
// The larger kind is the common one.
#[allow(clippy::large_enum_variant)]
enum Saved {
    Activations(BlockSaved),
    /// From which the activations are recomputed.
    Input(Values),
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
            Saved::Input(x) => call
                .forward(&x, wanted)
                .1
                .expect("activations were asked for"),
        };
        let dy = sent(saved.gpu(), &dy);
        let (dx, weights) = block_backward(&call.weights, &saved, &dy, wanted);
        gradients(
            call.output(dx),
            weights.into_iter().flat_map(CudaWeights::in_order),
        )
    }
}
