//! Operations that are one piece on the CPU: patches, unfolding, a linear layer, layer norm, GELU, the
//! encoder block, the ConvNeXt block, an attack's step, the optimizer's update.
//!
//! On `Device::flex()` they run the kernels of `advxl-kernels` on plain slices, as one node of
//! Burn's automatic differentiation each. On every other device the plain composition beside each
//! of them runs instead; it is the definition and the test oracle.
//! The one place that knows Burn's primitives. No mathematics of its own.

pub(crate) mod adamw;
pub(crate) mod block;
pub(crate) mod cache;
pub(crate) mod convnext;
pub(crate) mod device;
pub(crate) mod linear;
pub mod norm;
pub(crate) mod patches;
pub(crate) mod pgd;
#[cfg(feature = "gpu")]
pub(crate) mod recompute;
pub mod reference;
pub(crate) mod unfold;
mod words;

pub use adamw::{AdamW, Moments, adamw};
pub use advxl_kernels::{Gelu, Precision, release_buffers};
pub use block::{BlockSpec, PathScale, encoder_block};
pub use cache::{ConvNextCache, WeightCache};
pub use convnext::{ConvNextSpec, convnext_block};
pub use device::{DeviceName, hardware};
pub use linear::linear;
pub use norm::{gelu, layer_norm};
pub use patches::{PatchSpec, patches};
pub use pgd::{l2_step, linf_step};
pub use unfold::unfold;

use advxl_kernels::{Floats, Wanted};
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, OpsKind};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{Autodiff, Flex};
use burn::tensor::{AllocationProperty, Bytes, DType, Device, Int, Shape, Tensor, TensorData};

/// The arithmetic that computes what was asked for fastest on a device, and a notice where it is another.
pub fn usable(wanted: Precision, device: &Device) -> (Precision, Option<&'static str>) {
    match device::multiplies_bf16(device) {
        None => choose(wanted, advxl_kernels::bf16_is_faster(), "processor"),
        Some(is_faster) => choose(wanted, is_faster, "GPU"),
    }
}

fn choose(
    wanted: Precision,
    bf16_is_faster: bool,
    what: &'static str,
) -> (Precision, Option<&'static str>) {
    let notice = match what {
        _ if wanted == Precision::F32 || bf16_is_faster => return (wanted, None),
        "GPU" => "this GPU does not compute in bf16: computing in f32",
        _ => "this processor does not multiply bf16 faster than f32: computing in f32",
    };
    (Precision::F32, Some(notice))
}

/// Whether the tensor lives where the kernels run.
fn on_kernels<const D: usize>(tensor: &Tensor<D>) -> bool {
    is_processor(&tensor.device())
}

/// Whether a device is the processor, on which the kernels run.
pub fn is_processor(device: &Device) -> bool {
    use burn::backend::DispatchDevice;
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

/// The CPU primitive of a tensor outside automatic differentiation, contiguous.
fn primitive<const D: usize>(tensor: Tensor<D>) -> FlexTensor {
    let primitive = tensor.without_autodiff().try_into_primitive::<Flex>();
    primitive
        .expect("callers check `on_kernels`")
        .to_contiguous()
}

/// The place of a tensor in automatic differentiation; one that takes no part gets an untracked one.
fn node<const D: usize>(tensor: &Tensor<D>) -> NodeGuard {
    let primitive = tensor
        .clone()
        .autodiff()
        .try_into_primitive::<Autodiff<Flex>>();
    primitive.expect("a tensor of the CPU").node()
}

fn slice(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().expect("contiguous f32 tensors")
}

/// A primitive whose memory goes back to the kernels when it is dropped, instead of to the system:
/// pages of a fresh tensor cost more than some of the operations that fill them.
fn reusable(values: Floats, shape: &[usize]) -> FlexTensor {
    let bytes = bytes::Bytes::from_owner(values);
    let bytes = Bytes::from_shared(bytes, AllocationProperty::Native);
    let layout = Layout::contiguous(Shape::from(shape.to_vec()));
    FlexTensor::new(bytes, layout, DType::F32)
}

/// Runs an operation of the kernels and, if any of `nodes` is tracked, records it with what its
/// `backward` needs. `forward` is told whether it is.
fn recorded<B, const N: usize, const D: usize>(
    backward: B,
    nodes: [NodeGuard; N],
    forward: impl FnOnce(bool) -> (FlexTensor, Option<B::State>),
) -> Tensor<D>
where
    B: Backward<Flex, N>,
{
    let prepared = backward
        .prepare::<NoCheckpointing>(nodes)
        .compute_bound()
        .stateful();
    let output = match prepared {
        OpsKind::Tracked(prep) => {
            let (y, state) = forward(true);
            prep.finish(state.expect("a tracked operation leaves its state"), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(forward(false).0),
    };
    Tensor::from_primitive::<Autodiff<Flex>>(output)
}

/// With one parent the gradient of the input alone, with more those of the weights too.
const fn wanted<const N: usize>() -> Wanted {
    if N > 1 {
        Wanted::Weights
    } else {
        Wanted::Input
    }
}

/// Hands a gradient to a parent that is tracked.
fn register(grads: &mut Gradients, parent: Option<NodeId>, values: Floats, shape: &[usize]) {
    if let Some(parent) = parent {
        grads.register::<Flex>(parent, reusable(values, shape));
    }
}

/// The places of a block's input and weights, in that order.
///
/// # Panics
/// When `N` is not the number of weights and one.
fn nodes_of<const N: usize>(input: NodeGuard, weights: &[Tensor<1>]) -> [NodeGuard; N] {
    let nodes = std::iter::once(input).chain(weights.iter().map(node));
    let nodes: Result<[_; N], _> = nodes.collect::<Vec<_>>().try_into();
    nodes.expect("an input and its weights")
}

/// Hands the gradients of a block's input, of a shape, and of its weights, where there are any, to its parents.
fn register_all(
    grads: &mut Gradients,
    parents: impl IntoIterator<Item = Option<NodeId>>,
    (input, shape): (Floats, &[usize]),
    weights: impl IntoIterator<Item = Floats>,
) {
    let mut parents = parents.into_iter();
    let first = parents.next().expect("the input is the first parent");
    register(grads, first, input, shape);
    for (parent, values) in parents.zip(weights) {
        let shape = [values.len()];
        register(grads, parent, values, &shape);
    }
}

/// A tensor as a vector on the host.
pub fn to_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor
        .into_data()
        .try_into_vec::<f32>()
        .expect("our float tensors are f32")
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

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        let values = to_vec(self.values.clone());
        bytemuck::cast_slice(&values).to_vec().into()
    }

    fn data_len(&self) -> usize {
        self.values.dims()[0] * size_of::<f32>()
    }
}

/// A tensor from host values, outside automatic differentiation.
pub fn from_vec<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(
        TensorData::new(values, shape),
        &device.clone().without_autodiff(),
    )
}

