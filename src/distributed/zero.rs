//! ZeRO-1: optimizer state sharded over the ranks (Rajbhandari et al. 2020, section 5.1), and the replica check.
//!
//! Every rank has all weights and owns one part of each tensor: it alone reduces the gradients of that part, keeps its
//! optimizer state and updates it. Each element is summed at one rank, in the order of a pairwise tree over the shards of the
//! batch, so that the number of ranks changes no bit.

use std::ops::Range;

use advxl_cuda::{Share, Values};
use burn::tensor::Tensor;

use super::comm::{BUCKET, Comm};
use super::config::Parallel;
use super::gpus::Gpus;
use crate::error::{Error, Kind, Result};
use crate::ops::{
    Device, add, from_vec, gpu_values, of_gpu_values, sum_of_bits, sum_of_squares, to_vec,
};

/// How tensors are partitioned over the ranks.
#[derive(Clone, Copy, Debug)]
pub struct Zero<'a> {
    comm: &'a Comm,
    /// Equal parts of every batch, a multiple of the world size.
    shards: usize,
    /// The ranks' GPUs, where these exchange without the host.
    gpus: Option<&'a Gpus>,
}

impl<'a> Zero<'a> {
    /// Errors: more ranks than the recipe has shards, or a number that does not divide them.
    pub fn new(comm: &'a Comm, parallel: Parallel) -> Result<Self> {
        let (shards, processes) = (parallel.shards as usize, comm.world_size());
        if !shards.is_multiple_of(processes) {
            let message = format!(
                "{processes} processes cannot share batches of {shards} {}",
                if shards == 1 { "shard" } else { "shards" }
            );
            let fitting: Vec<String> = (1..=shards)
                .filter(|count| shards.is_multiple_of(*count))
                .map(|count| count.to_string())
                .collect();
            let mut hint = format!(
                "start a number of processes that divides them: {}",
                fitting.join(", ")
            );
            let enough = processes.next_power_of_two();
            if enough == processes {
                hint += &format!(
                    "; or set parallel = {{ shards = {enough}, reduce = \"exact\" }} in the recipe"
                );
            }
            return Err(Error::input(message).hint(hint).everywhere());
        }
        Ok(Self {
            comm,
            shards,
            gpus: None,
        })
    }

    /// The same with the group of the ranks' GPUs.
    pub(crate) fn with_gpus(self, gpus: Option<&'a Gpus>) -> Self {
        Self { gpus, ..self }
    }

