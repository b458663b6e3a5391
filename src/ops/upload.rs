//! Images that go to a device while it computes.

use burn::tensor::Tensor;

use super::cuda::values::tensor;
use super::device::Device;

/// Sends images ahead of the step that learns from them, to NVIDIA GPUs. Other devices take them with the step.
pub struct Uploads(Option<advxl_cuda::Uploads>);

/// Images on their way.
pub struct Upload(advxl_cuda::Upload);

impl Uploads {
    /// To a device.
    pub fn new(device: &Device) -> Self {
        Self(device.gpu().map(advxl_cuda::Uploads::new))
    }

    /// Whether the device takes images ahead.
    pub fn are_ahead(&self) -> bool {
        self.0.is_some()
    }

    /// Begins to send images of bytes; none where the device does not take them ahead.
    pub fn send(&self, bytes: &[u8]) -> Option<Upload> {
        self.0.as_ref().map(|uploads| Upload(uploads.send(bytes)))
    }
}

impl Upload {
    /// [`super::from_bytes`] of what was sent.
    pub fn images<const D: usize>(self, shape: [usize; D]) -> Tensor<D> {
        tensor(self.0.images(), shape)
    }
}
