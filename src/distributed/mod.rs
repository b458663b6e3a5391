//! The processes of one run: one alone, or as many as `mpirun` started.
//!
//! Open MPI launches them, connects them and ends them all when one dies; here are the few exchanges that a run needs.
//! Nothing is added up on the way: sums are made where they are wanted, in an order that is told there. Every process must
//! ask for the same exchanges in the same order.
//! Not what is exchanged, which training and evaluation know, and no scheduler, of which there are enough.

pub(crate) mod config;
pub mod heartbeat;
pub(crate) mod launch;
#[cfg(feature = "mpi")]
pub(crate) mod mpi;
pub(crate) mod signals;
pub mod zero;

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::files;

use signals::Stop;

#[cfg(feature = "mpi")]
use std::sync::Arc;

pub use config::{Parallel, Reduce};
pub use launch::{number_here, processes_here, threads};
pub use signals::Saved;

/// Elements that are sent at a time: large enough that a message's start does not count, small enough to add them up while
/// the next are on their way.
pub const BUCKET: usize = 4 << 20;

/// One process among those of a run.
#[derive(Clone)]
pub struct Group {
    rank: usize,
    size: usize,
    #[cfg(feature = "mpi")]
    link: Option<Arc<mpi::Link>>,
    stop: Stop,
}

/// Values that are on their way.
pub struct Pending<T>(Way<T>);

enum Way<T> {
    Here(Vec<T>),
    #[cfg_attr(not(feature = "mpi"), allow(dead_code))]
    Coming(Receiver<Vec<T>>),
}

impl<T> Pending<T> {
    /// Waits for them.
    ///
    /// # Panics
    /// When the thread that talks to the other processes is gone, which only happens with the process.
    pub fn wait(self) -> Vec<T> {
        match self.0 {
            Way::Here(values) => values,
            Way::Coming(values) => values
                .recv()
                .expect("MPI's thread lives as long as the group"),
        }
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} of {}", self.rank, self.size)
    }
}

impl Group {
    /// A process alone.
    pub fn solo() -> Self {
        Self {
            rank: 0,
            size: 1,
            #[cfg(feature = "mpi")]
            link: None,
            stop: Stop::default(),
        }
    }

    /// This process with those that were started together with it.
    ///
    /// `tell` prints lines that come from other threads: that a signal was received, or that another process is lost.
    ///
    /// Errors: there are others and this binary was built without MPI; they run another binary.
    pub fn open(tell: fn(&str)) -> Result<Self> {
        let Some(count) = launch::processes() else {
            return Ok(Self {
                stop: Stop::telling(tell),
                ..Self::solo()
            });
        };
        #[cfg(feature = "mpi")]
        {
            let _ = count;
            let group = mpi::open(tell)?;
            group.same_binary()?;
            Ok(group)
        }
        #[cfg(not(feature = "mpi"))]
        {
            let _ = tell;
            let message =
                format!("{count} processes were started, and this binary was built for one");
            Err(Error::input(message).hint("build it with: cargo build --release --features mpi"))
        }
    }

    /// The number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many processes there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether this is the process that writes and tells.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// The part of `len` things that falls to this process: parts are consecutive and differ by one at most.
    pub fn part(&self, len: usize) -> Range<usize> {
        let at = |rank: usize| rank * len / self.size;
        at(self.rank)..at(self.rank + 1)
    }

    /// Sends each process its own part: `values` are as many for each, in the order of the processes.
    ///
    /// What comes is as many from each, in their order.
    pub fn start_all_to_all(&self, values: Vec<f32>) -> Pending<f32> {
        #[cfg(feature = "mpi")]
        if let Some(link) = &self.link {
            return Pending(Way::Coming(link.all_to_all(values)));
        }
        Pending(Way::Here(values))
    }

    /// Sends all processes the same values; what comes is those of all, in their order. All send as many.
    pub fn start_all_gather(&self, values: Vec<f32>) -> Pending<f32> {
        #[cfg(feature = "mpi")]
        if let Some(link) = &self.link {
            return Pending(Way::Coming(link.all_gather(values)));
        }
        Pending(Way::Here(values))
    }

