//! Layer norm and GELU outside of blocks.

use advxl_kernels::Floats;
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::{
    Gelu, node, on_kernels, primitive, recorded, reference as plain, register, reusable, slice,
};

/// Layer norm over the last axis: `(x - mean) / sqrt(variance + eps) * weight + bias`.
///
/// Gradients of weight and bias are computed if one of them takes part in automatic differentiation.
///
/// Shapes: `x` and the result `[batch, tokens, width]`; `weight` and `bias` `[width]`.
/// Source: Ba et al. 2016.
pub fn layer_norm(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<3> {
    if !on_kernels(&x) {
        return plain::layer_norm(x, weight, bias, eps);
    }
    let shape = x.dims();
    let tracked = x.is_autodiff() || weight.is_autodiff() || bias.is_autodiff();
    let nodes = tracked.then(|| [node(&x), node(&weight), node(&bias)]);
    let [x, weight, bias] = [primitive(x), primitive(weight), primitive(bias)];
    let (mut y, eps) = (Floats::new(shape.iter().product()), eps as f32);
    advxl_kernels::layer_norm(slice(&x), slice(&weight), slice(&bias), eps, &mut y);
    let y = reusable(y, &shape);
    match nodes {
        None => Tensor::from_primitive::<Flex>(y),
        Some(nodes) => {
            let state = NormState {
                x,
                weight,
                eps,
                shape,
            };
            recorded(NormBackward, nodes, |_| (y, Some(state)))
        }
    }
}

#[derive(Clone, Debug)]
struct NormState {
    x: FlexTensor,
    weight: FlexTensor,
    eps: f32,
    shape: [usize; 3],
}

#[derive(Debug)]
struct NormBackward;

impl Backward<Flex, 3> for NormBackward {
    type State = NormState;

    fn backward(self, ops: Ops<NormState, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let NormState {
            x,
            weight,
            eps,
            shape,
        } = ops.state;
        let [to_x, to_weight, to_bias] = ops.parents.map(|parent| parent.map(|parent| parent.id));
        let dy = grads.consume::<Flex>(&ops.node).to_contiguous();
        let (x, weight, width) = (slice(&x), slice(&weight), shape[2]);
        let mut dx = Floats::new(x.len());
        let [mut dw, mut db] = [Floats::new(width), Floats::new(width)];
        let wanted = to_weight.is_some() || to_bias.is_some();
        let parameters = wanted.then_some((&mut dw[..], &mut db[..]));
        advxl_kernels::layer_norm_gradient(x, weight, eps, slice(&dy), &mut dx, parameters);
        register(grads, to_x, dx, &shape);
        register(grads, to_weight, dw, &[width]);
        register(grads, to_bias, db, &[width]);
    }
}

/// GELU of every element.
pub fn gelu(x: Tensor<3>, kind: Gelu) -> Tensor<3> {
    if !on_kernels(&x) {
        return plain::gelu(x, kind);
    }
    let shape = x.dims();
    let node = x.is_autodiff().then(|| node(&x));
    let x = primitive(x);
    let mut y = Floats::new(slice(&x).len());
    advxl_kernels::gelu(kind, slice(&x), &mut y);
    let y = reusable(y, &shape);
    match node {
        None => Tensor::from_primitive::<Flex>(y),
        Some(node) => recorded(GeluBackward, [node], |_| (y, Some((x, kind, shape)))),
    }
}

#[derive(Debug)]
struct GeluBackward;

impl Backward<Flex, 1> for GeluBackward {
    type State = (FlexTensor, Gelu, [usize; 3]);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (x, kind, shape) = ops.state;
        let [parent] = ops.parents.map(|parent| parent.map(|parent| parent.id));
        let dy = grads.consume::<Flex>(&ops.node).to_contiguous();
        let mut dx = Floats::new(slice(&x).len());
        advxl_kernels::gelu_gradient(kind, slice(&x), slice(&dy), &mut dx);
        register(grads, parent, dx, &shape);
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

    const SHAPE: [usize; 3] = [3, 5, 21];

    fn close(found: &[f32], right: &[f32]) {
        assert_eq!(found.len(), right.len());
        for (found, right) in found.iter().zip(right) {
            // Sums of at most 21 numbers near 1.
            assert!((found - right).abs() < 1e-5, "{found} {right}");
        }
    }

    #[test]
    fn the_norm_agrees_with_its_plain_composition() {
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
        for (found, right) in found.iter().zip(results(plain::layer_norm)) {
            close(found, &right);
        }
        let x = draw(1, SHAPE).autodiff().require_grad();
        let y = layer_norm(x.clone(), draw(2, [21]), draw(3, [21]), 1e-6);
        let mut gradients = (y * draw(4, SHAPE).autodiff()).sum().backward();
        assert_eq!(to_vec(x.grad_remove(&mut gradients).unwrap()), found[1]);
    }

    #[test]
    fn every_gelu_agrees_with_its_plain_composition() {
        for kind in [Gelu::Erf, Gelu::Tanh, Gelu::Quick] {
            let results = |gelu: fn(Tensor<3>, Gelu) -> Tensor<3>| {
                let x = (draw(1, SHAPE) * 2.0).autodiff().require_grad();
                let y = gelu(x.clone(), kind);
                let mut gradients = (y.clone() * draw(4, SHAPE).autodiff()).sum().backward();
                (to_vec(y), to_vec(x.grad_remove(&mut gradients).unwrap()))
            };
            let (found, right) = (results(gelu), results(plain::gelu));
            close(&found.0, &right.0);
            close(&found.1, &right.1);
        }
    }
}