    /// The ranks.
    pub fn comm(&self) -> &'a Comm {
        self.comm
    }

    /// Elements of a shard's part of a tensor; the last parts may have fewer or none.
    fn piece(&self, len: usize) -> usize {
        len.div_ceil(self.shards)
    }

    /// The same of a process's part.
    fn stride(&self, len: usize) -> usize {
        self.piece(len) * (self.shards / self.comm.world_size())
    }

    fn range(&self, rank: usize, len: usize) -> Range<usize> {
        let at = |rank: usize| (rank * self.stride(len)).min(len);
        at(rank)..at(rank + 1)
    }

    /// This rank's part of a tensor.
    pub fn part(&self, whole: &Tensor<1>) -> Tensor<1> {
        let range = self.range(self.comm.rank(), whole.dims()[0]);
        if self.comm.world_size() == 1 {
            return whole.clone();
        }
        if let Some(gpus) = self.gpus {
            let length = range.len();
            return of_gpu_values(gpu_values(gpus.gpu(), whole).slice(range), [length]);
        }
        let values = match range.is_empty() {
            true => Vec::new(),
            false => to_vec(whole.clone().narrow(0, range.start, range.len())),
        };
        from_vec(values, [range.len()], &Device::of(whole))
    }

    /// This rank's parts of the sums of all ranks' gradients.
    pub fn reduce_scatter(&self, gradients: Vec<Tensor<1>>) -> Vec<Tensor<1>> {
        if self.comm.world_size() == 1 {
            return gradients;
        }
        let buckets = buckets(gradients.iter().map(|gradient| gradient.dims()[0]));
        if let Some(gpus) = self.gpus {
            let sums = gpus.reduce_scatter(self.on_gpus(gpus, &buckets, gradients));
            return sums.into_iter().map(as_tensor).collect();
        }
        let device = Device::of(&gradients[0]);
        let mut gradients = gradients.into_iter();
        let mut start = |bucket: &Vec<usize>| {
            let tensors: Vec<Vec<f32>> =
                gradients.by_ref().take(bucket.len()).map(to_vec).collect();
            self.comm.reduce_scatter_f32(self.lay_out(&tensors))
        };
        let mut parts = Vec::new();
        // While one bucket is summed the next is in transit.
        let mut coming = buckets.first().map(&mut start);
        for (number, bucket) in buckets.iter().enumerate() {
            let pending = coming.take().expect("one is always in transit");
            coming = buckets.get(number + 1).map(&mut start);
            let sums = pending.wait();
            let mut begin = 0;
            for len in bucket {
                let own = self.range(self.comm.rank(), *len).len();
                let values = sums[begin..begin + own].to_vec();
                parts.push(from_vec(values, [own], &device));
                begin += self.stride(*len);
            }
        }
        parts
    }

    /// The tensors of each bucket on the GPU, or this rank's parts of them, with how the ranks share the tensors.
    fn on_gpus(
        &self,
        gpus: &Gpus,
        buckets: &[Vec<usize>],
        tensors: impl IntoIterator<Item = Tensor<1>>,
    ) -> Vec<(Vec<Share>, Vec<Values>)> {
        let mut tensors = tensors.into_iter();
        let of_bucket = |lengths: &Vec<usize>| {
            let share = |len: &usize| Share {
                len: *len,
                stride: self.stride(*len),
            };
            let values = tensors.by_ref().take(lengths.len());
            let values = values.map(|tensor| gpu_values(gpus.gpu(), &tensor));
            (lengths.iter().map(share).collect(), values.collect())
        };
        buckets.iter().map(of_bucket).collect()
    }

    /// The parts of tensors for each rank, one rank after another, padded with zeros.
    fn lay_out(&self, tensors: &[Vec<f32>]) -> Vec<f32> {
        let width: usize = tensors.iter().map(|tensor| self.stride(tensor.len())).sum();
        let mut values = Vec::with_capacity(width * self.comm.world_size());
        for rank in 0..self.comm.world_size() {
            for tensor in tensors {
                let end = values.len() + self.stride(tensor.len());
                values.extend(&tensor[self.range(rank, tensor.len())]);
                values.resize(end, 0.0);
            }
        }
        values
    }

    /// Whole tensors of some lengths from the parts of all ranks.
    pub fn all_gather(&self, parts: &[Tensor<1>], lengths: &[usize]) -> Vec<Tensor<1>> {
        if self.comm.world_size() == 1 {
            return parts.to_vec();
        }
        let mut wholes = Vec::new();
        self.all_gather_each(parts, lengths, |whole| wholes.push(whole));
        wholes
    }

    /// The same, one after another: a caller that replaces an old tensor by each never holds both sets.
    pub fn all_gather_each(
        &self,
        parts: &[Tensor<1>],
        lengths: &[usize],
        mut take: impl FnMut(Tensor<1>),
    ) {
        let buckets = buckets(lengths.iter().copied());
        if let Some(gpus) = self.gpus {
            let parts = self.on_gpus(gpus, &buckets, parts.iter().cloned());
            return gpus.all_gather(parts, |whole| take(as_tensor(whole)));
        }
        let mut left = parts.iter().zip(lengths);
        let mut start = |bucket: &Vec<usize>| {
            let mut values = Vec::new();
            for (part, len) in left.by_ref().take(bucket.len()) {
                let end = values.len() + self.stride(*len);
                values.extend(to_vec(part.clone()));
                values.resize(end, 0.0);
            }
            self.comm.all_gather_f32(values)
        };
        let mut coming = buckets.first().map(&mut start);
        for (number, bucket) in buckets.iter().enumerate() {
            let here = coming.take().expect("one is always in transit").wait();
            coming = buckets.get(number + 1).map(&mut start);
            let width = here.len() / self.comm.world_size();
            let mut begin = 0;
            for len in bucket {
                let mut values = Vec::with_capacity(*len);
                for rank in 0..self.comm.world_size() {
                    let own = self.range(rank, *len).len();
                    values.extend(&here[rank * width + begin..][..own]);
                }
                begin += self.stride(*len);
                take(from_vec(values, [*len], &Device::of(&parts[0])));
            }
        }
    }

    /// Sums of squares of this rank's parts of the tensors, one for each of its shards; the world size changes none.
    pub fn squares(&self, parts: &[Tensor<1>], lengths: &[usize]) -> Vec<f64> {
        let own = self.shards / self.comm.world_size();
        let pieces = |shard: usize| {
            let pieces = parts.iter().zip(lengths).filter_map(move |(part, len)| {
                let (size, held) = (self.piece(*len), part.dims()[0]);
                let at = |shard: usize| (shard * size).min(held);
                let (begin, end) = (at(shard), at(shard + 1));
                (begin < end).then(|| part.clone().narrow(0, begin, end - begin))
            });
            pieces.collect()
        };
        (0..own)
            .map(|shard| sum_of_squares(pieces(shard)))
            .collect()
    }

    /// A number that changes with any bit of any weight, and with what was exchanged between GPUs; 0 in a run of one process.
    pub fn checksum<'b>(&self, weights: impl Iterator<Item = &'b Tensor<1>>) -> u64 {
        if self.comm.world_size() == 1 {
            return 0;
        }
        let exchanges = self.gpus.map_or(0, Gpus::trace);
        weights.fold(exchanges, |sum: u64, weights| {
            sum.wrapping_mul(31).wrapping_add(sum_of_bits(weights))
        })
    }
}

