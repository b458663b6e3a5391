//! Exchanges over MPI, on a thread of their own.
//!
//! MPI's handles belong to the thread that made them. One thread keeps them and serves requests in the order in which they
//! come, so that a transfer goes on while others compute.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use mpi::Threading;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};

use super::heartbeat::Activity;
use super::signals::Stop;
use super::{Group, heartbeat as watch};
use crate::error::{Error, Result};

/// The way to the thread.
pub(crate) struct Link {
    /// Taken at the end, which ends the thread.
    requests: Mutex<Option<Sender<Request>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    is_first: bool,
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
pub(crate) fn open(tell: fn(&str)) -> Result<Group> {
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
        .map_err(|_| Error::failed("MPI could not be initialised"))?;
    let link = Link {
        requests: Mutex::new(Some(requests)),
        thread: Mutex::new(Some(thread)),
        is_first: rank == 0,
    };
    let group = Group {
        rank,
        size,
        link: Some(Arc::new(link)),
        stop: Stop::telling(tell),
    };
    if size > 1 {
        watch::start(&group, activity, tell)?;
    }
    Ok(group)
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

impl Link {
    fn ask<T>(&self, request: impl FnOnce(Sender<T>) -> Request) -> Receiver<T> {
        let (answer, receiver) = channel();
        let requests = self
            .requests
            .lock()
            .expect("no code panics while it holds the lock");
        if let Some(requests) = &*requests {
            // Without the thread the answer does not come either, which the receiver tells.
            let _ = requests.send(request(answer));
        }
        receiver
    }

    pub(crate) fn all_to_all(&self, values: Vec<f32>) -> Receiver<Vec<f32>> {
        self.ask(|answer| Request::AllToAll(values, answer))
    }

    pub(crate) fn all_gather(&self, values: Vec<f32>) -> Receiver<Vec<f32>> {
        self.ask(|answer| Request::AllGather(values, answer))
    }

    pub(crate) fn broadcast(&self, values: Vec<f32>) -> Vec<f32> {
        let answer = self.ask(|answer| Request::Broadcast(values, answer));
        answer
            .recv()
            .expect("MPI's thread lives as long as the group")
    }

    /// The bytes of all: their numbers first, then as many from each as the longest has.
    ///
    /// Where they go to the first process alone, the others get an empty list.
    pub(crate) fn gather_bytes(
        &self,
        mut bytes: Vec<u8>,
        size: usize,
        to_all: bool,
    ) -> Vec<Vec<u8>> {
        let lives = "MPI's thread lives as long as the group";
        let length = bytes.len() as u64;
        let lengths = self.ask(|answer| Request::Lengths(length, answer));
        let lengths = lengths.recv().expect(lives);
        let longest = lengths.iter().max().copied().unwrap_or_default() as usize;
        if longest == 0 {
            let is_told = to_all || self.is_first;
            return vec![Vec::new(); if is_told { size } else { 0 }];
        }
        bytes.resize(longest, 0);
        let all = match to_all {
            true => self.ask(|answer| Request::AllGatherBytes(bytes, answer)),
            false => self.ask(|answer| Request::GatherBytes(bytes, answer)),
        };
        let all = all.recv().expect(lives);
        let parts = all.chunks_exact(longest).zip(lengths);
        parts
            .map(|(part, length)| part[..length as usize].to_vec())
            .collect()
    }

    pub(crate) fn abort(&self, code: u8) {
        let ended = self.ask(|_: Sender<()>| Request::Abort(code));
        // It ends this process too.
        let _ = ended.recv();
        std::thread::park();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Ok(requests) = self.requests.get_mut() {
            requests.take();
        }
        if let Ok(thread) = self.thread.get_mut()
            && let Some(thread) = thread.take()
        {
            // If it panicked, that was told.
            let _ = thread.join();
        }
    }
}
