//! Estimates the time of a training step on an NVIDIA GPU from measured constants of that GPU.
//!
//! The time of a step is the sum over its kernels: matrix products by operations, elementwise passes by bytes read and
//! written, attention by both. `advxl bench device` measures the constants; those of an H100 are built in. The counts
//! below follow `advxl_cuda`'s blocks kernel by kernel. The time in which the host queues all kernels is a lower bound.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use advxl_cuda::measure::{Line, Measured, Rates, attention_amounts};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::files;
use crate::model::ModelConfig;
use crate::ops::{AttackPrecision, Gelu, Numerics, Precision};

/// Performance constants of a GPU, in the format of the constants file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuConstants {
    /// The GPU's name.
    pub name: String,
    /// Source of the numbers.
    pub source: String,
    /// Memory bandwidth of elementwise passes, read plus write, in 10^9 bytes per second.
    pub copy_gb: f64,
    /// Time in which the host queues one kernel, in microseconds.
    pub launch_us: f64,
    /// Constants by precision: `f32`, `tf32`, `bf16`, `fp8`.
    pub rates: BTreeMap<String, PrecisionConstants>,
    /// 7 x 7 depthwise convolution, its input gradient and its weight gradient, in picoseconds per element. Absent if
    /// not measured.
    pub depthwise_ps: Option<[f64; 3]>,
}

/// Constants of one precision.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrecisionConstants {
    /// Matrix products for a layer's output, input gradient and weight gradient: 10^12 operations per second, and the
    /// fixed overhead of each product in microseconds.
    pub products: [[f64; 2]; 3],
    /// Attention and its gradient: 10^12 operations per second and 10^9 bytes per second, whose times add up.
    pub attention: [[f64; 2]; 2],
}

/// Constants of an H100, from the kernel times recorded in `benchmarks/h100`; products and attention in bf16 and FP8
/// are from the same card.
const H100: &str = include_str!("h100.json");

impl GpuConstants {
    /// Converts measurements of a GPU.
    pub fn of(name: &str, measured: &Measured) -> Self {
        // Caps the rate of a part that takes no time, since JSON cannot represent infinity.
        let rate = |seconds: f64, unit: f64| (1.0 / seconds.max(1e-30) / unit).min(1e9);
        let of = |rates: &Rates| PrecisionConstants {
            products: rates
                .products
                .map(|line| [rate(line.seconds[0], 1e12), line.seconds[1] * 1e6]),
            attention: rates
                .attention
                .map(|line| [rate(line.seconds[0], 1e12), rate(line.seconds[1], 1e9)]),
        };
        let rates = measured.rates.iter();
        Self {
            name: name.to_owned(),
            source: "advxl bench device".to_owned(),
            copy_gb: measured.copy / 1e9,
            launch_us: measured.launch * 1e6,
            rates: rates
                .map(|(name, rates)| ((*name).to_owned(), of(rates)))
                .collect(),
            depthwise_ps: Some(measured.depthwise.map(|seconds| seconds * 1e12)),
        }
    }

    /// Loads constants from a file, or the built-in ones for the name `h100`.
    ///
    /// Errors: the file cannot be read or is invalid.
    pub fn load(name: &str) -> Result<Self> {
        let text = match name {
            "h100" => H100.to_owned(),
            path => files::read_text(Path::new(path)).map_err(|error| {
                error.hint("use `h100`, or a file written by `advxl bench device --device cuda`")
            })?,
        };
        let parsed = serde_json::from_str(&text).map_err(|error| {
            Error::input(format!("invalid GPU constants: {error}"))
                .hint("create the file with `advxl bench device --device cuda`")
        });
        let constants: Self = parsed.context(|| format!("`{name}`"))?;
        let numbers = constants.rates.values().flat_map(|rates| {
            let products = rates.products.iter().flatten();
            products
                .chain(rates.attention.iter().flatten())
                .copied()
                .collect::<Vec<_>>()
        });
        let all = [constants.copy_gb].into_iter().chain(numbers);
        let good = all
            .into_iter()
            .all(|number| number.is_finite() && number >= 0.0);
        match good && constants.copy_gb > 0.0 {
            true => Ok(constants),
            false => Err(Error::input(format!(
                "`{name}`: GPU constants must be finite and not negative, and `copy_gb` above 0"
            ))),
        }
    }

    /// Returns the path where `advxl bench device` stores the constants of a GPU.
    pub fn path(name: &str) -> Option<PathBuf> {
        let name: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
            .collect();
        Some(Self::folder()?.join(format!("{name}.json")))
    }

    /// Returns the folder of the constants files.
    pub fn folder() -> Option<PathBuf> {
        Some(advxl_cuda::cache_folder()?.join("devices"))
    }

