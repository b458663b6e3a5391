//! AdamW with a weight average, and the norm of the gradient, over all tensors of a model in one launch each.

use crate::error::Result;
use crate::gpu::Gpu;
use crate::launch;
use crate::machine::Kind;
use crate::programs::Program::Optimizer;
use crate::values::Values;

/// Settings of one update.
///
/// Source: Loshchilov and Hutter 2019, as `torch.optim.AdamW` computes it: the decay is decoupled and multiplied by the
/// learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub learning_rate: f32,
    /// Decay of the first and second moment.
    pub betas: (f32, f32),
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Number of this update, from 1.
    pub step: u64,
    /// Factor of the gradient: the clipping's.
    pub gradient_scale: f32,
    /// Decay of the weight average; without effect where there is none.
    pub average_decay: f32,
}

/// A tensor of the model, all in f32.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// Changed in place, like all but the gradient.
    pub weights: &'a mut Values,
    /// Of the loss.
    pub gradient: &'a Values,
    /// First moment.
    pub first: &'a mut Values,
    /// Second moment.
    pub second: &'a mut Values,
    /// Average of the weights.
    pub average: Option<&'a mut Values>,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Factor of the learning rate.
    pub rate: f32,
    /// Whether the new weights come with their bf16 form, which [`Values::cast`] then finds.
    pub rounded: bool,
}

/// Elements of one block of threads.
const CHUNK: usize = 4096;

/// An entry of the kernels' list: six addresses, the length, the chunks before it, the factors of the old weight and of
/// the step.
fn entry(list: &mut Vec<u8>, addresses: [u64; 6], len: usize, first_chunk: usize, factors: [f32; 2]) {
    let numbers = addresses.into_iter().chain([len as u64, first_chunk as u64]);
    list.extend(numbers.flat_map(u64::to_le_bytes));
    list.extend(factors.into_iter().flat_map(f32::to_le_bytes));
}

impl AdamW {
    /// Updates all parameters.
    ///
    /// # Panics
    ///
    /// If tensors of one parameter differ in length, some are not f32, or `step` is 0.
    pub fn update(&self, gpu: &Gpu, parameters: &mut [Parameter]) {
        assert!(self.step > 0, "updates are counted from 1");
        let (mut list, mut chunks, mut count) = (Vec::new(), 0, 0);
        for parameter in &mut *parameters {
            let Parameter { weights, gradient, first, second, average, weight_decay, rate, rounded } = parameter;
            let len = gradient.len();
            let mut address = |values: &mut Values| {
                assert!((values.len(), values.kind()) == (len, Kind::F32), "{values:?} for a gradient of {len}");
                values.own().at()
            };
            let [at, first, second] = [&mut **weights, &mut **first, &mut **second].map(&mut address);
            let average = average.as_mut().map_or(0, |average| address(average));
            assert!(gradient.kind() == Kind::F32, "the gradient is {gradient:?}");
            if len == 0 {
                continue;
            }
            let keep = (1.0 - f64::from(self.learning_rate) * f64::from(*rate) * f64::from(*weight_decay)) as f32;
            let low = rounded.then(|| Values::new(gpu, len, Kind::Bf16));
            let low_at = low.as_ref().map_or(0, Values::at);
            entry(&mut list, [at, gradient.at(), first, second, average, low_at], len, chunks, [keep, *rate]);
            if let Some(low) = low {
                **weights = weights.clone().with_rounded(low);
            }
            chunks += len.div_ceil(CHUNK);
            count += 1;
        }
        let list = Values::send_bytes(gpu, &list);
        let update = Values::send(gpu, &self.numbers());
        // SAFETY: the list names live tensors of the lengths in it, and the factors are in the kernel's order.
        unsafe { launch!(gpu, Optimizer, "adamw", [chunks, 1, 1], 256, 0, &list, count, &update) };
    }

    /// The kernel's factors, computed in f64: `1 - 0.999^step` loses half its digits in f32.
    fn numbers(&self) -> [f32; 10] {
        let (beta1, beta2) = self.betas;
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(self.step as f64);
        let rest = |beta: f32| (1.0 - f64::from(beta)) as f32;
        [
            (f64::from(self.learning_rate) / correction(beta1)) as f32,
            (1.0 / correction(beta2).sqrt()) as f32,
            beta1,
            beta2,
            rest(beta1),
            rest(beta2),
            self.eps,
            self.gradient_scale,
            self.average_decay,
            rest(self.average_decay),
        ]
    }
}

/// The sum of the squares of all values of all tensors, in f64 in a fixed order: one number comes to the host.
///
/// # Errors
///
/// The first failure since the GPU was opened.
///
/// # Panics
///
/// If some values are not f32.
pub fn sum_of_squares(gpu: &Gpu, tensors: &[&Values]) -> Result<f64> {
    let (mut list, mut chunks, mut count) = (Vec::new(), 0, 0);
    for values in tensors.iter().filter(|values| !values.is_empty()) {
        assert!(values.kind() == Kind::F32, "squares of {values:?}");
        entry(&mut list, [0, values.at(), 0, 0, 0, 0], values.len(), chunks, [0.0; 2]);
        chunks += values.len().div_ceil(CHUNK);
        count += 1;
    }
    if count == 0 {
        return Ok(0.0);
    }
    let list = Values::send_bytes(gpu, &list);
    let parts = Values::new(gpu, 2 * chunks, Kind::F32);
    let sum = Values::new(gpu, 2, Kind::F32);
    // SAFETY: the list names live tensors of the lengths in it; there is an f64 for each chunk.
    unsafe {
        launch!(gpu, Optimizer, "squares", [chunks, 1, 1], 256, 256 * 8, &parts, &list, count);
        launch!(gpu, Optimizer, "total_f64", [1, 1, 1], 1024, 1024 * 8, &sum, &parts, chunks as u64);
    }
    let bytes = sum.to_bytes()?;
    Ok(f64::from_le_bytes(bytes.try_into().expect("eight bytes")))
}
