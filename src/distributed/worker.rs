//! The thread that serves a transport's requests, in the order in which they come.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// The way to that thread.
pub(super) struct Worker<R> {
    /// Taken at the end, which ends the thread.
    requests: Option<Sender<R>>,
    /// Those that end with it.
    threads: Vec<JoinHandle<()>>,
}

impl<R> Worker<R> {
    /// Of threads that end when no more requests can come.
    pub(super) fn new(requests: Sender<R>, threads: Vec<JoinHandle<()>>) -> Self {
        Self {
            requests: Some(requests),
            threads,
        }
    }

    /// Sends a request with the way back for its answer.
    pub(super) fn ask<T>(&self, request: impl FnOnce(Sender<T>) -> R) -> Receiver<T> {
        let (answer, receiver) = channel();
        if let Some(requests) = &self.requests {
            // Without the thread the answer does not come either, which the receiver reports.
            let _ = requests.send(request(answer));
        }
        receiver
    }

    /// Waits until all requests are served and the threads have ended.
    pub(super) fn end(&mut self) {
        self.requests.take();
        for thread in self.threads.drain(..) {
            // If it panicked, that was printed.
            let _ = thread.join();
        }
    }
}
