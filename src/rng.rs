//! Keyed random streams: every random number of a run is a function of (seed, purpose, keys).
//!
//! There is no generator that lives on from one batch to the next, so batch size, the number of
//! threads and processes, and a restart in the middle change nothing (design invariant 3).
//! The conversions to floats are written here, since a library may change its own.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// What a stream is for. Streams of different purposes never share numbers.
///
/// The numbers are part of what makes a run reproducible: never renumber, only append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial weights; key: index of the tensor.
    Init = 1,
    /// Order of the samples; key: epoch.
    Order = 2,
    /// Augmentation of one sample; keys: epoch, sample.
    Augment = 3,
    /// MixUp and CutMix of one batch; key: samples seen.
    Mix = 4,
    /// The start of an attack; keys: samples seen or evaluation, sample.
    AttackStart = 5,
    /// Drop path; keys: samples seen, position in the batch.
    DropPath = 6,
    /// Which patches are kept; keys: samples seen, position in the batch.
    Masking = 7,
    /// A synthetic image; key: its index.
    Synthetic = 8,
    /// Images and labels of a benchmark.
    Bench = 9,
    /// The start of an APGD climb; keys: sample, run.
    Apgd = 10,
    /// The start of a restart of FAB; keys: sample, run.
    Fab = 11,
    /// The start and each query of Square; keys: sample, run and query.
    Square = 12,
    /// Which images a sample of a data set takes; keys: image and 0, class and 1.
    Subset = 13,
}

/// A stream of random numbers.
pub struct Rng(ChaCha8Rng);

impl Rng {
    /// The stream of (seed, purpose, two keys).
    pub fn new(seed: u64, purpose: Purpose, key: u64, sub_key: u64) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..12].copy_from_slice(&(purpose as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&key.to_le_bytes());
        bytes[24..].copy_from_slice(&sub_key.to_le_bytes());
        Self(ChaCha8Rng::from_seed(bytes))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Uniform in [0, 1), in steps of 2^-24.
    pub fn uniform(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }

    /// Uniform in [low, high).
    pub fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// A whole number in 0..n, each as likely as the next.
    ///
    /// # Panics
    /// When `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "no number is below 0");
        // Lemire's multiplication; the bias is below n / 2^64.
        ((self.0.next_u64() as u128 * n as u128) >> 64) as usize
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f32) -> bool {
        self.uniform() < p
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.uniform() as f64).ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform() as f64).cos()) as f32
    }

    /// Beta(alpha, alpha) by Johnk's method in logarithms, which does not underflow for small alpha.
    pub fn beta(&mut self, alpha: f64) -> f64 {
        loop {
            let x = (1.0 - self.uniform() as f64).ln() / alpha;
            let y = (1.0 - self.uniform() as f64).ln() / alpha;
            let largest = x.max(y);
            let sum = largest + ((x - largest).exp() + (y - largest).exp()).ln();
            if sum <= 0.0 {
                return (x - sum).exp();
            }
        }
    }

    /// A random order of 0..n (Fisher and Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for last in (1..n).rev() {
            order.swap(last, self.below(last + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_other_keys_or_purposes_differ_and_equal_ones_agree() {
        let first = |purpose, key, sub| Rng::new(7, purpose, key, sub).bits();
        let base = first(Purpose::Augment, 1, 2);
        assert_eq!(base, first(Purpose::Augment, 1, 2));
        for other in [
            first(Purpose::Mix, 1, 2),
            first(Purpose::Augment, 2, 2),
            first(Purpose::Augment, 1, 3),
            Rng::new(8, Purpose::Augment, 1, 2).bits(),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let mut rng = Rng::new(0, Purpose::Bench, 0, 0);
        let n = 200_000;
        let mean = |draw: &mut dyn FnMut() -> f64| (0..n).map(|_| draw()).sum::<f64>() / n as f64;
        // Standard errors are below 0.003; four of them.
        assert!((mean(&mut || rng.uniform() as f64) - 0.5).abs() < 0.012);
        assert!(mean(&mut || rng.normal() as f64).abs() < 0.012);
        assert!((mean(&mut || (rng.normal() as f64).powi(2)) - 1.0).abs() < 0.02);
        assert!((mean(&mut || rng.beta(0.8)) - 0.5).abs() < 0.012);
        // The variance of Beta(a, a) is 1 / (4 (2a + 1)).
        assert!((mean(&mut || (rng.beta(0.8) - 0.5).powi(2)) - 1.0 / 10.4).abs() < 0.005);
    }

    #[test]
    fn a_permutation_holds_every_number_once() {
        let mut order = Rng::new(1, Purpose::Order, 0, 0).permutation(1000);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
        assert!(Rng::new(1, Purpose::Order, 0, 0).permutation(0).is_empty());
    }
}
