//! The public operations: what each computes, and which engine runs it.

use advxl_cuda::RowDistance;
use advxl_cuda::mixing::Mix;
use advxl_kernels::{BlockWeights, ConvNextWeights, Gelu};
use burn::tensor::Tensor;

use super::cache::WeightCache;
use super::device::Device;
use super::engine::Engine;
use super::spec::{
    AdamW, BlockSpec, ConvNextSpec, KeptRows, Moments, PatchSpec, PathScale, Places, Streams,
    TensorUpdate,
};
use super::words::Numerics;
use super::{cpu, cuda, gpu, plain, reference};

/// Normalizes the channels and cuts the images into patches.
///
/// Shapes: `images` `[batch, 3, grid * patch, grid * patch]`; the result
/// `[batch, grid * grid, 3 * patch * patch]`, in timm's order of pixels.
pub fn patches(images: Tensor<4>, spec: &PatchSpec) -> Tensor<3> {
    match Engine::of(&images) {
        Engine::Cpu => cpu::patches(images, spec),
        Engine::Cuda(gpu) => cuda::patches(&gpu, images, spec),
        Engine::Burn => reference::patches(images, spec),
    }
}

/// A row for every position of a square kernel: its lines, their pixels, their channels.
///
/// Shapes: `x` `[batch, height * width, channels]`, an image being `[height, width]`; the result
/// `[batch, positions, kernel * kernel * channels]`, with `(size + 2 padding - kernel) / stride + 1`
/// positions down and along the image. A convolution is [`linear`] of it with a weight
/// `[out, kernel, kernel, channels]`.
pub fn unfold(
    x: Tensor<3>,
    size: [usize; 2],
    kernel: usize,
    stride: usize,
    padding: usize,
) -> Tensor<3> {
    match Engine::of(&x) {
        Engine::Cpu => cpu::unfold(x, size, kernel, stride, padding),
        Engine::Cuda(gpu) => cuda::unfold(&gpu, x, size, kernel, stride, padding),
        Engine::Burn => reference::unfold(x, size, kernel, stride, padding),
    }
}

/// `x W^T + b`, with the weight as PyTorch keeps it. An NVIDIA GPU multiplies in the products' precision and writes the format
/// of the residual stream; elsewhere all is f32.
///
/// Shapes: `x` `[batch, tokens, in]`; `weight` `[out * in]`, rows of `out`; `bias` `[out]`; the result
/// `[batch, tokens, out]`.
pub fn linear(
    x: Tensor<3>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    numerics: impl Into<Numerics>,
) -> Tensor<3> {
    match Engine::of_both(&x, &weight) {
        Engine::Cpu => cpu::linear(x, weight, bias),
        Engine::Cuda(gpu) => cuda::linear(&gpu, x, weight, bias, numerics.into()),
        Engine::Burn => reference::linear(x, weight, bias),
    }
}

