//! The ConvNeXt block as one operation, and the rows of convolutions.

use std::sync::Arc;

use advxl_cuda::{
    ConvNext, ConvNextSaved, ConvNextShape, ConvNextWeights as CudaWeights, Gelu, Gpu, Unfold,
    Values, Wanted, convnext_backward, convnext_forward,
};
use advxl_kernels::ConvNextWeights;
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::values::{flex, gradients, primitive, sent, values, wanted};
use crate::ops::cache::WeightCache;
use crate::ops::node::{Differentiable, parents, record};
use crate::ops::spec::ConvNextSpec;
use crate::ops::words::gelu_on_cuda;

/// See [`crate::ops::convnext_block`].
pub(crate) fn convnext_block(
    gpu: &Gpu,
    x: Tensor<3>,
    [height, width]: [usize; 2],
    weights: &ConvNextWeights<Tensor<1>>,
    spec: &ConvNextSpec,
    path: Option<&[f32]>,
    cache: &WeightCache,
) -> Tensor<3> {
    let [batch, _, channels] = x.dims();
    let parents = parents::<Flex, 3>(&x, weights);
    let primitives: Vec<FlexTensor> = weights.iter().map(flex).collect();
    let of_weights = || {
        let all = primitives.iter().map(|weight| sent(gpu, weight));
        let all: Vec<Values> = all.collect();
        let all: [Values; 9] = all.try_into().expect("a block has nine weights");
        ConvNext::new(spec.kernel, &CudaWeights::of(all), spec.precision.on_cuda())
    };
    let call = Call {
        shape: ConvNextShape {
            batch,
            height,
            width,
            channels,
            hidden: spec.hidden,
            kernel: spec.kernel,
        },
        weights: cache.form(primitives.clone(), spec.precision.into(), of_weights),
        gelu: gelu_on_cuda(spec.gelu),
        eps: spec.eps as f32,
        path: path.map(|factors| Values::send(gpu, factors)),
    };
    let x = values(gpu, &x);
    record(parents, |asked| {
        let (y, saved) = match spec.recompute {
            true => call.forward(&x, Wanted::Nothing),
            false => call.forward(&x, wanted(asked)),
        };
        (y, ConvNextGradient { call, x, saved })
    })
}

/// One use of a block: everything that forward and backward share.
#[derive(Clone, Debug)]
struct Call {
    shape: ConvNextShape,
    weights: Arc<ConvNext>,
    gelu: Gelu,
    eps: f32,
    path: Option<Values>,
}

impl Call {
    fn forward(&self, x: &Values, wanted: Wanted) -> (FlexTensor, Option<ConvNextSaved>) {
        let (gelu, eps, path) = (self.gelu, self.eps, self.path.as_ref());
        let (y, saved) = convnext_forward(self.shape, &self.weights, gelu, eps, path, x, wanted);
        (self.output(y), saved)
    }

    fn output(&self, values: Values) -> FlexTensor {
        let ConvNextShape {
            batch,
            height,
            width,
            channels,
            ..
        } = self.shape;
        primitive(values, &[batch, height * width, channels])
    }
}

/// What a forward pass leaves for the backward pass.
#[derive(Clone, Debug)]
struct ConvNextGradient {
    call: Call,
    x: Values,
    saved: Option<ConvNextSaved>,
}

impl Differentiable for ConvNextGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, wanted: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self { call, x, saved } = self;
        let wanted = match wanted.len() {
            1 => Wanted::Input,
            _ => Wanted::Weights,
        };
        let saved = saved.unwrap_or_else(|| {
            let (_, saved) = call.forward(&x, wanted);
            saved.expect("activations were asked for")
        });
        let dy = sent(x.gpu(), &dy);
        let (dx, weights) = convnext_backward(&call.weights, &saved, &dy, wanted);
        gradients(
            call.output(dx),
            weights.into_iter().flat_map(CudaWeights::in_order),
        )
    }
}

/// See [`crate::ops::unfold`].
pub(crate) fn unfold(
    gpu: &Gpu,
    x: Tensor<3>,
    [height, width]: [usize; 2],
    kernel: usize,
    stride: usize,
    padding: usize,
) -> Tensor<3> {
    let [batch, _, channels] = x.dims();
    let sizes = Unfold {
        batch,
        height,
        width,
        channels,
        kernel,
        stride,
        padding,
    };
    let parents = parents::<Flex, 3>(&x, []);
    let x = values(gpu, &x);
    record(parents, |_| {
        let [down, along] = sizes.output();
        let rows = primitive(sizes.unfold(&x), &[batch, down * along, sizes.row()]);
        let gpu = gpu.clone();
        (rows, UnfoldGradient { gpu, sizes })
    })
}

#[derive(Clone, Debug)]
struct UnfoldGradient {
    gpu: Gpu,
    sizes: Unfold,
}

impl Differentiable for UnfoldGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self { gpu, sizes } = self;
        let shape = [sizes.batch, sizes.height * sizes.width, sizes.channels];
        vec![Some(primitive(sizes.gradient(&sent(&gpu, &dy)), &shape))]
    }
}
