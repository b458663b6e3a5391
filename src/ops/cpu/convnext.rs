//! The ConvNeXt block as one operation, with gradients of the input alone or of the weights too.

use std::sync::Arc;

use advxl_kernels::{
    ConvNextGradients, ConvNextSaved, ConvNextShape, ConvNextWeights, Floats, Gelu, PackedConvNext,
    Wanted, convnext_backward, convnext_forward,
};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::flex::{from_floats, gradients, primitive, slice};
use crate::ops::cache::WeightCache;
use crate::ops::node::{Differentiable, parents, record};
use crate::ops::spec::ConvNextSpec;

/// See [`crate::ops::convnext_block`].
pub(crate) fn convnext_block(
    x: Tensor<3>,
    [height, width]: [usize; 2],
    weights: &ConvNextWeights<Tensor<1>>,
    spec: &ConvNextSpec,
    path: Option<&[f32]>,
    cache: &WeightCache,
) -> Tensor<3> {
    let [batch, _, channels] = x.dims();
    let parents = parents::<Flex, 3>(&x, weights);
    let values = weights.clone().map(primitive);
    let precision = spec.precision.on_cpu();
    let call = Call {
        shape: ConvNextShape {
            batch,
            height,
            width,
            channels,
            hidden: spec.hidden,
            kernel: spec.kernel,
        },
        packed: cache.form(
            values.iter().cloned().collect(),
            spec.precision.into(),
            || PackedConvNext::new(spec.kernel, &values.as_ref().map(slice), precision),
        ),
        gelu: spec.gelu,
        eps: spec.eps as f32,
        path: path.map(<[f32]>::to_vec),
    };
    let x = primitive(x);
    record(parents, |wanted| {
        let (y, saved) = match spec.recompute {
            true => call.forward(&x, Wanted::Nothing),
            false => call.forward(&x, wanted),
        };
        // The gradient of the input alone does without the input, unless activations are recomputed from it.
        let x = (wanted == Wanted::Weights || saved.is_none()).then_some(x);
        let saved = saved.map(Arc::new);
        (y, ConvNextGradient { call, x, saved })
    })
}

/// One use of a block: everything that forward and backward share.
#[derive(Clone, Debug)]
struct Call {
    shape: ConvNextShape,
    packed: Arc<PackedConvNext>,
    gelu: Gelu,
    eps: f32,
    path: Option<Vec<f32>>,
}

impl Call {
    fn forward(&self, x: &FlexTensor, wanted: Wanted) -> (FlexTensor, Option<ConvNextSaved>) {
        let mut y = Floats::new(self.shape.elements());
        let saved = convnext_forward(
            self.shape,
            &self.packed,
            self.gelu,
            self.eps,
            self.path.as_deref(),
            slice(x),
            &mut y,
            wanted,
        );
        (self.output(y), saved)
    }

    /// A tensor of the shape that input, output and their gradients have.
    fn output(&self, values: Floats) -> FlexTensor {
        let ConvNextShape {
            batch,
            height,
            width,
            channels,
            ..
        } = self.shape;
        from_floats(values, &[batch, height * width, channels])
    }
}

