//! Rows of tensors, and sums of tensors.

use advxl_cuda::evaluation::select_rows;
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
pub(crate) fn add<const D: usize>(gpu: &Gpu, a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    let shape = a.dims();
    tensor(advxl_cuda::sum(&values(gpu, &a), &values(gpu, &b)), shape)
}

/// See [`crate::ops::select`].
pub(crate) fn select<const D: usize>(gpu: &Gpu, x: Tensor<D>, rows: &[usize]) -> Tensor<D> {
    let mut shape = x.dims();
    let row = shape[1..].iter().product();
    shape[0] = rows.len();
    tensor(select_rows(&values(gpu, &x), row, rows), shape)
}