    /// Returns the rate of large matrix products in this precision, in 10^12 operations per second.
    ///
    /// Errors: the constants lack the precision.
    pub fn tflops(&self, precision: Precision) -> Result<f64> {
        let [[tflops, _], ..] = self.rates(precision.word())?.products;
        Ok(tflops)
    }

    fn rates(&self, precision: &str) -> Result<&PrecisionConstants> {
        self.rates.get(precision).ok_or_else(|| {
            let there: Vec<_> = self.rates.keys().map(String::as_str).collect();
            Error::input(format!(
                "the GPU constants of {} have no entry for {precision}, only {}",
                self.name,
                there.join(", ")
            ))
            .hint("measure them with `advxl bench device --device cuda`")
        })
    }
}

impl PrecisionConstants {
    /// Returns the seconds of a matrix product.
    fn product(&self, which: usize, operations: f64) -> f64 {
        let [tflops, us] = self.products[which];
        operations / (tflops * 1e12) + us * 1e-6
    }

    fn attention(&self, which: usize, elements: f64, tokens: f64, bytes: f64) -> f64 {
        let line = Line {
            seconds: self.attention[which].map(|rate| 1.0 / rate),
        };
        let [operations, bytes] = attention_amounts(elements, tokens, bytes)[which];
        line.seconds[0] * operations / 1e12 + line.seconds[1] * bytes / 1e9
    }
}

/// A training step whose time is estimated.
#[derive(Clone, Copy, Debug)]
pub struct StepShape<'a> {
    /// The model.
    pub model: &'a ModelConfig,
    /// Number of weights.
    pub parameters: u64,
    /// Image size in pixels.
    pub image_size: usize,
    /// Tokens per image; 0 for a ConvNeXt.
    pub tokens: u64,
    /// Batch size.
    pub batch: u64,
    /// Attack steps.
    pub attack_steps: u64,
    /// Precision of the update.
    pub precision: Precision,
    /// Precision of the attack.
    pub attack: Numerics,
    /// Whether activations are recomputed.
    pub recompute: bool,
    /// Whether drop path is enabled.
    pub drop_path: bool,
}

/// Time of passes and the number of kernels they queue.
#[derive(Clone, Copy, Debug, Default)]
struct Time {
    seconds: f64,
    kernels: f64,
}

impl std::ops::Add for Time {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            seconds: self.seconds + other.seconds,
            kernels: self.kernels + other.kernels,
        }
    }
}

impl std::ops::Mul<f64> for Time {
    type Output = Self;

    fn mul(self, count: f64) -> Self {
        Self {
            seconds: self.seconds * count,
            kernels: self.kernels * count,
        }
    }
}

/// Kernels of a step outside the blocks: images, tokens, head, loss, sums.
const OTHER_KERNELS: f64 = 40.0;

/// Returns the seconds of one step.
///
/// Errors: the constants lack a precision.
pub fn step_seconds(step: &StepShape, gpu: &GpuConstants) -> Result<f64> {
    let k = step.attack_steps as f64;
    let update = of_blocks(step, gpu, step.precision.into(), true)?;
    let attack = match step.attack_steps {
        0 => Time::default(),
        _ => of_blocks(step, gpu, step.attack, false)?,
    };
    let copy = |bytes: f64| bytes / (gpu.copy_gb * 1e9);
    let pixels = step.batch as f64 * 3.0 * (step.image_size as f64).powi(2);
    // Bytes to floats, random start, patches of every pass, their gradients and the attack steps.
    let images = copy(pixels * (5.0 + 8.0 + 6.0 * (k + 1.0) + (6.0 + 16.0) * k));
    // Weights, gradients, two moments, the weight average and the rounded weights; squared gradients.
    let weights = copy(step.parameters as f64 * (38.0 + 4.0));
    let forms = match step.attack {
        Numerics::AttackFp8 if step.attack_steps > 0 => copy(step.parameters as f64 * 22.0),
        _ => 0.0,
    };
    let all = attack * k + update;
    let device = all.seconds + images + weights + forms;
    let host = (all.kernels + OTHER_KERNELS * (k + 1.0)) * gpu.launch_us * 1e-6;
    Ok(device.max(host))
}

