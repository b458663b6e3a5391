//! Exchanges over MPI, on a thread of their own.
//!
//! MPI's handles belong to the thread that made them. One thread keeps them and serves requests in the order in which they
//! come, so that a transfer continues while others compute.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};

use mpi::Threading;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};

use super::comm::{Comm, Transport};
use super::heartbeat::Activity;
use super::launch::Reports;
use super::mpi_beats;
use super::signals::Stop;
use super::worker::Worker;
use crate::error::{Error, Result};

/// The way to the thread.
pub(crate) struct Link {
    thread: Worker<Request>,
    rank: usize,
    world_size: usize,
}

enum Request {
    AllToAll(Vec<f32>, Sender<Vec<f32>>),
    AllGather(Vec<f32>, Sender<Vec<f32>>),
    AllGatherBytes(Vec<u8>, Sender<Vec<u8>>),
    /// To the first process alone; the others get nothing.
    GatherBytes(Vec<u8>, Sender<Vec<u8>>),
    Lengths(u64, Sender<Vec<u64>>),
    Broadcast(Vec<f32>, Sender<Vec<f32>>),
    Abort(u8),
}

/// Joins the processes that were started together.
pub(super) fn join(reports: Reports) -> Result<Comm> {
    let (requests, incoming) = channel();
    let (ready, joined) = channel();
    let activity = Arc::new(Activity::default());
    let watched = Arc::clone(&activity);
    let thread = std::thread::Builder::new()
        .name("mpi".into())
        .spawn(move || serve(&incoming, &ready, &watched))
        .map_err(|error| Error::failed(format!("cannot start a thread for MPI: {error}")))?;
    let (rank, size) = joined
        .recv()
        .map_err(|_| Error::failed("MPI could not be initialized"))?;
    let link = Link {
        thread: Worker::new(requests, vec![thread]),
        rank,
        world_size: size,
    };
    let comm = Comm::new(rank, size, Arc::new(link), Stop::reporting(reports));
    if size > 1 {
        mpi_beats::start(&comm, activity, reports)?;
    }
    Ok(comm)
}

fn serve(requests: &Receiver<Request>, ready: &Sender<(usize, usize)>, activity: &Activity) {
    // Only this thread calls MPI.
    let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
        return;
    };
    let world = universe.world();
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    if ready.send((rank, size)).is_err() {
        return;
    }
    while let Ok(request) = requests.recv() {
        activity.waiting.store(true, Ordering::Relaxed);
        perform(&world, size, request);
        activity.waiting.store(false, Ordering::Relaxed);
        activity.done.fetch_add(1, Ordering::Relaxed);
    }
    activity.ended.store(true, Ordering::Relaxed);
    // Dropping the universe ends MPI, in which all processes take part.
}

/// Nobody may wait for the answer any more: then it is dropped.
fn perform(world: &SimpleCommunicator, size: usize, request: Request) {
    match request {
        Request::AllToAll(values, answer) => {
            let mut received = vec![0.0; values.len()];
            world.all_to_all_into(&values[..], &mut received[..]);
            let _ = answer.send(received);
        }
        Request::AllGather(values, answer) => {
            let mut received = vec![0.0; values.len() * size];
            world.all_gather_into(&values[..], &mut received[..]);
            let _ = answer.send(received);
        }
        Request::AllGatherBytes(bytes, answer) => {
            let mut received = vec![0; bytes.len() * size];
            world.all_gather_into(&bytes[..], &mut received[..]);
            let _ = answer.send(received);
        }
        Request::GatherBytes(bytes, answer) => {
            let first = world.process_at_rank(0);
            let mut received = Vec::new();
            if world.rank() == 0 {
                received.resize(bytes.len() * size, 0);
                first.gather_into_root(&bytes[..], &mut received[..]);
            } else {
                first.gather_into(&bytes[..]);
            }
            let _ = answer.send(received);
        }
        Request::Lengths(length, answer) => {
            let mut received = vec![0; size];
            world.all_gather_into(&length, &mut received[..]);
            let _ = answer.send(received);
        }
        Request::Broadcast(mut values, answer) => {
            world.process_at_rank(0).broadcast_into(&mut values[..]);
            let _ = answer.send(values);
        }
        Request::Abort(code) => world.abort(i32::from(code)),
    }
}

const ALIVE: &str = "the MPI thread lives as long as the communicator";

impl Transport for Link {
    fn all_to_all(&self, values: Vec<f32>) -> Receiver<Vec<f32>> {
        self.thread.ask(|answer| Request::AllToAll(values, answer))
    }

    fn all_gather(&self, values: Vec<f32>) -> Receiver<Vec<f32>> {
        self.thread.ask(|answer| Request::AllGather(values, answer))
    }

    fn broadcast(&self, values: Vec<f32>) -> Vec<f32> {
        let answer = self.thread.ask(|answer| Request::Broadcast(values, answer));
        answer.recv().expect(ALIVE)
    }

    /// Lengths first, then as many bytes from each rank as the longest has.
    fn gather_bytes(&self, mut bytes: Vec<u8>, to_all: bool) -> Vec<Vec<u8>> {
        let length = bytes.len() as u64;
        let lengths = self.thread.ask(|answer| Request::Lengths(length, answer));
        let lengths = lengths.recv().expect(ALIVE);
        let longest = lengths.iter().max().copied().unwrap_or_default() as usize;
        if longest == 0 {
            let receives = to_all || self.rank == 0;
            return vec![Vec::new(); if receives { self.world_size } else { 0 }];
        }
        bytes.resize(longest, 0);
        let all = match to_all {
            true => self
                .thread
                .ask(|answer| Request::AllGatherBytes(bytes, answer)),
            false => self
                .thread
                .ask(|answer| Request::GatherBytes(bytes, answer)),
        };
        let all = all.recv().expect(ALIVE);
        let parts = all.chunks_exact(longest).zip(lengths);
        parts
            .map(|(part, length)| part[..length as usize].to_vec())
            .collect()
    }

    fn abort(&self, code: u8) {
        let ended = self.thread.ask(|_: Sender<()>| Request::Abort(code));
        // It ends this process too.
        let _ = ended.recv();
        std::thread::park();
    }

    /// MPI's thread may wait in an exchange; `mpirun` ends the others when this process ends.
    fn leave(&self, code: u8) -> ! {
        std::process::exit(i32::from(code))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.thread.end();
    }
}
