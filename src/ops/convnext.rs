//! The ConvNeXt block as one operation, with gradients of the input alone or of the weights too.

use std::fmt;
use std::sync::Arc;

use advxl_kernels::{
    ConvNextGradients, ConvNextSaved, ConvNextShape, ConvNextWeights, Floats, PackedConvNext,
    Wanted, convnext_backward, convnext_forward,
};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops};
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::cache::ConvNextCache;
use super::{
    Gelu, Precision, node, nodes_of, on_kernels, primitive, recorded, reference as plain,
    register_all, reusable, slice, wanted,
};

/// What a ConvNeXt block is, apart from its weights.
#[derive(Clone, Debug)]
pub struct ConvNextSpec {
    /// Width of the hidden layer of the MLP.
    pub hidden: usize,
    /// Pixels on a side of the depthwise kernel: odd, 7 in the paper.
    pub kernel: usize,
    /// Which GELU.
    pub gelu: Gelu,
    /// Added to the variance in the norm.
    pub eps: f64,
    /// Arithmetic of the matrix products.
    pub precision: Precision,
    /// Whether the backward pass computes the block's activations anew instead of keeping them.
    pub recompute: bool,
}

fn kernel_weights(weights: &[FlexTensor; 9]) -> ConvNextWeights<'_> {
    let [
        gamma,
        conv_dw_weight,
        conv_dw_bias,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
    ] = weights.each_ref().map(slice);
    ConvNextWeights {
        gamma,
        conv_dw_weight,
        conv_dw_bias,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
    }
}

/// The gradients in the order of the weights.
fn in_order(gradients: ConvNextGradients) -> [Floats; 9] {
    [
        gradients.gamma,
        gradients.conv_dw_weight,
        gradients.conv_dw_bias,
        gradients.norm_weight,
        gradients.norm_bias,
        gradients.fc1_weight,
        gradients.fc1_bias,
        gradients.fc2_weight,
        gradients.fc2_bias,
    ]
}

/// A ConvNeXt block: depthwise convolution, layer norm and MLP, scaled by `gamma`, around a residual.
///
/// Gradients of the weights are computed when the weights take part in automatic differentiation,
/// and only then: an attack passes plain weights and pays for the gradient of its input alone.
/// `path` are factors of the branch, one an image: 0 where drop path left it out, else 1 / (1 - rate).
///
/// Shapes: `x` and the result `[batch, height * width, channels]`, `[height, width]` of an image
/// beside them; `weights` flat, in timm's order: `gamma`, then from `conv_dw.weight` to `mlp.fc2.bias`,
/// as torch keeps them.
/// Source: Liu et al. 2022, figure 4.
pub fn convnext_block(
    x: Tensor<3>,
    [height, width]: [usize; 2],
    weights: &[Tensor<1>; 9],
    spec: &ConvNextSpec,
    path: Option<&[f32]>,
    cache: &ConvNextCache,
) -> Tensor<3> {
    if !on_kernels(&x) {
        return plain::convnext_block(x, [height, width], weights, spec, path);
    }
    let [batch, _, channels] = x.dims();
    let shape = ConvNextShape {
        batch,
        height,
        width,
        channels,
        hidden: spec.hidden,
        kernel: spec.kernel,
    };
    let packed = cache.packed(weights.clone().map(primitive), spec.precision, |weights| {
        PackedConvNext::new(spec.kernel, &kernel_weights(weights), spec.precision)
    });
    let call = Call {
        shape,
        packed,
        gelu: spec.gelu,
        eps: spec.eps as f32,
        path: path.map(<[f32]>::to_vec),
    };
    let input = node(&x);
    if weights[0].is_autodiff() {
        call.tracked(primitive(x), nodes_of::<10>(input, weights), spec.recompute)
    } else if x.is_autodiff() {
        call.tracked(primitive(x), [input], spec.recompute)
    } else {
        Tensor::from_primitive::<Flex>(call.forward(&primitive(x), Wanted::Nothing).0)
    }
}

/// One use of a block: everything that forward and backward share.
#[derive(Clone)]
struct Call {
    shape: ConvNextShape,
    packed: Arc<PackedConvNext>,
    gelu: Gelu,
    eps: f32,
    path: Option<Vec<f32>>,
}

impl Call {
    /// The shape of input and output.
    fn dims(&self) -> [usize; 3] {
        let ConvNextShape {
            batch,
            height,
            width,
            channels,
            ..
        } = self.shape;
        [batch, height * width, channels]
    }

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
        (reusable(y, &self.dims()), saved)
    }

    fn tracked<const N: usize>(
        self,
        x: FlexTensor,
        nodes: [NodeGuard; N],
        recompute: bool,
    ) -> Tensor<3>
    where
        ConvNextBackward: Backward<Flex, N, State = State>,
    {
        recorded(ConvNextBackward, nodes, |tracked| {
            let now = match tracked && !recompute {
                true => wanted::<N>(),
                false => Wanted::Nothing,
            };
            let (y, saved) = self.forward(&x, now);
            // The gradient of the input alone does without the input, unless it has nothing else.
            let x = (N > 1 || saved.is_none()).then_some(x);
            let state = State {
                call: self,
                x,
                saved: saved.map(Arc::new),
            };
            (y, tracked.then_some(state))
        })
    }
}

