//! The encoder block as one operation.

use std::sync::Arc;

use advxl_cuda::{
    Block, BlockSaved, BlockShape, BlockWeights as CudaWeights, Fp8Block, Fp8Saved, Gpu, Values,
    Wanted, block_backward, block_forward, fail, fp8_block_forward, fp8_block_input_gradient,
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
///
/// # Panics
/// When FP8 attacks want gradients of weights or drop branches.
pub(crate) fn encoder_block(
    gpu: &Gpu,
    x: Tensor<3>,
    weights: &BlockWeights<Tensor<1>>,
    spec: &BlockSpec,
    path: Option<&PathScale>,
    cache: &WeightCache,
) -> Tensor<3> {
    let [batch, tokens, width] = x.dims();
    let parents = parents::<Flex, 3>(&x, weights);
    let form = match spec.numerics {
        Numerics::AttackFp8 => {
            assert!(parents.len() <= 1, "attacks want gradients of images alone");
            assert!(path.is_none(), "attacks pass in evaluation mode");
            Numerics::AttackFp8
        }
        // Attacks and updates in bf16 have the same.
        numerics => numerics.products().into(),
    };
    let primitives: Vec<FlexTensor> = weights.iter().map(flex).collect();
    let of_weights = || {
        let all = primitives
            .iter()
            .map(|weight| sent(gpu, weight))
            .collect::<Vec<_>>();
        let all: [Values; 12] = all.try_into().expect("a block has twelve weights");
        let all = CudaWeights::of(all);
        match form {
            Numerics::AttackFp8 => {
                Form::Fp8(Fp8Block::new(&all).unwrap_or_else(|error| fail(error)))
            }
            numerics => Form::Rounded(Block::new(spec.heads, &all, numerics.products().on_cuda())),
        }
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
        weights: cache.form(primitives.clone(), form, of_weights),
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

/// The weights as products need them.
#[derive(Clone, Debug)]
// Cached one by one.
#[allow(clippy::large_enum_variant)]
enum Form {
    Rounded(Block),
    Fp8(Fp8Block),
}

/// One use of a block: everything that forward and backward share.
#[derive(Clone, Debug)]
struct Call {
    shape: BlockShape,
    weights: Arc<Form>,
    gelu: advxl_cuda::Gelu,
    eps: f32,
    path: Option<[Values; 2]>,
}

impl Call {
    fn forward(&self, x: &Values, wanted: Wanted) -> (FlexTensor, Option<Activations>) {
        let (shape, gelu, eps) = (self.shape, self.gelu, self.eps);
        let (y, saved) = match &*self.weights {
            Form::Rounded(weights) => {
                let path = self.path.as_ref().map(|[attention, mlp]| (attention, mlp));
                let (y, saved) = block_forward(shape, weights, gelu, eps, path, x, wanted);
                (y, saved.map(Activations::Rounded))
            }
            Form::Fp8(weights) => {
                let (y, saved) = fp8_block_forward(shape, weights, gelu, eps, x);
                let saved = (wanted != Wanted::Nothing).then_some(saved);
                (y, saved.map(Activations::Fp8))
            }
        };
        (self.output(y), saved)
    }

    /// Gradients of the input and, where the forward pass saved for them, of the weights.
    fn backward(
        &self,
        saved: &Activations,
        dy: &FlexTensor,
        wanted: Wanted,
    ) -> (FlexTensor, Option<CudaWeights>) {
        let (dx, gradients) = match (&*self.weights, saved) {
            (Form::Rounded(weights), Activations::Rounded(saved)) => {
                block_backward(weights, saved, &sent(saved.gpu(), dy), wanted)
            }
            (Form::Fp8(weights), Activations::Fp8(saved)) => {
                let dy = sent(saved.gpu(), dy);
                (fp8_block_input_gradient(weights, saved, &dy), None)
            }
            _ => unreachable!("activations are of the forward pass with these weights"),
        };
        (self.output(dx), gradients)
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
    Activations(Activations),
    /// From which the activations are recomputed.
    Input(Values),
}

#[derive(Clone, Debug)]
// The larger kind is the common one.
#[allow(clippy::large_enum_variant)]
enum Activations {
    Rounded(BlockSaved),
    Fp8(Fp8Saved),
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
        let (dx, weights) = call.backward(&saved, &dy, wanted);
        gradients(dx, weights.into_iter().flat_map(CudaWeights::in_order))
    }
}
