//! Gradients added up over the processes, and weights put together again.
//!
//! Every process has all weights, and of every tensor one part that is its own: it alone adds up the gradients of that part,
//! keeps its moments and moves it ("ZeRO-1", Rajbhandari et al. 2020). Each element is added up by one process from
//! those of all, in the order of a pairwise tree over the shards of the batch, so that the number of processes changes no bit.

use std::ops::Range;

use burn::tensor::Tensor;

use super::config::Parallel;
use super::{BUCKET, Group};
use crate::error::{Error, Kind, Result};
use crate::ops::{from_vec, sum_of_bits, sums_of_squares, to_vec};

/// How tensors are dealt to the processes of a group.
#[derive(Clone, Debug)]
pub struct Exchange {
    pub(crate) group: Group,
    pub(crate) parallel: Parallel,
}

impl Exchange {
    /// Errors: more processes than the recipe has shards, or a number that does not divide them.
    pub(crate) fn new(group: &Group, parallel: Parallel) -> Result<Self> {
        let (shards, processes) = (parallel.shards, group.size());
        if !(shards as usize).is_multiple_of(processes) {
            let message = format!(
                "{processes} processes cannot share batches of {shards} {}",
                if shards == 1 { "shard" } else { "shards" }
            );
            let hint = format!(
                "start as many processes as divide them, or set parallel = {{ shards = {}, reduce = \"exact\" }} in the recipe",
                processes.next_power_of_two()
            );
            return Err(Error::input(message).hint(hint).everywhere());
        }
        Ok(Self {
            group: group.clone(),
            parallel,
        })
    }

    /// Elements of a shard's part of a tensor; the last parts may have fewer or none.
    fn piece(&self, len: usize) -> usize {
        len.div_ceil(self.parallel.shards as usize)
    }

    /// The same of a process's part.
    fn stride(&self, len: usize) -> usize {
        self.piece(len) * (self.parallel.shards as usize / self.group.size())
    }

    fn range(&self, rank: usize, len: usize) -> Range<usize> {
        let at = |rank: usize| (rank * self.stride(len)).min(len);
        at(rank)..at(rank + 1)
    }

    /// This process's part of a tensor.
    pub(crate) fn own(&self, whole: &Tensor<1>) -> Tensor<1> {
        let range = self.range(self.group.rank(), whole.dims()[0]);
        if self.group.size() == 1 {
            return whole.clone();
        }
        let values = match range.is_empty() {
            true => Vec::new(),
            false => to_vec(whole.clone().narrow(0, range.start, range.len())),
        };
        from_vec(values, [range.len()], &whole.device())
    }

    /// This process's parts of the sums of all processes' gradients.
    pub(crate) fn add_up(&self, gradients: Vec<Tensor<1>>) -> Vec<Tensor<1>> {
        if self.group.size() == 1 {
            return gradients;
        }
        let buckets = buckets(gradients.iter().map(|gradient| gradient.dims()[0]));
        let device = gradients[0].device();
        let mut gradients = gradients.into_iter();
        let mut start = |bucket: &Vec<usize>| {
            let tensors: Vec<Vec<f32>> =
                gradients.by_ref().take(bucket.len()).map(to_vec).collect();
            self.group.start_all_to_all(self.lay_out(&tensors))
        };
        let mut parts = Vec::new();
        // While the sums of one are made the next is on its way.
        let mut coming = buckets.first().map(&mut start);
        for (number, bucket) in buckets.iter().enumerate() {
            let here = coming.take().expect("one is always on its way").wait();
            coming = buckets.get(number + 1).map(&mut start);
            let sums = pairwise(here, self.group.size());
            let mut begin = 0;
            for len in bucket {
                let own = self.range(self.group.rank(), *len).len();
                let values = sums[begin..begin + own].to_vec();
                parts.push(from_vec(values, [own], &device));
                begin += self.stride(*len);
            }
        }
        parts
    }

    /// The parts of tensors for each process, one process after another, filled up with zeros.
    fn lay_out(&self, tensors: &[Vec<f32>]) -> Vec<f32> {
        let width: usize = tensors.iter().map(|tensor| self.stride(tensor.len())).sum();
        let mut values = Vec::with_capacity(width * self.group.size());
        for rank in 0..self.group.size() {
            for tensor in tensors {
                let end = values.len() + self.stride(tensor.len());
                values.extend(&tensor[self.range(rank, tensor.len())]);
                values.resize(end, 0.0);
            }
        }
        values
    }

