//! The GPUs of a run's ranks, and what they exchange without the host: gradients and weights.
//!
//! Over NCCL, whose id rank 0 makes and the ranks' own transport carries. Ranks that share a GPU, which NCCL refuses, exchange
//! through the host.

use std::collections::BTreeSet;
use std::time::Duration;

use advxl_cuda::{Collectives, Gpu, Pending, Plan, Share, Sum, UniqueId, Values, fail};

use super::comm::Comm;
use super::config::Reduce;
use super::launch::machine;
use crate::error::{Error, Result};

/// How long a rank waits for the others in an exchange. One of them may be evaluating or writing a checkpoint.
const LIMIT: Duration = Duration::from_secs(600);

/// The group of the ranks' GPUs.
#[derive(Debug)]
pub(crate) struct Gpus {
    gpu: Gpu,
    collectives: Collectives,
}

impl Gpus {
    /// Joins the GPUs of all ranks; `None` where some share one.
    ///
    /// Errors, at all ranks: NCCL is missing, or does not connect them.
    pub(crate) fn join(comm: &Comm, gpu: &Gpu, reduce: Reduce) -> Result<Option<Self>> {
        let here = (machine(), gpu.facts().id.clone());
        let all = comm.all_gather(here);
        if all.iter().collect::<BTreeSet<_>>().len() < all.len() {
            return Ok(None);
        }
        let failed = |error: advxl_cuda::Error| Error::of_gpu(&error);
        let id = comm
            .is_main()
            .then(|| UniqueId::new(gpu).map(UniqueId::to_bytes));
        let id = comm.all_ok(id.transpose().map_err(failed))?;
        let bytes = comm.broadcast(id.map(|id| id.to_vec()).unwrap_or_default());
        let id: [u8; 128] = bytes.try_into().expect("rank 0 sends an id of 128 bytes");
        let sum = match reduce {
            Reduce::Exact => Sum::Exact,
            Reduce::Fast => Sum::Fast,
        };
        let id = UniqueId::from_bytes(id);
        let joined = Collectives::join(gpu, id, comm.rank(), comm.world_size(), sum, LIMIT);
        let collectives = comm.all_ok(joined.map_err(failed))?;
        Ok(Some(Self {
            gpu: gpu.clone(),
            collectives,
        }))
    }

    /// This rank's.
    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// A number that depends on all exchanges so far, for the replica check.
    pub(super) fn trace(&self) -> u64 {
        self.collectives.trace()
    }

    fn plan(&self, shares: &[Share]) -> Plan {
        let plan = self.collectives.plan(shares);
        plan.unwrap_or_else(|error| fail(error))
    }

    /// This rank's parts of the sums of all ranks' tensors, bucket by bucket. All exchanges start before the first is waited
    /// for, the last bucket first, whose gradients a backward pass computes first.
    pub(super) fn reduce_scatter(&self, buckets: Vec<(Vec<Share>, Vec<Values>)>) -> Vec<Values> {
        let started = buckets.into_iter().rev().map(|(shares, tensors)| {
            self.collectives
                .reduce_scatter(&self.plan(&shares), tensors)
        });
        let started: Vec<Pending> = started.collect();
        started.into_iter().rev().flat_map(Pending::wait).collect()
    }

    /// Whole tensors from the parts of all ranks, one bucket after another, while the next is on its way.
    pub(super) fn all_gather(
        &self,
        buckets: Vec<(Vec<Share>, Vec<Values>)>,
        mut take: impl FnMut(Values),
    ) {
        let mut coming: Option<Pending> = None;
        for (shares, parts) in buckets {
            let next = self.collectives.all_gather(&self.plan(&shares), parts);
            if let Some(here) = coming.replace(next) {
                here.wait().into_iter().for_each(&mut take);
            }
        }
        coming.into_iter().flat_map(Pending::wait).for_each(take);
    }
}
