//! The ranks of one run and their collectives.
//!
//! [`Comm`] knows rank and world size and offers the usual collectives; a `Transport` carries them: TCP or MPI.
//! Nothing is summed on the way: [`Comm::reduce_scatter_f32`] receives the values of all ranks and adds them in the order of
//! a pairwise tree, so that neither the transport nor the number of ranks changes a bit. Every rank must call the same
//! collectives in the same order.
//! What is communicated is known to training and evaluation, not here.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Weak};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::launch::host;
use super::program;
use super::signals::{ExitGuard, Stop};
use crate::error::{Error, Kind, Result};
use crate::files;

/// Elements of one message: large enough to hide latency, small enough that sums overlap with the next message.
pub const BUCKET: usize = 4 << 20;

/// What carries collectives between the ranks.
pub(crate) trait Transport: Send + Sync {
    /// Sends each rank its own part: `values` are as many for each, in the order of the ranks. As many come from each.
    fn all_to_all(&self, values: Vec<f32>) -> Receiver<Vec<f32>>;
    /// Sends all ranks the same values; what comes is those of all, in their order. All send as many.
    fn all_gather(&self, values: Vec<f32>) -> Receiver<Vec<f32>>;
    /// The values of rank 0; all pass as many.
    fn broadcast(&self, values: Vec<f32>) -> Vec<f32>;
    /// The bytes of all ranks, which may differ in number: at every rank, or at rank 0 alone (the others get nothing).
    fn gather_bytes(&self, bytes: Vec<u8>, to_all: bool) -> Vec<Vec<u8>>;
    /// Ends all ranks with an exit code, from the thread that calls the collectives.
    fn abort(&self, code: u8);
    /// Ends this rank from any thread, while others may wait in an exchange, and with it the other ranks.
    fn leave(&self, code: u8) -> !;
}

/// One rank of a run, and its way to the others.
#[derive(Clone)]
pub struct Comm {
    rank: usize,
    world_size: usize,
    /// None in a run of one process.
    transport: Option<Arc<dyn Transport>>,
    stop: Stop,
}

/// Values in transit.
pub struct Pending(Source);

enum Source {
    Local(Vec<f32>),
    Remote(Receiver<Vec<f32>>),
    /// Rows of this many ranks, to be summed.
    Sum(Receiver<Vec<f32>>, usize),
}

impl Pending {
    /// Waits for them.
    ///
    /// # Panics
    /// When the communication thread is gone, which only happens with the process.
    pub fn wait(self) -> Vec<f32> {
        let receive = |values: Receiver<Vec<f32>>| {
            let values = values.recv();
            values.expect("the communication thread lives as long as the communicator")
        };
        match self.0 {
            Source::Local(values) => values,
            Source::Remote(values) => receive(values),
            Source::Sum(values, ranks) => pairwise_sum(receive(values), ranks),
        }
    }
}

/// The sum of `count` equal parts of `values`, each with its neighbor, those sums with theirs, and so on.
pub(super) fn pairwise_sum(mut values: Vec<f32>, count: usize) -> Vec<f32> {
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

impl std::fmt::Debug for Comm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} of {}", self.rank, self.world_size)
    }
}

impl Comm {
    /// A run of one process.
    pub fn single() -> Self {
        Self::single_with(Stop::default())
    }

    pub(super) fn single_with(stop: Stop) -> Self {
        Self {
            rank: 0,
            world_size: 1,
            transport: None,
            stop,
        }
    }

    pub(super) fn new(
        rank: usize,
        world_size: usize,
        transport: Arc<dyn Transport>,
        stop: Stop,
    ) -> Self {
        Self {
            rank,
            world_size,
            transport: Some(transport),
            stop,
        }
    }

    /// The number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of processes.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Whether this is rank 0, which alone writes files and prints.
    pub fn is_main(&self) -> bool {
        self.rank == 0
    }

    /// This rank's part of `len` items: parts are consecutive and differ by one item at most.
    pub fn local_range(&self, len: usize) -> Range<usize> {
        let at = |rank: usize| rank * len / self.world_size;
        at(self.rank)..at(self.rank + 1)
    }

    /// Starts an all-to-all: `values` are as many for each rank, in the order of the ranks.
    pub fn all_to_all_f32(&self, values: Vec<f32>) -> Pending {
        Pending(match &self.transport {
            Some(transport) => Source::Remote(transport.all_to_all(values)),
            None => Source::Local(values),
        })
    }

