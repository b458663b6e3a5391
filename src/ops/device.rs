//! The device of a tensor: where its values are, and so what computes with it.

use advxl_cuda::Gpu;
use burn::tensor::{Device as BurnDevice, Tensor};

use super::cuda::values::{gpu_of, is_flex};
use crate::error::{Error, Result};

/// Where tensors are made and operations run.
#[derive(Clone, Debug)]
pub enum Device {
    /// The processor, or a GPU through Burn.
    Burn(BurnDevice),
    /// An NVIDIA GPU through our own kernels. Its tensors are tensors of the processor whose values are on the GPU until
    /// something else reads them.
    Cuda(Gpu),
}

impl Device {
    /// The processor.
    pub fn cpu() -> Self {
        Self::Burn(BurnDevice::flex())
    }

    /// The device of a tensor.
    pub fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        match gpu_of(tensor) {
            Some(gpu) => Self::Cuda(gpu),
            None => Self::Burn(tensor.device().without_autodiff()),
        }
    }

    /// As Burn has it.
    pub fn burn(&self) -> BurnDevice {
        match self {
            Self::Burn(device) => device.clone(),
            Self::Cuda(_) => BurnDevice::flex(),
        }
    }

    /// The NVIDIA GPU, if it is one.
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Self::Burn(_) => None,
            Self::Cuda(gpu) => Some(gpu),
        }
    }

    /// Whether it is the processor.
    pub fn is_cpu(&self) -> bool {
        match self {
            Self::Burn(device) => is_flex(device),
            Self::Cuda(_) => false,
        }
    }

    /// Returns memory that is kept for reuse, before work of other sizes.
    pub fn release_memory(&self) {
        if let Some(gpu) = self.gpu() {
            gpu.release_memory();
        }
        advxl_kernels::release_buffers();
    }

    /// Waits until a GPU has done what it was given. What went wrong shows in the numbers that are read from it.
    pub fn wait(&self) {
        match self {
            Self::Burn(device) => drop(device.sync()),
            Self::Cuda(gpu) => drop(gpu.wait()),
        }
    }

    /// Bytes of a GPU's memory that are in use or kept for reuse at the most so far, where that is known.
    pub fn memory(&self) -> Option<u64> {
        match self {
            Self::Burn(device) => device.memory_pool_usage().map(|usage| usage.bytes_reserved),
            Self::Cuda(gpu) => Some(gpu.usage().1 as u64),
        }
    }

    /// Whether the engine has kernels for these widths of a block: on an NVIDIA GPU widths are multiples of 8, so are heads, up
    /// to 128. `what` names the block.
    ///
    /// Errors: it has none.
    pub fn check_block(&self, what: &str, widths: &[usize], head: Option<usize>) -> Result<()> {
        if self.gpu().is_none() {
            return Ok(());
        }
        let message = if let Some(width) = widths.iter().find(|width| *width % 8 != 0) {
            format!("{what}: a width of {width} is not a multiple of 8, which NVIDIA GPUs need")
        } else if let Some(head) = head.filter(|head| head % 8 != 0 || *head > 128) {
            format!(
                "{what}: heads of {head} are not a multiple of 8 up to 128, which NVIDIA GPUs need"
            )
        } else {
            return Ok(());
        };
        Err(Error::input(message).hint("change the model's width or heads, or use --device cpu"))
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Burn(one), Self::Burn(two)) => one == two,
            (Self::Cuda(one), Self::Cuda(two)) => one.is(two),
            _ => false,
        }
    }
}
