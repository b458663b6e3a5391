//! What a GPU does in a second: the constants from which the time of a training step is planned.

use crate::Precision;
use crate::attention::{AttentionShape, attention, attention_gradient};
use crate::depthwise::{Depthwise, DepthwiseShape, depthwise, depthwise_input_gradient, depthwise_weight_gradient};
use crate::error::Result;
use crate::fp8;
use crate::gpu::Gpu;
use crate::linear::Linear;
use crate::machine::Kind;
use crate::values::Values;

/// Seconds as a sum of two parts: of `amounts[0]` and `amounts[1]`, such as operations and bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line {
    /// Seconds of one of each.
    pub seconds: [f64; 2],
}

impl Line {
    /// The line of least squares of the relative errors through some measurements `([amount, amount], seconds)`. Parts
    /// are never negative.
    pub fn through(points: &[([f64; 2], f64)]) -> Self {
        // Divided by the seconds, every right side is 1.
        let parts: Vec<[f64; 2]> =
            points.iter().map(|(amounts, seconds)| amounts.map(|amount| amount / seconds)).collect();
        let [aa, ab, bb] = [(0, 0), (0, 1), (1, 1)].map(|(i, j)| parts.iter().map(|x| x[i] * x[j]).sum::<f64>());
        let [a, b] = [0, 1].map(|i| parts.iter().map(|x| x[i]).sum::<f64>());
        let determinant = aa * bb - ab * ab;
        let both = [(a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant];
        let seconds = match both {
            [first, second] if first >= 0.0 && second >= 0.0 => both,
            [first, _] if first.is_nan() || first < 0.0 => [0.0, b / bb],
            _ => [a / aa, 0.0],
        };
        Self { seconds }
    }
}

/// Constants of one precision.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Products of a layer, for its output, its input's gradient and its weight's: of operations and products. FP8 has
    /// no third.
    pub products: [Line; 3],
    /// Attention and its gradient: of operations and bytes.
    pub attention: [Line; 2],
}

/// Constants of a GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Bytes that a pass over memory reads and writes in a second.
    pub copy: f64,
    /// Seconds in which the host queues one kernel.
    pub launch: f64,
    /// By precision; the last is FP8, where the GPU has it.
    pub rates: Vec<(&'static str, Rates)>,
    /// A depthwise convolution of 7 x 7, its input's gradient and its weight's: seconds for one element.
    pub depthwise: [f64; 3],
}

/// Sizes that are measured: those of a GPU in software take a moment.
struct Sizes {
    rows: usize,
    widths: [usize; 2],
    samples: usize,
    tokens: [usize; 2],
    heads: usize,
    side: usize,
    repeats: usize,
}

impl Gpu {
    /// Measures the constants, in a few seconds.
    ///
    /// # Errors
    ///
    /// The first failure since the GPU was opened.
    pub fn measure(&self) -> Result<Measured> {
        let sizes = match self.is_software() {
            true => Sizes { rows: 32, widths: [16, 32], samples: 1, tokens: [17, 97], heads: 1, side: 3, repeats: 1 },
            false => Sizes {
                rows: 25_600,
                widths: [768, 1280],
                samples: 128,
                tokens: [50, 197],
                heads: 16,
                side: 14,
                repeats: 5,
            },
        };
        let kinds = [("f32", Precision::F32), ("tf32", Precision::Tf32), ("bf16", Precision::Bf16)];
        let mut rates = Vec::new();
        for (name, precision) in kinds {
            let attention = self.attention_lines(&sizes, precision.kind())?;
            rates.push((name, Rates { products: self.product_lines(&sizes, precision)?, attention }));
        }
        if self.check_fp8().is_ok() {
            let [.., (_, bf16)] = rates[..] else { unreachable!("bf16 was measured") };
            let [forward, input] = self.fp8_lines(&sizes)?;
            rates.push(("fp8", Rates { products: [forward, input, bf16.products[2]], ..bf16 }));
        }
        Ok(Measured {
            copy: self.copy_rate(&sizes)?,
            launch: self.launch_seconds(&sizes)?,
            rates,
            depthwise: self.depthwise_seconds(&sizes)?,
        })
    }

    /// The minimum time of some runs in seconds, after a first run that chooses algorithms.
    fn least(&self, sizes: &Sizes, mut work: impl FnMut()) -> Result<f64> {
        work();
        let mut least = f64::INFINITY;
        for _ in 0..sizes.repeats {
            least = least.min(self.time(&mut work)?);
        }
        Ok(least.max(1e-9))
    }

    fn copy_rate(&self, sizes: &Sizes) -> Result<f64> {
        let count = sizes.rows * 4 * sizes.widths[1];
        let (a, b) = (Values::zeros(self, count, Kind::Bf16), Values::zeros(self, count, Kind::Bf16));
        let seconds = self.least(sizes, || drop(crate::add(&a, &b)))?;
        Ok((3 * count * Kind::Bf16.bytes()) as f64 / seconds)
    }

    fn launch_seconds(&self, sizes: &Sizes) -> Result<f64> {
        let count = if self.is_software() { 4 } else { 2000 };
        let (a, b) = (Values::zeros(self, 8, Kind::F32), Values::zeros(self, 8, Kind::F32));
        let launches = || (0..count).for_each(|_| drop(crate::add(&a, &b)));
        Ok(self.least(sizes, launches)? / count as f64)
    }

    /// The layers of a block: `[out, in]`.
    fn layers(sizes: &Sizes) -> impl Iterator<Item = [usize; 2]> {
        let of_width = |w: usize| [[3 * w, w], [w, w], [4 * w, w], [w, 4 * w]];
        sizes.widths.into_iter().flat_map(of_width)
    }