/// Layer norm over the last axis: `(x - mean) / sqrt(variance + eps) * weight + bias`.
///
/// Shapes: `x` and the result `[batch, tokens, width]`; `weight` and `bias` `[width]`.
/// Source: Ba et al. 2016.
pub fn layer_norm(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<3> {
    match Engine::of_both(&x, &weight) {
        Engine::Cpu => cpu::layer_norm(x, weight, bias, eps),
        Engine::Cuda(gpu) => cuda::layer_norm(&gpu, x, weight, bias, eps),
        Engine::Burn => reference::layer_norm(x, weight, bias, eps),
    }
}

/// GELU of every element.
///
/// Source: Hendrycks and Gimpel 2016.
pub fn gelu(x: Tensor<3>, kind: Gelu) -> Tensor<3> {
    match Engine::of(&x) {
        Engine::Cpu => cpu::gelu(x, kind),
        Engine::Cuda(gpu) => cuda::gelu(&gpu, x, kind),
        Engine::Burn => reference::gelu(x, kind),
    }
}

/// A pre-norm encoder block: attention and MLP, each after a layer norm and around a residual.
///
/// Gradients of the weights are computed when the weights take part in automatic differentiation,
/// and only then: an attack passes plain weights and pays for the gradient of its input alone.
/// With `spec.causal` a token does not see those after it, as in CLIP's text tower.
///
/// Shapes: `x` and the result `[batch, tokens, width]`; `weights` flat, matrices `[out, in]`.
/// Source: Dosovitskiy et al. 2021, equations 2 and 3.
pub fn encoder_block(
    x: Tensor<3>,
    weights: &BlockWeights<Tensor<1>>,
    spec: &BlockSpec,
    path: Option<&PathScale>,
    cache: &WeightCache,
) -> Tensor<3> {
    match Engine::of_both(&x, &weights.norm1_weight) {
        Engine::Cpu => cpu::encoder_block(x, weights, spec, path, cache),
        Engine::Cuda(gpu) => cuda::encoder_block(&gpu, x, weights, spec, path, cache),
        Engine::Burn => reference::encoder_block(x, weights, spec, path),
    }
}

/// A ConvNeXt block: depthwise convolution, layer norm and MLP, scaled by `gamma`, around a residual.
///
/// Gradients of the weights are computed as in [`encoder_block`]. `path` are factors of the branch, one per
/// image: 0 where drop path left it out, else 1 / (1 - rate).
///
/// Shapes: `x` and the result `[batch, height * width, channels]`, `size` `[height, width]`; `weights` flat,
/// in torch's layout.
/// Source: Liu et al. 2022, figure 4.
pub fn convnext_block(
    x: Tensor<3>,
    size: [usize; 2],
    weights: &ConvNextWeights<Tensor<1>>,
    spec: &ConvNextSpec,
    path: Option<&[f32]>,
    cache: &WeightCache,
) -> Tensor<3> {
    match Engine::of_both(&x, &weights.norm_weight) {
        Engine::Cpu => cpu::convnext_block(x, size, weights, spec, path, cache),
        Engine::Cuda(gpu) => cuda::convnext_block(&gpu, x, size, weights, spec, path, cache),
        Engine::Burn => reference::convnext_block(x, size, weights, spec, path),
    }
}

/// A step of each image's own length along the gradient's sign, then to the nearest image within `epsilon` of
/// `center` in l-infinity and within [0, 1].
///
/// Shapes: images `[batch, 3, height, width]`; `steps` `[batch]`.
/// Source: Madry et al. 2018, section 2.1.
pub fn linf_step(
    images: Tensor<4>,
    gradient: Tensor<4>,
    center: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    match Engine::of(&images) {
        Engine::Cpu => cpu::linf_step(images, gradient, center, steps, epsilon),
        Engine::Cuda(gpu) => cuda::linf_step(&gpu, images, gradient, center, steps, epsilon),
        Engine::Burn => reference::linf_step(images, gradient, center, steps, epsilon),
    }
}

/// A step of each image's own length along the gradient's direction, then scaled to within `epsilon` of `center` in
/// l2 and clipped to [0, 1], image by image.
///
/// Shapes: images `[batch, 3, height, width]`; `steps` `[batch]`.
/// Source: Madry et al. 2018, section 2.1.
pub fn l2_step(
    images: Tensor<4>,
    gradient: Tensor<4>,
    center: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    match Engine::of(&images) {
        Engine::Cpu => cpu::l2_step(images, gradient, center, steps, epsilon),
        Engine::Cuda(gpu) => cuda::l2_step(&gpu, images, gradient, center, steps, epsilon),
        Engine::Burn => reference::l2_step(images, gradient, center, steps, epsilon),
    }
}

/// Images of bytes in `[0, 1]` on a device, to which they go as bytes. The floats are those of the processor to the bit.
pub fn from_bytes<const D: usize>(bytes: &[u8], shape: [usize; D], device: &Device) -> Tensor<D> {
    match device {
        Device::Cuda(gpu) => cuda::from_bytes(gpu, bytes, shape),
        Device::Burn(_) => gpu::from_bytes(bytes, shape, device),
    }
}

/// Images mixed with others of their batch (MixUp, CutMix), on an NVIDIA GPU.
///
/// Shapes: `images` and the result `[batch, 3, size, size]`; `mixes` `[batch]`.
///
/// # Panics
/// When the images are elsewhere.
pub fn mix_rows(images: Tensor<4>, mixes: &[Mix]) -> Tensor<4> {
    match Engine::of(&images) {
        Engine::Cuda(gpu) => cuda::mix_rows(&gpu, images, mixes),
        _ => panic!("images of other devices are mixed by `data::augment`"),
    }
}

/// Uniform points of the l-infinity balls around images, clipped to [0, 1], drawn on the device.
///
/// `None` where the host draws them. The bits are those of the host's streams.
pub fn linf_start(center: &Tensor<4>, streams: &Streams, epsilon: f64) -> Option<Tensor<4>> {
    match Engine::of(center) {
        Engine::Cuda(gpu) => {
            let kernel = advxl_cuda::pgd::linf_start;
            Some(cuda::start(kernel, &gpu, center, streams, epsilon))
        }
        _ => None,
    }
}

/// Points of the l2 balls around images in random directions, at lengths uniform in `[0, epsilon]`, clipped to [0, 1],
/// drawn on the device.
///
/// `None` where the host draws them. The numbers are those of the host's streams up to the last places.
pub fn l2_start(center: &Tensor<4>, streams: &Streams, epsilon: f64) -> Option<Tensor<4>> {
    match Engine::of(center) {
        Engine::Cuda(gpu) => {
            let kernel = advxl_cuda::pgd::l2_start;
            Some(cuda::start(kernel, &gpu, center, streams, epsilon))
        }
        _ => None,
    }
}

/// The rows of each image's tokens that stay.
///
/// Shapes: `x` `[batch, patches, width]`; the result `[batch, kept, width]`.
pub fn keep(x: Tensor<3>, kept: &KeptRows) -> Tensor<3> {
    assert_eq!(
        x.dims()[0],
        kept.batch,
        "a choice of patches is made for one batch"
    );
    match Engine::of(&x) {
        Engine::Cuda(gpu) => cuda::keep(&gpu, x, kept),
        _ => plain::keep(x, kept),
    }
}

/// Patches with their positions, after the class token where there is one.
///
/// They begin the residual stream, whose format `numerics` decides on an NVIDIA GPU.
///
/// Shapes: `patches` `[batch, patches, width]`; `class` `[width]`; the result `[batch, tokens, width]`.
/// Source: Dosovitskiy et al. 2021, equation 1.
pub fn tokens(
    patches: Tensor<3>,
    class: Option<&Tensor<1>>,
    places: &Places,
    numerics: Numerics,
) -> Tensor<3> {
    match Engine::of_both(&patches, &places.table) {
        Engine::Cuda(gpu) => cuda::tokens(&gpu, patches, class, places, numerics),
        _ => plain::tokens(patches, class, places),
    }
}

/// The mean of the tokens from `first` to before `end`.
///
/// Shapes: `x` `[batch, tokens, width]`; the result `[batch, 1, width]`.
pub fn pool(x: Tensor<3>, first: usize, end: usize) -> Tensor<3> {
    match Engine::of(&x) {
        Engine::Cuda(gpu) => cuda::pool(&gpu, x, first, end),
        _ => plain::pool(x, first, end),
    }
}

/// A convolution's weight with its channels last, as [`unfold`] has them.
///
/// Shapes: `weight` `[outputs, inputs, pixels]`, flat, with `sizes` inputs and pixels; the result
/// `[outputs, pixels, inputs]`, flat.
pub fn kernel_last(weight: Tensor<1>, sizes: [usize; 2]) -> Tensor<1> {
    match Engine::of(&weight) {
        Engine::Cuda(gpu) => cuda::kernel_last(&gpu, weight, sizes),
        _ => plain::kernel_last(weight, sizes),
    }
}

/// Cross entropy against a distribution over the classes, for each image.
///
/// Shapes: `logits` and `targets` `[batch, classes]`; the result `[batch]`.
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<2>) -> Tensor<1> {
    match Engine::of(&logits) {
        Engine::Cuda(gpu) => cuda::cross_entropy(&gpu, logits, targets),
        _ => plain::cross_entropy(logits, targets),
    }
}