/// Values on a GPU as a tensor.
fn as_tensor(values: Values) -> Tensor<1> {
    let length = values.len();
    of_gpu_values(values, [length])
}

/// The replica check: an error that names the ranks whose weights differ from the majority's.
pub fn check_replicas(checksums: &[u64]) -> Result<()> {
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
        false => "weights differ between ranks and no majority agrees".to_owned(),
    };
    Err(Error::new(Kind::TryAgain, message)
        .hint("a memory fault or a bug; the step was not applied, run the same command again to resume from the last checkpoint")
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

/// Gradients of shards, summed as they come in, in the order of the same tree: pairs first, then pairs of these.
#[derive(Default)]
pub struct PairwiseSum(Vec<(u32, Vec<Tensor<1>>)>);

impl PairwiseSum {
    /// Adds the gradients of the next shard.
    pub fn add(&mut self, gradients: Vec<Tensor<1>>) {
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
    pub fn sum(self) -> Vec<Tensor<1>> {
        let sums = self.0.into_iter().map(|(_, sum)| sum).rev();
        sums.reduce(|right, left| both(left, right))
            .expect("a batch has images")
    }
}

/// Element-wise sums of two lists of tensors.
pub fn both(left: Vec<Tensor<1>>, right: Vec<Tensor<1>>) -> Vec<Tensor<1>> {
    left.into_iter()
        .zip(right)
        .map(|(a, b)| add(a, b))
        .collect()
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::distributed::comm::pairwise_sum;
    use crate::ops::Device;

    #[test]
    fn sums_are_those_of_one_tree_for_every_world_size() {
        // The order shows: 1 is lost next to 2^24 and not next to -2^24.
        let values = [16_777_216.0, 1.0, -16_777_216.0, 1.0, 0.25, 3.0, 1e-3, 7.0];
        let tree = ((values[0] + values[1]) + (values[2] + values[3]))
            + ((values[4] + values[5]) + (values[6] + values[7]));
        let tensor = |value: f32| vec![from_vec(vec![value], [1], &Device::cpu())];
        let alone = |values: &[f32]| {
            let mut sum = PairwiseSum::default();
            values.iter().for_each(|value| sum.add(tensor(*value)));
            to_vec(sum.sum().remove(0))[0]
        };
        assert_eq!(alone(&values), tree);
        for processes in [1, 2, 4, 8] {
            let parts: Vec<f32> = values.chunks(8 / processes).map(alone).collect();
            assert_eq!(pairwise_sum(parts, processes), [tree]);
        }
        assert_eq!(
            pairwise_sum(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3),
            [9.0, 12.0]
        );
    }

    #[test]
    fn every_element_belongs_to_one_rank() {
        for (shards, size) in [(1, 1), (8, 2), (8, 8), (6, 3)] {
            for len in [0, 1, 7, 64, 1001] {
                let zero = Zero {
                    comm: &Comm::single(),
                    shards,
                    gpus: None,
                };
                let stride = zero.piece(len) * (shards / size);
                assert!(stride * size >= len);
                assert!(stride * size < len + shards);
            }
        }
    }

    #[test]
    fn the_rank_whose_weights_differ_is_named() {
        check_replicas(&[5, 5, 5]).unwrap();
        let error = check_replicas(&[5, 5, 6]).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("the weights of process 2 differ")
        );
        assert_eq!(error.exit_code(), 75);
        let error = check_replicas(&[5, 6]).unwrap_err();
        assert!(error.to_string().contains("no majority agrees"));
    }
}
