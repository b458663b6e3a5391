//! Which engine computes with a tensor: the one whose memory holds it.

use burn::backend::DispatchDevice;
use burn::tensor::{Device, Tensor};

/// What runs an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    /// The kernels of `advxl-kernels`, on the memory of Flex tensors.
    Cpu,
    /// Burn's own operations on its GPU devices, composed as in `reference`.
    Burn,
}

impl Engine {
    /// The engine of a tensor.
    pub(crate) fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        if is_processor(&tensor.device()) {
            Self::Cpu
        } else {
            Self::Burn
        }
    }
}

/// Whether a device is the processor, where the kernels run.
pub fn is_processor(device: &Device) -> bool {
    fn is_flex(device: &DispatchDevice) -> bool {
        match device {
            DispatchDevice::Flex(_) => true,
            DispatchDevice::Autodiff(inner) => is_flex(inner),
            #[allow(unreachable_patterns)] // Flex is the only device of the default build.
            _ => false,
        }
    }
    is_flex(device.as_dispatch())
}