/// Returns the forward and backward time of blocks, embedding and pooling.
fn of_blocks(
    step: &StepShape,
    gpu: &GpuConstants,
    numerics: Numerics,
    weights: bool,
) -> Result<Time> {
    let outside = numerics.products().word();
    let rates = gpu.rates(match numerics {
        Numerics::AttackFp8 => AttackPrecision::Fp8.word(),
        _ => outside,
    })?;
    let outside = gpu.rates(outside)?;
    let work = Work {
        step,
        gpu,
        rates,
        numerics,
        weights,
    };
    Ok(match step.model {
        ModelConfig::Vit(vit) => {
            let rows = step.batch as f64 * step.tokens as f64;
            let (w, h) = (vit.width as f64, vit.hidden as f64);
            let block = work.encoder_block(rows, w, h, step.tokens as f64, vit.gelu);
            // Patch embedding, tokens, and their gradients.
            let operations = 2.0 * rows * w * 3.0 * (vit.patch as f64).powi(2);
            let embedding = outside.product(0, operations)
                + outside.product(1, operations)
                + if weights {
                    outside.product(2, operations)
                } else {
                    0.0
                }
                + work.pass(rows * w, 5.0 * work.stream());
            block * vit.depth as f64
                + Time {
                    seconds: embedding,
                    kernels: 0.0,
                }
        }
        ModelConfig::ConvNext(convnext) => {
            let depthwise = gpu.depthwise_ps.ok_or_else(|| {
                Error::input(format!(
                    "the GPU constants of {} have no times for depthwise convolutions",
                    gpu.name
                ))
                .hint("measure them with `advxl bench device --device cuda`")
            })?;
            let stages = convnext.widths.iter().zip(convnext.depths).enumerate();
            let stage = |(stage, (width, depth)): (usize, (&usize, usize))| {
                let side = ((step.image_size / convnext.patch) >> stage) as f64;
                let rows = step.batch as f64 * side * side;
                work.convnext_block(rows, *width as f64, depthwise) * depth as f64
            };
            // Stem and downsampling are omitted; they take a few percent.
            stages
                .map(stage)
                .fold(Time::default(), |sum, time| sum + time)
        }
    })
}

/// Settings for estimating blocks.
struct Work<'a> {
    step: &'a StepShape<'a>,
    gpu: &'a GpuConstants,
    rates: &'a PrecisionConstants,
    numerics: Numerics,
    /// Whether gradients of the weights are computed.
    weights: bool,
}

