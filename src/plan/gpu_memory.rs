//! Estimates the memory of a run on an NVIDIA GPU from the buffers of the CUDA engine.
//!
//! `tests/gpu.rs` compares it with the engine's own count. The driver and cuBLASLt take about half a GiB more.

use super::link::FLOAT;
use super::memory::{LARGEST_PART, Memory};
use crate::distributed;
use crate::model::ModelConfig;
use crate::ops::{Device, Precision};
use crate::recipe::{Phase, Recipe, Stage};

/// Bytes of the driver's context, its kernels, and the workspace of cuBLASLt.
pub const GPU_CONTEXT: u64 = 512 << 20;

/// Returns the memory available to a run on a device, in the terms of plans. Unknown (`None`) for GPUs through Burn.
pub fn free_memory(device: &Device) -> Option<u64> {
    match device.gpu() {
        // The driver's context is already allocated, and plans include it.
        Some(gpu) => Some(gpu.memory().0 as u64 + GPU_CONTEXT),
        None => distributed::available_memory().filter(|_| device.is_cpu()),
    }
}

/// Bytes per element of the residual stream, which is f32.
const STREAM: u128 = 4;

/// Copies of the images alive in a backward pass: clean, adversarial, patches, and their gradients.
const IMAGE_COPIES: u64 = 6;

/// Returns the peak memory of a GPU, which occurs at the start of an update's backward pass.
pub(super) fn memory(
    recipe: &Recipe,
    stage: &Stage,
    phase: &Phase,
    classes: usize,
    precision: Precision,
    [batch, chunk]: [u64; 2],
    devices: u64,
) -> Memory {
    let model = &recipe.model;
    let parameters = model.parameters(classes, recipe.first_image_size());
    let kind = if precision == Precision::Bf16 { 2 } else { 4 };
    let tokens = recipe.tokens(phase).unwrap_or_default();
    let blocks = blocks(model, phase.image_size as usize, tokens, chunk, kind);
    let capped = |bytes: u128| bytes.min(LARGEST_PART) as u64;
    let sum = |of: fn(&Blocks) -> u128| capped(blocks.iter().map(|b| b.count * of(b)).sum());
    let largest = |of: fn(&Blocks) -> u128| capped(blocks.iter().map(of).max().unwrap_or_default());
    let images = batch * 3 * phase.image_size * phase.image_size * FLOAT;
    let part = (parameters * FLOAT).div_ceil(devices);
    let shards = recipe.parallel.local_shards(devices as usize).max(1) as u64;
    let sums = match batch.div_ceil(chunk.max(1)) {
        1 => 1,
        // The gradients of the next microbatch arrive while sums of 1, 2, 4 ... shards wait.
        _ => 2 + u64::from(shards.ilog2()),
    };
    let matrices = sum(|b| b.matrices);
    let kept = match recipe.recompute {
        true => sum(|b| b.between) + largest(|b| b.kept),
        false => sum(|b| b.kept),
    };
    let activations = stage.passes_at_once() * kept + largest(|b| b.passing);
    Memory {
        weights: parameters * FLOAT,
        gradients: sums * parameters * FLOAT,
        moments: 2 * part,
        average: if recipe.average.is_some() { part } else { 0 },
        exchange: 0,
        // Rounded once per update; in f32, products use the weights directly.
        packed: if kind == 2 { matrices * kind as u64 } else { 0 },
        reference: match stage.objective.reference() {
            Some(_) => parameters * FLOAT + if kind == 2 { matrices * kind as u64 } else { 0 },
            None => 0,
        },
        // A block's activations are freed when its gradients are computed, so only the excess over them counts.
        activations: activations.saturating_sub(parameters * FLOAT),
        base: GPU_CONTEXT + IMAGE_COPIES * images + 4 * batch * classes as u64 * FLOAT,
    }
}

/// A group of identical blocks, in bytes per block; matrices in elements.
struct Blocks {
    count: u128,
    /// Weights used in matrix products.
    matrices: u128,
    /// Activations kept for the backward pass of an update.
    kept: u128,
    /// Temporary buffers of the backward pass.
    passing: u128,
    /// Activations passed between blocks.
    between: u128,
}

fn blocks(
    model: &ModelConfig,
    image_size: usize,
    tokens: u64,
    batch: u64,
    kind: u128,
) -> Vec<Blocks> {
    match model {
        ModelConfig::Vit(vit) => {
            let (width, hidden) = (vit.width as u128, vit.hidden as u128);
            let rows = u128::from(batch) * u128::from(tokens);
            vec![Blocks {
                count: vit.depth as u128,
                matrices: 4 * width * width + 2 * width * hidden,
                // The input and the sum after attention; queries, keys and values, and the attention output; the hidden
                // layer before and after its GELU; means and scales of both norms, sums of the softmax; norm outputs of
                // rows too wide for registers.
                kept: rows
                    * (2 * width * STREAM
                        + if width <= 2048 { 4 } else { 6 } * width * kind
                        + 2 * hidden * kind
                        + 16
                        + 4 * vit.heads as u128),
                // The gradients of the output, also rounded, and of the hidden layer: on both sides of its GELU, or
                // with the norm output, its gradient, and that of the sum with its rounded form.
                passing: rows
                    * (width * (STREAM + kind)
                        + hidden * kind
                        + (hidden * kind).max(width * (STREAM + 3 * kind))),
                between: rows * width * STREAM,
            }]
        }
        ModelConfig::ConvNext(convnext) => {
            let stages = convnext.widths.iter().zip(convnext.depths).enumerate();
            let stage = |(stage, (width, depth)): (usize, (&usize, usize))| {
                let side = (image_size / convnext.patch) >> stage;
                let rows = u128::from(batch) * (side * side) as u128;
                let width = *width as u128;
                Blocks {
                    count: depth as u128,
                    matrices: 8 * width * width,
                    // The input; the outputs of the convolution and the norm; the hidden layer before and after its
                    // GELU.
                    kept: rows * (width * STREAM + 2 * width * kind + 8 * width * kind + 8),
                    passing: rows * (width * (2 * STREAM + 2 * kind) + 8 * width * kind),
                    between: rows * width * STREAM,
                }
            };
            stages.map(stage).collect()
        }
    }
}
