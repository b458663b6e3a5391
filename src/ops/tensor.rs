//! Tensors from host values and back, and sums over whole tensors.

use std::borrow::Cow;

use burn::tensor::{Tensor, TensorData};

use advxl_cuda::{Kind, Values};

use super::cpu::flex::{primitive, slice};
use super::cuda::optimizer::squares;
use super::cuda::values::{fetched, is_flex, on_gpu, tensor};
use super::device::Device;
use super::engine::Engine;

/// A tensor as a vector on the host.
pub fn to_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    if let Some(values) = on_gpu(&tensor) {
        return fetched(&values);
    }
    if is_flex(&tensor.device()) {
        // Once: Burn's way to a vector copies what is shared twice.
        return slice(&primitive(tensor)).to_vec();
    }
    tensor
        .into_data()
        .try_into_vec::<f32>()
        .expect("our float tensors are f32")
}

/// A tensor from host values, outside automatic differentiation.
pub fn from_vec<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    match device {
        Device::Cuda(gpu) => tensor(Values::send(gpu, &values), shape),
        Device::Burn(device) => Tensor::from_data(
            TensorData::new(values, shape),
            &device.clone().without_autodiff(),
        ),
    }
}

/// Zeros.
pub fn zeros<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    match device {
        Device::Cuda(gpu) => {
            let count = shape.iter().product();
            tensor(Values::zeros(gpu, count, Kind::F32), shape)
        }
        Device::Burn(device) => Tensor::zeros(shape, &device.clone().without_autodiff()),
    }
}

/// A tensor as a safetensors file takes it: its bytes are made when they are asked for.
#[derive(Clone, Copy)]
pub struct Stored<'a> {
    /// The values.
    pub values: &'a Tensor<1>,
    /// Their shape.
    pub shape: &'a [usize],
}

impl safetensors::View for Stored<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        safetensors::Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = to_vec(self.values.clone());
        bytemuck::cast_slice(&values).to_vec().into()
    }

    fn data_len(&self) -> usize {
        self.values.dims()[0] * size_of::<f32>()
    }
}

/// Sum of the bits of a tensor's values as whole numbers, which any flipped bit changes.
pub fn sum_of_bits(tensor: &Tensor<1>) -> u64 {
    let sum = |values: &[f32]| {
        let bits = values.iter().map(|value| u64::from(value.to_bits()));
        bits.fold(0, u64::wrapping_add)
    };
    match Engine::of(tensor) {
        Engine::Cpu => sum(slice(&primitive(tensor.clone()))),
        Engine::Cuda(_) | Engine::Burn => sum(&to_vec(tensor.clone())),
    }
}

/// Sum of the squares of all values of tensors on one device: on the processor and on NVIDIA GPUs in f64 and in a fixed
/// order; on other GPUs in f32, in the order of their own reduction.
pub fn sum_of_squares(tensors: Vec<Tensor<1>>) -> f64 {
    let Some(first) = tensors.first() else {
        return 0.0;
    };
    match Engine::of(first) {
        Engine::Cpu => {
            let sum = |tensor| advxl_kernels::sum_of_squares(slice(&primitive(tensor)));
            tensors
                .into_iter()
                .map(sum)
                .fold(0.0, |sum, square| sum + square)
        }
        Engine::Cuda(gpu) => squares(&gpu, &tensors),
        Engine::Burn => {
            let sums = tensors.into_iter().map(|tensor| match tensor.dims() {
                [0] => Tensor::zeros([1], &tensor.device()),
                _ => (tensor.clone() * tensor).sum(),
            });
            let sums = to_vec(Tensor::cat(sums.collect(), 0));
            sums.into_iter().map(f64::from).sum()
        }
    }
}