impl Work<'_> {
    /// Returns the bytes per element of the residual stream.
    fn stream(&self) -> f64 {
        match self.numerics {
            Numerics::Precise(_) => 4.0,
            Numerics::AttackBf16 | Numerics::AttackFp8 => 2.0,
        }
    }

    /// Returns the bytes per element of operands and results of products.
    fn cell(&self) -> f64 {
        match self.numerics.products() {
            Precision::Bf16 => 2.0,
            _ => 4.0,
        }
    }

    /// Returns the seconds of elementwise passes over `numbers` elements, with `bytes` read and written per element.
    fn pass(&self, numbers: f64, bytes: f64) -> f64 {
        numbers * bytes / (self.gpu.copy_gb * 1e9)
    }

    fn encoder_block(&self, rows: f64, w: f64, h: f64, tokens: f64, gelu: Gelu) -> Time {
        let (r, s, c) = (self.rates, self.stream(), self.cell());
        let layers = [3.0 * w * w, w * w, w * h, w * h].map(|weights| 2.0 * rows * weights);
        let products = |which: usize| {
            layers
                .iter()
                .map(|operations| r.product(which, *operations))
                .sum::<f64>()
        };
        let attention = |which: usize| r.attention(which, rows * w, tokens, c);
        let ratio = h / w;
        let is_fused = c == 2.0 && self.numerics.gelu(gelu) == Gelu::Tanh;
        // Bytes per element of the stream, forward and backward; see `advxl_cuda`'s block.
        let (forward, backward, kernels) = match self.numerics {
            Numerics::AttackFp8 => {
                // Norms read the stream and a branch, and write the sum and FP8; the attention output is quantized; the
                // GELU reads bf16 and writes FP8; the last branch is added.
                let forward = (2.0 + 1.0) + 3.0 + (2.0 + 2.0 + 2.0 + 1.0) + 3.0 * ratio + 6.0;
                // Norm gradients are written in both formats; those of queries, keys and values are quantized.
                let backward = 5.0 * ratio + 2.0 * 9.0 + 3.0 * 3.0;
                (forward, backward, [11.0, 11.0])
            }
            _ => {
                // Norms; the GELU's input read and its output written, or the input alone; reads and writes of the
                // residuals beyond the product's output.
                let gelu = if is_fused { ratio * c } else { 2.0 * ratio * c };
                let forward = 2.0 * (s + c) + gelu + 2.0 * (2.0 * s - c).max(s);
                let gelu = if is_fused {
                    1.5 * ratio * c
                } else {
                    3.0 * ratio * c
                };
                let rounded = if s > c { 2.0 * c } else { 0.0 };
                // Weight gradients need the norm output again.
                let again = if self.weights { 2.0 * c } else { 0.0 };
                let norms = 2.0 * (c + 3.0 * s) + rounded + again;
                // Bias gradients: of qkv unless attention sums it, of fc2 and proj unless the norms do.
                let sums = if self.weights {
                    let of_branches = if self.step.drop_path || s == c {
                        2.0 * c
                    } else {
                        0.0
                    };
                    of_branches + if tokens > 80.0 { 3.0 * c } else { 0.0 }
                } else {
                    0.0
                };
                let kernels = if self.weights {
                    [8.0, 17.0]
                } else {
                    [7.0, 8.0]
                };
                (forward, gelu + norms + sums, kernels)
            }
        };
        // Drop path: scaling of the branches as separate passes, forward and backward.
        let paths = if self.weights && self.step.drop_path {
            2.0 * (2.0 * s + c) + 2.0 * (s + c)
        } else {
            0.0
        };
        let of_forward = products(0) + attention(0) + self.pass(rows * w, forward);
        let again = if self.step.recompute { 2.0 } else { 1.0 };
        let of_weights = if self.weights { products(2) } else { 0.0 };
        Time {
            seconds: again * of_forward
                + products(1)
                + of_weights
                + attention(1)
                + self.pass(rows * w, backward + paths),
            kernels: again * kernels[0] + kernels[1],
        }
    }

    fn convnext_block(&self, rows: f64, w: f64, depthwise: [f64; 3]) -> Time {
        let (r, c) = (self.rates, self.cell());
        let operations = 2.0 * rows * 4.0 * w * w;
        let depthwise = |which: usize| depthwise[which] * 1e-12 * rows * w;
        let products = |which: usize| 2.0 * r.product(which, operations);
        // The norm, the GELU at four times the width, the scaled residual; and their gradients.
        let forward = products(0) + depthwise(0) + self.pass(rows * w, (4.0 + c) + 8.0 * c + 12.0);
        let backward = products(1) + depthwise(1) + self.pass(rows * w, 12.0 * c + 16.0);
        let weights = if self.weights {
            products(2) + depthwise(2)
        } else {
            0.0
        };
        let again = if self.step.recompute { 2.0 } else { 1.0 };
        Time {
            seconds: again * forward + backward + weights,
            kernels: again * 6.0 + 8.0 + if self.weights { 12.0 } else { 0.0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the predicted milliseconds of a step.
    fn predicted(
        name: &str,
        image_size: usize,
        batch: u64,
        attack_steps: u64,
        attack: Numerics,
    ) -> f64 {
        let model = ModelConfig::named(name).unwrap();
        let tokens = ((image_size / 16).pow(2) + 1) as u64;
        let step = StepShape {
            parameters: model.parameters(1000, image_size),
            model: &model,
            image_size,
            tokens,
            batch,
            attack_steps,
            precision: Precision::Bf16,
            attack,
            recompute: false,
            drop_path: false,
        };
        1e3 * step_seconds(&step, &GpuConstants::load("h100").unwrap()).unwrap()
    }

    /// Steps of benchmarks/h100/program.jsonl.
    #[test]
    fn steps_measured_on_an_h100_are_predicted_within_a_seventh() {
        let (bf16, fp8) = (Numerics::AttackBf16, Numerics::AttackFp8);
        for (model, image_size, batch, steps, attack, measured) in [
            ("vit_b16", 112, 1024, 1, bf16, 104.35),
            ("vit_b16", 112, 1024, 1, fp8, 97.47),
            ("vit_b16", 224, 256, 3, bf16, 200.06),
            ("vit_b16", 224, 256, 3, fp8, 185.56),
            ("vit_l16", 112, 512, 1, bf16, 165.52),
            ("vit_l16", 112, 512, 1, fp8, 151.94),
            ("vit_s16", 112, 1024, 1, bf16, 40.79),
        ] {
            let found = predicted(model, image_size, batch, steps, attack);
            eprintln!("{model} {image_size} {attack:?}: {found:.1} ms, measured {measured}");
            assert!((found / measured - 1.0).abs() < 0.15, "{found} {measured}");
        }
    }

    #[test]
    fn small_models_are_bound_by_kernel_launches_and_fp8_is_faster_than_bf16() {
        let small = |batch| predicted("vit_micro", 32, batch, 1, Numerics::AttackBf16);
        assert!((small(8) / small(16) - 1.0).abs() < 1e-9);
        let of = |attack| predicted("vit_l16", 112, 512, 3, attack);
        assert!(of(Numerics::AttackFp8) < of(Numerics::AttackBf16));
    }

    #[test]
    fn invalid_constants_files_are_rejected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("constants.json");
        for (text, part) in [
            ("{}", "invalid GPU constants"),
            (
                &H100.replace("2700.0", "-1.0"),
                "must be finite and not negative",
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = GpuConstants::load(path.to_str().unwrap()).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
