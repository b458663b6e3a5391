//! Keyed random streams: every random number of a run is a function of its seed, what it is for, and keys ([`Stream`]).
//!
//! No generator outlives a batch, so the batch size of an evaluation, the number of threads and ranks, and a resume change
//! nothing. Conversions to floats are written here, because a library may change its own.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// The number of a stream's purpose. Streams of different purposes never share numbers.
///
/// Reproducibility depends on these numbers: never change them, only append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Purpose {
    Weights = 1,
    Order = 2,
    Augment = 3,
    Mix = 4,
    AttackStart = 5,
    DropPath = 6,
    Masking = 7,
    Synthetic = 8,
    Bench = 9,
    Apgd = 10,
    Fab = 11,
    Square = 12,
    Subset = 13,
    Mixture = 14,
    Unseen = 15,
    Sample = 16,
}

/// An attack that draws random numbers, each from streams of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttackKind {
    /// PGD: its random start.
    Pgd,
    /// APGD: the random start of a restart or target.
    Apgd,
    /// FAB: the random start of a restart.
    Fab,
    /// Square: its start (iteration 0) and each query.
    Square,
    /// Unseen attacks: what each corruption draws once, and its start and steps.
    Unseen,
}

/// A random stream of a run, by what it is for: the whole contract of reproducibility. Each variant names its keys.
///
/// A position in the run counts samples from its start; a position in the data set counts its images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Initial weights of an image model.
    Weights {
        /// Number of the tensor among the random ones, from 1.
        tensor: u64,
        /// 0 for a whole model; stage + 1 where only a new head is drawn.
        draw: u64,
    },
    /// Initial weights of a text tower.
    TextWeights {
        /// Number of the tensor, from 1.
        tensor: u64,
    },
    /// Order of the samples in an epoch: of all samples, or of the shards.
    Order {
        /// Number of the epoch.
        epoch: u64,
    },
    /// Order of the samples within a window of shards.
    OrderInWindow {
        /// Number of the epoch.
        epoch: u64,
        /// Number of the window in the epoch.
        window: u64,
    },
    /// Augmentation of a sample.
    Augment {
        /// Number of the epoch.
        epoch: u64,
        /// Position in the data set.
        sample: u64,
    },
    /// MixUp and CutMix of a batch.
    Mix {
        /// Position in the run of the batch's first image.
        position: u64,
    },
    /// An attack on an image.
    Attack {
        /// The attack.
        kind: AttackKind,
        /// Position in the run while training, position in the data set in an evaluation.
        image: u64,
        /// Number of the restart or target.
        run: u32,
        /// Number of the iteration or query; 0 is the start.
        iteration: u32,
    },
    /// Stochastic depth of an image in a block.
    DropPath {
        /// Position in the run.
        image: u64,
        /// Number of the block.
        block: u64,
    },
    /// The patches of an image that masking keeps.
    Masking {
        /// Position in the run.
        image: u64,
    },
    /// A synthetic image.
    Synthetic {
        /// 0 for training, 1 for test images.
        split: u64,
        /// Number of the image.
        image: u64,
    },
    /// Inputs of benchmarks and tests.
    Bench,
    /// Rank of an image in stratified samples.
    SubsetImage {
        /// Position in the data set.
        image: u64,
    },
    /// Offset of a class in stratified samples.
    SubsetClass {
        /// Number of the class.
        class: u64,
    },
    /// Order of the sources in a block of positions of the run, where several are mixed.
    Mixture {
        /// Number of the block.
        block: u64,
    },
    /// Rank of an image in the sample that the last attacks of an evaluation run on.
    Sample {
        /// Position in the data set.
        image: u64,
    },
}

impl AttackKind {
    fn purpose(self) -> Purpose {
        match self {
            Self::Pgd => Purpose::AttackStart,
            Self::Apgd => Purpose::Apgd,
            Self::Fab => Purpose::Fab,
            Self::Square => Purpose::Square,
            Self::Unseen => Purpose::Unseen,
        }
    }
}