/// The inner product of each row with constant weights: what has those weights as its gradient.
///
/// Shapes: `x` and `weights` `[rows, width]`; the result `[rows]`.
pub fn row_dots(x: Tensor<2>, weights: &Tensor<2>) -> Tensor<1> {
    match Engine::of(&x) {
        Engine::Cuda(gpu) => cuda::row_dots(&gpu, x, weights),
        _ => plain::row_dots(x, weights),
    }
}

/// The sum of all values.
///
/// Shapes: the result `[1]`.
pub fn sum(x: Tensor<1>) -> Tensor<1> {
    match Engine::of(&x) {
        Engine::Cuda(gpu) => cuda::scaled_sum(&gpu, x, 1.0),
        _ => x.sum(),
    }
}

/// The sum of all values times a factor.
///
/// Shapes: the result `[1]`.
pub fn scaled_sum(x: Tensor<1>, factor: f64) -> Tensor<1> {
    match Engine::of(&x) {
        Engine::Cuda(gpu) => cuda::scaled_sum(&gpu, x, factor as f32),
        _ => x.sum() * factor,
    }
}

/// The mean of all values.
///
/// Shapes: the result `[1]`.
pub fn mean(x: Tensor<1>) -> Tensor<1> {
    match Engine::of(&x) {
        Engine::Cuda(gpu) => cuda::mean(&gpu, x),
        _ => x.mean(),
    }
}

