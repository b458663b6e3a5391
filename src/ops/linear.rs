//! A linear layer in f32: patch embedding. (Those inside the encoder block are part of it.)

use advxl_kernels::{Finish, Floats, Layout, Precision, gemm, sum_of_rows};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::{node, on_kernels, primitive, recorded, reference as plain, register, reusable, slice};

/// `x W^T + b` with the weight as PyTorch keeps it.
///
/// Only gradients of what takes part in automatic differentiation are computed.
///
/// Shapes: `x` `[batch, tokens, in]`; `weight` `[out * in]`, rows of `out`; `bias` `[out]`; the result
/// `[batch, tokens, out]`.
pub fn linear(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>) -> Tensor<3> {
    if !on_kernels(&x) {
        return plain::linear(x, weight, bias);
    }
    let [batch, tokens, inputs] = x.dims();
    let sizes = [batch * tokens, inputs, bias.dims()[0]];
    let tracked = x.is_autodiff() || weight.is_autodiff();
    let nodes = tracked.then(|| [node(&x), node(&weight), node(&bias)]);
    let [x, weight, bias] = [primitive(x), primitive(weight), primitive(bias)];
    let mut y = Floats::new(sizes[0] * sizes[2]);
    let (a, b) = (
        (slice(&x), Layout::Plain),
        (slice(&weight), Layout::Transposed),
    );
    gemm(
        sizes,
        a,
        b,
        Precision::F32,
        Finish::Bias(slice(&bias)),
        &mut y,
    );
    let y = reusable(y, &[batch, tokens, sizes[2]]);
    match nodes {
        None => Tensor::from_primitive::<Flex>(y),
        Some(nodes) => {
            let state = State {
                x,
                weight,
                shape: [batch, tokens, inputs],
            };
            recorded(LinearBackward, nodes, |_| (y, Some(state)))
        }
    }
}

#[derive(Clone, Debug)]
struct State {
    x: FlexTensor,
    weight: FlexTensor,
    /// Of `x`.
    shape: [usize; 3],
}

#[derive(Debug)]
struct LinearBackward;

impl Backward<Flex, 3> for LinearBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let State {
            x,
            weight,
            shape: [batch, tokens, inputs],
        } = ops.state;
        let [to_x, to_weight, to_bias] = ops.parents.map(|parent| parent.map(|parent| parent.id));
        let dy = grads.consume::<Flex>(&ops.node).to_contiguous();
        let (rows, dy) = (batch * tokens, slice(&dy));
        let outputs = slice(&weight).len() / inputs;
        let product = |sizes: [usize; 3], a, b| {
            let mut c = Floats::new(sizes[0] * sizes[2]);
            gemm(sizes, a, b, Precision::F32, Finish::Store, &mut c);
            c
        };
        if to_x.is_some() {
            let (a, b) = ((dy, Layout::Plain), (slice(&weight), Layout::Plain));
            let dx = product([rows, outputs, inputs], a, b);
            register(grads, to_x, dx, &[batch, tokens, inputs]);
        }
        if to_weight.is_some() {
            let (a, b) = ((dy, Layout::Transposed), (slice(&x), Layout::Plain));
            let dw = product([outputs, rows, inputs], a, b);
            register(grads, to_weight, dw, &[outputs * inputs]);
        }
        if to_bias.is_some() {
            let mut db = Floats::new(outputs);
            sum_of_rows(dy, &mut db);
            register(grads, to_bias, db, &[outputs]);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::ops::{from_vec, to_vec};
    use crate::rng::{Purpose, Rng};

    fn draw<const D: usize>(seed: u64, shape: [usize; D]) -> Tensor<D> {
        let mut rng = Rng::new(seed, Purpose::Bench, 0, 0);
        let values = (0..shape.iter().product()).map(|_| rng.normal()).collect();
        from_vec(values, shape, &Device::flex())
    }

    type Layer = fn(Tensor<3>, Tensor<1>, Tensor<1>) -> Tensor<3>;

    /// The output and the gradients of input, weight and bias.
    fn results(layer: Layer) -> Vec<Vec<f32>> {
        let tracked = |tensor: Tensor<1>| tensor.autodiff().require_grad();
        let (x, weight, bias) = (
            draw(1, [3, 5, 7]),
            tracked(draw(2, [4 * 7])),
            tracked(draw(3, [4])),
        );
        let x = x.autodiff().require_grad();
        let y = layer(x.clone(), weight.clone(), bias.clone());
        let mut gradients = (y.clone() * draw(4, [3, 5, 4]).autodiff()).sum().backward();
        vec![
            to_vec(y),
            to_vec(x.grad_remove(&mut gradients).unwrap()),
            to_vec(weight.grad_remove(&mut gradients).unwrap()),
            to_vec(bias.grad_remove(&mut gradients).unwrap()),
        ]
    }

    #[test]
    fn the_linear_layer_agrees_with_its_plain_composition() {
        for (found, right) in results(linear).iter().zip(results(plain::linear)) {
            for (found, right) in found.iter().zip(right) {
                // Sums of at most 15 products of numbers near 1.
                assert!((found - right).abs() < 1e-5, "{found} {right}");
            }
        }
    }

    #[test]
    fn a_layer_with_plain_weights_passes_on_the_gradient_of_its_input_alone() {
        let x = draw(1, [3, 5, 7]).autodiff().require_grad();
        let y = linear(x.clone(), draw(2, [4 * 7]), draw(3, [4]));
        let mut gradients = (y * draw(4, [3, 5, 4]).autodiff()).sum().backward();
        let found = to_vec(x.grad_remove(&mut gradients).unwrap());
        assert_eq!(found, results(linear)[1]);
    }
}
