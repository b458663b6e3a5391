//! Layer norm outside of blocks.

use advxl_kernels::Floats;
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::flex::{from_floats, gradients, primitive, slice};
use crate::ops::node::{Differentiable, parents, record};

/// See [`crate::ops::layer_norm`].
pub(crate) fn layer_norm(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<3> {
    let (shape, eps) = (x.dims(), eps as f32);
    let parents = parents::<Flex, 3>(&x, [&weight, &bias]);
    let [x, weight, bias] = [primitive(x), primitive(weight), primitive(bias)];
    record(parents, |_| {
        let mut y = Floats::new(shape.iter().product());
        advxl_kernels::layer_norm(slice(&x), slice(&weight), slice(&bias), eps, &mut y);
        let y = from_floats(y, &shape);
        let saved = NormGradient {
            x,
            weight,
            eps,
            shape,
        };
        (y, saved)
    })
}

#[derive(Clone, Debug)]
struct NormGradient {
    x: FlexTensor,
    weight: FlexTensor,
    eps: f32,
    shape: [usize; 3],
}

impl Differentiable for NormGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, wanted: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self {
            x,
            weight,
            eps,
            shape,
        } = self;
        let (dy, width) = (dy.to_contiguous(), shape[2]);
        let (x, weight) = (slice(&x), slice(&weight));
        let mut dx = Floats::new(x.len());
        let of_weights = wanted[1..].contains(&true);
        let mut sums = of_weights.then(|| [Floats::new(width), Floats::new(width)]);
        let parameters = sums.as_mut();
        let parameters = parameters.map(|[weight, bias]| (&mut weight[..], &mut bias[..]));
        advxl_kernels::layer_norm_gradient(x, weight, eps, slice(&dy), &mut dx, parameters);
        gradients(from_floats(dx, &shape), sums.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{assert_close, draw};
    use crate::ops::{reference, to_vec};

    const SHAPE: [usize; 3] = [3, 5, 21];

    #[test]
    fn the_norm_agrees_with_its_reference() {
        type Norm = fn(Tensor<3>, Tensor<1>, Tensor<1>, f64) -> Tensor<3>;
        let results = |norm: Norm| {
            let tracked = |seed| draw(seed, [21]).autodiff().require_grad();
            let (weight, bias) = (tracked(2), tracked(3));
            let x = draw(1, SHAPE).autodiff().require_grad();
            let y = norm(x.clone(), weight.clone(), bias.clone(), 1e-6);
            let mut gradients = (y.clone() * draw(4, SHAPE).autodiff()).sum().backward();
            [
                to_vec(y),
                to_vec(x.grad_remove(&mut gradients).unwrap()),
                to_vec(weight.grad_remove(&mut gradients).unwrap()),
                to_vec(bias.grad_remove(&mut gradients).unwrap()),
            ]
        };
        let found = results(layer_norm);
        for (found, right) in found.iter().zip(results(reference::layer_norm)) {
            assert_close(found, &right);
        }
        let x = draw(1, SHAPE).autodiff().require_grad();
        let y = layer_norm(x.clone(), draw(2, [21]), draw(3, [21]), 1e-6);
        let mut gradients = (y * draw(4, SHAPE).autodiff()).sum().backward();
        assert_eq!(to_vec(x.grad_remove(&mut gradients).unwrap()), found[1]);
    }
}
