//! How long a training step takes on an NVIDIA GPU, from constants of that GPU.
//!
//! A step is a sum of what its kernels take: products by operations, passes by the bytes that they read and write,
//! attention by both; `advxl bench device` measures the constants, and those of an H100 come with the program. The counts
//! below follow `advxl_cuda`'s blocks kernel by kernel. What the host needs to queue all kernels is a lower bound.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use advxl_cuda::measure::{Line, Measured, Rates, attention_amounts};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::files;
use crate::model::ModelConfig;
use crate::ops::{AttackPrecision, Gelu, Numerics, Precision};

/// Constants of a GPU, as they are kept in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuConstants {
    /// The GPU's name.
    pub name: String,
    /// Where the numbers come from.
    pub source: String,
    /// Bytes that a pass over memory reads and writes in a second, in 10^9.
    pub copy_gb: f64,
    /// In which the host queues one kernel, in millionths of a second.
    pub launch_us: f64,
    /// By precision: `f32`, `tf32`, `bf16`, `fp8`.
    pub rates: BTreeMap<String, PrecisionConstants>,
    /// A depthwise convolution of 7 x 7, its input's gradient and its weight's: 10^-12 seconds for one element. Absent where
    /// it was not measured.
    pub depthwise_ps: Option<[f64; 3]>,
}

/// Constants of one precision.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrecisionConstants {
    /// Products for a layer's output, its input's gradient and its weight's: 10^12 operations a second, and what each
    /// product takes besides, in millionths of a second.
    pub products: [[f64; 2]; 3],
    /// Attention and its gradient: 10^12 operations and 10^9 bytes a second, one after the other.
    pub attention: [[f64; 2]; 2],
}

/// An H100, from the recorded times of kernels in `benchmarks/h100`, products and attention in bf16 and FP8 from the same card.
const H100: &str = include_str!("h100.json");

impl GpuConstants {
    /// Those of a GPU that was measured.
    pub fn of(name: &str, measured: &Measured) -> Self {
        // A part that takes no time is infinitely fast, which JSON cannot say.
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

    /// Those that a file holds, or with the name `h100` those that come with the program.
    ///
    /// Errors: the file cannot be read, or holds something else.
    pub fn load(name: &str) -> Result<Self> {
        let text = match name {
            "h100" => H100.to_owned(),
            path => files::read_text(Path::new(path)).map_err(|error| {
                error.hint("give `h100`, or a file that `advxl bench device --device cuda` wrote")
            })?,
        };
        let parsed = serde_json::from_str(&text).map_err(|error| {
            Error::input(format!("no constants of a GPU: {error}"))
                .hint("`advxl bench device --device cuda` writes such a file")
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
                "`{name}`: constants of a GPU are numbers above 0"
            ))),
        }
    }

    /// Where `advxl bench device` keeps those of a GPU.
    pub fn path(name: &str) -> Option<PathBuf> {
        let name: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
            .collect();
        Some(Self::folder()?.join(format!("{name}.json")))
    }

    /// The folder of these files.
    pub fn folder() -> Option<PathBuf> {
        Some(advxl_cuda::cache_folder()?.join("devices"))
    }

    /// 10^12 operations a second in large products of this precision.
    ///
    /// Errors: the constants lack it.
    pub fn tflops(&self, precision: Precision) -> Result<f64> {
        let [[tflops, _], ..] = self.rates(precision.word())?.products;
        Ok(tflops)
    }

    fn rates(&self, precision: &str) -> Result<&PrecisionConstants> {
        self.rates.get(precision).ok_or_else(|| {
            let there: Vec<_> = self.rates.keys().map(String::as_str).collect();
            Error::input(format!(
                "the constants of {} have no {precision}, only {}",
                self.name,
                there.join(", ")
            ))
            .hint("measure them: advxl bench device --device cuda")
        })
    }
}

impl PrecisionConstants {
    /// Seconds of a product of `operations`.
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

/// A step whose time is asked for.
#[derive(Clone, Copy, Debug)]
pub struct StepShape<'a> {
    /// The model.
    pub model: &'a ModelConfig,
    /// Weights.
    pub parameters: u64,
    /// Pixels on a side.
    pub image_size: usize,
    /// Tokens of an image; 0 in a ConvNeXt.
    pub tokens: u64,
    /// Images.
    pub batch: u64,
    /// Steps of the attack.
    pub attack_steps: u64,
    /// Arithmetic of the update.
    pub precision: Precision,
    /// Arithmetic of the attack.
    pub attack: Numerics,
    /// Whether activations are recomputed.
    pub recompute: bool,
    /// Whether branches are dropped at random.
    pub drop_path: bool,
}