/// What a forward pass leaves for the backward pass.
#[derive(Clone, Debug)]
struct ConvNextGradient {
    call: Call,
    /// For the gradients of the weights, or to recompute the activations from.
    x: Option<FlexTensor>,
    saved: Option<Arc<ConvNextSaved>>,
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
            let x = x.as_ref().expect("kept where activations are not");
            let (_, saved) = call.forward(x, wanted);
            Arc::new(saved.expect("activations were asked for"))
        });
        let dy = dy.to_contiguous();
        let ConvNextShape {
            channels,
            hidden,
            kernel,
            ..
        } = call.shape;
        let mut dx = Floats::new(call.shape.elements());
        let mut weights =
            (wanted == Wanted::Weights).then(|| ConvNextGradients::new(channels, hidden, kernel));
        let of_weights = weights.as_mut().map(|weights| {
            let x = x.as_ref().expect("kept for the gradients of the weights");
            (slice(x), weights)
        });
        convnext_backward(&call.packed, &saved, slice(&dy), &mut dx, of_weights);
        gradients(call.output(dx), weights.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::draw;
    use crate::ops::words::Precision;
    use crate::ops::{reference, to_vec};

    const SIZE: [usize; 2] = [5, 6];
    const CHANNELS: usize = 20;
    const HIDDEN: usize = 36;

    fn weights() -> ConvNextWeights<Tensor<1>> {
        let (c, h) = (CHANNELS, HIDDEN);
        let lengths = [c, 49 * c, c, c, c, h * c, h, c * h, c];
        let mut seed = 10;
        ConvNextWeights::from_array(lengths).map(|length| {
            seed += 1;
            let size = if length == 49 * c { 0.15 } else { 0.3 };
            draw(seed, [length]) * size
        })
    }

    fn spec(gelu: Gelu, recompute: bool) -> ConvNextSpec {
        ConvNextSpec {
            hidden: HIDDEN,
            kernel: 7,
            gelu,
            eps: 1e-6,
            precision: Precision::F32,
            recompute,
        }
    }

    /// The output and the gradients of the input and, if they are tracked, of the weights.
    fn results(
        weights: ConvNextWeights<Tensor<1>>,
        block: impl Fn(Tensor<3>, &ConvNextWeights<Tensor<1>>) -> Tensor<3>,
    ) -> Vec<Vec<f32>> {
        let shape = [3, SIZE[0] * SIZE[1], CHANNELS];
        let x = draw(1, shape).autodiff().require_grad();
        let y = block(x.clone(), &weights);
        let mut gradients = (y.clone() * draw(2, shape).autodiff()).sum().backward();
        let mut all = vec![to_vec(y), to_vec(x.grad_remove(&mut gradients).unwrap())];
        for weight in weights.iter().filter(|weight| weight.is_autodiff()) {
            all.push(to_vec(weight.grad_remove(&mut gradients).unwrap()));
        }
        all
    }

    fn tracked() -> ConvNextWeights<Tensor<1>> {
        weights().map(|weight| weight.autodiff().require_grad())
    }

    const PATH: [f32; 3] = [1.25, 0.0, 0.5];

    fn fused(spec: ConvNextSpec) -> impl Fn(Tensor<3>, &ConvNextWeights<Tensor<1>>) -> Tensor<3> {
        let cache = WeightCache::default();
        move |x, weights| convnext_block(x, SIZE, weights, &spec, Some(&PATH), &cache)
    }

    #[test]
    fn the_block_agrees_with_its_reference() {
        for gelu in [Gelu::Erf, Gelu::Tanh, Gelu::Quick] {
            let spec = spec(gelu, false);
            let found = results(tracked(), fused(spec.clone()));
            let right = results(tracked(), |x, weights| {
                reference::convnext_block(x, SIZE, weights, &spec, Some(&PATH))
            });
            assert_eq!(found.len(), 11);
            for (index, (found, right)) in found.iter().zip(right).enumerate() {
                let size = right.iter().fold(1.0, |size: f32, v| size.max(v.abs()));
                for (found, right) in found.iter().zip(right) {
                    // Sums of some hundred products, relative to the largest element of each result.
                    let off = (found - right).abs() / size;
                    assert!(off < 2e-5, "{gelu:?}, result {index}: {found} {right}");
                }
            }
        }
    }

    #[test]
    fn untracked_weights_and_recomputed_activations_change_no_bit() {
        let all = results(tracked(), fused(spec(Gelu::Erf, false)));
        assert_eq!(results(weights(), fused(spec(Gelu::Erf, false))), all[..2]);
        assert_eq!(results(weights(), fused(spec(Gelu::Erf, true))), all[..2]);
        assert_eq!(results(tracked(), fused(spec(Gelu::Erf, true))), all);
        let x = draw(1, [3, SIZE[0] * SIZE[1], CHANNELS]);
        let untracked = fused(spec(Gelu::Erf, false))(x, &weights());
        assert_eq!(to_vec(untracked), all[0]);
    }

    #[test]
    fn changed_weights_are_packed_again() {
        let block = fused(spec(Gelu::Erf, false));
        let x = draw(1, [3, SIZE[0] * SIZE[1], CHANNELS]);
        let first = to_vec(block(x.clone(), &weights()));
        let mut changed = weights();
        changed.gamma = changed.gamma * 2.0;
        assert_ne!(to_vec(block(x.clone(), &changed)), first);
        assert_eq!(to_vec(block(x, &weights())), first);
    }
}
