//! What a convolution's kernel covers, as rows: with a linear layer after it, a dense convolution.

use advxl_kernels::{Floats, Unfold};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::flex::{from_floats, primitive, slice};
use crate::ops::node::{Differentiable, parents, record};

/// See [`crate::ops::unfold`].
pub(crate) fn unfold(
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
    let x = primitive(x);
    record(parents, |_| {
        let [down, along] = sizes.output();
        let shape = [batch, down * along, sizes.row()];
        let mut rows = Floats::new(shape.iter().product());
        sizes.unfold(slice(&x), &mut rows);
        (from_floats(rows, &shape), sizes)
    })
}

impl Differentiable for Unfold {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let dy = dy.to_contiguous();
        let shape = [self.batch, self.height * self.width, self.channels];
        let mut dx = Floats::new(shape.iter().product());
        self.gradient(slice(&dy), &mut dx);
        vec![Some(from_floats(dx, &shape))]
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::device::Device;

    use super::*;
    use crate::ops::{from_vec, reference, to_vec};
    use crate::rng::{Rng, Stream};

    #[test]
    fn rows_and_their_gradient_are_those_of_the_reference() {
        let mut rng = Rng::new(1, Stream::Bench);
        for (kernel, stride, padding) in [(2, 2, 0), (3, 2, 1), (4, 4, 0), (3, 1, 1)] {
            let mut draw = |shape: [usize; 3]| {
                let count = shape.iter().product();
                let values = (0..count).map(|_| rng.normal()).collect();
                from_vec(values, shape, &Device::cpu())
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
            let ((rows, found), (right_rows, right)) =
                (results(unfold), results(reference::unfold));
            assert_eq!(rows, right_rows);
            for (found, right) in found.iter().zip(right) {
                // Sums of at most nine numbers near 1, in another order.
                assert!((found - right).abs() < 1e-5, "{found} {right}");
            }
        }
    }
}