/// Seconds of passes and how many kernels they queue.
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

/// Kernels that a step queues besides those of blocks: images, tokens, head, loss, sums.
const OTHER_KERNELS: f64 = 40.0;

/// Seconds of one step.
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
    // Bytes to floats, a random start, patches of every pass, their gradients and steps of the attack.
    let images = copy(pixels * (5.0 + 8.0 + 6.0 * (k + 1.0) + (6.0 + 16.0) * k));
    // Weights, gradients, two moments, an average and the rounded weights; squares of the gradients.
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

/// Blocks, embedding and pooling: forward and the gradients.
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
            // The patch embedding, tokens, their gradients.
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
                    "the constants of {} have no depthwise convolutions",
                    gpu.name
                ))
                .hint("measure them: advxl bench device --device cuda")
            })?;
            let stages = convnext.widths.iter().zip(convnext.depths).enumerate();
            let stage = |(stage, (width, depth)): (usize, (&usize, usize))| {
                let side = ((step.image_size / convnext.patch) >> stage) as f64;
                let rows = step.batch as f64 * side * side;
                work.convnext_block(rows, *width as f64, depthwise) * depth as f64
            };
            // Stem and downsampling are left out: a few percent.
            stages
                .map(stage)
                .fold(Time::default(), |sum, time| sum + time)
        }
    })
}

/// How blocks are passed.
struct Work<'a> {
    step: &'a StepShape<'a>,
    gpu: &'a GpuConstants,
    rates: &'a PrecisionConstants,
    numerics: Numerics,
    /// Whether gradients of the weights are computed.
    weights: bool,
}

impl Work<'_> {
    /// Bytes of a number of the residual stream.
    fn stream(&self) -> f64 {
        match self.numerics {
            Numerics::Precise(_) => 4.0,
            Numerics::AttackBf16 | Numerics::AttackFp8 => 2.0,
        }
    }

    /// Bytes of a number between products.
    fn cell(&self) -> f64 {
        match self.numerics.products() {
            Precision::Bf16 => 2.0,
            _ => 4.0,
        }
    }

    /// Seconds of passes over `numbers`, with `bytes` read and written for each.
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
        // Bytes for each number of the stream, forward and backward; see `advxl_cuda`'s block.
        let (forward, backward, kernels) = match self.numerics {
            Numerics::AttackFp8 => {
                // Norms read the stream and a branch, write the sum and FP8; attention's result is quantized; the GELU reads
                // bf16 and writes FP8; the last branch is added.
                let forward = (2.0 + 1.0) + 3.0 + (2.0 + 2.0 + 2.0 + 1.0) + 3.0 * ratio + 6.0;
                // Gradients of norms are written in both formats; those of queries, keys and values are quantized.
                let backward = 5.0 * ratio + 2.0 * 9.0 + 3.0 * 3.0;
                (forward, backward, [11.0, 11.0])
            }
            _ => {
                // Norms; the GELU's input read and its result written, or the input alone; what the residuals read and write
                // beyond a product's result.
                let gelu = if is_fused { ratio * c } else { 2.0 * ratio * c };
                let forward = 2.0 * (s + c) + gelu + 2.0 * (2.0 * s - c).max(s);
                let gelu = if is_fused {
                    1.5 * ratio * c
                } else {
                    3.0 * ratio * c
                };
                let rounded = if s > c { 2.0 * c } else { 0.0 };
                // With the gradients of weights a norm's result comes again.
                let again = if self.weights { 2.0 * c } else { 0.0 };
                let norms = 2.0 * (c + 3.0 * s) + rounded + again;
                // Biases: of qkv where attention does not sum it, of fc2 and proj where norms do not.
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
        // Branches times the path's factors: apart from the products, forward and backward.
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
        // The norm, the GELU of four times the width, the scaled residual; and their gradients.
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

    /// Milliseconds of a step, predicted.
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
    fn small_models_take_what_the_host_needs_to_queue_them_and_fp8_is_faster_than_bf16() {
        let small = |batch| predicted("vit_micro", 32, batch, 1, Numerics::AttackBf16);
        assert!((small(8) / small(16) - 1.0).abs() < 1e-9);
        let of = |attack| predicted("vit_l16", 112, 512, 3, attack);
        assert!(of(Numerics::AttackFp8) < of(Numerics::AttackBf16));
    }

    #[test]
    fn a_file_of_something_else_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("constants.json");
        for (text, part) in [
            ("{}", "no constants of a GPU"),
            (&H100.replace("2700.0", "-1.0"), "numbers above 0"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = GpuConstants::load(path.to_str().unwrap()).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
