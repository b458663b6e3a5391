//! The order of samples in training, a function of seed, epoch and position only.
//!
//! The images of a folder or file are permuted as a whole. Shards are permuted in two steps, since a permutation of a
//! billion samples needs gigabytes and jumps between all files: in each epoch the shards are put in random order,
//! consecutive shards form windows, and the samples of each window are permuted. A position is found by binary search,
//! so a run can resume anywhere at once. Memory is needed for a few windows only.
//! Not for the processing of samples ([`crate::data::loader`]).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::data::dataset::Dataset;
use crate::data::mixture::Mixture;
use crate::rng::{Rng, Stream};

/// Smallest number of samples in a window, unless there are fewer in total.
pub const WINDOW_SAMPLES: usize = 16_384;
/// Smallest number of shards in a window, unless there are fewer in total: neighbors in a shard are often similar.
pub const WINDOW_SHARDS: usize = 8;
/// Permutations that are cached: threads may work on two epochs or windows at the same time.
const KEPT: usize = 3;

/// The order of the samples of a run, from one source or from several.
#[derive(Debug)]
pub enum RunOrder {
    /// One source.
    One(Order),
    /// Several sources in fixed fractions: for each its order and its first sample in the data set.
    Mixed(Vec<(Order, usize)>, Arc<Mixture>),
}

impl RunOrder {
    /// Makes the order of a data set.
    pub fn new(seed: u64, dataset: &Dataset) -> Self {
        let Some((parts, mixture)) = dataset.mixed() else {
            return Self::One(Order::new(seed, dataset));
        };
        let mut first = 0;
        let mut orders = Vec::new();
        for (part, number) in parts.iter().zip(0u64..) {
            // Sources of the same length are not in the same order.
            let seed = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            orders.push((Order::new(seed, part), first));
            first += part.len();
        }
        Self::Mixed(orders, mixture)
    }

    /// Returns the epoch and the sample at a position of the run. Epochs are those of the sample's source.
    pub fn at(&self, position: u64) -> (u64, usize) {
        let (order, first, position) = match self {
            Self::One(order) => (order, 0, position),
            Self::Mixed(orders, mixture) => {
                let (source, number) = mixture.at(position);
                let (order, first) = &orders[source];
                (order, *first, number)
            }
        };
        let (epoch, place) = (position / order.len as u64, position % order.len as u64);
        (epoch, first + order.sample(epoch, place as usize))
    }
}

/// The order of the samples of a source.
#[derive(Debug)]
pub struct Order {
    seed: u64,
    len: usize,
    /// First sample of each shard, then the number of samples; none to permute all samples as a whole.
    starts: Option<Vec<usize>>,
    epochs: Recent<u64, Windows>,
    permutations: Recent<(u64, usize), Vec<u32>>,
}

impl Order {
    /// Makes the order of a data set.
    pub fn new(seed: u64, dataset: &Dataset) -> Self {
        let starts = dataset.shards().map(|shards| shards.starts().to_vec());
        Self::of(seed, dataset.len(), starts)
    }

    /// Makes the order of `len` samples. `starts` are the first samples of the shards, then `len`.
    pub fn of(seed: u64, len: usize, starts: Option<Vec<usize>>) -> Self {
        Self {
            seed,
            len,
            starts,
            epochs: Recent::default(),
            permutations: Recent::default(),
        }
    }

