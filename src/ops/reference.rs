//! The operations of this module composed from Burn's own: their definition.
//!
//! Written for clearness; every device can run them, and the tests hold the kernels to them.

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{DType, Tensor};

use super::block::{BlockSpec, PathScale};
use super::convnext::ConvNextSpec;
use super::patches::PatchSpec;
use super::{Gelu, Precision, from_vec};

/// Layer norm over the last axis (Ba et al. 2016): `(x - mean) / sqrt(variance + eps) * weight + bias`.
pub fn layer_norm(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<3> {
    let centred = x.clone() - x.mean_dim(2);
    let variance = (centred.clone() * centred.clone()).mean_dim(2);
    centred / (variance + eps).sqrt() * weight.unsqueeze() + bias.unsqueeze()
}

/// `x W^T + b` with the weight as PyTorch keeps it.
///
/// Shapes: `x` `[batch, tokens, in]`; `weight` `[out * in]`, rows of `out`; `bias` `[out]`.
pub fn linear(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>) -> Tensor<3> {
    linear_in(Precision::F32, x, weight, bias)
}

/// The same with a product in some arithmetic; what is added is f32.
fn linear_in(precision: Precision, x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>) -> Tensor<3> {
    let [batch, tokens, inputs] = x.dims();
    let outputs = bias.dims()[0];
    let weight = weight.reshape([outputs, inputs]).transpose();
    // [batch, tokens, in] -> [batch * tokens, in], one product for the whole batch
    let product = product(precision, x.reshape([batch * tokens, inputs]), weight);
    (product + bias.unsqueeze()).reshape([batch, tokens, outputs])
}

/// Rows and columns of what a GPU multiplies are made multiples of this: it then reads several numbers at a time, of bf16 too.
const ALIGNMENT: usize = 8;

/// A product of matrices, of operands rounded to bf16 and with an f32 result where that is asked for.
///
/// On a GPU operands are filled up with zeros to an even size, so that this product and those of the backward pass, whose
/// inner sides are the outer ones here, are fast. (And right: SwiftShader computes wrongly where inner sides are no multiple of 4.)
fn product<const D: usize>(precision: Precision, a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    if crate::ops::on_kernels(&a) {
        return a.matmul(b);
    }
    let (rows, columns) = (a.dims()[D - 2], b.dims()[D - 1]);
    let [a, b] = [a, b].map(|operand| filled(filled(operand, D - 2), D - 1));
    let product = match precision {
        Precision::F32 => a.matmul(b),
        Precision::Bf16 => {
            let [a, b] = [a, b].map(|operand| operand.cast(DType::BF16));
            a.matmul(b).cast(DType::F32)
        }
    };
    shortened(shortened(product, D - 2, rows), D - 1, columns)
}

/// Zeros behind along an axis, to a multiple of [`ALIGNMENT`].
fn filled<const D: usize>(tensor: Tensor<D>, axis: usize) -> Tensor<D> {
    let mut shape = tensor.dims();
    let missing = shape[axis].next_multiple_of(ALIGNMENT) - shape[axis];
    if missing == 0 {
        return tensor;
    }
    shape[axis] = missing;
    let zeros = Tensor::zeros(shape, &tensor.device());
    Tensor::cat(vec![tensor, zeros], axis)
}

/// The first so many along an axis.
fn shortened<const D: usize>(tensor: Tensor<D>, axis: usize, length: usize) -> Tensor<D> {
    match tensor.dims()[axis] == length {
        true => tensor,
        false => tensor.narrow(axis, 0, length),
    }
}

/// What a piece of a model gives; on a GPU it is computed once more in the backward pass, and nothing kept but its input.
fn anew(
    x: Tensor<3>,
    weights: &[Tensor<1>],
    piece: impl Fn(Tensor<3>, &[Tensor<1>]) -> Tensor<3> + Send + Sync + 'static,
) -> Tensor<3> {
    #[cfg(feature = "gpu")]
    if !crate::ops::on_kernels(&x) {
        return crate::ops::recompute::recomputed(x, weights, std::sync::Arc::new(piece));
    }
    piece(x, weights)
}

/// Normalises the channels and cuts the images into patches; see [`crate::ops::patches`].
pub fn patches(images: Tensor<4>, spec: &PatchSpec) -> Tensor<3> {
    let device = images.device();
    let [mean, factor] = spec.affine();
    let channels = |values: [f32; 3]| crate::ops::from_vec(values.to_vec(), [1, 3, 1, 1], &device);
    let images = (images - channels(mean)) * channels(factor);
    let ([batch, _, size, _], patch) = (images.dims(), spec.patch);
    let grid = size / patch;
    // [batch, 3, grid * patch, grid * patch] -> [batch, grid * grid, 3 * patch * patch]
    images
        .reshape([batch, 3, grid, patch, grid, patch])
        .permute([0, 2, 4, 1, 3, 5])
        .reshape([batch, grid * grid, 3 * patch * patch])
}

/// See [`crate::ops::pgd::linf_step`].
pub fn linf_step(
    images: Tensor<4>,
    gradient: Tensor<4>,
    centre: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    let delta = images + gradient.sign() * by_image(steps, centre) - centre.clone();
    (centre.clone() + delta.clamp(-epsilon, epsilon)).clamp(0.0, 1.0)
}

/// A number for each image, shaped to be multiplied with images: `[batch, 1, 1, 1]`.
fn by_image(values: &[f32], images: &Tensor<4>) -> Tensor<4> {
    from_vec(values.to_vec(), [values.len(), 1, 1, 1], &images.device())
}

/// See [`crate::ops::pgd::l2_step`].
pub fn l2_step(
    images: Tensor<4>,
    gradient: Tensor<4>,
    centre: &Tensor<4>,
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
    let delta = images + direction * by_image(steps, centre) - centre.clone();
    let factor = (length(&delta).recip() * epsilon).clamp_max(1.0);
    (centre.clone() + delta * factor).clamp(0.0, 1.0)
}

/// A pre-norm encoder block (Dosovitskiy et al. 2021, equations 2 and 3).
pub(crate) fn encoder_block(
    x: Tensor<3>,
    weights: &[Tensor<1>; 12],
    spec: &BlockSpec,
    path: Option<&PathScale>,
) -> Tensor<3> {
    if !spec.recompute {
        return encode(x, weights, spec, path);
    }
    let (spec, path) = (spec.clone(), path.cloned());
    anew(x, weights, move |x, weights| {
        let weights = weights.first_chunk().expect("as many as there are");
        encode(x, weights, &spec, path.as_ref())
    })
}

fn encode(
    x: Tensor<3>,
    weights: &[Tensor<1>; 12],
    spec: &BlockSpec,
    path: Option<&PathScale>,
) -> Tensor<3> {
    let linear = |x, weight, bias| linear_in(spec.precision, x, weight, bias);
    let [
        norm1_weight,
        norm1_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        norm2_weight,
        norm2_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
    ] = weights.clone();
    let normed = layer_norm(x.clone(), norm1_weight, norm1_bias, spec.eps);
    let (heads, precision) = (spec.heads, spec.precision);
    // Kept, its scores would be most of a block's memory.
    let mixed = anew(linear(normed, qkv_weight, qkv_bias), &[], move |qkv, _| {
        attention(qkv, heads, precision)
    });
    let branch = linear(mixed, proj_weight, proj_bias);
    let x = x + scaled(branch, path.map(|path| &path.attention[..]));

    let normed = layer_norm(x.clone(), norm2_weight, norm2_bias, spec.eps);
    let hidden = linear(normed, fc1_weight, fc1_bias);
    let branch = linear(gelu(hidden, spec.gelu), fc2_weight, fc2_bias);
    x + scaled(branch, path.map(|path| &path.mlp[..]))
}

/// A ConvNeXt block (Liu et al. 2022, figure 4); see [`crate::ops::convnext::convnext_block`].
pub fn convnext_block(
    x: Tensor<3>,
    size: [usize; 2],
    weights: &[Tensor<1>; 9],
    spec: &ConvNextSpec,
    path: Option<&[f32]>,
) -> Tensor<3> {
    if !spec.recompute {
        return convolve(x, size, weights, spec, path);
    }
    let (spec, path) = (spec.clone(), path.map(<[f32]>::to_vec));
    anew(x, weights, move |x, weights| {
        let weights = weights.first_chunk().expect("as many as there are");
        convolve(x, size, weights, &spec, path.as_deref())
    })
}

fn convolve(
    x: Tensor<3>,
    [height, width]: [usize; 2],
    weights: &[Tensor<1>; 9],
    spec: &ConvNextSpec,
    path: Option<&[f32]>,
) -> Tensor<3> {
    let linear = |x, weight, bias| linear_in(spec.precision, x, weight, bias);
    let [
        gamma,
        conv_weight,
        conv_bias,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
    ] = weights.clone();
    let ([batch, pixels, channels], kernel) = (x.dims(), spec.kernel);
    // [batch, height * width, channels] -> [batch, channels, height, width], and back after the convolution
    let images = x.clone().reshape([batch, height, width, channels]);
    let convolved = conv2d(
        images.permute([0, 3, 1, 2]),
        conv_weight.reshape([channels, 1, kernel, kernel]),
        Some(conv_bias),
        ConvOptions::new([1, 1], [kernel / 2, kernel / 2], [1, 1], channels),
    );
    let convolved = convolved
        .permute([0, 2, 3, 1])
        .reshape([batch, pixels, channels]);
    let normed = layer_norm(convolved, norm_weight, norm_bias, spec.eps);
    let hidden = gelu(linear(normed, fc1_weight, fc1_bias), spec.gelu);
    let branch = linear(hidden, fc2_weight, fc2_bias) * gamma.unsqueeze();
    x + scaled(branch, path)
}

/// A row for every place of a square kernel; see [`crate::ops::unfold`].
pub fn unfold(
    x: Tensor<3>,
    [height, width]: [usize; 2],
    kernel: usize,
    stride: usize,
    padding: usize,
) -> Tensor<3> {
    let [batch, _, channels] = x.dims();
    let images = x.reshape([batch, height, width, channels]);
    let images = padded(images, 1, padding);
    let images = padded(images, 2, padding);
    let places = |size: usize| (size + 2 * padding - kernel) / stride + 1;
    let (down, along) = (places(height), places(width));
    // For every pixel of the kernel, what it meets at all places: [batch, down, along, channels].
    let steps = |start: usize, places: usize| (start..).step_by(stride).take(places);
    let pick = |images: Tensor<4>, axis: usize, start: usize, places: usize| {
        let parts = steps(start, places).map(|at| images.clone().narrow(axis, at, 1));
        Tensor::cat(parts.collect(), axis)
    };
    let mut seen = Vec::new();
    for y in 0..kernel {
        let lines = pick(images.clone(), 1, y, down);
        seen.extend((0..kernel).map(|x| pick(lines.clone(), 2, x, along)));
    }
    Tensor::cat(seen, 3).reshape([batch, down * along, kernel * kernel * channels])
}

/// Zeros before and behind along one axis.
fn padded(images: Tensor<4>, axis: usize, padding: usize) -> Tensor<4> {
    if padding == 0 {
        return images;
    }
    let zeros = images.clone().narrow(axis, 0, 1).zeros_like();
    let mut parts = vec![zeros; 2 * padding + 1];
    parts[padding] = images;
    Tensor::cat(parts, axis)
}

/// Multi-head self-attention on queries, keys and values in one tensor.
///
/// Shapes: `qkv` `[batch, tokens, 3 * width]`, in timm's order; the result `[batch, tokens, width]`.
fn attention(qkv: Tensor<3>, heads: usize, precision: Precision) -> Tensor<3> {
    let [batch, tokens, triple] = qkv.dims();
    let width = triple / 3;
    let head = width / heads;
    let on_gpu = !crate::ops::on_kernels(&qkv);
    // Once, instead of in each product; nobody looks at what is filled in.
    let qkv = if on_gpu { filled(qkv, 1) } else { qkv };
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
    let mut scores = product(precision, part(0), part(1).transpose()) / (head as f64).sqrt();
    if all > tokens {
        let seen = (0..all).map(|token| if token < tokens { 0.0 } else { UNSEEN });
        scores = scores.clone() + from_vec(seen.collect(), [1, 1, 1, all], &scores.device());
    }
    // [batch, heads, all, head] -> [batch, all, width]
    let mixed = product(precision, softmax(scores, 3), part(2))
        .permute([0, 2, 1, 3])
        .reshape([batch, all, width]);
    shortened(mixed, 1, tokens)
}

/// A score whose exponential is 0 beside that of any other.
const UNSEEN: f32 = -1e30;

/// GELU (Hendrycks and Gimpel 2016): exact, the approximation that CLIPA's towers were trained with, and the one of
/// OpenAI's CLIP.
pub fn gelu(x: Tensor<3>, kind: Gelu) -> Tensor<3> {
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
            let device = branch.device();
            branch * crate::ops::from_vec(factors.to_vec(), [factors.len(), 1, 1], &device)
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::rng::{Purpose, Rng};

    fn draw<const D: usize>(seed: u64, shape: [usize; D]) -> Tensor<D> {
        let mut rng = Rng::new(seed, Purpose::Bench, 0, 0);
        let count = shape.iter().product();
        let values: Vec<f64> = (0..count).map(|_| f64::from(rng.normal()) * 0.5).collect();
        Tensor::from_data(
            TensorData::new(values, shape),
            (&Device::flex(), DType::F64),
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
        for gelu in [Gelu::Erf, Gelu::Tanh, Gelu::Quick] {
            let spec = BlockSpec {
                heads: 2,
                hidden,
                gelu,
                eps: 1e-6,
                precision: Precision::F32,
                recompute: false,
            };
            let block = |x, weights: &[Tensor<1>; 12]| encoder_block(x, weights, &spec, None);
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
        let block = |x, weights: &[Tensor<1>; 9]| convnext_block(x, [3, 5], weights, &spec, None);
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
