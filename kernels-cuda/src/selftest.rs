//! A short comparison of the device with the host, for when a GPU is opened: a driver or library that computes wrongly
//! must not train a model.

use crate::Precision;
use crate::attention::{AttentionShape, attention};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::linear::Linear;
use crate::machine::Kind;
use crate::norm::layer_norm;
use crate::programs::Program;
use crate::values::{Values, from_bf16, to_bf16};

impl Gpu {
    /// Computes small products, a norm and attention on the device and on the host.
    ///
    /// # Errors
    ///
    /// If a result is off; the error names it. Or the first failure since the GPU was opened.
    pub fn self_test(&self) -> Result<()> {
        if !self.is_software() {
            // Those of every run, at once: compiled one by one at first use they would take longer.
            self.prepare(&Program::COMMON)?;
        }
        for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
            self.test_product(precision)?;
        }
        self.test_norm()?;
        self.test_attention(Kind::F32, 1e-5)?;
        self.test_attention(Kind::Bf16, 0.02)
    }

    /// Floating point operations a second in products of large square matrices.
    ///
    /// # Errors
    ///
    /// The first failure since the GPU was opened.
    pub fn product_rate(&self, precision: Precision) -> Result<f64> {
        let (side, repeats) = if self.is_software() { (32, 1) } else { (4096, 10) };
        let weight = Values::filled(self, side * side, 1.0);
        let layer = Linear::new(&weight, &Values::zeros(self, side, Kind::F32), precision);
        let (x, kind) = (weight.cast(precision.kind()), precision.kind());
        // The first chooses the algorithm.
        drop(layer.forward(&x, kind));
        let seconds = self.time(|| (0..repeats).for_each(|_| drop(layer.forward(&x, kind))))?;
        Ok(2.0 * (side.pow(3) * repeats) as f64 / seconds)
    }

    /// Operands whose products and sums f32 holds exactly, but not if they were rounded to TF32 on the way.
    fn test_product(&self, precision: Precision) -> Result<()> {
        let (rows, inputs, outputs) = (24, 64, 40);
        let x: Vec<f32> = (0..rows * inputs).map(|i| 1.0 + (i % 5) as f32 / 4096.0).collect();
        let weight: Vec<f32> = (0..outputs * inputs).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
        let bias: Vec<f32> = (0..outputs).map(|i| i as f32).collect();
        let kind = precision.kind();
        let layer = Linear::new(&Values::send(self, &weight), &Values::send(self, &bias), precision);
        let found = layer.forward(&Values::send(self, &x).cast(kind), Kind::F32).to_vec()?;
        let operand = |v: f32| if kind == Kind::Bf16 { from_bf16(to_bf16(v)) } else { v };
        let right = |row: usize, column: usize| {
            let terms =
                (0..inputs).map(|k| f64::from(operand(x[row * inputs + k])) * f64::from(weight[column * inputs + k]));
            terms.sum::<f64>() + f64::from(bias[column])
        };
        let right: Vec<f64> = (0..rows * outputs).map(|i| right(i / outputs, i % outputs)).collect();
        let allowed = if precision == Precision::Tf32 { 0.01 } else { 0.0 };
        compare(&format!("products in {precision:?}"), &found, &right, allowed)
    }

    fn test_norm(&self) -> Result<()> {
        let width = 72;
        let x: Vec<f32> = (0..5 * width).map(|i| (i * 13 % 29) as f32 * 0.1).collect();
        let (ones, zeros) = (Values::send(self, &vec![1.0; width]), Values::zeros(self, width, Kind::F32));
        let (found, _) = layer_norm(&Values::send(self, &x), &ones, &zeros, 1e-6, Kind::F32);
        let row = |row: &[f32]| {
            let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / width as f64;
            let variance = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / width as f64;
            row.iter().map(|v| (f64::from(*v) - mean) / (variance + 1e-6).sqrt()).collect::<Vec<_>>()
        };
        compare("layer norm", &found.to_vec()?, &x.chunks(width).flat_map(row).collect::<Vec<_>>(), 1e-5)
    }

    fn test_attention(&self, kind: Kind, allowed: f64) -> Result<()> {
        let shape = AttentionShape { batch: 1, tokens: 17, heads: 1, head_dim: 16, causal: false };
        let AttentionShape { tokens, head_dim, .. } = shape;
        let sent = Values::send(
            self,
            &(0..3 * tokens * head_dim).map(|i| (i * 17 % 31) as f32 / 15.0 - 1.0).collect::<Vec<_>>(),
        );
        let sent = sent.cast(kind);
        let (found, qkv) = (attention(shape, &sent).0.to_vec()?, sent.to_vec()?);
        let value = |part: usize, token: usize, i: usize| f64::from(qkv[(token * 3 + part) * head_dim + i]);
        let mut right = Vec::new();
        for query in 0..tokens {
            let score = |key: usize| (0..head_dim).map(|i| value(0, query, i) * value(1, key, i)).sum::<f64>() / 4.0;
            let powers: Vec<f64> = (0..tokens).map(|key| score(key).exp()).collect();
            let sum: f64 = powers.iter().sum();
            let mean = |i: usize| powers.iter().enumerate().map(|(key, p)| p * value(2, key, i)).sum::<f64>() / sum;
            right.extend((0..head_dim).map(mean));
        }
        compare(&format!("attention in {kind:?}"), &found, &right, allowed)
    }
}

fn compare(what: &str, found: &[f32], right: &[f64], allowed: f64) -> Result<()> {
    let largest = right.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    let off = found.iter().zip(right).map(|(found, right)| (f64::from(*found) - right).abs());
    let off = off.fold(0.0, |most: f64, off| if off.is_nan() { f64::INFINITY } else { most.max(off) }) / largest;
    match off <= allowed {
        true => Ok(()),
        false => {
            Err(Error::failed(format!("self-test: {what} are off by {off:.1e} of the largest, allowed {allowed:.0e}"))
                .hint("update NVIDIA's driver and libraries; NVIDIA_TF32_OVERRIDE changes how cuBLAS computes"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_that_is_off_or_not_a_number_fails_the_self_test() {
        assert!(compare("sums", &[1.0, 2.0], &[1.0, 2.0], 0.0).is_ok());
        for wrong in [2.001, f32::NAN, f32::INFINITY] {
            let error = compare("sums", &[1.0, wrong], &[1.0, 2.0], 1e-5).unwrap_err().to_string();
            assert!(error.contains("self-test: sums are off by"), "{error}");
        }
    }
}
