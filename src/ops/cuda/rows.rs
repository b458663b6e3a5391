//! Rows of tensors, and sums of tensors.

use advxl_cuda::{Gpu, Values};
use burn::tensor::Tensor;

use super::values::{tensor, values};

/// See [`crate::ops::join`].
pub(crate) fn join<const D: usize>(gpu: &Gpu, parts: &[Tensor<D>]) -> Tensor<D> {
    let mut shape = parts[0].dims();
    shape[0] = parts.iter().map(|part| part.dims()[0]).sum();
    let parts: Vec<Values> = parts.iter().map(|part| values(gpu, part)).collect();
    tensor(Values::joined(&parts.iter().collect::<Vec<_>>()), shape)
}

/// See [`crate::ops::add`].
pub(crate) fn add(gpu: &Gpu, a: Tensor<1>, b: Tensor<1>) -> Tensor<1> {
    let length = a.dims()[0];
    tensor(
        advxl_cuda::sum(&values(gpu, &a), &values(gpu, &b)),
        [length],
    )
}

/// See [`crate::ops::select`].
pub(crate) fn select<const D: usize>(gpu: &Gpu, x: Tensor<D>, rows: &[usize]) -> Tensor<D> {
    let mut shape = x.dims();
    let row: usize = shape[1..].iter().product();
    let x = values(gpu, &x);
    let parts: Vec<Values> = rows
        .iter()
        .map(|index| x.slice(index * row..(index + 1) * row))
        .collect();
    shape[0] = rows.len();
    tensor(Values::joined(&parts.iter().collect::<Vec<_>>()), shape)
}