/// Images of bytes on a GPU, in `[0, 1]`: they cross the bus as they are.
///
/// Four in a word, which every device has; the floats come from a table, and so are those of the processor to the bit.
pub fn from_bytes<const D: usize>(bytes: &[u8], shape: [usize; D], device: &Device) -> Tensor<D> {
    let device = device.clone().without_autodiff();
    let words: Vec<i32> = bytes
        .chunks(4)
        .map(|four| {
            let mut word = [0; 4];
            word[..four.len()].copy_from_slice(four);
            i32::from_le_bytes(word)
        })
        .collect();
    let count = words.len();
    let words: Tensor<1, Int> =
        Tensor::from_data(TensorData::new(words, [count]), (&device, DType::I32));
    let byte = |shift: i32| {
        words
            .clone()
            .bitwise_right_shift_scalar(shift)
            .bitwise_and_scalar(255)
    };
    // [words] each -> [words, 4], in the order of the bytes
    let places: Tensor<2, Int> = Tensor::stack([0, 8, 16, 24].map(byte).to_vec(), 1);
    let places = places.reshape([4 * count]).narrow(0, 0, bytes.len());
    let table: Vec<f32> = (0..=u8::MAX).map(|byte| f32::from(byte) / 255.0).collect();
    let table: Tensor<1> = from_vec(table, [256], &device);
    table.select(0, places).reshape(shape)
}

/// Sum of the bits of a tensor's values as whole numbers, which any flipped bit changes.
pub fn sum_of_bits(tensor: &Tensor<1>) -> u64 {
    let sum = |values: &[f32]| {
        let bits = values.iter().map(|value| u64::from(value.to_bits()));
        bits.fold(0, u64::wrapping_add)
    };
    match on_kernels(tensor) {
        true => sum(slice(&primitive(tensor.clone()))),
        false => sum(&to_vec(tensor.clone())),
    }
}

/// Sums of the squares of tensors: on the processor in f64 and in a fixed order; on a GPU as it adds up, and brought over
/// together.
pub fn sums_of_squares(tensors: Vec<Tensor<1>>) -> Vec<f64> {
    let Some(first) = tensors.first() else {
        return Vec::new();
    };
    if on_kernels(first) {
        let sum = |tensor| advxl_kernels::sum_of_squares(slice(&primitive(tensor)));
        return tensors.into_iter().map(sum).collect();
    }
    let sums = tensors.into_iter().map(|tensor| match tensor.dims() {
        [0] => Tensor::zeros([1], &tensor.device()),
        _ => (tensor.clone() * tensor).sum(),
    });
    let sums = to_vec(Tensor::cat(sums.collect(), 0));
    sums.into_iter().map(f64::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_falls_back_to_f32_with_a_notice_where_it_is_not_faster() {
        let choose = |wanted, is_faster| choose(wanted, is_faster, "processor");
        assert_eq!(choose(Precision::Bf16, true), (Precision::Bf16, None));
        assert_eq!(choose(Precision::F32, false), (Precision::F32, None));
        let (precision, notice) = choose(Precision::Bf16, false);
        assert_eq!(precision, Precision::F32);
        assert!(notice.unwrap().contains("computing in f32"));
    }
}
