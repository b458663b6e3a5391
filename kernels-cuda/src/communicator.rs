//! One rank's membership in a group of GPUs: NCCL's communicator, and what goes wrong with it.
//!
//! The communicator is non-blocking: every call returns at once and is then asked for its state, so that a rank that
//! does not answer can be given up at any point: while joining, while NCCL sets up connections, in an exchange, at the
//! end. A thread looks for asynchronous errors (a connection that broke) and for exchanges that take longer than the
//! limit; it aborts the communicator, which ends NCCL's kernels on the GPU and with them the host's waits. The failure
//! becomes the GPU's ([`Gpu::check`]).
//!
//! What NCCL cannot know: it notices a rank that vanished only where it talks over a network. Between GPUs of one
//! machine its kernels wait in shared memory for good, so whoever watches the processes has to call [`Watch::abort`].

use std::collections::VecDeque;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::bindings::{Handle, NCCL_IN_PROGRESS, Nccl, NcclConfig, Status, UNIQUE_ID, UniqueId as RawId};
use crate::compiler::text;
use crate::error::{Error, ErrorKind, Result};
use crate::events::Event;
use crate::gpu::Gpu;
use crate::machine::Stream;
use crate::real::Pointer;

/// Non-blocking communicators were young before.
const OLDEST_NCCL: i32 = 21_800;

/// How often the thread looks for errors.
const TICK: Duration = Duration::from_millis(100);

/// What ranks join by: made at rank 0, brought to the others by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UniqueId([u8; UNIQUE_ID]);

impl UniqueId {
    /// A new one, for one group of ranks. NCCL listens for the others in this process from now on.
    ///
    /// # Errors
    ///
    /// If NCCL is missing, or there is no network interface to listen on.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        let nccl = gpu.machine().nccl()?;
        gpu.machine().enter()?;
        let mut id = RawId { internal: [0; UNIQUE_ID] };
        // SAFETY: written to a live variable.
        let status = unsafe { (nccl.ncclGetUniqueId)(&mut id) };
        if status == 0 { Ok(Self(id.internal)) } else { Err(failed(nccl, ptr::null_mut(), "unique id", status)) }
    }

    /// As it travels to the other ranks.
    pub fn to_bytes(self) -> [u8; 128] {
        self.0
    }

    /// What another rank made.
    pub fn from_bytes(bytes: [u8; 128]) -> Self {
        Self(bytes)
    }
}

fn failed(nccl: &Nccl, handle: Handle, what: &str, status: Status) -> Error {
    // SAFETY: both are texts of NCCL's; the communicator is live or null.
    let (why, more) = unsafe { (text((nccl.ncclGetErrorString)(status)), text((nccl.ncclGetLastError)(handle))) };
    let more = more.trim();
    let more = if more.is_empty() || more == "unknown" { String::new() } else { format!(": {more}") };
    // A remote error, and a timeout.
    let kind = if [6, 8].contains(&status) { ErrorKind::Lost } else { ErrorKind::Failed };
    Error::new(kind, format!("NCCL: {what}: {why} ({status}){more}")).hint("NCCL_DEBUG=WARN prints what NCCL knows")
}

/// A communicator, shared with the thread that watches it.
pub(crate) struct Communicator {
    gpu: Gpu,
    nccl: &'static Nccl,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    limit: Duration,
    /// None once it was aborted or destroyed.
    handle: Mutex<Option<Pointer>>,
    fault: Mutex<Option<Error>>,
    in_flight: Mutex<VecDeque<InFlight>>,
    is_closed: AtomicBool,
}

/// An exchange that was queued and not seen to be done.
struct InFlight {
    what: &'static str,
    end: Arc<Event>,
    /// Since when all before it are done.
    since: Option<Instant>,
}