impl Stream {
    /// Returns the number of the purpose and the two keys, which with the run's seed make the seed of ChaCha.
    pub(crate) fn keys(self) -> (u32, u64, u64) {
        let (purpose, key, sub_key) = match self {
            Self::Weights { tensor, draw } => (Purpose::Weights, tensor, draw),
            // Heads are drawn with small second keys.
            Self::TextWeights { tensor } => (Purpose::Weights, tensor, u64::MAX),
            Self::Order { epoch } => (Purpose::Order, epoch, 0),
            Self::OrderInWindow { epoch, window } => (Purpose::Order, epoch, 1 + window),
            Self::Augment { epoch, sample } => (Purpose::Augment, epoch, sample),
            Self::Mix { position } => (Purpose::Mix, position, 0),
            Self::Attack {
                kind,
                image,
                run,
                iteration,
            } => (
                kind.purpose(),
                image,
                u64::from(run) << 32 | u64::from(iteration),
            ),
            Self::DropPath { image, block } => (Purpose::DropPath, image, block),
            Self::Masking { image } => (Purpose::Masking, image, 0),
            Self::Synthetic { split, image } => (Purpose::Synthetic, split, image),
            Self::Bench => (Purpose::Bench, 0, 0),
            Self::SubsetImage { image } => (Purpose::Subset, image, 0),
            Self::SubsetClass { class } => (Purpose::Subset, class, 1),
            Self::Mixture { block } => (Purpose::Mixture, block, 0),
            Self::Sample { image } => (Purpose::Sample, image, 0),
        };
        (purpose as u32, key, sub_key)
    }
}

/// A stream of random numbers.
pub struct Rng(ChaCha8Rng);

impl Rng {
    /// Returns a stream at its start.
    pub fn new(seed: u64, stream: Stream) -> Self {
        let (purpose, key, sub_key) = stream.keys();
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..12].copy_from_slice(&purpose.to_le_bytes());
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
    fn streams_with_other_seeds_purposes_or_keys_differ_and_equal_ones_agree() {
        let first = |stream| Rng::new(7, stream).bits();
        let base = Stream::Augment {
            epoch: 1,
            sample: 2,
        };
        assert_eq!(first(base), first(base));
        for other in [
            first(Stream::Mix { position: 1 }),
            first(Stream::Augment {
                epoch: 2,
                sample: 2,
            }),
            first(Stream::Augment {
                epoch: 1,
                sample: 3,
            }),
            Rng::new(8, base).bits(),
        ] {
            assert_ne!(first(base), other);
        }
    }

    /// Unchanged since each stream was introduced. If one changes, runs no longer resume to the same bits and published
    /// results cannot be reproduced.
    #[test]
    fn the_streams_of_a_run_never_change() {
        let attack = |kind| Stream::Attack {
            kind,
            image: 3,
            run: 5,
            iteration: 7,
        };
        let recorded = [
            (Stream::Weights { tensor: 3, draw: 5 }, (1, 3, 5)),
            (Stream::TextWeights { tensor: 3 }, (1, 3, u64::MAX)),
            (Stream::Order { epoch: 3 }, (2, 3, 0)),
            (
                Stream::OrderInWindow {
                    epoch: 3,
                    window: 5,
                },
                (2, 3, 6),
            ),
            (
                Stream::Augment {
                    epoch: 3,
                    sample: 5,
                },
                (3, 3, 5),
            ),
            (Stream::Mix { position: 3 }, (4, 3, 0)),
            (attack(AttackKind::Pgd), (5, 3, 5 << 32 | 7)),
            (attack(AttackKind::Apgd), (10, 3, 5 << 32 | 7)),
            (attack(AttackKind::Fab), (11, 3, 5 << 32 | 7)),
            (attack(AttackKind::Square), (12, 3, 5 << 32 | 7)),
            (attack(AttackKind::Unseen), (15, 3, 5 << 32 | 7)),
            (Stream::DropPath { image: 3, block: 5 }, (6, 3, 5)),
            (Stream::Masking { image: 3 }, (7, 3, 0)),
            (Stream::Synthetic { split: 1, image: 3 }, (8, 1, 3)),
            (Stream::Bench, (9, 0, 0)),
            (Stream::SubsetImage { image: 3 }, (13, 3, 0)),
            (Stream::SubsetClass { class: 3 }, (13, 3, 1)),
            (Stream::Mixture { block: 3 }, (14, 3, 0)),
            (Stream::Sample { image: 3 }, (16, 3, 0)),
        ];
        for (stream, (number, key, sub_key)) in recorded {
            let (purpose, first, second) = stream.keys();
            assert_eq!(
                (u64::from(purpose), first, second),
                (number, key, sub_key),
                "{stream:?}"
            );
        }
        // ChaCha8 keyed with the seed, the number and the two keys.
        let mut rng = Rng::new(
            7,
            Stream::Augment {
                epoch: 1,
                sample: 2,
            },
        );
        assert_eq!(
            [rng.bits(), rng.bits()],
            [10_740_351_444_531_382_768, 16_283_730_903_925_002_495]
        );
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let mut rng = Rng::new(0, Stream::Bench);
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
        let mut order = Rng::new(1, Stream::Order { epoch: 0 }).permutation(1000);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
        assert!(
            Rng::new(1, Stream::Order { epoch: 0 })
                .permutation(0)
                .is_empty()
        );
    }
}
