//! A linear layer in f32: patch embedding, convolutions, heads. (Those inside encoder blocks are part of the block.)

use advxl_kernels::{Finish, Floats, Layout, Precision, gemm, sum_of_rows};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::flex::{from_floats, primitive, slice};
use crate::ops::node::{Differentiable, parents, record};

/// See [`crate::ops::linear`].
pub(crate) fn linear(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>) -> Tensor<3> {
    let [batch, tokens, inputs] = x.dims();
    let outputs = bias.dims()[0];
    let parents = parents::<Flex, 3>(&x, [&weight, &bias]);
    let [x, weight, bias] = [primitive(x), primitive(weight), primitive(bias)];
    record(parents, |_| {
        let mut y = Floats::new(batch * tokens * outputs);
        gemm(
            [batch * tokens, inputs, outputs],
            (slice(&x), Layout::Plain),
            (slice(&weight), Layout::Transposed),
            Precision::F32,
            Finish::Bias(slice(&bias)),
            &mut y,
        );
        let shape = [batch, tokens, inputs];
        let y = from_floats(y, &[batch, tokens, outputs]);
        (y, LinearGradient { x, weight, shape })
    })
}

#[derive(Clone, Debug)]
struct LinearGradient {
    x: FlexTensor,
    weight: FlexTensor,
    /// Of `x`.
    shape: [usize; 3],
}

impl Differentiable for LinearGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, wanted: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self { x, weight, shape } = self;
        let [batch, tokens, inputs] = shape;
        let dy = dy.to_contiguous();
        let (rows, dy, x, weight) = (batch * tokens, slice(&dy), slice(&x), slice(&weight));
        let outputs = weight.len() / inputs;
        let product = |sizes: [usize; 3], a, b| {
            let mut c = Floats::new(sizes[0] * sizes[2]);
            gemm(sizes, a, b, Precision::F32, Finish::Store, &mut c);
            c
        };
        let dx = || {
            let (a, b) = ((dy, Layout::Plain), (weight, Layout::Plain));
            from_floats(product([rows, outputs, inputs], a, b), &shape)
        };
        let d_weight = || {
            let (a, b) = ((dy, Layout::Transposed), (x, Layout::Plain));
            from_floats(product([outputs, rows, inputs], a, b), &[outputs * inputs])
        };
        let d_bias = || {
            let mut sums = Floats::new(outputs);
            sum_of_rows(dy, &mut sums);
            from_floats(sums, &[outputs])
        };
        let all: [&dyn Fn() -> FlexTensor; 3] = [&dx, &d_weight, &d_bias];
        let wanted = wanted.iter().zip(all);
        wanted
            .map(|(wanted, gradient)| wanted.then(gradient))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{assert_close, draw};
    use crate::ops::{reference, to_vec};

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
    fn the_linear_layer_agrees_with_its_reference() {
        for (found, right) in results(linear).iter().zip(results(reference::linear)) {
            assert_close(found, &right);
        }
    }

    #[test]
    fn a_layer_with_untracked_weights_passes_on_the_gradient_of_its_input_alone() {
        let x = draw(1, [3, 5, 7]).autodiff().require_grad();
        let y = linear(x.clone(), draw(2, [4 * 7]), draw(3, [4]));
        let mut gradients = (y * draw(4, [3, 5, 4]).autodiff()).sum().backward();
        let found = to_vec(x.grad_remove(&mut gradients).unwrap());
        assert_eq!(found, results(linear)[1]);
    }
}