    /// Starts a reduce-scatter: `values` are as many for each rank; each rank receives the sum of its part over all ranks,
    /// added as a pairwise tree in the order of the ranks.
    pub fn reduce_scatter_f32(&self, values: Vec<f32>) -> Pending {
        Pending(match &self.transport {
            Some(transport) => Source::Sum(transport.all_to_all(values), self.world_size),
            None => Source::Local(values),
        })
    }

    /// Starts an all-gather of as many values from each rank.
    pub fn all_gather_f32(&self, values: Vec<f32>) -> Pending {
        Pending(match &self.transport {
            Some(transport) => Source::Remote(transport.all_gather(values)),
            None => Source::Local(values),
        })
    }

    /// The values of rank 0; the other ranks pass as many of their own.
    pub fn broadcast_f32(&self, values: Vec<f32>) -> Vec<f32> {
        match &self.transport {
            Some(transport) => transport.broadcast(values),
            None => values,
        }
    }

    /// The values of all ranks, which may differ in number, at rank 0; the others get nothing.
    pub fn gather_f32(&self, values: Vec<f32>) -> Vec<Vec<f32>> {
        match &self.transport {
            None => vec![values],
            Some(transport) => {
                let all = transport.gather_bytes(bytemuck::cast_slice(&values).to_vec(), false);
                let all = all.iter();
                all.map(|bytes| bytemuck::pod_collect_to_vec(bytes))
                    .collect()
            }
        }
    }

    /// The value of each rank, in their order.
    pub fn all_gather<T: Serialize + DeserializeOwned>(&self, value: T) -> Vec<T> {
        match &self.transport {
            None => vec![value],
            Some(transport) => decode(&transport.gather_bytes(encode(&value), true)),
        }
    }

    /// The value of each rank at rank 0; the others get nothing.
    pub fn gather<T: Serialize + DeserializeOwned>(&self, value: T) -> Vec<T> {
        match &self.transport {
            None => vec![value],
            Some(transport) => decode(&transport.gather_bytes(encode(&value), false)),
        }
    }

    /// The value of rank 0.
    pub fn broadcast<T: Serialize + DeserializeOwned>(&self, value: T) -> T {
        let Some(transport) = &self.transport else {
            return value;
        };
        let bytes = match self.is_main() {
            true => encode(&value),
            false => Vec::new(),
        };
        let all = transport.gather_bytes(bytes, true);
        decode(&all[..1]).pop().expect("one for one")
    }

    /// Waits until all ranks are here.
    pub fn barrier(&self) {
        self.all_gather(());
    }

    /// A result that is `Ok` at all ranks or at none: where one failed, all get its error.
    pub fn all_ok<T>(&self, result: Result<T>) -> Result<T> {
        if self.transport.is_none() {
            return result;
        }
        let failure = result.as_ref().err().map(|error| Failure {
            kind: error.exit_code(),
            text: error.to_string(),
        });
        let all = self.all_gather(failure);
        let Some((rank, first)) = all
            .iter()
            .enumerate()
            .find_map(|(rank, failure)| Some((rank, failure.as_ref()?)))
        else {
            return result;
        };
        let is_same = all.iter().all(|failure| failure.as_ref() == Some(first));
        let kind = [Kind::Input, Kind::TryAgain]
            .into_iter()
            .find(|kind| kind.exit_code() == first.kind);
        let error = Error::new(kind.unwrap_or(Kind::Failed), &first.text[..]).everywhere();
        Err(match is_same {
            true => error,
            false => error.context(format!("process {rank} of {}", self.world_size)),
        })
    }

    /// An error unless all ranks pass the same text; `difference` describes how rank 0's and another's differ.
    pub fn check_equal(
        &self,
        what: &str,
        text: &str,
        difference: impl Fn(&str, &str) -> String,
    ) -> Result<()> {
        let all = self.all_gather((host(), text.to_owned()));
        let (_, first) = &all[0];
        let other = all.iter().enumerate().find(|(_, (_, text))| text != first);
        let Some((rank, (host, text))) = other else {
            return Ok(());
        };
        let difference = difference(first, text);
        let message = format!(
            "process {rank} of {} (on {host}) has a different {what} than process 0{difference}",
            self.world_size
        );
        Err(Error::input(message)
            .hint("give all processes the same files and arguments")
            .everywhere())
    }

    /// An error unless all ranks run the same binary.
    pub fn check_binary(&self) -> Result<()> {
        if self.world_size == 1 {
            return Ok(());
        }
        let hash = || {
            let path = program::binary().ok()?;
            files::Source::open(&path).ok()?.hash().ok()
        };
        let version = env!("CARGO_PKG_VERSION");
        let own = format!("{version} {}", hash().unwrap_or_default());
        self.check_equal("binary", &own, |_, _| String::new())
    }

