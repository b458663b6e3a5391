//! Flex tensors as the kernels see them: contiguous slices of f32.

use advxl_kernels::Floats;
use burn::backend::Flex;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{AllocationProperty, Bytes, DType, Shape, Tensor};

/// The primitive of a tensor, outside automatic differentiation and contiguous.
pub(crate) fn primitive<const D: usize>(tensor: Tensor<D>) -> FlexTensor {
    let primitive = tensor.without_autodiff().try_into_primitive::<Flex>();
    primitive.expect("callers check the engine").to_contiguous()
}

/// The values of a contiguous tensor.
pub(crate) fn slice(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().expect("contiguous f32 tensors")
}

/// A primitive whose memory goes back to the kernels when it is dropped, instead of to the system:
/// pages of a fresh tensor cost more than some of the operations that fill them.
pub(crate) fn from_floats(values: Floats, shape: &[usize]) -> FlexTensor {
    let bytes = bytes::Bytes::from_owner(values);
    let bytes = Bytes::from_shared(bytes, AllocationProperty::Native);
    let layout = Layout::contiguous(Shape::from(shape.to_vec()));
    FlexTensor::new(bytes, layout, DType::F32)
}

/// Returns the gradients of an input, and of those flat weights whose gradients were computed, as a node returns them.
pub(crate) fn gradients(
    input: FlexTensor,
    weights: impl IntoIterator<Item = Floats>,
) -> Vec<Option<FlexTensor>> {
    let weights = weights.into_iter().map(|values| {
        let length = values.len();
        from_floats(values, &[length])
    });
    std::iter::once(input).chain(weights).map(Some).collect()
}