    fn product_lines(&self, sizes: &Sizes, precision: Precision) -> Result<[Line; 3]> {
        // f32 without TF32 is twenty times slower than the others.
        let rows = if precision == Precision::F32 { sizes.rows / 8 } else { sizes.rows };
        let mut points = [(); 3].map(|()| Vec::new());
        for [outputs, inputs] in Self::layers(sizes) {
            let kind = precision.kind();
            let weight = Values::filled(self, outputs * inputs, 0.01);
            let layer = Linear::new(&weight, &Values::zeros(self, outputs, Kind::F32), precision);
            let x = Values::filled(self, rows * inputs, 0.5).cast(kind);
            let dy = Values::filled(self, rows * outputs, 0.5).cast(kind);
            let amounts = [2.0 * (rows * outputs * inputs) as f64, 1.0];
            let seconds = [
                self.least(sizes, || drop(layer.forward(&x, kind)))?,
                self.least(sizes, || drop(layer.input_gradient(&dy)))?,
                self.least(sizes, || drop(layer.weight_gradient(&x, &dy)))?,
            ];
            points.iter_mut().zip(seconds).for_each(|(points, seconds)| points.push((amounts, seconds)));
        }
        Ok(points.map(|points| Line::through(&points)))
    }

    fn fp8_lines(&self, sizes: &Sizes) -> Result<[Line; 2]> {
        let mut points = [(); 2].map(|()| Vec::new());
        for [outputs, inputs] in Self::layers(sizes) {
            let layer = fp8::Timed::new(self, sizes.rows, outputs, inputs)?;
            let amounts = [2.0 * (sizes.rows * outputs * inputs) as f64, 1.0];
            let seconds = [self.least(sizes, || layer.forward())?, self.least(sizes, || layer.input_gradient())?];
            points.iter_mut().zip(seconds).for_each(|(points, seconds)| points.push((amounts, seconds)));
        }
        Ok(points.map(|points| Line::through(&points)))
    }

    fn attention_lines(&self, sizes: &Sizes, kind: Kind) -> Result<[Line; 2]> {
        let mut points = [(); 2].map(|()| Vec::new());
        for tokens in sizes.tokens {
            let batch = sizes.samples * (sizes.tokens[1] / tokens).max(1);
            let shape = AttentionShape { batch, tokens, heads: sizes.heads, head_dim: 64, causal: false };
            let elements = batch * tokens * sizes.heads * 64;
            let (qkv, dy) = (Values::filled(self, 3 * elements, 0.1), Values::filled(self, elements, 0.1));
            let (qkv, dy) = (qkv.cast(kind), dy.cast(kind));
            let (_, saved) = attention(shape, &qkv);
            let [forward, backward] = attention_amounts(elements as f64, tokens as f64, kind.bytes() as f64);
            points[0].push((forward, self.least(sizes, || drop(attention(shape, &qkv)))?));
            points[1].push((backward, self.least(sizes, || drop(attention_gradient(&saved, &dy)))?));
        }
        Ok(points.map(|points| Line::through(&points)))
    }

    fn depthwise_seconds(&self, sizes: &Sizes) -> Result<[f64; 3]> {
        let shape = DepthwiseShape {
            batch: sizes.samples,
            height: sizes.side,
            width: sizes.side,
            channels: sizes.widths[0],
            kernel: 7,
        };
        let elements = sizes.samples * sizes.side * sizes.side * shape.channels;
        let weight = Values::filled(self, 49 * shape.channels, 0.1);
        let packed = Depthwise::new(&weight, &Values::zeros(self, shape.channels, Kind::F32), 7);
        let (x, kind) = (Values::filled(self, elements, 0.5), Kind::F32);
        let seconds = [
            self.least(sizes, || drop(depthwise(shape, &packed, &x, kind)))?,
            self.least(sizes, || drop(depthwise_input_gradient(shape, &packed, &x, None, kind)))?,
            self.least(sizes, || drop(depthwise_weight_gradient(shape, &x, &x)))?,
        ];
        Ok(seconds.map(|seconds| seconds / elements as f64))
    }
}

/// Operations and bytes of attention and of its gradient. `elements` are those of the result, `bytes` the size of one.
///
/// Two products forward, five backward; q, k, v in and the result out; with them the result's gradient in and three
/// out.
pub fn attention_amounts(elements: f64, tokens: f64, bytes: f64) -> [[f64; 2]; 2] {
    let product = 2.0 * elements * tokens;
    [[2.0 * product, 4.0 * bytes * elements], [5.0 * product, 7.0 * bytes * elements]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_through_what_is_on_one() {
        let points: Vec<_> = [[1e9, 1.0], [2e9, 1.0], [8e9, 3.0]].map(|x| (x, x[0] * 2e-12 + x[1] * 5e-6)).to_vec();
        let [a, b] = Line::through(&points).seconds;
        assert!((a / 2e-12 - 1.0).abs() < 1e-6 && (b / 5e-6 - 1.0).abs() < 1e-6, "{a:e} {b:e}");
        // Where a part would be negative it is 0, and the other carries all.
        let [a, b] = Line::through(&[([1.0, 1.0], 1.0), ([2.0, 1.0], 0.9)]).seconds;
        assert!(a == 0.0 && (0.9..1.0).contains(&b), "{a} {b}");
    }

    #[test]
    fn a_gpu_in_software_is_measured() {
        let gpu = Gpu::soft(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tmp").as_path());
        let measured = gpu.measure().unwrap();
        assert_eq!(measured.rates.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["f32", "tf32", "bf16", "fp8"]);
        assert!(
            measured.copy > 0.0 && measured.launch > 0.0 && measured.depthwise.iter().all(|seconds| *seconds > 0.0)
        );
    }
}
