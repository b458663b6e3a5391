//! The operations of this module composed from Burn's own: their definition.
//!
//! Written for clearness; every device can run them, and the tests hold the kernels to them.

use burn::tensor::Tensor;
use burn::tensor::activation::{gelu, softmax};

use super::Gelu;
use super::block::{BlockSpec, PathScale};

/// Layer norm over the last axis (Ba et al. 2016): `(x - mean) / sqrt(variance + eps) * weight + bias`.
pub fn layer_norm(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<3> {
    let centred = x.clone() - x.mean_dim(2);
    let variance = (centred.clone() * centred.clone()).mean_dim(2);
    centred / (variance + eps).sqrt() * weight.unsqueeze() + bias.unsqueeze()
}

/// `x W^T + b` with the weight as PyTorch keeps it.
///
/// Shapes: `x` [batch, tokens, in]; `weight` [out * in], rows of `out`; `bias` [out].
pub fn linear(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>) -> Tensor<3> {
    let [batch, tokens, inputs] = x.dims();
    let outputs = bias.dims()[0];
    let weight = weight.reshape([outputs, inputs]).transpose();
    // [batch, tokens, in] -> [batch * tokens, in], one product for the whole batch
    let product = x.reshape([batch * tokens, inputs]).matmul(weight);
    (product + bias.unsqueeze()).reshape([batch, tokens, outputs])
}

/// A pre-norm encoder block (Dosovitskiy et al. 2021, equations 2 and 3).
pub(super) fn encoder_block(
    x: Tensor<3>,
    weights: &[Tensor<1>; 12],
    spec: &BlockSpec,
    path: Option<&PathScale>,
) -> Tensor<3> {
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
    let mixed = attention(linear(normed, qkv_weight, qkv_bias), spec.heads);
    let branch = linear(mixed, proj_weight, proj_bias);
    let x = x + scaled(branch, path.map(|path| &path.attention));

    let normed = layer_norm(x.clone(), norm2_weight, norm2_bias, spec.eps);
    let hidden = linear(normed, fc1_weight, fc1_bias);
    let hidden = match spec.gelu {
        Gelu::Erf => gelu(hidden),
        Gelu::Tanh => gelu_tanh(hidden),
    };
    let branch = linear(hidden, fc2_weight, fc2_bias);
    x + scaled(branch, path.map(|path| &path.mlp))
}

/// Multi-head self-attention on queries, keys and values in one tensor.
///
/// Shapes: `qkv` [batch, tokens, 3 * width], in timm's order; the result [batch, tokens, width].
fn attention(qkv: Tensor<3>, heads: usize) -> Tensor<3> {
    let [batch, tokens, triple] = qkv.dims();
    let width = triple / 3;
    let head = width / heads;
    // [batch, tokens, 3 * width] -> [3, batch, heads, tokens, head]
    let qkv = qkv
        .reshape([batch, tokens, 3, heads, head])
        .permute([2, 0, 3, 1, 4]);
    let part = |index: usize| {
        qkv.clone()
            .narrow(0, index, 1)
            .reshape([batch, heads, tokens, head])
    };
    let scores = part(0).matmul(part(1).transpose()) / (head as f64).sqrt();
    // [batch, heads, tokens, head] -> [batch, tokens, width]
    softmax(scores, 3)
        .matmul(part(2))
        .permute([0, 2, 1, 3])
        .reshape([batch, tokens, width])
}

/// The approximation that CLIPA's towers were trained with.
fn gelu_tanh(x: Tensor<3>) -> Tensor<3> {
    let inner =
        (x.clone() + x.clone().powi_scalar(3) * 0.044715) * (2.0 / std::f64::consts::PI).sqrt();
    x * (inner.tanh() + 1.0) * 0.5
}

fn scaled(branch: Tensor<3>, factors: Option<&Vec<f32>>) -> Tensor<3> {
    match factors {
        None => branch,
        Some(factors) => {
            let device = branch.device();
            branch * super::from_vec(factors.clone(), [factors.len(), 1, 1], &device)
        }
    }
}
