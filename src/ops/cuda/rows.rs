//! Rows of tensors, and sums of tensors.

use std::sync::{Arc, Mutex};

use advxl_cuda::evaluation::select_rows;
use advxl_cuda::{Gpu, Values};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::values::{flex, primitive, sent, tensor, values};
use crate::ops::node::{Differentiable, parent, parents, record};

/// See [`crate::ops::join`].
pub(crate) fn join<const D: usize>(gpu: &Gpu, parts: &[Tensor<D>]) -> Tensor<D> {
    let mut shape = parts[0].dims();
    shape[0] = parts.iter().map(|part| part.dims()[0]).sum();
    let parts: Vec<Values> = parts.iter().map(|part| values(gpu, part)).collect();
    tensor(Values::joined(&parts.iter().collect::<Vec<_>>()), shape)
}

/// See [`crate::ops::add`].
pub(crate) fn add<const D: usize>(gpu: &Gpu, a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    let shape = a.dims();
    let parents = match a.is_autodiff() || b.is_autodiff() {
        true => vec![parent::<Flex, D>(&a), parent::<Flex, D>(&b)],
        false => Vec::new(),
    };
    let (a, b) = (values(gpu, &a), values(gpu, &b));
    record(parents, |_| {
        let sum = advxl_cuda::sum(&a, &b);
        (primitive(sum, &shape), SumGradient)
    })
}

#[derive(Clone, Debug)]
struct SumGradient;

impl Differentiable for SumGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        vec![Some(dy.clone()), Some(dy)]
    }
}

/// See [`crate::ops::fork`].
pub(crate) fn fork<const D: usize>(gpu: &Gpu, x: &Tensor<D>, count: usize) -> Vec<Tensor<D>> {
    let arrived = Arc::default();
    let fork = |_| {
        let gradient = ForkGradient {
            gpu: gpu.clone(),
            arrived: Arc::clone(&arrived),
            count,
        };
        record(parents::<Flex, D>(x, []), |_| (flex(x), gradient))
    };
    (0..count).map(fork).collect()
}

/// The gradient of a copy: the last to arrive returns the sum of all.
#[derive(Clone, Debug)]
struct ForkGradient {
    gpu: Gpu,
    /// Gradients that arrived, and their sum.
    arrived: Arc<Mutex<(usize, Option<Values>)>>,
    count: usize,
}

impl Differentiable for ForkGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let dy_values = sent(&self.gpu, &dy);
        let mut arrived = self.arrived.lock().expect("nothing panics with it");
        let (seen, sum) = &mut *arrived;
        *seen += 1;
        let so_far = match sum.take() {
            Some(sum) => advxl_cuda::sum(&dy_values, &sum),
            None => dy_values,
        };
        if *seen == self.count {
            return vec![Some(primitive(so_far, &dy.layout().shape().to_vec()))];
        }
        *sum = Some(so_far);
        vec![None]
    }
}

/// See [`crate::ops::scale`].
pub(crate) fn scale<const D: usize>(gpu: &Gpu, x: Tensor<D>, factor: f32) -> Tensor<D> {
    let shape = x.dims();
    let parents = parents::<Flex, D>(&x, []);
    let x = values(gpu, &x);
    record(parents, |_| {
        let gradient = ScaleGradient {
            gpu: gpu.clone(),
            factor,
        };
        (primitive(scaled(&x, factor), &shape), gradient)
    })
}

/// Values times a factor.
pub(super) fn scaled(x: &Values, factor: f32) -> Values {
    advxl_cuda::times_rows(x, &Values::filled(x.gpu(), 1, factor))
}

#[derive(Clone, Debug)]
struct ScaleGradient {
    gpu: Gpu,
    factor: f32,
}

impl Differentiable for ScaleGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let dx = scaled(&sent(&self.gpu, &dy), self.factor);
        vec![Some(primitive(dx, &dy.layout().shape().to_vec()))]
    }
}

/// See [`crate::ops::select`].
pub(crate) fn select<const D: usize>(gpu: &Gpu, x: Tensor<D>, rows: &[usize]) -> Tensor<D> {
    let mut shape = x.dims();
    let row = shape[1..].iter().product();
    shape[0] = rows.len();
    tensor(select_rows(&values(gpu, &x), row, rows), shape)
}
