//! Dense convolutions on activations `[batch, side * side, channels]`.

use burn::tensor::Tensor;

use super::parameter::Parameter;
use super::pass::NORM_EPS;
use crate::ops::{Gelu, Precision, gelu, kernel_last, layer_norm, linear, unfold};

/// Computes a convolution by unfolding (possibly overlapping) patches and one matrix product.
///
/// Shapes: `x` `[batch, side * side, inputs]`; `weight` `[outputs, inputs, kernel, kernel]` and `bias` flat, in
/// PyTorch's layout; returns `[batch, to * to, outputs]` and `to`.
pub(crate) fn convolution(
    x: Tensor<3>,
    side: usize,
    [weight, bias]: &[Parameter; 2],
    step: usize,
    padding: usize,
    precision: Precision,
) -> (Tensor<3>, usize) {
    let &[_, inputs, kernel, _] = &weight.shape[..] else {
        unreachable!("a convolution's weight has four axes");
    };
    let to = (side + 2 * padding - kernel) / step + 1;
    let columns = unfold(x, [side, side], kernel, step, padding);
    // [outputs, inputs, kernel, kernel] -> [outputs, kernel, kernel, inputs], the layout of the columns.
    let weight = kernel_last(weight.value.clone(), [inputs, kernel * kernel]);
    (linear(columns, weight, bias.value.clone(), precision), to)
}

/// A layer of a convolutional stem: 3 x 3 convolution, norm over the channels, GELU.
///
/// Source: Singh et al. 2023; names as in their published code.
#[derive(Clone, Debug)]
pub(crate) struct ConvLayer {
    convolution: [Parameter; 2],
    norm: [Parameter; 2],
    step: usize,
}

impl ConvLayer {
    /// Builds layer `index` of a stem with the given inputs, outputs and stride, requesting its weights one by one.
    pub(crate) fn new<E>(
        prefix: &str,
        index: usize,
        [inputs, outputs, step]: [usize; 3],
        tensor: &mut impl FnMut(&str, &[usize]) -> Result<Parameter, E>,
    ) -> Result<Self, E> {
        let mut part = |place: usize, kind: &str, shape: &[usize]| {
            tensor(&format!("{prefix}.{}.{kind}", 3 * index + place), shape)
        };
        Ok(Self {
            convolution: [
                part(0, "weight", &[outputs, inputs, 3, 3])?,
                part(0, "bias", &[outputs])?,
            ],
            norm: [part(1, "weight", &[outputs])?, part(1, "bias", &[outputs])?],
            step,
        })
    }

    /// Applies all layers in order.
    ///
    /// Shapes: `x` `[batch, side * side, channels]`; returns the same layout, and its side.
    pub(crate) fn all(
        layers: &[Self],
        x: Tensor<3>,
        side: usize,
        precision: Precision,
    ) -> (Tensor<3>, usize) {
        layers.iter().fold((x, side), |(x, side), layer| {
            let (x, side) = convolution(x, side, &layer.convolution, layer.step, 1, precision);
            let [weight, bias] = layer.norm.each_ref().map(|part| part.value.clone());
            (gelu(layer_norm(x, weight, bias, NORM_EPS), Gelu::Erf), side)
        })
    }

    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.convolution.iter().chain(&self.norm)
    }

    pub(crate) fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        self.convolution.iter_mut().chain(&mut self.norm)
    }
}
