//! A GPU as the operations see it: launches in order, memory that is used again, and one place for failures.
//!
//! Work runs behind the host. So launches, products and even allocations return nothing: the first failure is kept,
//! all later work is skipped, and [`Gpu::check`] and every read of values report it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::error::{Error, ErrorKind, Result};
use crate::fp8::Support;
use crate::machine::{Argument, Facts, Launch, Machine, Operands, Product, Stream};
use crate::programs::Program;
use crate::real::{self, Real};
use crate::soft::Soft;

/// A GPU that was opened. Clones are the same GPU.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    // Before the machine, which frees what it allocated.
    arena: Mutex<Arena>,
    fault: Mutex<Option<Error>>,
    sent: Counter,
    fetched: Counter,
    unplanned: Counter,
    profile: Mutex<Option<BTreeMap<String, (u64, f64)>>>,
    fp8: OnceLock<Result<Support>>,
    exchanges: AtomicBool,
    machine: Box<dyn Machine>,
}

/// Copies in one direction.
#[derive(Default)]
struct Counter {
    copies: AtomicU64,
    bytes: AtomicU64,
}

impl Counter {
    fn count(&self, bytes: usize) {
        self.copies.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn get(&self) -> (u64, u64) {
        (self.copies.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}

/// Copies between host and device since the GPU was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// Copies to the device, and their bytes.
    pub sent: (u64, u64),
    /// Copies from the device, and their bytes.
    pub fetched: (u64, u64),
    /// Those of them that host code caused by reading a tensor whose values are on the device.
    pub unplanned: (u64, u64),
}

/// Memory of the device that nobody uses now, by size, and how much is out.
#[derive(Default)]
struct Arena {
    free: BTreeMap<usize, Vec<u64>>,
    in_use: usize,
    cached: usize,
    peak: usize,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPU {}", self.facts().name)
    }
}

/// The folder in `ADVXL_CUDA_SOFTWARE`, which asks for a GPU in software in place of a real one.
pub(crate) fn software() -> Option<PathBuf> {
    std::env::var_os("ADVXL_CUDA_SOFTWARE").filter(|folder| !folder.is_empty()).map(PathBuf::from)
}

impl Gpu {
    /// Opens GPU `number`, counted from 0. With the variable `ADVXL_CUDA_SOFTWARE` it is one in software, for tests,
    /// which keeps its kernels in the folder named.
    ///
    /// # Errors
    ///
    /// If there is no such GPU, or NVIDIA's driver or libraries are missing; the error says which, where they were
    /// looked for, and how to install them.
    pub fn open(number: usize) -> Result<Self> {
        let count = Self::count()?;
        if number >= count {
            let there = match count {
                1 => "one, number 0".to_owned(),
                count => format!("{count}, numbers 0 to {}", count.saturating_sub(1)),
            };
            return Err(Error::missing(format!("no such GPU: this machine has {there}"))
                .hint("use one of these numbers; CUDA_VISIBLE_DEVICES can hide some"));
        }
        if let Some(folder) = software() {
            return Ok(Self::soft(&folder));
        }
        Real::open(number).map(|machine| Self::of(Box::new(machine)))
    }

    /// Whether `ADVXL_CUDA_SOFTWARE` asks for GPUs in software; each process makes its own.
    pub fn is_software_requested() -> bool {
        software().is_some()
    }

    /// The number of GPUs.
    ///
    /// # Errors
    ///
    /// If the driver is missing or does not start.
    pub fn count() -> Result<usize> {
        if software().is_some() { Ok(1) } else { real::count() }
    }

    /// A GPU in software, for tests. It compiles kernels with `c++` when they are first used and keeps them in a
    /// folder.
    pub fn soft(folder: &Path) -> Self {
        Self::soft_with(folder, 227 << 10)
    }

    /// The same with this many bytes of shared memory per block: 227 KiB are those of an H100, 163 KiB of an A100, 99
    /// KiB of consumer GPUs.
    pub fn soft_with(folder: &Path, shared_memory: usize) -> Self {
        Self::of(Box::new(Soft::open(folder, shared_memory)))
    }

    fn of(machine: Box<dyn Machine>) -> Self {
        Self(Arc::new(Inner {
            arena: Mutex::default(),
            fault: Mutex::default(),
            sent: Counter::default(),
            fetched: Counter::default(),
            unplanned: Counter::default(),
            profile: Mutex::default(),
            fp8: OnceLock::new(),
            exchanges: AtomicBool::new(false),
            machine,
        }))
    }

