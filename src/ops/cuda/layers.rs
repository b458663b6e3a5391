//! Layers outside of blocks: linear, layer norm, GELU, and a convolution's weight with its channels last.

use advxl_cuda::{Gpu, Linear, NormSaved, Values};
use advxl_kernels::Gelu;
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::values::{gradients, primitive, sent, values};
use crate::ops::node::{Differentiable, parents, record};
use crate::ops::words::{Numerics, Precision, gelu_on_cuda};

/// See [`crate::ops::linear`].
pub(crate) fn linear(
    gpu: &Gpu,
    x: Tensor<3>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    numerics: Numerics,
) -> Tensor<3> {
    let [batch, tokens, inputs] = x.dims();
    let outputs = bias.dims()[0];
    let parents = parents::<Flex, 3>(&x, [&weight, &bias]);
    let (weight, bias) = (values(gpu, &weight), values(gpu, &bias));
    // In bf16 rows are multiples of 8; a head of ten classes is f32 then.
    let precision = match numerics.products() {
        Precision::Bf16 if !outputs.is_multiple_of(8) => Precision::F32,
        precision => precision,
    };
    let layer = Linear::new(&weight, &bias, precision.on_cuda());
    let x = layer.pad(&values(gpu, &x));
    record(parents, |_| {
        let y = layer.forward(&x, numerics.stream());
        let y = primitive(y, &[batch, tokens, outputs]);
        let shape = [batch, tokens, inputs];
        (y, LinearGradient { layer, x, shape })
    })
}

#[derive(Clone, Debug)]
struct LinearGradient {
    layer: Linear,
    x: Values,
    /// Of the input as it came.
    shape: [usize; 3],
}

impl Differentiable for LinearGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, wanted: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self { layer, x, shape } = self;
        let dy = sent(x.gpu(), &dy);
        // A weight's gradient has the precision's operands, as the product has; the bias is summed in f32.
        let rounded = dy.cast(x.kind());
        let dx = || {
            let dx = layer.crop(&layer.input_gradient(&rounded));
            primitive(dx, &shape)
        };
        let d_weight = || {
            let gradient = layer.weight_gradient(&x, &rounded);
            let length = gradient.len();
            primitive(gradient, &[length])
        };
        let d_bias = || primitive(layer.bias_gradient(&dy), &[layer.outputs()]);
        let all: [&dyn Fn() -> FlexTensor; 3] = [&dx, &d_weight, &d_bias];
        let wanted = wanted.iter().zip(all);
        wanted
            .map(|(wanted, gradient)| wanted.then(gradient))
            .collect()
    }
}

/// See [`crate::ops::layer_norm`].
pub(crate) fn layer_norm(
    gpu: &Gpu,
    x: Tensor<3>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    eps: f64,
) -> Tensor<3> {
    let shape = x.dims();
    let parents = parents::<Flex, 3>(&x, [&weight, &bias]);
    let [weight, bias] = [weight, bias].map(|tensor| values(gpu, &tensor));
    let x = values(gpu, &x);
    record(parents, |_| {
        let (y, saved) = advxl_cuda::layer_norm(&x, &weight, &bias, eps as f32, x.kind());
        let saved = NormGradient {
            saved,
            weight,
            shape,
        };
        (primitive(y, &shape), saved)
    })
}

#[derive(Clone, Debug)]
struct NormGradient {
    saved: NormSaved,
    weight: Values,
    shape: [usize; 3],
}

impl Differentiable for NormGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, wanted: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self {
            saved,
            weight,
            shape,
        } = self;
        let dy = sent(weight.gpu(), &dy);
        let of_weights = wanted[1..].contains(&true);
        let (dx, sums) = advxl_cuda::layer_norm_gradient(&saved, &weight, &dy, None, of_weights);
        let sums = sums.into_iter().flat_map(|(weight, bias)| [weight, bias]);
        gradients(primitive(dx, &shape), sums)
    }
}

/// See [`crate::ops::gelu`].
pub(crate) fn gelu(gpu: &Gpu, x: Tensor<3>, kind: Gelu) -> Tensor<3> {
    let shape = x.dims();
    let parents = parents::<Flex, 3>(&x, []);
    let (x, kind) = (values(gpu, &x), gelu_on_cuda(kind));
    record(parents, |_| {
        let y = advxl_cuda::gelu(kind, &x);
        (primitive(y, &shape), GeluGradient { x, kind, shape })
    })
}

#[derive(Clone, Debug)]
struct GeluGradient {
    x: Values,
    kind: advxl_cuda::Gelu,
    shape: [usize; 3],
}

impl Differentiable for GeluGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self { x, kind, shape } = self;
        let dy = sent(x.gpu(), &dy);
        let (dx, _) = advxl_cuda::gelu_gradient(kind, &x, &dy, shape[2], false);
        vec![Some(primitive(dx, &shape))]
    }
}

/// See [`crate::ops::kernel_last`].
pub(crate) fn kernel_last(gpu: &Gpu, weight: Tensor<1>, [inputs, pixels]: [usize; 2]) -> Tensor<1> {
    let length = weight.dims()[0];
    let parents = parents::<Flex, 1>(&weight, []);
    let weight = values(gpu, &weight);
    record(parents, |_| {
        let swapped = advxl_cuda::swap_axes(&weight, [inputs, pixels]);
        let gpu = gpu.clone();
        (
            primitive(swapped, &[length]),
            KernelLast {
                gpu,
                inputs,
                pixels,
            },
        )
    })
}

#[derive(Clone, Debug)]
struct KernelLast {
    gpu: Gpu,
    inputs: usize,
    pixels: usize,
}

impl Differentiable for KernelLast {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let swapped = advxl_cuda::swap_axes(&sent(&self.gpu, &dy), [self.pixels, self.inputs]);
        let length = swapped.len();
        vec![Some(primitive(swapped, &[length]))]
    }
}