    /// Returns the sample at a position of an epoch. The position is below the number of samples.
    pub fn sample(&self, epoch: u64, position: usize) -> usize {
        let Some(starts) = &self.starts else {
            let order = self.permutations.get((epoch, 0), || {
                // Numbers of samples of these sources fit into 32 bits.
                let mut rng = Rng::new(self.seed, Stream::Order { epoch });
                let order = rng.permutation(self.len);
                order.into_iter().map(|sample| sample as u32).collect()
            });
            return order[position] as usize;
        };
        let windows = self.epochs.get(epoch, || {
            let mut rng = Rng::new(self.seed, Stream::Order { epoch });
            Windows::new(starts, rng.permutation(starts.len() - 1))
        });
        let window = windows.starts.partition_point(|start| *start <= position) - 1;
        let (first, end) = (windows.starts[window], windows.starts[window + 1]);
        let order = self.permutations.get((epoch, window), || {
            let mut rng = Rng::new(
                self.seed,
                Stream::OrderInWindow {
                    epoch,
                    window: window as u64,
                },
            );
            let order = rng.permutation(end - first);
            order.into_iter().map(|place| place as u32).collect()
        });
        let place = first + order[position - first] as usize;
        let number = windows.cumulated.partition_point(|start| *start <= place) - 1;
        starts[windows.shards[number]] + place - windows.cumulated[number]
    }
}

/// The windows of one epoch.
#[derive(Debug)]
struct Windows {
    /// Shards in the order of the epoch.
    shards: Vec<usize>,
    /// Number of samples before each of these shards, then in total.
    cumulated: Vec<usize>,
    /// Number of samples before each window, then in total.
    starts: Vec<usize>,
}

impl Windows {
    fn new(of_shards: &[usize], shards: Vec<usize>) -> Self {
        let mut cumulated = vec![0];
        let mut starts = vec![0];
        let (mut samples, mut first) = (0, 0);
        let all = of_shards[of_shards.len() - 1];
        for (number, shard) in shards.iter().enumerate() {
            samples += of_shards[shard + 1] - of_shards[*shard];
            cumulated.push(samples);
            let begun = starts[starts.len() - 1];
            let full = samples - begun >= WINDOW_SAMPLES && number + 1 - first >= WINDOW_SHARDS;
            // A remainder that would not fill a window is added to the last one.
            let enough_left =
                all - samples >= WINDOW_SAMPLES && shards.len() - (number + 1) >= WINDOW_SHARDS;
            if full && enough_left {
                starts.push(samples);
                first = number + 1;
            }
        }
        starts.push(all);
        Self {
            shards,
            cumulated,
            starts,
        }
    }
}

/// A cache of the most recently made values. It is locked while a value is made, so that it is made only once.
#[derive(Debug)]
struct Recent<K, V>(Mutex<VecDeque<(K, Arc<V>)>>);

