//! What a convolution's kernel sees, as rows: with a linear layer after it, a dense convolution.

use advxl_kernels::{Floats, Unfold};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::tensor::Tensor;

use super::{node, on_kernels, primitive, recorded, reference as plain, register, reusable, slice};

/// A row for every place of a square kernel: its lines, their pixels, their channels.
///
/// Shapes: `x` `[batch, height * width, channels]`, `[height, width]` of an image beside it; the
/// result `[batch, places, kernel * kernel * channels]`, with `(size + 2 padding - kernel) / stride + 1`
/// places down and along the image. A convolution is [`linear`](crate::ops::linear) of it with a weight
/// `[out, kernel, kernel, channels]`.
pub fn unfold(
    x: Tensor<3>,
    [height, width]: [usize; 2],
    kernel: usize,
    stride: usize,
    padding: usize,
) -> Tensor<3> {
    if !on_kernels(&x) {
        return plain::unfold(x, [height, width], kernel, stride, padding);
    }
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
    let [down, along] = sizes.output();
    let shape = [batch, down * along, sizes.row()];
    let node = x.is_autodiff().then(|| node(&x));
    let x = primitive(x);
    let mut rows = Floats::new(shape.iter().product());
    sizes.unfold(slice(&x), &mut rows);
    let rows = reusable(rows, &shape);
    match node {
        None => Tensor::from_primitive::<Flex>(rows),
        Some(node) => recorded(UnfoldBackward, [node], |_| (rows, Some(sizes))),
    }
}

#[derive(Debug)]
struct UnfoldBackward;

impl Backward<Flex, 1> for UnfoldBackward {
    type State = Unfold;

    fn backward(self, ops: Ops<Unfold, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let Unfold {
            batch,
            height,
            width,
            channels,
            ..
        } = ops.state;
        let [parent] = ops.parents.map(|parent| parent.map(|parent| parent.id));
        let from = grads.consume::<Flex>(&ops.node).to_contiguous();
        let mut to = Floats::new(batch * height * width * channels);
        ops.state.gradient(slice(&from), &mut to);
        register(grads, parent, to, &[batch, height * width, channels]);
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::ops::{from_vec, to_vec};
    use crate::rng::{Purpose, Rng};

    #[test]
    fn rows_and_their_gradient_are_those_of_the_plain_composition() {
        let mut rng = Rng::new(1, Purpose::Bench, 0, 0);
        for (kernel, stride, padding) in [(2, 2, 0), (3, 2, 1), (4, 4, 0), (3, 1, 1)] {
            let mut draw = |shape: [usize; 3]| {
                let count = shape.iter().product();
                let values = (0..count).map(|_| rng.normal()).collect();
                from_vec(values, shape, &Device::flex())
            };
            let x = draw([2, 8 * 9, 5]);
            let weights = draw(unfold(x.clone(), [8, 9], kernel, stride, padding).dims());
            let results = |unfold: fn(Tensor<3>, [usize; 2], usize, usize, usize) -> Tensor<3>| {
                let x = x.clone().autodiff().require_grad();
                let rows = unfold(x.clone(), [8, 9], kernel, stride, padding);
                let mut gradients = (rows.clone() * weights.clone().autodiff()).sum().backward();
                let gradient = x.grad_remove(&mut gradients).unwrap();
                (to_vec(rows), to_vec(gradient))
            };
            let ((rows, found), (right_rows, right)) = (results(unfold), results(plain::unfold));
            assert_eq!(rows, right_rows);
            for (found, right) in found.iter().zip(right) {
                // Sums of at most nine numbers near 1, in another order.
                assert!((found - right).abs() < 1e-5, "{found} {right}");
            }
        }
    }
}