/// Embeddings of tokens with their places.
///
/// Shapes: `ids` `[count * length]`; `table` `[vocabulary, width]` and `places` `[context, width]`, flat, a context of at least
/// `length`; `shape` and the result `[count, length, width]`.
pub fn embed(ids: &[u32], table: Tensor<1>, places: &Tensor<1>, shape: [usize; 3]) -> Tensor<3> {
    match Engine::of(&table) {
        Engine::Cuda(gpu) => cuda::embed(&gpu, ids, table, places, shape),
        _ => plain::embed(ids, table, places, shape),
    }
}

/// One token of each sample.
///
/// Shapes: `x` `[count, tokens, width]`; `which` `[count]`; the result `[count, 1, width]`.
pub fn take(x: Tensor<3>, which: &[usize]) -> Tensor<3> {
    match Engine::of(&x) {
        Engine::Cuda(gpu) => cuda::take(&gpu, x, which),
        _ => plain::take(x, which),
    }
}

/// `x W` in f32.
///
/// Shapes: `x` `[rows, in]`; `weight` `[in, out]`, flat; the result `[rows, out]`.
pub fn project(x: Tensor<2>, weight: &Tensor<1>) -> Tensor<2> {
    match Engine::of_both(&x, weight) {
        Engine::Cuda(gpu) => cuda::project(&gpu, x, weight),
        _ => plain::project(x, weight),
    }
}

/// Rows divided by their lengths, as `torch.nn.functional.normalize`.
pub fn unit_length(rows: Tensor<2>) -> Tensor<2> {
    match Engine::of(&rows) {
        Engine::Cuda(gpu) => cuda::unit_length(&gpu, rows),
        _ => plain::unit_length(rows),
    }
}

/// The distance of each row of `x` from the same row of `y`, differentiable in both.
///
/// Shapes: `x` and `y` `[rows, width]`; the result `[rows]`.
pub fn row_distances(kind: RowDistance, x: Tensor<2>, y: Tensor<2>) -> Tensor<1> {
    match Engine::of_both(&x, &y) {
        Engine::Cuda(gpu) => cuda::row_distances(&gpu, kind, x, y),
        _ => plain::row_distances(kind, x, y),
    }
}

/// The cosine similarity of each row with each text, times a scale; differentiable in `rows`.
///
/// Shapes: `rows` `[n, width]`, of any length; `texts` `[m, width]`, of length 1; the result `[n, m]`.
pub fn scaled_similarities(rows: Tensor<2>, texts: &Tensor<2>, scale: f64) -> Tensor<2> {
    match Engine::of_both(&rows, texts) {
        Engine::Cuda(gpu) => cuda::scaled_similarities(&gpu, rows, texts, scale),
        _ => plain::scaled_similarities(rows, texts, scale),
    }
}

/// The symmetric contrastive loss of a batch, for each image: half the cross entropy of finding its text among all
/// texts, half that of finding it among all images by its text.
///
/// The mean over the batch is the paper's equations 2 and 3.
///
/// Shapes: `images` `[batch, dimensions]`, of any length; `texts` the same, of length 1; `log_scale` `[1]`; the result
/// `[batch]`.
/// Source: Radford et al. 2021, figure 3.
pub fn contrastive(images: Tensor<2>, texts: Tensor<2>, log_scale: Tensor<1>) -> Tensor<1> {
    match Engine::of_both(&images, &texts) {
        Engine::Cuda(gpu) => cuda::contrastive(&gpu, images, &texts, &log_scale),
        _ => plain::contrastive(images, texts, log_scale),
    }
}

/// The inner products of the rows of two tensors, outside automatic differentiation.
///
/// Shapes: `a` `[n, width]`; `b` `[m, width]`; the result `[n, m]`.
pub fn similarities(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    match Engine::of_both(&a, &b) {
        Engine::Cuda(gpu) => cuda::similarities(&gpu, &a, &b),
        _ => a.matmul(b.transpose()),
    }
}

