//! The public operations: what each computes, and which engine runs it.

use advxl_kernels::{BlockWeights, ConvNextWeights, Gelu};
use burn::tensor::Tensor;

use super::cpu::cache::{ConvNextCache, WeightCache};
use super::engine::Engine;
use super::spec::{AdamW, BlockSpec, ConvNextSpec, Moments, PatchSpec, PathScale};
use super::{cpu, reference};

/// Normalizes the channels and cuts the images into patches.
///
/// Shapes: `images` `[batch, 3, grid * patch, grid * patch]`; the result
/// `[batch, grid * grid, 3 * patch * patch]`, in timm's order of pixels.
pub fn patches(images: Tensor<4>, spec: &PatchSpec) -> Tensor<3> {
    match Engine::of(&images) {
        Engine::Cpu => cpu::patches(images, spec),
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
        Engine::Burn => reference::unfold(x, size, kernel, stride, padding),
    }
}

/// `x W^T + b` in f32, with the weight as PyTorch keeps it.
///
/// Shapes: `x` `[batch, tokens, in]`; `weight` `[out * in]`, rows of `out`; `bias` `[out]`; the result
/// `[batch, tokens, out]`.
pub fn linear(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>) -> Tensor<3> {
    match Engine::of(&x) {
        Engine::Cpu => cpu::linear(x, weight, bias),
        Engine::Burn => reference::linear(x, weight, bias),
    }
}

/// Layer norm over the last axis: `(x - mean) / sqrt(variance + eps) * weight + bias`.
///
/// Shapes: `x` and the result `[batch, tokens, width]`; `weight` and `bias` `[width]`.
/// Source: Ba et al. 2016.
pub fn layer_norm(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<3> {
    match Engine::of(&x) {
        Engine::Cpu => cpu::layer_norm(x, weight, bias, eps),
        Engine::Burn => reference::layer_norm(x, weight, bias, eps),
    }
}

/// GELU of every element.
///
/// Source: Hendrycks and Gimpel 2016.
pub fn gelu(x: Tensor<3>, kind: Gelu) -> Tensor<3> {
    match Engine::of(&x) {
        Engine::Cpu => cpu::gelu(x, kind),
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
    match Engine::of(&x) {
        Engine::Cpu => cpu::encoder_block(x, weights, spec, path, cache),
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
    cache: &ConvNextCache,
) -> Tensor<3> {
    match Engine::of(&x) {
        Engine::Cpu => cpu::convnext_block(x, size, weights, spec, path, cache),
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
        Engine::Burn => reference::l2_step(images, gradient, center, steps, epsilon),
    }
}

/// One update of AdamW: the new weights and moments.
///
/// Source: Loshchilov and Hutter 2019, algorithm 2, in the order of `torch.optim.AdamW`.
pub fn adamw(
    weights: Tensor<1>,
    gradient: Tensor<1>,
    moments: Moments,
    update: &AdamW,
) -> (Tensor<1>, Moments) {
    match Engine::of(&weights) {
        Engine::Cpu => cpu::adamw(weights, gradient, moments, update),
        Engine::Burn => reference::adamw(weights, gradient, moments, update),
    }
}