    /// Requests a stop on SIGTERM, SIGUSR1 (a scheduler's warning) and SIGINT (Ctrl-C). A second signal exits at once.
    pub fn stop_on_signals(&self) -> Result<()> {
        let transport = self.transport.as_ref().map(Arc::downgrade);
        let leave = move |code: u8| {
            if let Some(transport) = transport.as_ref().and_then(Weak::upgrade) {
                transport.leave(code);
            }
            std::process::exit(i32::from(code))
        };
        self.stop.on_signals(self.is_main(), leave)
    }

    /// Marks a section in which exiting loses nothing: while the guard is alive, a process that does not reach a safe point
    /// within seconds of a signal exits where it is.
    pub fn allow_exit(&self) -> ExitGuard {
        self.stop.allow_exit()
    }

    /// Whether this rank was asked to stop. The others may not know; see [`Self::any_stop_requested`].
    pub fn stop_requested(&self) -> bool {
        self.stop.requested.load(Ordering::Relaxed)
    }

    /// Asks this rank to stop, as a signal does.
    pub fn request_stop(&self) {
        self.stop.requested.store(true, Ordering::Relaxed);
    }

    /// Whether any rank was asked to stop.
    pub fn any_stop_requested(&self) -> bool {
        let requested = self.stop_requested();
        self.all_gather(requested).contains(&true)
    }

    /// The flag that a request to stop sets.
    #[cfg(feature = "mpi")]
    pub(super) fn stop_flag(&self) -> Arc<std::sync::atomic::AtomicBool> {
        Arc::clone(&self.stop.requested)
    }

    /// Works through `len` items in pieces, dealt to the ranks in turn, and passes the results to `take` in order, at rank 0
    /// alone.
    ///
    /// Errors: the first of a piece, or of `take`; all ranks get it.
    pub fn map_in_order<T: Serialize + DeserializeOwned>(
        &self,
        len: usize,
        piece: usize,
        mut work: impl FnMut(Range<usize>) -> Result<T>,
        mut take: impl FnMut(T) -> Result<()>,
    ) -> Result<()> {
        let round = piece.max(1) * self.world_size;
        for begin in (0..len).step_by(round) {
            let start = (begin + self.rank * piece.max(1)).min(len);
            let own = start..(start + piece.max(1)).min(len);
            let done = if own.is_empty() {
                Ok(None)
            } else {
                work(own).map(Some)
            };
            let all = self.gather(self.all_ok(done)?);
            let taken = match self.is_main() {
                true => all.into_iter().flatten().try_for_each(&mut take),
                false => Ok(()),
            };
            self.all_ok(taken)?;
        }
        Ok(())
    }

    /// Ends all ranks with an exit code, from wherever they are.
    pub fn abort(&self, code: u8) {
        if let Some(transport) = &self.transport {
            transport.abort(code);
        }
    }
}

/// An error as it travels to the other ranks.
#[derive(PartialEq, Serialize, Deserialize)]
struct Failure {
    kind: u8,
    text: String,
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).expect("memory takes all that is written");
    bytes
}

/// # Panics
/// If they are not such values, which cannot happen: all ranks run the same binary.
fn decode<T: DeserializeOwned>(all: &[Vec<u8>]) -> Vec<T> {
    let values = all.iter();
    values
        .map(|bytes| ciborium::from_reader(&bytes[..]).expect("the same binary wrote it"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_process_gets_back_what_it_sends() {
        let comm = Comm::single();
        assert_eq!(comm.all_to_all_f32(vec![1.0, 2.0]).wait(), [1.0, 2.0]);
        assert_eq!(comm.all_gather_f32(vec![3.0]).wait(), [3.0]);
        assert_eq!(comm.all_gather("a".to_owned()), ["a"]);
        assert_eq!(comm.local_range(7), 0..7);
        let mut taken = Vec::new();
        let take = |range: Range<usize>| {
            taken.push(range);
            Ok(())
        };
        comm.map_in_order(7, 3, Ok, take).unwrap();
        assert_eq!(taken, [0..3, 3..6, 6..7]);
    }

    #[test]
    fn parts_are_consecutive_and_differ_by_one_at_most() {
        for size in 1..9 {
            let mut end = 0;
            for rank in 0..size {
                let comm = Comm {
                    rank,
                    world_size: size,
                    ..Comm::single()
                };
                let part = comm.local_range(20);
                assert_eq!(part.start, end);
                assert!(part.len() == 20 / size || part.len() == 20 / size + 1);
                end = part.end;
            }
            assert_eq!(end, 20);
        }
    }
}