    /// On the software GPU: runs threads in a random order from now on, or with 0 in ascending order.
    pub fn shuffle_threads(&self, seed: u64) {
        self.machine().shuffle(seed);
    }

    /// On the software GPU: does the work of a stream as late as events and the host's waits allow, or with none all at
    /// once.
    pub fn delay(&self, stream: Option<Stream>) {
        self.machine().delay(stream);
    }

    /// Whether it takes part in exchanges with others, so that marks on its values are of use.
    pub(crate) fn has_exchanges(&self) -> bool {
        self.0.exchanges.load(Ordering::Relaxed)
    }

    pub(crate) fn begin_exchanges(&self) {
        self.0.exchanges.store(true, Ordering::Relaxed);
    }

    pub(crate) fn machine(&self) -> &dyn Machine {
        &*self.0.machine
    }

    /// What its FP8 products can do, found out once.
    pub(crate) fn fp8_support(&self, find: impl FnOnce() -> Result<Support>) -> Result<Support> {
        self.0.fp8.get_or_init(find).clone()
    }

    /// What it is.
    pub fn facts(&self) -> &Facts {
        self.machine().facts()
    }

    /// Whether it is one in software, which is for tests.
    pub fn is_software(&self) -> bool {
        self.facts().name == crate::soft::NAME
    }

    /// Whether two are the same.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The first failure since the GPU was opened. Work after it was skipped, and its results are void.
    ///
    /// # Errors
    ///
    /// That failure.
    pub fn check(&self) -> Result<()> {
        self.0.fault.lock().expect("not poisoned").clone().map_or(Ok(()), Err)
    }

    /// Forgets that memory ran out, so that the GPU can be used for something smaller; other failures stay. All values
    /// computed since then are void.
    pub fn forget_memory_error(&self) -> Option<Error> {
        self.0.fault.lock().expect("not poisoned").take_if(|error| error.kind() == ErrorKind::Memory)
    }

    /// Waits for all work but exchanges that no work waits for.
    ///
    /// # Errors
    ///
    /// The first failure since the GPU was opened.
    pub fn wait(&self) -> Result<()> {
        self.check()?;
        self.note(self.machine().wait());
        self.check()
    }

    /// Seconds that work takes on the device.
    ///
    /// # Errors
    ///
    /// The first failure since the GPU was opened.
    pub fn time(&self, mut work: impl FnMut()) -> Result<f64> {
        self.check()?;
        let seconds = self.machine().time(&mut work)?;
        self.check().map(|()| seconds)
    }

    /// Free and total memory of the device in bytes; what is kept for reuse counts as free.
    pub fn memory(&self) -> (usize, usize) {
        let (free, total) = self.machine().memory();
        (free + self.0.arena.lock().expect("not poisoned").cached, total)
    }

    /// Bytes in use now, and the most since the start or the last [`reset_peak`](Self::reset_peak).
    pub fn usage(&self) -> (usize, usize) {
        let arena = self.0.arena.lock().expect("not poisoned");
        (arena.in_use, arena.peak)
    }

    /// Starts a new measurement of the peak.
    pub fn reset_peak(&self) {
        let mut arena = self.0.arena.lock().expect("not poisoned");
        arena.peak = arena.in_use;
    }

    /// Returns memory that is kept for reuse to the device, between phases of different shapes.
    pub fn release_memory(&self) {
        let mut arena = self.0.arena.lock().expect("not poisoned");
        arena.cached = 0;
        for at in std::mem::take(&mut arena.free).into_values().flatten() {
            // SAFETY: blocks in the arena are nobody's; the machine waits for work that still runs.
            unsafe { self.machine().release(at) };
        }
    }

    /// Which of cuBLASLt's algorithms serve the products so far, as text for a checkpoint: another algorithm rounds
    /// differently, so a run resumed on another machine gives the same bits only with these.
    pub fn algorithms(&self) -> String {
        self.machine().algorithms()
    }

    /// Uses algorithms of a checkpoint from now on; whether they are of this GPU model and library version. Others are
    /// left out.
    pub fn adopt_algorithms(&self, text: &str) -> bool {
        self.machine().adopt_algorithms(text)
    }

    /// Copies so far.
    pub fn traffic(&self) -> Traffic {
        Traffic { sent: self.0.sent.get(), fetched: self.0.fetched.get(), unplanned: self.0.unplanned.get() }
    }

    pub(crate) fn count_unplanned(&self, bytes: usize) {
        self.0.unplanned.count(bytes);
    }