/// Values brought into a range, outside automatic differentiation.
pub fn clamp(x: Tensor<1>, low: f64, high: f64) -> Tensor<1> {
    match Engine::of(&x) {
        Engine::Cuda(gpu) => cuda::clamp(&gpu, &x, low, high),
        _ => x.clamp(low, high),
    }
}

/// The class of the largest logit of each row, on the host.
///
/// Shapes: `logits` `[rows, classes]`; the result `[rows]`.
pub fn predictions(logits: Tensor<2>) -> Vec<u32> {
    match Engine::of(&logits) {
        Engine::Cuda(gpu) => cuda::evaluation::predictions(&gpu, &logits),
        _ => plain::predictions(&logits),
    }
}

/// How many rows have the largest logit at their label.
///
/// Shapes: `logits` `[rows, classes]`; `labels` `[rows]`.
pub fn count_correct(logits: Tensor<2>, labels: &[u32]) -> u64 {
    match Engine::of(&logits) {
        Engine::Cuda(gpu) => cuda::correct(&gpu, &logits, labels),
        _ => {
            let pairs = plain::predictions(&logits).into_iter().zip(labels);
            pairs.filter(|(found, right)| found == *right).count() as u64
        }
    }
}

/// Some of the rows of a tensor.
pub fn select<const D: usize>(x: Tensor<D>, rows: &[usize]) -> Tensor<D> {
    match Engine::of(&x) {
        Engine::Cpu if !x.is_tracked() => cpu::select(x, rows),
        Engine::Cuda(gpu) => cuda::select(&gpu, x, rows),
        _ => plain::select(x, rows),
    }
}

/// Some of the columns of a matrix.
///
/// On NVIDIA GPUs it is computed on the host: only evaluations of few classes use it.
pub fn select_columns(x: Tensor<2>, columns: &[usize]) -> Tensor<2> {
    plain::select_columns(x, columns)
}

/// Tensors one after another along their first axis.
///
/// # Panics
/// When there are none.
pub fn join<const D: usize>(mut parts: Vec<Tensor<D>>) -> Tensor<D> {
    match (Engine::of(&parts[0]), parts.len()) {
        (_, 1) => parts.remove(0),
        (Engine::Cuda(gpu), _) => cuda::join(&gpu, &parts),
        _ => Tensor::cat(parts, 0),
    }
}

/// `a + b`.
pub fn add<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    match Engine::of_both(&a, &b) {
        Engine::Cuda(gpu) => cuda::add(&gpu, a, b),
        _ => a + b,
    }
}

/// Returns copies of a tensor whose gradients are summed on the tensor's device. The loss must use every copy.
///
/// Automatic differentiation would sum the gradients of a tensor that is used several times on the host.
pub fn fork<const D: usize>(x: &Tensor<D>, count: usize) -> Vec<Tensor<D>> {
    match Engine::of(x) {
        Engine::Cuda(gpu) if count > 1 && x.is_autodiff() => cuda::fork(&gpu, x, count),
        _ => vec![x.clone(); count],
    }
}

/// Values times a factor.
pub fn scale<const D: usize>(x: Tensor<D>, factor: f64) -> Tensor<D> {
    match Engine::of(&x) {
        _ if factor == 1.0 => x,
        Engine::Cuda(gpu) => cuda::scale(&gpu, x, factor as f32),
        _ => x * factor,
    }
}

/// One update of AdamW over some tensors: the new weights and moments, in order.
///
/// Source: Loshchilov and Hutter 2019, algorithm 2, in the order of `torch.optim.AdamW`.
pub fn adamw(tensors: Vec<TensorUpdate>, update: &AdamW) -> Vec<(Tensor<1>, Moments)> {
    let Some(first) = tensors.first() else {
        return Vec::new();
    };
    match Engine::of(&first.weights) {
        Engine::Cpu => each(tensors, update, cpu::adamw),
        Engine::Cuda(gpu) => cuda::update(&gpu, tensors, update),
        Engine::Burn => each(tensors, update, reference::adamw),
    }
}

fn each(
    tensors: Vec<TensorUpdate>,
    update: &AdamW,
    one: fn(TensorUpdate, &AdamW) -> (Tensor<1>, Moments),
) -> Vec<(Tensor<1>, Moments)> {
    tensors
        .into_iter()
        .map(|tensor| one(tensor, update))
        .collect()
}
