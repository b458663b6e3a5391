//! GELU outside of blocks.

use advxl_kernels::{Floats, Gelu};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::flex::{from_floats, primitive, slice};
use crate::ops::node::{Differentiable, parents, record};

/// See [`crate::ops::gelu`].
pub(crate) fn gelu(x: Tensor<3>, kind: Gelu) -> Tensor<3> {
    let shape = x.dims();
    let parents = parents::<Flex, 3>(&x, []);
    let x = primitive(x);
    record(parents, |_| {
        let mut y = Floats::new(slice(&x).len());
        advxl_kernels::gelu(kind, slice(&x), &mut y);
        (from_floats(y, &shape), GeluGradient { x, kind, shape })
    })
}

#[derive(Clone, Debug)]
struct GeluGradient {
    x: FlexTensor,
    kind: Gelu,
    shape: [usize; 3],
}

impl Differentiable for GeluGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let dy = dy.to_contiguous();
        let mut dx = Floats::new(slice(&self.x).len());
        advxl_kernels::gelu_gradient(self.kind, slice(&self.x), slice(&dy), &mut dx);
        vec![Some(from_floats(dx, &self.shape))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{assert_close, draw};
    use crate::ops::{reference, to_vec};

    const SHAPE: [usize; 3] = [3, 5, 21];

    #[test]
    fn every_gelu_agrees_with_its_reference() {
        for kind in [Gelu::Erf, Gelu::Tanh, Gelu::Quick] {
            let results = |gelu: fn(Tensor<3>, Gelu) -> Tensor<3>| {
                let x = (draw(1, SHAPE) * 2.0).autodiff().require_grad();
                let y = gelu(x.clone(), kind);
                let mut gradients = (y.clone() * draw(4, SHAPE).autodiff()).sum().backward();
                (to_vec(y), to_vec(x.grad_remove(&mut gradients).unwrap()))
            };
            let (found, right) = (results(gelu), results(reference::gelu));
            assert_close(&found.0, &right.0);
            assert_close(&found.1, &right.1);
        }
    }
}