    /// Times every launch and product from now on, one after the other, by name.
    pub fn start_profile(&self) {
        *self.0.profile.lock().expect("not poisoned") = Some(BTreeMap::new());
    }

    /// Ends the profile: names, how often each ran, and seconds in all.
    pub fn end_profile(&self) -> Vec<(String, u64, f64)> {
        let profile = self.0.profile.lock().expect("not poisoned").take().unwrap_or_default();
        profile.into_iter().map(|(name, (count, seconds))| (name, count, seconds)).collect()
    }

    /// Runs one piece of work, timed where there is a profile.
    fn run(&self, name: impl FnOnce() -> String, work: &dyn Fn() -> Result<()>) -> Result<()> {
        if self.0.profile.lock().expect("not poisoned").is_none() {
            return work();
        }
        let mut result = Ok(());
        let seconds = self.machine().time(&mut || result = work())?;
        if let Some(profile) = &mut *self.0.profile.lock().expect("not poisoned") {
            let (count, sum) = profile.entry(name()).or_default();
            *count += 1;
            *sum += seconds;
        }
        result
    }

    pub(crate) fn prepare(&self, programs: &[Program]) -> Result<()> {
        self.machine().prepare(programs)
    }

    /// Keeps the first failure.
    pub(crate) fn note(&self, result: Result<()>) {
        if let Err(error) = result {
            self.0.fault.lock().expect("not poisoned").get_or_insert(error);
        }
    }

    /// Memory for `bytes`, not set. After a failure the address is 0 and nothing will run.
    pub(crate) fn take(&self, bytes: usize) -> Memory {
        let size = self.machine().block_size(bytes);
        let found = self.block(size);
        let failed = found.is_err();
        let at = found.unwrap_or_else(|error| {
            self.note(Err(error));
            0
        });
        Memory { gpu: self.clone(), at, size: if failed { 0 } else { size } }
    }

    fn block(&self, size: usize) -> Result<u64> {
        self.check()?;
        let reused = {
            let mut arena = self.0.arena.lock().expect("not poisoned");
            let reused = arena.free.get_mut(&size).and_then(Vec::pop);
            if reused.is_some() {
                arena.cached -= size;
            }
            reused
        };
        let at = match reused {
            Some(at) => {
                // SAFETY: it was in the arena, so it is nobody's.
                unsafe { self.machine().recycle(at, size) };
                at
            }
            None => self.allocate(size)?,
        };
        self.count_use(size);
        Ok(at)
    }

    fn allocate(&self, size: usize) -> Result<u64> {
        self.machine().allocate(size).or_else(|error| {
            if error.kind() != ErrorKind::Memory {
                return Err(error);
            }
            // Other sizes may hold what is missing.
            self.release_memory();
            self.machine().allocate(size).map_err(|error| self.full(size, error))
        })
    }

    fn count_use(&self, size: usize) {
        let mut arena = self.0.arena.lock().expect("not poisoned");
        arena.in_use += size;
        arena.peak = arena.peak.max(arena.in_use);
    }

    /// Memory that no work uses, outside the arena: for work on another stream.
    pub(crate) fn take_fresh(&self, bytes: usize) -> Result<Fresh> {
        self.check()?;
        let size = self.machine().block_size(bytes);
        let at = self.allocate(size)?;
        self.count_use(size);
        Ok(Fresh { gpu: self.clone(), at, size })
    }

    fn full(&self, size: usize, error: Error) -> Error {
        if error.kind() != ErrorKind::Memory {
            return error;
        }
        let mib = |bytes: usize| bytes >> 20;
        let ((free, total), (used, _)) = (self.memory(), self.usage());
        Error::new(
            ErrorKind::Memory,
            format!(
                "out of GPU memory: {} MiB more are needed, {} MiB are in use, {} of {} MiB are free",
                mib(size),
                mib(used),
                mib(free),
                mib(total)
            ),
        )
        .hint("use a smaller batch or recompute activations; `nvidia-smi` shows other programs on the GPU")
    }

    /// Runs a kernel, unless something failed before.
    ///
    /// # Safety
    ///
    /// The arguments are those of the kernel's source, and the memory behind them is as large as it expects.
    pub(crate) unsafe fn launch(
        &self,
        program: Program,
        kernel: &str,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
        arguments: &[Argument],
    ) {
        // SAFETY: by the caller's promise.
        unsafe { self.launch_on(Stream::Compute, program, kernel, grid, [threads, shared], arguments) };
    }