    /// The bytes of all processes, which may differ in number.
    fn all_gather_bytes(&self, bytes: Vec<u8>) -> Vec<Vec<u8>> {
        #[cfg(feature = "mpi")]
        if let Some(link) = &self.link {
            return link.gather_bytes(bytes, self.size, true);
        }
        vec![bytes]
    }

    /// The values of all processes, in their order.
    pub fn gather<T: Serialize + DeserializeOwned>(&self, value: T) -> Vec<T> {
        if self.size == 1 {
            return vec![value];
        }
        let all = self.all_gather_bytes(to_bytes(&value));
        all.iter().map(|bytes| from_bytes(bytes)).collect()
    }

    /// The bytes of all processes for the first one; the others get nothing.
    fn bytes_to_first(&self, bytes: Vec<u8>) -> Vec<Vec<u8>> {
        #[cfg(feature = "mpi")]
        if let Some(link) = &self.link {
            return link.gather_bytes(bytes, self.size, false);
        }
        vec![bytes]
    }

    /// The values of all processes for the first one; the others get nothing.
    fn gather_to_first<T: Serialize + DeserializeOwned>(&self, value: T) -> Vec<T> {
        if self.size == 1 {
            return vec![value];
        }
        let all = self.bytes_to_first(to_bytes(&value));
        all.iter().map(|bytes| from_bytes(bytes)).collect()
    }

    /// The numbers of all processes, which may differ in number, for the first one; the others get nothing.
    pub fn floats_to_first(&self, values: Vec<f32>) -> Vec<Vec<f32>> {
        if self.size == 1 {
            return vec![values];
        }
        let all = self.bytes_to_first(bytemuck::cast_slice(&values).to_vec());
        all.iter()
            .map(|bytes| bytemuck::pod_collect_to_vec(bytes))
            .collect()
    }

    /// What the first process has.
    pub fn of_first<T: Serialize + DeserializeOwned>(&self, value: T) -> T {
        if self.size == 1 {
            return value;
        }
        let bytes = if self.is_first() {
            to_bytes(&value)
        } else {
            Vec::new()
        };
        from_bytes(&self.all_gather_bytes(bytes)[0])
    }

    /// The numbers that the first process has; the others give as many of their own.
    pub fn floats_of_first(&self, values: Vec<f32>) -> Vec<f32> {
        #[cfg(feature = "mpi")]
        if let Some(link) = &self.link {
            return link.broadcast(values);
        }
        values
    }

    /// A result that all processes have or none: where one failed, all get its error.
    pub fn agree<T>(&self, result: Result<T>) -> Result<T> {
        if self.size == 1 {
            return result;
        }
        let told = result.as_ref().err().map(|error| Told {
            kind: error.exit_code(),
            text: error.to_string(),
        });
        let all = self.gather(told);
        let Some((rank, first)) = all
            .iter()
            .enumerate()
            .find_map(|(rank, told)| Some((rank, told.as_ref()?)))
        else {
            return result;
        };
        let everybody = all.iter().all(|told| told.as_ref() == Some(first));
        let kind = [Kind::Input, Kind::TryAgain]
            .into_iter()
            .find(|kind| kind.exit_code() == first.kind);
        let error = Error::new(kind.unwrap_or(Kind::Failed), &first.text[..]).everywhere();
        Err(match everybody {
            true => error,
            false => error.context(format!("process {rank} of {}", self.size)),
        })
    }

    /// An error unless all processes were given the same text; `difference` tells what differs between the first's and
    /// another's.
    pub fn same(
        &self,
        what: &str,
        text: &str,
        difference: impl Fn(&str, &str) -> String,
    ) -> Result<()> {
        let all = self.gather((host(), text.to_owned()));
        let (_, first) = &all[0];
        let other = all.iter().enumerate().find(|(_, (_, text))| text != first);
        let Some((rank, (host, text))) = other else {
            return Ok(());
        };
        let difference = difference(first, text);
        let message = format!(
            "process {rank} of {} (on {host}) has another {what} than process 0{difference}",
            self.size
        );
        Err(Error::input(message)
            .hint("give all processes the same files and arguments")
            .everywhere())
    }

