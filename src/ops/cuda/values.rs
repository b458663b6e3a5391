//! Tensors whose values are on an NVIDIA GPU: Flex tensors over lazy bytes, and the values behind them.
//!
//! Views (reshapes, narrowed rows) share the values. An operation of Burn's own that reads such a tensor gets a copy on the
//! host, which [`advxl_cuda::Traffic::unplanned`] counts: tests hold a training step to none.

use advxl_cuda::{Gpu, Kind, Values, fail, lazy_bytes, values_of};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{DispatchDevice, Flex};
use burn::tensor::{DType, Device as BurnDevice, Shape, Tensor};

/// The GPU that holds a tensor's values, if one does and they are in its order.
pub(crate) fn gpu_of<const D: usize>(tensor: &Tensor<D>) -> Option<Gpu> {
    if !is_flex(&tensor.device()) {
        return None;
    }
    let tensor = flex(tensor);
    tensor.layout().contiguous_offsets()?;
    Some(values_of(&tensor.data_arc())?.gpu().clone())
}

/// The values of a tensor, if they are on a GPU and in its order.
pub(crate) fn on_gpu<const D: usize>(tensor: &Tensor<D>) -> Option<Values> {
    if !is_flex(&tensor.device()) {
        return None;
    }
    of_primitive(&flex(tensor))
}

/// The primitive of a tensor, outside automatic differentiation.
pub(crate) fn flex<const D: usize>(tensor: &Tensor<D>) -> FlexTensor {
    let primitive = tensor
        .clone()
        .without_autodiff()
        .try_into_primitive::<Flex>();
    primitive.expect("callers check the engine")
}

/// The values of a primitive, if they are on a GPU and contiguous.
pub(crate) fn of_primitive(tensor: &FlexTensor) -> Option<Values> {
    let values = values_of(&tensor.data_arc())?;
    let (start, end) = tensor.layout().contiguous_offsets()?;
    Some(values.slice(start..end))
}

/// The values of a primitive on a GPU, sent there if they are not.
pub(crate) fn sent(gpu: &Gpu, tensor: &FlexTensor) -> Values {
    of_primitive(tensor).unwrap_or_else(|| {
        let tensor = tensor.to_contiguous();
        Values::send(
            gpu,
            tensor.as_slice::<f32>().expect("contiguous f32 tensors"),
        )
    })
}

/// The values of a tensor on a GPU, sent there if they are not.
pub fn values<const D: usize>(gpu: &Gpu, tensor: &Tensor<D>) -> Values {
    sent(gpu, &flex(tensor))
}

/// A primitive over values.
pub(crate) fn primitive(values: Values, shape: &[usize]) -> FlexTensor {
    debug_assert_eq!(values.len(), shape.iter().product::<usize>());
    let dtype = match values.kind() {
        Kind::F32 => DType::F32,
        Kind::Bf16 => DType::BF16,
        Kind::E4m3 => unreachable!("operands of products are not tensors"),
    };
    FlexTensor::new(
        lazy_bytes(values),
        Layout::contiguous(Shape::from(shape.to_vec())),
        dtype,
    )
}

/// A tensor over values, outside automatic differentiation.
pub fn tensor<const D: usize>(values: Values, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_primitive::<Flex>(primitive(values, &shape))
}

/// Values on the host; a failure of the GPU ends the work (see [`advxl_cuda::fail`]).
pub(crate) fn fetched(values: &Values) -> Vec<f32> {
    values.to_vec().unwrap_or_else(|error| fail(error))
}

/// The gradients of an input and of weights as a node returns them.
pub(crate) fn gradients(
    input: FlexTensor,
    weights: impl IntoIterator<Item = Values>,
) -> Vec<Option<FlexTensor>> {
    // From here on they can be sent to other GPUs, while the backward pass computes the layers before.
    let mut weights: Vec<_> = weights.into_iter().collect();
    Values::mark(&mut weights);
    let weights = weights.into_iter().map(|values| {
        let length = values.len();
        primitive(values, &[length])
    });
    std::iter::once(input).chain(weights).map(Some).collect()
}

/// Whether a device of Burn's is the processor.
pub(crate) fn is_flex(device: &BurnDevice) -> bool {
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

/// What a node wants, as the engine has it.
pub(crate) fn wanted(asked: advxl_kernels::Wanted) -> advxl_cuda::Wanted {
    match asked {
        advxl_kernels::Wanted::Nothing => advxl_cuda::Wanted::Nothing,
        advxl_kernels::Wanted::Input => advxl_cuda::Wanted::Input,
        advxl_kernels::Wanted::Weights => advxl_cuda::Wanted::Weights,
    }
}
