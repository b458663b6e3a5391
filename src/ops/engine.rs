//! Which engine computes with a tensor: the one whose memory holds it.

use advxl_cuda::Gpu;
use burn::tensor::Tensor;

use super::cuda::values::{gpu_of, is_flex};

/// What runs an operation.
#[derive(Clone, Debug)]
pub(crate) enum Engine {
    /// The kernels of `advxl-kernels`, on the memory of Flex tensors.
    Cpu,
    /// The kernels of `advxl-cuda`, on tensors whose values are on the GPU.
    Cuda(Gpu),
    /// Burn's own operations on its GPU devices, composed as in `reference`.
    Burn,
}

impl Engine {
    /// The engine of a tensor.
    pub(crate) fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        match gpu_of(tensor) {
            Some(gpu) => Self::Cuda(gpu),
            None if is_flex(&tensor.device()) => Self::Cpu,
            None => Self::Burn,
        }
    }

    /// The engine of an operation on a tensor and a weight: the GPU if either is there, since some operation of Burn's own
    /// may have brought the other to the host.
    pub(crate) fn of_both<const D: usize, const E: usize>(
        x: &Tensor<D>,
        weight: &Tensor<E>,
    ) -> Self {
        match Self::of(x) {
            Self::Cpu => Self::of(weight),
            engine => engine,
        }
    }

    /// The NVIDIA GPU, if it is one.
    pub(crate) fn gpu(self) -> Option<Gpu> {
        match self {
            Self::Cuda(gpu) => Some(gpu),
            Self::Cpu | Self::Burn => None,
        }
    }
}