    #[cfg(feature = "mpi")]
    fn same_binary(&self) -> Result<()> {
        if self.size == 1 {
            return Ok(());
        }
        let hash = || {
            let path = std::env::current_exe().ok()?;
            files::Source::open(&path).ok()?.hash().ok()
        };
        let version = env!("CARGO_PKG_VERSION");
        let own = format!("{version} {}", hash().unwrap_or_default());
        self.same("binary", &own, |_, _| String::new())
    }

    /// Requests a stop on SIGTERM, SIGUSR1 (a scheduler's warning) and SIGINT (Ctrl-C). A second signal exits at once.
    pub fn stop_on_signals(&self) -> Result<()> {
        self.stop.on_signals()
    }

    /// Marks a section in which exiting loses nothing: while the guard is alive, a process that does not get to a good
    /// moment within seconds of a signal exits where it is.
    pub fn everything_is_saved(&self) -> Saved {
        self.stop.everything_is_saved()
    }

    /// Whether this process was asked to stop. The others may not know; see [`Self::is_stopping`].
    pub fn was_told_to_stop(&self) -> bool {
        self.stop.told.load(Ordering::Relaxed)
    }

    /// Whether any process was asked to stop.
    pub fn is_stopping(&self) -> bool {
        let told = self.was_told_to_stop();
        let all = self.gather(told);
        all.contains(&true)
    }

    /// Works through `len` things in pieces, each process some of them, and hands the results to `take` in order, in the
    /// first process alone.
    ///
    /// Errors: the first of a piece, or of `take`; all processes get it.
    pub fn deal<T: Serialize + DeserializeOwned>(
        &self,
        len: usize,
        piece: usize,
        mut work: impl FnMut(Range<usize>) -> Result<T>,
        mut take: impl FnMut(T) -> Result<()>,
    ) -> Result<()> {
        let round = piece.max(1) * self.size;
        for begin in (0..len).step_by(round) {
            let start = (begin + self.rank * piece.max(1)).min(len);
            let own = start..(start + piece.max(1)).min(len);
            let done = if own.is_empty() {
                Ok(None)
            } else {
                work(own).map(Some)
            };
            let all = self.gather_to_first(self.agree(done)?);
            let taken = match self.is_first() {
                true => all.into_iter().flatten().try_for_each(&mut take),
                false => Ok(()),
            };
            self.agree(taken)?;
        }
        Ok(())
    }

    /// Ends all processes with an exit code, from wherever they are.
    pub fn abort(&self, code: u8) {
        #[cfg(feature = "mpi")]
        if let Some(link) = &self.link {
            link.abort(code);
        }
        let _ = code;
    }
}

/// An error that a process tells the others of.
#[derive(PartialEq, Serialize, Deserialize)]
struct Told {
    kind: u8,
    text: String,
}

fn to_bytes<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).expect("memory takes all that is written");
    bytes
}

/// # Panics
/// When they are no such value: all processes run the same binary.
fn from_bytes<T: DeserializeOwned>(bytes: &[u8]) -> T {
    ciborium::from_reader(bytes).expect("the same binary wrote it")
}

/// The name of this machine.
pub(crate) fn host() -> String {
    let name = files::read_text(std::path::Path::new("/proc/sys/kernel/hostname"));
    name.map_or_else(|_| "an unknown host".into(), |name| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alone_every_exchange_gives_back_what_was_sent() {
        let group = Group::solo();
        assert_eq!(group.start_all_to_all(vec![1.0, 2.0]).wait(), [1.0, 2.0]);
        assert_eq!(group.start_all_gather(vec![3.0]).wait(), [3.0]);
        assert_eq!(group.gather("a".to_owned()), ["a"]);
        assert_eq!(group.part(7), 0..7);
        let mut taken = Vec::new();
        let take = |range: Range<usize>| {
            taken.push(range);
            Ok(())
        };
        group.deal(7, 3, Ok, take).unwrap();
        assert_eq!(taken, [0..3, 3..6, 6..7]);
    }

    #[test]
    fn parts_are_consecutive_and_differ_by_one_at_most() {
        for size in 1..9 {
            let mut end = 0;
            for rank in 0..size {
                let group = Group {
                    rank,
                    size,
                    ..Group::solo()
                };
                let part = group.part(20);
                assert_eq!(part.start, end);
                assert!(part.len() == 20 / size || part.len() == 20 / size + 1);
                end = part.end;
            }
            assert_eq!(end, 20);
        }
    }
}
