//! The operations composed from Burn's own: their definition.
//!
//! Written for clarity; every device can run them, and the tests compare the kernels with them.

use crate::ops::device::Device;
use advxl_kernels::{BlockWeights, ConvNextWeights, Gelu};
use burn::tensor::Tensor;
use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;

use super::engine::Engine;
use super::gpu;
use super::recompute::recomputed;
use super::spec::{AdamW, BlockSpec, ConvNextSpec, Moments, PatchSpec, PathScale, TensorUpdate};
use super::tensor::from_vec;
use super::words::Precision;

/// See [`crate::ops::layer_norm`].
pub(crate) fn layer_norm(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<3> {
    let centered = x.clone() - x.mean_dim(2);
    let variance = (centered.clone() * centered.clone()).mean_dim(2);
    centered / (variance + eps).sqrt() * weight.unsqueeze() + bias.unsqueeze()
}

/// See [`crate::ops::linear`].
pub(crate) fn linear(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>) -> Tensor<3> {
    linear_in(Precision::F32, x, weight, bias)
}

/// A linear layer whose product is computed in a precision; the bias is added in f32.
fn linear_in(precision: Precision, x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>) -> Tensor<3> {
    let [batch, tokens, inputs] = x.dims();
    let outputs = bias.dims()[0];
    let weight = weight.reshape([outputs, inputs]).transpose();
    // [batch, tokens, in] -> [batch * tokens, in], one product for the whole batch
    let product = product(precision, x.reshape([batch * tokens, inputs]), weight);
    (product + bias.unsqueeze()).reshape([batch, tokens, outputs])
}

/// A product of matrices; on the processor it is always f32.
fn product<const D: usize>(precision: Precision, a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    match Engine::of(&a) {
        Engine::Burn => gpu::product(precision, a, b),
        _ => a.matmul(b),
    }
}

/// See [`crate::ops::patches`].
pub(crate) fn patches(images: Tensor<4>, spec: &PatchSpec) -> Tensor<3> {
    let device = Device::of(&images);
    let [mean, factor] = spec.affine();
    let channels = |values: [f32; 3]| from_vec(values.to_vec(), [1, 3, 1, 1], &device);
    let images = (images - channels(mean)) * channels(factor);
    let ([batch, _, size, _], patch) = (images.dims(), spec.patch);
    let grid = size / patch;
    // [batch, 3, grid * patch, grid * patch] -> [batch, grid * grid, 3 * patch * patch]
    images
        .reshape([batch, 3, grid, patch, grid, patch])
        .permute([0, 2, 4, 1, 3, 5])
        .reshape([batch, grid * grid, 3 * patch * patch])
}

/// See [`crate::ops::linf_step`].
pub(crate) fn linf_step(
    images: Tensor<4>,
    gradient: Tensor<4>,
    center: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    let delta = images + gradient.sign() * by_image(steps, center) - center.clone();
    (center.clone() + delta.clamp(-epsilon, epsilon)).clamp(0.0, 1.0)
}

/// One number per image, shaped to be multiplied with images: `[batch, 1, 1, 1]`.
fn by_image(values: &[f32], images: &Tensor<4>) -> Tensor<4> {
    from_vec(
        values.to_vec(),
        [values.len(), 1, 1, 1],
        &Device::of(images),
    )
}

/// See [`crate::ops::l2_step`].
pub(crate) fn l2_step(
    images: Tensor<4>,
    gradient: Tensor<4>,
    center: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    let length = |images: &Tensor<4>| {
        let [batch, channels, height, width] = images.dims();
        let flat = images.clone().reshape([batch, channels * height * width]);
        let squares = (flat.clone() * flat).sum_dim(1);
        squares.sqrt().clamp_min(1e-12).reshape([batch, 1, 1, 1])
    };
    let direction = gradient.clone() / length(&gradient);
    let delta = images + direction * by_image(steps, center) - center.clone();
    let factor = (length(&delta).recip() * epsilon).clamp_max(1.0);
    (center.clone() + delta * factor).clamp(0.0, 1.0)
}

/// See [`crate::ops::encoder_block`].
pub(crate) fn encoder_block(
    x: Tensor<3>,
    weights: &BlockWeights<Tensor<1>>,
    spec: &BlockSpec,
    path: Option<&PathScale>,
) -> Tensor<3> {
    let layers = Layers {
        layer_norm,
        linear: linear_in,
        gelu,
    };
    block_of(layers, x, weights, spec, path)
}

/// The layers around a block's attention, as an engine computes them.
#[derive(Clone, Copy)]
pub(crate) struct Layers {
    pub(crate) layer_norm: fn(Tensor<3>, Tensor<1>, Tensor<1>, f64) -> Tensor<3>,
    pub(crate) linear: fn(Precision, Tensor<3>, Tensor<1>, Tensor<1>) -> Tensor<3>,
    pub(crate) gelu: fn(Tensor<3>, Gelu) -> Tensor<3>,
}

/// An encoder block composed of these layers.
pub(crate) fn block_of(
    layers: Layers,
    x: Tensor<3>,
    weights: &BlockWeights<Tensor<1>>,
    spec: &BlockSpec,
    path: Option<&PathScale>,
) -> Tensor<3> {
    if !spec.recompute {
        return compose(layers, x, weights.clone(), spec, path);
    }
    let (spec, path) = (spec.clone(), path.cloned());
    let weights = weights.clone().into_array();
    recomputed(x, &weights, move |x, weights| {
        let weights = BlockWeights::from_array(array(weights));
        compose(layers, x, weights, &spec, path.as_ref())
    })
}

fn compose(
    layers: Layers,
    x: Tensor<3>,
    weights: BlockWeights<Tensor<1>>,
    spec: &BlockSpec,
    path: Option<&PathScale>,
) -> Tensor<3> {
    let Layers {
        layer_norm, gelu, ..
    } = layers;
    let linear = |x, weight, bias| (layers.linear)(spec.numerics.products(), x, weight, bias);
    let w = weights;
    let normed = layer_norm(x.clone(), w.norm1_weight, w.norm1_bias, spec.eps);
    let qkv = linear(normed, w.qkv_weight, w.qkv_bias);
    let mixed = match Engine::of(&qkv) {
        // Kept, its scores would be most of a block's memory.
        Engine::Burn => {
            let (heads, causal) = (spec.heads, spec.causal);
            let precision = spec.numerics.products();
            recomputed(qkv, &[], move |qkv, _| {
                attention(qkv, heads, causal, precision)
            })
        }
        _ => attention(qkv, spec.heads, spec.causal, spec.numerics.products()),
    };
    let branch = linear(mixed, w.proj_weight, w.proj_bias);
    let x = x + scaled(branch, path.map(|path| &path.attention[..]));

    let normed = layer_norm(x.clone(), w.norm2_weight, w.norm2_bias, spec.eps);
    let hidden = gelu(linear(normed, w.fc1_weight, w.fc1_bias), spec.gelu);
    let branch = linear(hidden, w.fc2_weight, w.fc2_bias);
    x + scaled(branch, path.map(|path| &path.mlp[..]))
}

/// The weights of a block, which were flattened for recomputation.
fn array<const N: usize>(weights: &[Tensor<1>]) -> [Tensor<1>; N] {
    weights
        .first_chunk()
        .expect("the weights of a block")
        .clone()
}

/// See [`crate::ops::convnext_block`].
pub(crate) fn convnext_block(
    x: Tensor<3>,
    size: [usize; 2],
    weights: &ConvNextWeights<Tensor<1>>,
    spec: &ConvNextSpec,
    path: Option<&[f32]>,
) -> Tensor<3> {
    if !spec.recompute {
        return convolve(x, size, weights.clone(), spec, path);
    }
    let (spec, path) = (spec.clone(), path.map(<[f32]>::to_vec));
    let weights = weights.clone().into_array();
    recomputed(x, &weights, move |x, weights| {
        let weights = ConvNextWeights::from_array(array(weights));
        convolve(x, size, weights, &spec, path.as_deref())
    })
}

fn convolve(
    x: Tensor<3>,
    [height, width]: [usize; 2],
    weights: ConvNextWeights<Tensor<1>>,
    spec: &ConvNextSpec,
    path: Option<&[f32]>,
) -> Tensor<3> {
    let linear = |x, weight, bias| linear_in(spec.precision, x, weight, bias);
    let w = weights;
    let ([batch, pixels, channels], kernel) = (x.dims(), spec.kernel);
    // [batch, height * width, channels] -> [batch, channels, height, width], and back after the convolution
    let images = x.clone().reshape([batch, height, width, channels]);
    let convolved = conv2d(
        images.permute([0, 3, 1, 2]),
        w.conv_dw_weight.reshape([channels, 1, kernel, kernel]),
        Some(w.conv_dw_bias),
        ConvOptions::new([1, 1], [kernel / 2, kernel / 2], [1, 1], channels),
    );
    let convolved = convolved
        .permute([0, 2, 3, 1])
        .reshape([batch, pixels, channels]);
    let normed = layer_norm(convolved, w.norm_weight, w.norm_bias, spec.eps);
    let hidden = gelu(linear(normed, w.fc1_weight, w.fc1_bias), spec.gelu);
    let branch = linear(hidden, w.fc2_weight, w.fc2_bias) * w.gamma.unsqueeze();
    x + scaled(branch, path)
}

/// See [`crate::ops::unfold`].
pub(crate) fn unfold(
    x: Tensor<3>,
    [height, width]: [usize; 2],
    kernel: usize,
    stride: usize,
    padding: usize,
) -> Tensor<3> {
    let [batch, _, channels] = x.dims();
    let images = x.reshape([batch, height, width, channels]);
    let images = pad_both(images, 1, padding);
    let images = pad_both(images, 2, padding);
    let positions = |size: usize| (size + 2 * padding - kernel) / stride + 1;
    let (down, along) = (positions(height), positions(width));
    // For every pixel of the kernel, the values at all positions: [batch, down, along, channels].
    let steps = |start: usize, count: usize| (start..).step_by(stride).take(count);
    let pick = |images: Tensor<4>, axis: usize, start: usize, count: usize| {
        let parts = steps(start, count).map(|at| images.clone().narrow(axis, at, 1));
        Tensor::cat(parts.collect(), axis)
    };
    let mut columns = Vec::new();
    for y in 0..kernel {
        let lines = pick(images.clone(), 1, y, down);
        columns.extend((0..kernel).map(|x| pick(lines.clone(), 2, x, along)));
    }
    Tensor::cat(columns, 3).reshape([batch, down * along, kernel * kernel * channels])
}

/// Adds zeros on both sides along one axis.
fn pad_both(images: Tensor<4>, axis: usize, padding: usize) -> Tensor<4> {
    if padding == 0 {
        return images;
    }
    let zeros = images.clone().narrow(axis, 0, 1).zeros_like();
    let mut parts = vec![zeros; 2 * padding + 1];
    parts[padding] = images;
    Tensor::cat(parts, axis)
}

/// Multi-head self-attention on queries, keys and values in one tensor (Vaswani et al. 2017, equation 1).
///
/// Shapes: `qkv` `[batch, tokens, 3 * width]`, in timm's order; the result `[batch, tokens, width]`.
fn attention(qkv: Tensor<3>, heads: usize, causal: bool, precision: Precision) -> Tensor<3> {
    let [batch, tokens, triple] = qkv.dims();
    let width = triple / 3;
    let head = width / heads;
    // On a GPU padded once, instead of in each product; the mask hides what is padded.
    let qkv = match Engine::of(&qkv) {
        Engine::Burn => gpu::pad(qkv, 1),
        _ => qkv,
    };
    let all = qkv.dims()[1];
    // [batch, all, 3 * width] -> [3, batch, heads, all, head]
    let qkv = qkv
        .reshape([batch, all, 3, heads, head])
        .permute([2, 0, 3, 1, 4]);
    let part = |index: usize| {
        qkv.clone()
            .narrow(0, index, 1)
            .reshape([batch, heads, all, head])
    };
    let mut scores = product(precision, part(0), part(1).transpose()) * (head as f64).powf(-0.5);
    if causal || all > tokens {
        let mask = mask(tokens, all, causal, &Device::of(&scores));
        scores = scores.clone() + mask.cast(scores.dtype());
    }
    // [batch, heads, all, head] -> [batch, all, width]
    let mixed = product(precision, softmax(scores, 3), part(2))
        .permute([0, 2, 1, 3])
        .reshape([batch, all, width]);
    gpu::truncate(mixed, 1, tokens)
}

/// What is added to attention's scores: [`MASKED`] for keys behind the `tokens` that there are and, if `causal`, for
/// those after the query; 0 for the others.
///
/// Shapes: `[1, 1, queries, all]`, with one row for all queries if not `causal`.
fn mask(tokens: usize, all: usize, causal: bool, device: &Device) -> Tensor<4> {
    let queries = if causal { all } else { 1 };
    let pairs = (0..queries).flat_map(|query| (0..all).map(move |key| (query, key)));
    let added = pairs.map(|(query, key)| {
        let hidden = key >= tokens || causal && key > query;
        if hidden { MASKED } else { 0.0 }
    });
    from_vec(added.collect(), [1, 1, queries, all], device)
}

/// A score whose exponential is 0 next to that of any other.
const MASKED: f32 = -1e30;

/// GELU (Hendrycks and Gimpel 2016): exact, the tanh approximation that CLIPA's towers were trained with, and the
/// sigmoid of OpenAI's CLIP.
pub(crate) fn gelu(x: Tensor<3>, kind: Gelu) -> Tensor<3> {
    match kind {
        // Composed: the gradient of Burn's own on GPUs is that of the approximation, which is 6e-4 off.
        Gelu::Erf => x.clone() * ((x / std::f64::consts::SQRT_2).erf() + 1.0) * 0.5,
        Gelu::Tanh => {
            let inner = (x.clone() + x.clone().powi_scalar(3) * 0.044715)
                * (2.0 / std::f64::consts::PI).sqrt();
            x * (inner.tanh() + 1.0) * 0.5
        }
        Gelu::Quick => x.clone() * sigmoid(x * 1.702),
    }
}

fn scaled(branch: Tensor<3>, factors: Option<&[f32]>) -> Tensor<3> {
    match factors {
        None => branch,
        Some(factors) => {
            let factors = from_vec(
                factors.to_vec(),
                [factors.len(), 1, 1],
                &Device::of(&branch),
            );
            branch * factors
        }
    }
}

/// See [`crate::ops::adamw`].
pub(crate) fn adamw(tensor: TensorUpdate, update: &AdamW) -> (Tensor<1>, Moments) {
    let TensorUpdate {
        weights,
        gradient,
        moments,
        weight_decay,
        rate,
    } = tensor;
    let learning_rate = update.learning_rate * rate;
    let [beta1, beta2] = update.betas;
    let gradient = gradient * update.gradient_scale;
    let first = moments.first * beta1 + gradient.clone() * (1.0 - beta1);
    let second = moments.second * beta2 + gradient.clone() * gradient * (1.0 - beta2);
    let correction1 = 1.0 - beta1.powf(update.step as f64);
    let correction2 = 1.0 - beta2.powf(update.step as f64);
    let denominator = second.clone().sqrt() / correction2.sqrt() + update.eps;
    let decayed = weights * (1.0 - learning_rate * weight_decay);
    let weights = decayed - first.clone() / denominator * (learning_rate / correction1);
    let average = moments.average.map(|average| {
        average * update.average_decay + weights.clone() * (1.0 - update.average_decay)
    });
    (
        weights,
        Moments {
            first,
            second,
            average,
        },
    )
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, TensorData};

    use super::*;
    use crate::ops::words::Numerics;
    use crate::rng::{Rng, Stream};

    fn draw<const D: usize>(seed: u64, shape: [usize; D]) -> Tensor<D> {
        let mut rng = Rng::new(seed, Stream::Bench);
        let count = shape.iter().product();
        let values: Vec<f64> = (0..count).map(|_| f64::from(rng.normal()) * 0.5).collect();
        Tensor::from_data(
            TensorData::new(values, shape),
            (&Device::cpu().burn(), DType::F64),
        )
    }

    fn scalar<const D: usize>(tensor: Tensor<D>) -> f64 {
        tensor.sum().into_data().try_into_vec::<f64>().unwrap()[0]
    }

    /// Compares the gradient of a weighted sum of the outputs for one input with central
    /// differences in f64, along three random directions. Steps of 1e-5 leave errors of 1e-10 from
    /// the third derivative and 1e-11 from rounding.
    fn check<const D: usize>(what: &str, input: Tensor<D>, f: impl Fn(Tensor<D>) -> Tensor<3>) {
        let weights = draw(99, f(input.clone()).dims());
        let value = |input| (f(input) * weights.clone()).sum();
        let tracked = input.clone().autodiff().require_grad();
        let mut gradients = value(tracked.clone()).backward();
        let gradient = tracked.grad_remove(&mut gradients).unwrap();
        for seed in 1..=3 {
            let direction = draw(seed, input.dims());
            let step = direction.clone() * 1e-5;
            let ahead = scalar(value(input.clone() + step.clone()));
            let behind = scalar(value(input.clone() - step));
            let right = (ahead - behind) / 2e-5;
            let found = scalar(gradient.clone() * direction);
            assert!(
                (found - right).abs() < 1e-7 * right.abs().max(1.0),
                "{what}: {found} {right}"
            );
        }
    }

    #[test]
    fn gradients_of_norm_and_linear_are_those_of_finite_differences() {
        let (x, weight, bias) = (draw(5, [2, 3, 8]), draw(6, [8]), draw(7, [8]));
        let norm = |x, weight, bias| layer_norm(x, weight, bias, 1e-6);
        check("norm input", x.clone(), |x| {
            norm(x, weight.clone(), bias.clone())
        });
        check("norm weight", weight.clone(), |weight| {
            norm(x.clone(), weight, bias.clone())
        });
        check("norm bias", bias.clone(), |bias| {
            norm(x.clone(), weight.clone(), bias)
        });

        let (weight, bias) = (draw(8, [5 * 8]), draw(9, [5]));
        check("linear input", x.clone(), |x| {
            linear(x, weight.clone(), bias.clone())
        });
        check("linear weight", weight.clone(), |weight| {
            linear(x.clone(), weight, bias.clone())
        });
        check("linear bias", bias.clone(), |bias| {
            linear(x.clone(), weight.clone(), bias)
        });
    }

    #[test]
    fn gradients_of_the_encoder_block_are_those_of_finite_differences() {
        let (width, hidden) = (8, 12);
        let x = draw(10, [2, 3, width]);
        let lengths = [
            width,
            width,
            3 * width * width,
            3 * width,
            width * width,
            width,
            width,
            width,
            hidden * width,
            hidden,
            width * hidden,
            width,
        ];
        let mut seed = 20;
        let weights = lengths.map(|length| {
            seed += 1;
            draw(seed, [length])
        });
        let kinds = [(Gelu::Erf, false), (Gelu::Tanh, false), (Gelu::Quick, true)];
        for (gelu, causal) in kinds {
            let spec = BlockSpec {
                heads: 2,
                hidden,
                gelu,
                eps: 1e-6,
                causal,
                numerics: Numerics::F32,
                recompute: false,
            };
            let block = |x, weights: &[Tensor<1>; 12]| {
                let weights = BlockWeights::from_array(weights.clone());
                encoder_block(x, &weights, &spec, None)
            };
            check("block input", x.clone(), |x| block(x, &weights));
            for index in 0..12 {
                check(
                    &format!("block weight {index}"),
                    weights[index].clone(),
                    |weight| {
                        let mut weights = weights.clone();
                        weights[index] = weight;
                        block(x.clone(), &weights)
                    },
                );
            }
        }
    }

    #[test]
    fn gradients_of_unfolding_and_gelu_are_those_of_finite_differences() {
        let x = draw(50, [2, 4 * 5, 3]);
        check("unfold", x.clone(), |x| unfold(x, [4, 5], 3, 2, 1));
        for kind in [Gelu::Erf, Gelu::Tanh, Gelu::Quick] {
            check("gelu", x.clone(), |x| gelu(x, kind));
        }
    }

    #[test]
    fn gradients_of_the_convnext_block_are_those_of_finite_differences() {
        let (channels, hidden) = (4, 10);
        let x = draw(60, [2, 3 * 5, channels]);
        let lengths = [
            channels,
            channels * 9,
            channels,
            channels,
            channels,
            hidden * channels,
            hidden,
            channels * hidden,
            channels,
        ];
        let mut seed = 70;
        let weights = lengths.map(|length| {
            seed += 1;
            draw(seed, [length])
        });
        let spec = ConvNextSpec {
            hidden,
            kernel: 3,
            gelu: Gelu::Erf,
            eps: 1e-6,
            precision: Precision::F32,
            recompute: false,
        };
        let block = |x, weights: &[Tensor<1>; 9]| {
            let weights = ConvNextWeights::from_array(weights.clone());
            convnext_block(x, [3, 5], &weights, &spec, None)
        };
        check("block input", x.clone(), |x| block(x, &weights));
        for index in 0..9 {
            let what = format!("block weight {index}");
            check(&what, weights[index].clone(), |weight| {
                let mut weights = weights.clone();
                weights[index] = weight;
                block(x.clone(), &weights)
            });
        }
    }
}