    /// Whole tensors of lengths from all processes' parts.
    pub(crate) fn put_together(&self, parts: &[Tensor<1>], lengths: &[usize]) -> Vec<Tensor<1>> {
        if self.group.size() == 1 {
            return parts.to_vec();
        }
        let mut wholes = Vec::new();
        self.each_whole(parts, lengths, |whole| wholes.push(whole));
        wholes
    }

    /// The same, one after another: who replaces an old tensor by each never holds all of both.
    pub(crate) fn each_whole(
        &self,
        parts: &[Tensor<1>],
        lengths: &[usize],
        mut take: impl FnMut(Tensor<1>),
    ) {
        let buckets = buckets(lengths.iter().copied());
        let mut left = parts.iter().zip(lengths);
        let mut start = |bucket: &Vec<usize>| {
            let mut values = Vec::new();
            for (part, len) in left.by_ref().take(bucket.len()) {
                let end = values.len() + self.stride(*len);
                values.extend(to_vec(part.clone()));
                values.resize(end, 0.0);
            }
            self.group.start_all_gather(values)
        };
        let mut coming = buckets.first().map(&mut start);
        for (number, bucket) in buckets.iter().enumerate() {
            let here = coming.take().expect("one is always on its way").wait();
            coming = buckets.get(number + 1).map(&mut start);
            let width = here.len() / self.group.size();
            let mut begin = 0;
            for len in bucket {
                let mut values = Vec::with_capacity(*len);
                for rank in 0..self.group.size() {
                    let own = self.range(rank, *len).len();
                    values.extend(&here[rank * width + begin..][..own]);
                }
                begin += self.stride(*len);
                take(from_vec(values, [*len], &parts[0].device()));
            }
        }
    }

    /// Sums of the squares of this process's parts of the tensors, one for each of its shards; the number of processes changes
    /// none.
    pub(crate) fn squares(&self, parts: &[Tensor<1>], lengths: &[usize]) -> Vec<f64> {
        let own = self.parallel.shards as usize / self.group.size();
        let mut pieces = Vec::new();
        for shard in 0..own {
            for (part, len) in parts.iter().zip(lengths) {
                let (size, held) = (self.piece(*len), part.dims()[0]);
                let at = |shard: usize| (shard * size).min(held);
                let (begin, end) = (at(shard), at(shard + 1));
                if begin < end {
                    pieces.push((shard, part.clone().narrow(0, begin, end - begin)));
                }
            }
        }
        let (shards, pieces): (Vec<_>, Vec<_>) = pieces.into_iter().unzip();
        let mut squares = vec![0.0; own];
        for (shard, square) in shards.into_iter().zip(sums_of_squares(pieces)) {
            squares[shard] += square;
        }
        squares
    }

    /// A number that another weight, or another bit of one, makes another.
    pub(crate) fn checksum<'a>(&self, weights: impl Iterator<Item = &'a Tensor<1>>) -> u64 {
        if self.group.size() == 1 {
            return 0;
        }
        weights.fold(0, |sum: u64, weights| {
            sum.wrapping_mul(31).wrapping_add(sum_of_bits(weights))
        })
    }
}

/// An error that names the processes whose weights are not those of most.
pub(crate) fn check_equal(checksums: &[u64]) -> Result<()> {
    let count = |sum: &u64| checksums.iter().filter(|other| *other == sum).count();
    let Some(most) = checksums.iter().max_by_key(|sum| count(sum)) else {
        return Ok(());
    };
    let others: Vec<String> = (0..checksums.len())
        .filter(|rank| checksums[*rank] != *most)
        .map(|rank| rank.to_string())
        .collect();
    if others.is_empty() {
        return Ok(());
    }
    let message = match 2 * count(most) > checksums.len() {
        true => format!(
            "the weights of process {} differ from those of the others",
            others.join(", ")
        ),
        // Of two nobody knows which is right.
        false => "the weights of the processes differ: which are right is not known".to_owned(),
    };
    Err(Error::new(Kind::TryAgain, message)
        .hint("a fault of memory, or of this program; the update was not made, and the same command goes on from the last checkpoint")
        .everywhere())
}

