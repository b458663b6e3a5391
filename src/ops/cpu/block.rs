//! The encoder block as one operation, with gradients of the input alone or of the weights too.

use std::sync::Arc;

use advxl_kernels::{
    BlockGradients, BlockSaved, BlockShape, BlockWeights, Floats, Gelu, PackedBlock, Wanted,
    block_backward, block_forward,
};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::flex::{from_floats, gradients, primitive, slice};
use super::gelu::gelu;
use super::linear::linear;
use super::norm::layer_norm;
use crate::ops::cache::WeightCache;
use crate::ops::node::{Differentiable, parents, record};
use crate::ops::reference;
use crate::ops::reference::Layers;
use crate::ops::spec::{BlockSpec, PathScale};
use crate::ops::words::Numerics;

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
    if spec.numerics == Numerics::AttackFp8 {
        return super::fp8::encoder_block(x, weights, spec, path, cache);
    }
    let [batch, tokens, width] = x.dims();
    let parents = parents::<Flex, 3>(&x, weights);
    let values = weights.clone().map(primitive);
    let precision = spec.numerics.products().on_cpu();
    let call = Call {
        shape: BlockShape {
            batch,
            tokens,
            width,
            heads: spec.heads,
            hidden: spec.hidden,
        },
        packed: cache.form(values.iter().cloned().collect(), spec.numerics, || {
            PackedBlock::new(spec.heads, &values.as_ref().map(slice), precision)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::draw;
    use crate::ops::to_vec;

    const SHAPE: [usize; 3] = [3, 7, 24];
    const HIDDEN: usize = 40;

    fn weights() -> BlockWeights<Tensor<1>> {
        let (w, h) = (SHAPE[2], HIDDEN);
        let lengths = [w, w, 3 * w * w, 3 * w, w * w, w, w, w, h * w, h, w * h, w];
        let mut seed = 10;
        BlockWeights::from_array(lengths).map(|length| {
            seed += 1;
            draw(seed, [length]) * 0.3
        })
    }

    fn tracked() -> BlockWeights<Tensor<1>> {
        weights().map(|weight| weight.autodiff().require_grad())
    }

    fn spec(causal: bool, recompute: bool) -> BlockSpec {
        BlockSpec {
            heads: 3,
            hidden: HIDDEN,
            gelu: Gelu::Erf,
            eps: 1e-6,
            causal,
            numerics: Numerics::F32,
            recompute,
        }
    }

    fn path() -> PathScale {
        PathScale {
            attention: vec![1.25, 0.0, 1.25],
            mlp: vec![0.0, 1.25, 1.25],
        }
    }

    fn block(x: Tensor<3>, weights: &BlockWeights<Tensor<1>>, spec: &BlockSpec) -> Tensor<3> {
        encoder_block(x, weights, spec, Some(&path()), &WeightCache::default())
    }

    /// The output and the gradients of the input and, if they are tracked, of the weights.
    fn results(
        weights: &BlockWeights<Tensor<1>>,
        block: impl Fn(Tensor<3>, &BlockWeights<Tensor<1>>) -> Tensor<3>,
    ) -> Vec<Vec<f32>> {
        let x = draw(1, SHAPE).autodiff().require_grad();
        let y = block(x.clone(), weights);
        let mut gradients = (y.clone() * draw(2, SHAPE).autodiff()).sum().backward();
        let mut all = vec![to_vec(y), to_vec(x.grad_remove(&mut gradients).unwrap())];
        for weight in weights.iter().filter(|weight| weight.is_autodiff()) {
            all.push(to_vec(weight.grad_remove(&mut gradients).unwrap()));
        }
        all
    }

    /// Differences are relative to the largest element of each result: sums of some hundred products.
    fn assert_close(found: &[Vec<f32>], right: &[Vec<f32>], what: &str) {
        assert_eq!(found.len(), right.len());
        for (index, (found, right)) in found.iter().zip(right).enumerate() {
            let size = right.iter().fold(1.0, |size: f32, v| size.max(v.abs()));
            for (found, right) in found.iter().zip(right) {
                let off = (found - right).abs() / size;
                assert!(off < 2e-5, "{what}, result {index}: {found} {right}");
            }
        }
    }

    #[test]
    fn full_and_causal_blocks_agree_with_their_reference() {
        for causal in [false, true] {
            let spec = spec(causal, false);
            let found = results(&tracked(), |x, weights| block(x, weights, &spec));
            let right = results(&tracked(), |x, weights| {
                reference::encoder_block(x, weights, &spec, Some(&path()))
            });
            assert_eq!(found.len(), 14);
            assert_close(&found, &right, &format!("causal {causal}"));
        }
    }

    #[test]
    fn untracked_weights_and_recomputed_activations_change_no_bit() {
        let run = |weights, recompute| {
            results(&weights, |x, weights| {
                block(x, weights, &spec(false, recompute))
            })
        };
        let all = run(tracked(), false);
        assert_eq!(run(weights(), false), all[..2]);
        assert_eq!(run(weights(), true), all[..2]);
        assert_eq!(run(tracked(), true), all);
    }

    #[test]
    fn recomputed_causal_blocks_give_the_same_gradients() {
        let run = |weights, recompute| {
            results(&weights, |x, weights| {
                block(x, weights, &spec(true, recompute))
            })
        };
        let all = run(tracked(), false);
        let [of_input, of_all] = [run(weights(), true), run(tracked(), true)];
        assert_eq!(of_input[1], all[1]);
        assert_eq!(of_all[1..], all[1..]);
        assert_close(&of_all[..1], &all[..1], "output");
    }

    #[test]
    fn a_token_of_a_causal_block_does_not_see_those_after_it() {
        let [batch, tokens, width] = SHAPE;
        let x = draw(1, SHAPE);
        let last = draw(3, [batch, 1, width]);
        let changed = Tensor::cat(vec![x.clone().narrow(1, 0, tokens - 1), last], 1);
        for (causal, same) in [(true, true), (false, false)] {
            let [before, after] = [&x, &changed].map(|x| {
                let y = block(x.clone(), &weights(), &spec(causal, false));
                to_vec(y.narrow(1, 0, tokens - 1))
            });
            assert_eq!(before == after, same, "causal {causal}");
        }
    }
}
