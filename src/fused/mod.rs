//! Operations that are one piece on the CPU: the encoder block, the optimizer's update.
//!
//! On `Device::flex()` they run the kernels of `advxl-kernels` on plain slices, as one node of
//! Burn's automatic differentiation each. On every other device the plain composition beside each
//! of them runs instead; it is the definition and the test oracle.
//! The one place that knows Burn's primitives. No mathematics of its own.

mod adamw;
mod block;
pub mod plain;

pub use adamw::{AdamW, Moments, adamw};
pub use advxl_kernels::{Gelu, Precision};
pub use block::{BlockSpec, PathScale, WeightCache, encoder_block};

use burn::backend::Flex;
use burn::tensor::{Tensor, TensorData};

/// Whether the tensor lives where the kernels run.
fn on_kernels<const D: usize>(tensor: &Tensor<D>) -> bool {
    use burn::backend::DispatchDevice;
    fn is_flex(device: &DispatchDevice) -> bool {
        match device {
            DispatchDevice::Flex(_) => true,
            DispatchDevice::Autodiff(inner) => is_flex(inner),
            #[allow(unreachable_patterns)] // Flex is the only device of the default build.
            _ => false,
        }
    }
    is_flex(tensor.device().as_dispatch())
}

/// The CPU primitive of a tensor outside automatic differentiation, contiguous.
fn primitive<const D: usize>(tensor: Tensor<D>) -> burn::backend::flex::FlexTensor {
    let primitive = tensor.without_autodiff().try_into_primitive::<Flex>();
    primitive
        .expect("callers check `on_kernels`")
        .to_contiguous()
}

/// A tensor as a vector on the host.
pub fn to_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor
        .into_data()
        .try_into_vec::<f32>()
        .expect("our float tensors are f32")
}

/// A tensor from host values, outside automatic differentiation.
pub fn from_vec<const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    device: &burn::tensor::Device,
) -> Tensor<D> {
    Tensor::from_data(
        TensorData::new(values, shape),
        &device.clone().without_autodiff(),
    )
}

/// Sum of the squares of a tensor, in f64 and in a fixed order.
pub fn sum_of_squares(tensor: &Tensor<1>) -> f64 {
    if on_kernels(tensor) {
        let primitive = primitive(tensor.clone());
        advxl_kernels::sum_of_squares(primitive.as_slice().expect("contiguous f32"))
    } else {
        let squares = tensor.clone() * tensor.clone();
        f64::from(squares.sum().into_scalar::<f32>())
    }
}