/// Consecutive tensors that are sent together, by their lengths.
fn buckets(lengths: impl Iterator<Item = usize>) -> Vec<Vec<usize>> {
    let mut buckets: Vec<Vec<usize>> = Vec::new();
    let mut filled = BUCKET;
    for len in lengths {
        if filled >= BUCKET {
            buckets.push(Vec::new());
            filled = 0;
        }
        filled += len;
        buckets.last_mut().expect("just pushed").push(len);
    }
    buckets
}

/// The sum of `count` equal parts of `values`, each with its neighbour, those sums with theirs, and so on.
fn pairwise(mut values: Vec<f32>, count: usize) -> Vec<f32> {
    let width = values.len() / count;
    let mut step = 1;
    while step < count {
        for left in (0..count).step_by(2 * step) {
            let right = left + step;
            if right < count {
                let (front, back) = values.split_at_mut(right * width);
                let sums = &mut front[left * width..][..width];
                sums.iter_mut()
                    .zip(&*back)
                    .for_each(|(sum, value)| *sum += value);
            }
        }
        step *= 2;
    }
    values.truncate(width);
    values
}

/// Gradients of shards, added up in the same order as they come in: pairs first, then pairs of these.
#[derive(Default)]
pub(crate) struct PairwiseSum(Vec<(u32, Vec<Tensor<1>>)>);

impl PairwiseSum {
    pub(crate) fn add(&mut self, gradients: Vec<Tensor<1>>) {
        let (mut level, mut sum) = (0, gradients);
        while let Some((of_left, left)) = self.0.pop_if(|(of_left, _)| *of_left == level) {
            sum = both(left, sum);
            level = of_left + 1;
        }
        self.0.push((level, sum));
    }

    /// The sum of all.
    ///
    /// # Panics
    /// When there were none.
    pub(crate) fn sum(self) -> Vec<Tensor<1>> {
        let sums = self.0.into_iter().map(|(_, sum)| sum).rev();
        sums.reduce(|right, left| both(left, right))
            .expect("a batch has images")
    }
}

pub(crate) fn both(left: Vec<Tensor<1>>, right: Vec<Tensor<1>>) -> Vec<Tensor<1>> {
    left.into_iter().zip(right).map(|(a, b)| a + b).collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::distributed::config::Reduce;

    #[test]
    fn sums_are_those_of_a_tree_whoever_makes_them() {
        // The order tells: 1 is lost beside 2^24 and not beside -2^24.
        let values = [16_777_216.0, 1.0, -16_777_216.0, 1.0, 0.25, 3.0, 1e-3, 7.0];
        let tree = ((values[0] + values[1]) + (values[2] + values[3]))
            + ((values[4] + values[5]) + (values[6] + values[7]));
        let tensor = |value: f32| vec![from_vec(vec![value], [1], &Device::flex())];
        let alone = |values: &[f32]| {
            let mut sum = PairwiseSum::default();
            values.iter().for_each(|value| sum.add(tensor(*value)));
            to_vec(sum.sum().remove(0))[0]
        };
        assert_eq!(alone(&values), tree);
        for processes in [1, 2, 4, 8] {
            let parts: Vec<f32> = values.chunks(8 / processes).map(alone).collect();
            assert_eq!(pairwise(parts, processes), [tree]);
        }
        assert_eq!(pairwise(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3), [9.0, 12.0]);
    }

    #[test]
    fn every_element_belongs_to_one_process() {
        for (shards, size) in [(1, 1), (8, 2), (8, 8), (6, 3)] {
            for len in [0, 1, 7, 64, 1001] {
                let parallel = Parallel {
                    shards,
                    reduce: Reduce::Fast,
                };
                let exchange = Exchange {
                    group: Group::solo(),
                    parallel,
                };
                let stride = exchange.piece(len) * (shards as usize / size);
                assert!(stride * size >= len);
                assert!(stride * size < len + shards as usize);
            }
        }
    }

    #[test]
    fn the_process_with_other_weights_is_named() {
        check_equal(&[5, 5, 5]).unwrap();
        let error = check_equal(&[5, 5, 6]).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("the weights of process 2 differ")
        );
        assert_eq!(error.exit_code(), 75);
        let error = check_equal(&[5, 6]).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("the weights of the processes differ")
        );
    }
}