impl<K, V> Default for Recent<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: PartialEq, V> Recent<K, V> {
    fn get(&self, key: K, make: impl FnOnce() -> V) -> Arc<V> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, value)) = kept.iter().find(|(known, _)| *known == key) {
            return value.clone();
        }
        let value = Arc::new(make());
        kept.push_back((key, value.clone()));
        if kept.len() > KEPT {
            kept.pop_front();
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns 60 shards of 500 to 1,499 samples, about 60,000 in total: three windows.
    fn shards() -> Vec<usize> {
        let mut rng = Rng::new(1, Stream::Bench);
        let mut starts = vec![0];
        for _ in 0..60 {
            starts.push(starts[starts.len() - 1] + 500 + rng.below(1000));
        }
        starts
    }

    fn order(starts: &[usize], seed: u64) -> Order {
        Order::of(seed, starts[starts.len() - 1], Some(starts.to_vec()))
    }

    fn epoch(order: &Order, epoch: u64) -> Vec<usize> {
        (0..order.len)
            .map(|position| order.sample(epoch, position))
            .collect()
    }

    #[test]
    fn each_epoch_of_shards_has_every_sample_once_in_a_different_order() {
        let starts = shards();
        let order = order(&starts, 3);
        let first = epoch(&order, 0);
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..order.len));
        assert_ne!(first, epoch(&order, 1));
    }

    #[test]
    fn the_sample_at_a_position_does_not_depend_on_earlier_calls() {
        let starts = shards();
        let whole = epoch(&order(&starts, 3), 2);
        let fresh = order(&starts, 3);
        for position in (0..whole.len()).rev().step_by(997) {
            assert_eq!(fresh.sample(2, position), whole[position]);
        }
    }

    #[test]
    fn without_shards_the_order_is_a_permutation_from_the_keyed_stream() {
        let order = Order::of(5, 1000, None);
        let expected = Rng::new(5, Stream::Order { epoch: 7 }).permutation(1000);
        assert_eq!(epoch(&order, 7), expected);
    }

    #[test]
    fn every_window_has_enough_samples() {
        let starts = shards();
        let windows = Windows::new(&starts, (0..60).collect());
        assert_eq!(windows.starts.len() - 1, 3);
        for pair in windows.starts.windows(2) {
            assert!(pair[1] - pair[0] >= WINDOW_SAMPLES);
        }
        // Empty shards, and fewer samples than a window needs.
        let windows = Windows::new(&[0, 0, 5, 5], vec![2, 0, 1]);
        assert_eq!(windows.starts, [0, 5]);
        let small = order(&[0, 0, 5, 5], 0);
        let mut samples = epoch(&small, 0);
        samples.sort_unstable();
        assert_eq!(samples, [0, 1, 2, 3, 4]);
    }

    /// Checks three statistics, each within four standard deviations of its value for random orders:
    /// (a) within a window, the share of neighbors from the same shard, which for n samples in shards of n_i is
    ///     s = sum n_i (n_i - 1) / (n (n - 1)), with a standard deviation of about sqrt(s (1 - s) / n);
    /// (b) within a window, the correlation of position and index in the shard: standard deviation 1 / sqrt(n);
    /// (c) over 400 epochs, the mean position of a given shard in the order of shards.
    #[test]
    fn samples_of_a_shard_do_not_cluster_within_a_window() {
        let starts = shards();
        let order = order(&starts, 9);
        let shard_of = |sample: usize| starts.partition_point(|start| *start <= sample) - 1;
        for number in 0..3_u64 {
            let samples = epoch(&order, number);
            let windows = order
                .epochs
                .get(number, || unreachable!("it was just used"));
            for pair in windows.starts.windows(2) {
                let window = &samples[pair[0]..pair[1]];
                let n = window.len() as f64;
                let mut counts = [0.0_f64; 60];
                window
                    .iter()
                    .for_each(|sample| counts[shard_of(*sample)] += 1.0);
                let share = counts.iter().map(|c| c * (c - 1.0)).sum::<f64>() / (n * (n - 1.0));
                let same = window
                    .windows(2)
                    .filter(|two| shard_of(two[0]) == shard_of(two[1]));
                let found = same.count() as f64 / (n - 1.0);
                let deviation = (share * (1.0 - share) / n).sqrt();
                assert!((found - share).abs() < 4.0 * deviation, "{found} {share}");

                let place = |sample: &usize| (sample - starts[shard_of(*sample)]) as f64;
                let positions: Vec<f64> = (0..window.len()).map(|p| p as f64).collect();
                let places: Vec<f64> = window.iter().map(place).collect();
                let found = correlation(&positions, &places);
                assert!(found.abs() < 4.0 / n.sqrt(), "{found}");
            }
        }
        // Positions of shard 0 over epochs: uniform in 0..59 for 60 shards, standard deviation 17.3 / sqrt(400).
        let mean = (0..400).map(|number| {
            order.sample(number, 0);
            let windows = order
                .epochs
                .get(number, || unreachable!("it was just used"));
            windows.shards.iter().position(|shard| *shard == 0).unwrap() as f64 / 400.0
        });
        let mean: f64 = mean.sum();
        assert!((mean - 29.5).abs() < 4.0 * 0.866, "{mean}");
    }

    fn correlation(x: &[f64], y: &[f64]) -> f64 {
        let n = x.len() as f64;
        let mean = |v: &[f64]| v.iter().sum::<f64>() / n;
        let (mx, my) = (mean(x), mean(y));
        let cross: f64 = x.iter().zip(y).map(|(a, b)| (a - mx) * (b - my)).sum();
        let square = |v: &[f64], m: f64| v.iter().map(|a| (a - m).powi(2)).sum::<f64>();
        cross / (square(x, mx) * square(y, my)).sqrt()
    }
}