impl Communicator {
    /// Joins the others, which all have to do so within the limit.
    pub(crate) fn join(gpu: &Gpu, id: UniqueId, rank: usize, world_size: usize, limit: Duration) -> Result<Self> {
        gpu.check()?;
        let nccl = gpu.machine().nccl()?;
        let (mut version, mut handle) = (0, ptr::null_mut());
        // SAFETY: written to a live integer.
        unsafe { (nccl.ncclGetVersion)(&mut version) };
        if version < OLDEST_NCCL {
            let message =
                format!("NCCL {}.{} is too old, expected 2.18 or later", version / 10_000, version / 100 % 100);
            return Err(Error::missing(message).hint("upgrade nvidia-nccl-cu12 or nvidia-nccl-cu13"));
        }
        gpu.machine().enter()?;
        let mut config = NcclConfig::NON_BLOCKING;
        let (size, number) = (world_size as i32, rank as i32);
        // SAFETY: the handle is written to a live variable; the configuration is read before the call returns.
        let status =
            unsafe { (nccl.ncclCommInitRankConfig)(&mut handle, size, RawId { internal: id.0 }, number, &mut config) };
        if ![0, NCCL_IN_PROGRESS].contains(&status) {
            return Err(failed(nccl, ptr::null_mut(), "joining", status));
        }
        let communicator = Self {
            gpu: gpu.clone(),
            nccl,
            rank,
            world_size,
            limit,
            handle: Mutex::new(Some(Pointer(handle))),
            fault: Mutex::default(),
            in_flight: Mutex::default(),
            is_closed: AtomicBool::new(false),
        };
        communicator.settle("joining", status)?;
        Ok(communicator)
    }

    /// Calls NCCL, and waits until what it began is on the stream.
    pub(crate) fn call(&self, what: &str, call: impl FnOnce(&Nccl, Handle) -> Status) -> Result<()> {
        let status = {
            let handle = self.handle.lock().expect("not poisoned");
            let Some(handle) = *handle else { return Err(self.gone()) };
            call(self.nccl, handle.0)
        };
        self.settle(what, status)
    }

    /// Waits while NCCL is at work on the host.
    fn settle(&self, what: &str, mut status: Status) -> Result<()> {
        let start = Instant::now();
        while status == NCCL_IN_PROGRESS {
            match start.elapsed() {
                passed if passed > self.limit => return Err(self.late(what)),
                passed if passed < Duration::from_micros(200) => thread::yield_now(),
                passed => thread::sleep((passed / 16).min(Duration::from_millis(2))),
            }
            status = self.status()?;
        }
        match status {
            0 => Ok(()),
            status => Err(self.fail(what, status)),
        }
    }

    /// What became of the calls so far.
    fn status(&self) -> Result<Status> {
        let handle = self.handle.lock().expect("not poisoned");
        let Some(handle) = *handle else { return Err(self.gone()) };
        let mut status = 0;
        // SAFETY: the communicator is live while its lock is held; written to a live integer.
        let asked = unsafe { (self.nccl.ncclCommGetAsyncError)(handle.0, &mut status) };
        Ok(if asked == 0 { status } else { asked })
    }

    /// An error if a rank is known to be lost, or the communicator was aborted.
    pub(crate) fn check(&self) -> Result<()> {
        if let Some(fault) = &*self.fault.lock().expect("not poisoned") {
            return Err(fault.clone());
        }
        match self.status()? {
            0 | NCCL_IN_PROGRESS => Ok(()),
            status => Err(self.fail("exchanges", status)),
        }
    }

    fn fail(&self, what: &str, status: Status) -> Error {
        let error = {
            let handle = self.handle.lock().expect("not poisoned");
            failed(self.nccl, handle.map_or(ptr::null_mut(), |handle| handle.0), what, status)
        };
        self.abort(error)
    }

    fn late(&self, what: &str) -> Error {
        let message =
            format!("NCCL: {what}: not done after {:?} at rank {} of {}", self.limit, self.rank, self.world_size);
        let hint = "a rank is missing, stopped or calls something else; NCCL_DEBUG=INFO shows how far each came";
        self.abort(Error::new(ErrorKind::Lost, message).hint(hint))
    }

    fn gone(&self) -> Error {
        let fault = self.fault.lock().expect("not poisoned").clone();
        fault.unwrap_or_else(|| Error::failed("NCCL: the communicator was left"))
    }