/// What a forward pass leaves for the backward pass.
#[derive(Clone)]
struct State {
    call: Call,
    /// For the gradients of the weights, or to compute the activations from once more.
    x: Option<FlexTensor>,
    saved: Option<Arc<ConvNextSaved>>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConvNeXt block {:?}", self.call.shape)
    }
}

#[derive(Debug)]
struct ConvNextBackward;

impl<const N: usize> Backward<Flex, N> for ConvNextBackward {
    type State = State;

    fn backward(self, ops: Ops<State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let State { call, x, saved } = ops.state;
        let saved = saved.unwrap_or_else(|| {
            let x = x.as_ref().expect("kept where activations are not");
            let (_, saved) = call.forward(x, wanted::<N>());
            Arc::new(saved.expect("asked to save"))
        });
        let dy = grads.consume::<Flex>(&ops.node).to_contiguous();
        let ConvNextShape {
            channels,
            hidden,
            kernel,
            ..
        } = call.shape;
        let mut dx = Floats::new(call.shape.elements());
        let mut weights = (N > 1).then(|| ConvNextGradients::new(channels, hidden, kernel));
        let gradients = weights.as_mut().map(|weights| {
            let x = x.as_ref().expect("kept for the gradients of the weights");
            (slice(x), weights)
        });
        convnext_backward(&call.packed, &saved, slice(&dy), &mut dx, gradients);
        // Their memory serves the next block.
        drop(saved);

        let parents = ops.parents.map(|parent| parent.map(|parent| parent.id));
        let weights = weights.into_iter().flat_map(in_order);
        register_all(grads, parents, (dx, &call.dims()), weights);
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::ops::{from_vec, to_vec};
    use crate::rng::{Purpose, Rng};

    const SIZE: [usize; 2] = [5, 6];
    const CHANNELS: usize = 20;
    const HIDDEN: usize = 36;

    fn draw<const D: usize>(seed: u64, shape: [usize; D], size: f64) -> Tensor<D> {
        let mut rng = Rng::new(seed, Purpose::Bench, 0, 0);
        let values = (0..shape.iter().product()).map(|_| (f64::from(rng.normal()) * size) as f32);
        from_vec(values.collect(), shape, &Device::flex())
    }

    fn weights() -> [Tensor<1>; 9] {
        let (c, h) = (CHANNELS, HIDDEN);
        let lengths = [c, 49 * c, c, c, c, h * c, h, c * h, c];
        let mut seed = 10;
        lengths.map(|length| {
            seed += 1;
            let size = if length == 49 * c { 0.15 } else { 0.3 };
            draw(seed, [length], size)
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
        weights: [Tensor<1>; 9],
        block: impl Fn(Tensor<3>, &[Tensor<1>; 9]) -> Tensor<3>,
    ) -> Vec<Vec<f32>> {
        let shape = [3, SIZE[0] * SIZE[1], CHANNELS];
        let x = draw(1, shape, 1.0).autodiff().require_grad();
        let y = block(x.clone(), &weights);
        let mut gradients = (y.clone() * draw(2, shape, 1.0).autodiff())
            .sum()
            .backward();
        let mut all = vec![to_vec(y), to_vec(x.grad_remove(&mut gradients).unwrap())];
        for weight in weights.iter().filter(|weight| weight.is_autodiff()) {
            all.push(to_vec(weight.grad_remove(&mut gradients).unwrap()));
        }
        all
    }

    fn tracked() -> [Tensor<1>; 9] {
        weights().map(|weight| weight.autodiff().require_grad())
    }

    const PATH: [f32; 3] = [1.25, 0.0, 0.5];

    fn fused(spec: ConvNextSpec) -> impl Fn(Tensor<3>, &[Tensor<1>; 9]) -> Tensor<3> {
        let cache = ConvNextCache::default();
        move |x, weights| convnext_block(x, SIZE, weights, &spec, Some(&PATH), &cache)
    }

    #[test]
    fn the_block_agrees_with_its_plain_composition() {
        for gelu in [Gelu::Erf, Gelu::Tanh, Gelu::Quick] {
            let spec = spec(gelu, false);
            let found = results(tracked(), fused(spec.clone()));
            let right = results(tracked(), |x, weights| {
                plain::convnext_block(x, SIZE, weights, &spec, Some(&PATH))
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
    fn plain_weights_and_activations_computed_anew_change_no_bit() {
        let all = results(tracked(), fused(spec(Gelu::Erf, false)));
        assert_eq!(results(weights(), fused(spec(Gelu::Erf, false))), all[..2]);
        assert_eq!(results(weights(), fused(spec(Gelu::Erf, true))), all[..2]);
        assert_eq!(results(tracked(), fused(spec(Gelu::Erf, true))), all);
        let x = draw(1, [3, SIZE[0] * SIZE[1], CHANNELS], 1.0);
        let untracked = fused(spec(Gelu::Erf, false))(x, &weights());
        assert_eq!(to_vec(untracked), all[0]);
    }

    #[test]
    fn new_weights_are_packed_anew() {
        let block = fused(spec(Gelu::Erf, false));
        let x = draw(1, [3, SIZE[0] * SIZE[1], CHANNELS], 1.0);
        let first = to_vec(block(x.clone(), &weights()));
        let mut changed = weights();
        changed[0] = changed[0].clone() * 2.0;
        assert_ne!(to_vec(block(x.clone(), &changed)), first);
        assert_eq!(to_vec(block(x, &weights())), first);
    }
}