    /// The same on any stream, with `[threads, shared]`. A profile has the compute stream's alone.
    ///
    /// # Safety
    ///
    /// As for [`launch`](Self::launch), and no work of another stream uses this memory at the same time.
    pub(crate) unsafe fn launch_on(
        &self,
        stream: Stream,
        program: Program,
        kernel: &str,
        grid: [usize; 3],
        [threads, shared]: [usize; 2],
        arguments: &[Argument],
    ) {
        if grid.contains(&0) || self.check().is_err() {
            return;
        }
        let too_many = grid[1].max(grid[2]) > 65_535 || grid[0] > i32::MAX as usize;
        if too_many {
            return self.note(Err(Error::failed(format!("kernel `{kernel}`: a grid of {grid:?} blocks is too large"))));
        }
        let grid = grid.map(|blocks| blocks as u32);
        let launch = Launch { stream, program, kernel, grid, threads: threads as u32, shared, arguments };
        // SAFETY: by the caller's promise.
        let work = || unsafe { self.machine().launch(&launch) };
        self.note(match stream {
            Stream::Compute => self.run(|| kernel.to_owned(), &work),
            Stream::Exchange | Stream::Upload => work(),
        });
    }

    /// Multiplies, unless something failed before.
    ///
    /// # Safety
    ///
    /// The operands are as large as `product` says.
    pub(crate) unsafe fn product(&self, product: &Product, operands: &Operands) {
        if product.rows * product.columns == 0 || self.check().is_err() {
            return;
        }
        // SAFETY: by the caller's promise.
        let work = || unsafe { self.machine().product(product, operands) };
        self.note(self.run(|| product.to_string(), &work));
    }

    /// # Safety
    ///
    /// `to` has room for the bytes.
    pub(crate) unsafe fn send(&self, from: &[u8], to: u64) {
        // SAFETY: by the caller's promise.
        unsafe { self.send_on(Stream::Compute, from, to) };
    }

    /// # Safety
    ///
    /// `to` has room for the bytes, and no work of another stream uses them at the same time.
    pub(crate) unsafe fn send_on(&self, stream: Stream, from: &[u8], to: u64) {
        if from.is_empty() || self.check().is_err() {
            return;
        }
        self.0.sent.count(from.len());
        // SAFETY: by the caller's promise.
        self.note(unsafe { self.machine().send(stream, from, to) });
    }

    /// # Safety
    ///
    /// `from` holds as many bytes.
    pub(crate) unsafe fn fetch(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.check()?;
        if to.is_empty() {
            return Ok(());
        }
        self.0.fetched.count(to.len());
        // SAFETY: by the caller's promise.
        self.note(unsafe { self.machine().fetch(from, to) });
        self.check()
    }

    /// # Safety
    ///
    /// Both are allocated for `bytes` and do not overlap.
    pub(crate) unsafe fn copy(&self, from: u64, to: u64, bytes: usize) {
        if bytes > 0 && self.check().is_ok() {
            // SAFETY: by the caller's promise.
            self.note(unsafe { self.machine().copy(from, to, bytes) });
        }
    }

    /// # Safety
    ///
    /// `at` is allocated for `bytes`.
    pub(crate) unsafe fn clear(&self, at: u64, bytes: usize) {
        if bytes > 0 && self.check().is_ok() {
            // SAFETY: by the caller's promise.
            self.note(unsafe { self.machine().clear(at, bytes) });
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let arena = self.arena.get_mut().expect("not poisoned");
        for at in std::mem::take(&mut arena.free).into_values().flatten() {
            // SAFETY: blocks in the arena are nobody's.
            unsafe { self.machine.release(at) };
        }
    }
}

/// A block of device memory; back to the arena when dropped. Work is done in order, so what still runs then may
/// keep using it until the next owner's work comes.
pub(crate) struct Memory {
    gpu: Gpu,
    at: u64,
    size: usize,
}

impl Memory {
    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(crate) fn at(&self) -> u64 {
        self.at
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.at == 0 {
            return;
        }
        let mut arena = self.gpu.0.arena.lock().expect("not poisoned");
        arena.in_use -= self.size;
        arena.cached += self.size;
        arena.free.entry(self.size).or_default().push(self.at);
    }
}

/// Memory outside the arena; given back to the device when dropped, which waits for all work.
pub(crate) struct Fresh {
    gpu: Gpu,
    at: u64,
    size: usize,
}

impl Fresh {
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        self.gpu.0.arena.lock().expect("not poisoned").in_use -= self.size;
        // SAFETY: allocated for this alone; the machine waits for work that still runs.
        unsafe { self.gpu.machine().release(self.at) };
    }
}