    /// Ends all exchanges on this GPU; the first reason is kept and returned.
    pub(crate) fn abort(&self, error: Error) -> Error {
        let first = self.fault.lock().expect("not poisoned").get_or_insert(error).clone();
        self.gpu.note(Err(first.clone()));
        let handle = self.handle.lock().expect("not poisoned").take();
        if let Some(handle) = handle {
            // SAFETY: taken, so nobody else uses it any more.
            unsafe { (self.nccl.ncclCommAbort)(handle.0) };
        }
        first
    }

    /// Has an exchange watched until it is done.
    pub(crate) fn started(&self, what: &'static str, end: Arc<Event>) {
        self.in_flight.lock().expect("not poisoned").push_back(InFlight { what, end, since: None });
    }

    /// Forgets what is done; an error once the next takes too long.
    fn check_limit(&self) -> Result<()> {
        let late = {
            let mut in_flight = self.in_flight.lock().expect("not poisoned");
            while in_flight.front().map_or(Ok(false), |front| front.end.is_done())? {
                in_flight.pop_front();
            }
            in_flight.front_mut().and_then(|front| {
                let since = front.since.get_or_insert_with(Instant::now);
                (since.elapsed() > self.limit).then_some(front.what)
            })
        };
        late.map_or(Ok(()), |what| Err(self.late(what)))
    }

    /// Waits on the host for an exchange.
    pub(crate) fn wait_for(&self, what: &str, end: &Event) -> Result<()> {
        let start = Instant::now();
        while !end.is_done()? {
            self.check()?;
            if start.elapsed() > self.limit {
                return Err(self.late(what));
            }
            thread::sleep(Duration::from_micros(50));
        }
        self.gpu.check()
    }

    /// Watches it on a thread of its own until it is closed.
    pub(crate) fn watched(self: &Arc<Self>) -> Result<JoinHandle<()>> {
        let watched = self.clone();
        let work = move || {
            while !watched.is_closed.load(Ordering::Acquire) {
                thread::park_timeout(TICK);
                // What they find is the GPU's failure, and ends the exchanges.
                if watched.check().and_then(|()| watched.check_limit()).is_err() {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("nccl".into()).spawn(work);
        thread.map_err(|error| Error::failed(format!("cannot start a thread that watches NCCL: {error}")))
    }

    /// Leaves the group, with the others: exchanges that were begun are finished.
    pub(crate) fn close(&self, thread: Option<JoinHandle<()>>) {
        self.is_closed.store(true, Ordering::Release);
        if let Some(thread) = thread {
            thread.thread().unpark();
            let _ = thread.join();
        }
        let is_unwinding = thread::panicking();
        if is_unwinding || self.finish().is_err() {
            self.abort(Error::failed("NCCL: the communicator was left"));
        }
    }

    fn finish(&self) -> Result<()> {
        self.gpu.check()?;
        if let Some(end) = Event::record(&self.gpu, Stream::Exchange) {
            end.hold_back(Stream::Compute);
            self.wait_for("leaving", &end)?;
        }
        // SAFETY: the communicator is live.
        self.call("leaving", |nccl, handle| unsafe { (nccl.ncclCommFinalize)(handle) })?;
        if let Some(handle) = self.handle.lock().expect("not poisoned").take() {
            // SAFETY: taken, so nobody else uses it any more.
            unsafe { (self.nccl.ncclCommDestroy)(handle.0) };
        }
        Ok(())
    }
}

/// Checks and ends a group's exchanges from any thread, such as the thread that watches heartbeats.
#[derive(Clone)]
pub struct Watch(pub(crate) Arc<Communicator>);

impl Watch {
    /// Whether all is well as far as NCCL knows.
    ///
    /// # Errors
    ///
    /// A lost rank, or the reason of an abort.
    pub fn check(&self) -> Result<()> {
        self.0.check()
    }

    /// Ends all exchanges on this GPU: the host's waits for them return, and [`Gpu::check`] reports the reason as
    /// [`ErrorKind::Lost`]. Every remaining rank must call it: NCCL needs all of them.
    pub fn abort(&self, why: &str) {
        self.0.abort(Error::new(ErrorKind::Lost, why));
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {} on {:?}", self.0.rank, self.0.world_size, self.0.gpu)
    }
}
