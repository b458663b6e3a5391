//! Which sample comes when: a function of seed, epoch and position, and of nothing else.
//!
//! Pictures of one folder or file are permuted as a whole. Shards are permuted in two steps, since a
//! permutation of a thousand million samples needs gigabytes and jumps between all files: in each
//! epoch the shards are put into a random order, consecutive ones are gathered into windows, and the
//! samples of a window are permuted. Any position is found by binary searches, so that a run resumes
//! anywhere at once; memory is that of a few windows.
//! Not for what happens to a sample ([`crate::data::loader`]).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::data::dataset::Dataset;
use crate::rng::{Purpose, Rng};

/// Least samples in a window, unless there are fewer in all.
pub const WINDOW_SAMPLES: usize = 16_384;
/// Least shards in a window, unless there are fewer: neighbours in a shard are often alike.
pub const WINDOW_SHARDS: usize = 8;
/// Permutations that are kept: threads work at two epochs or windows at once.
const KEPT: usize = 3;

/// The order of the samples of a run.
#[derive(Debug)]
pub struct Order {
    seed: u64,
    len: usize,
    /// First sample of each shard and the number of samples; none for a permutation of all.
    starts: Option<Vec<usize>>,
    epochs: Recent<u64, Windows>,
    permutations: Recent<(u64, usize), Vec<u32>>,
}

impl Order {
    /// The order of a data set.
    pub fn new(seed: u64, dataset: &Dataset) -> Self {
        let starts = dataset.shards().map(|shards| shards.starts().to_vec());
        Self::of(seed, dataset.len(), starts)
    }

    /// The order of `len` samples; `starts` are the first of each shard and `len`.
    pub fn of(seed: u64, len: usize, starts: Option<Vec<usize>>) -> Self {
        Self {
            seed,
            len,
            starts,
            epochs: Recent::default(),
            permutations: Recent::default(),
        }
    }

    /// The sample at a position of an epoch, below the number of samples.
    pub fn sample(&self, epoch: u64, position: usize) -> usize {
        let Some(starts) = &self.starts else {
            let order = self.permutations.get((epoch, 0), || {
                // Numbers of samples of these sources fit into 32 bits.
                let mut rng = Rng::new(self.seed, Purpose::Order, epoch, 0);
                let order = rng.permutation(self.len);
                order.into_iter().map(|sample| sample as u32).collect()
            });
            return order[position] as usize;
        };
        let windows = self.epochs.get(epoch, || {
            let mut rng = Rng::new(self.seed, Purpose::Order, epoch, 0);
            Windows::new(starts, rng.permutation(starts.len() - 1))
        });
        let window = windows.starts.partition_point(|start| *start <= position) - 1;
        let (first, end) = (windows.starts[window], windows.starts[window + 1]);
        let order = self.permutations.get((epoch, window), || {
            // Key 0 is that of the shards.
            let mut rng = Rng::new(self.seed, Purpose::Order, epoch, 1 + window as u64);
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
    /// The shards in the order of the epoch.
    shards: Vec<usize>,
    /// Samples before each of them, and in all.
    cumulated: Vec<usize>,
    /// Samples before each window, and in all.
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
            // What is left goes into the last window when it would not fill one of its own.
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

/// The values made last. Held locked while one is made, so that it is made once.
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

    /// 60 shards of 500 to 1,499 samples, about 60,000: three windows.
    fn shards() -> Vec<usize> {
        let mut rng = Rng::new(1, Purpose::Bench, 0, 0);
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
    fn an_epoch_of_shards_shows_every_sample_once_in_an_order_of_its_own() {
        let starts = shards();
        let order = order(&starts, 3);
        let first = epoch(&order, 0);
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..order.len));
        assert_ne!(first, epoch(&order, 1));
    }

    #[test]
    fn any_position_gives_the_same_sample_whatever_was_asked_before() {
        let starts = shards();
        let whole = epoch(&order(&starts, 3), 2);
        let fresh = order(&starts, 3);
        for position in (0..whole.len()).rev().step_by(997) {
            assert_eq!(fresh.sample(2, position), whole[position]);
        }
    }

    #[test]
    fn a_whole_permutation_is_that_of_the_keyed_stream() {
        let order = Order::of(5, 1000, None);
        let expected = Rng::new(5, Purpose::Order, 7, 0).permutation(1000);
        assert_eq!(epoch(&order, 7), expected);
    }

    #[test]
    fn windows_hold_enough_samples_and_shards_and_few_are_left_over() {
        let starts = shards();
        let windows = Windows::new(&starts, (0..60).collect());
        assert_eq!(windows.starts.len() - 1, 3);
        for pair in windows.starts.windows(2) {
            assert!(pair[1] - pair[0] >= WINDOW_SAMPLES);
        }
        // Empty shards, and fewer samples than a window.
        let windows = Windows::new(&[0, 0, 5, 5], vec![2, 0, 1]);
        assert_eq!(windows.starts, [0, 5]);
        let small = order(&[0, 0, 5, 5], 0);
        let mut samples = epoch(&small, 0);
        samples.sort_unstable();
        assert_eq!(samples, [0, 1, 2, 3, 4]);
    }

    /// Three statistics, each within four standard deviations of what it is for random orders:
    /// (a) within a window, neighbours from the same shard: of n samples in shards of n_i the share is
    ///     s = sum n_i (n_i - 1) / (n (n - 1)), with a deviation of about sqrt(s (1 - s) / n);
    /// (b) within a window, the correlation of position and place in the shard: deviation 1 / sqrt(n);
    /// (c) over 400 epochs, the mean place of the window that shows a given shard.
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
        // Positions of shard 0 over epochs: 60 shards, so uniform in 0..59, deviation 17.3 / sqrt(400).
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
