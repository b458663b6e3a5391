//! A GPU in software, for tests: memory is the host's, kernels are the same CUDA sources compiled by a C++ compiler
//! (`cuda/soft/shim.h`), products are plain loops with cuBLASLt's epilogues.
//!
//! Slow, and honest about mistakes: fresh and recycled memory is filled with not-a-number, every allocation is one of
//! the host's so that the address sanitizer sees what goes beyond it, and threads run in any order that is asked for.
//!
//! Work is done at once. With a delayed stream ([`Gpu::delay`](crate::Gpu::delay)) the work of that stream is done as late
//! as events and the host's waits allow: an event that is missing, or memory that is used again too early, shows as wrong
//! numbers.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::env;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use libloading::Library;

use crate::bindings::Nccl;
use crate::compiler::fingerprint;
use crate::error::{Error, ErrorKind, Result};
use crate::libraries;
use crate::machine::{Epilogue, EventId, ExchangeWork, Facts, Form, Kind, Launch, Machine, Operands, Product, Stream};
use crate::programs::Program;

/// Its name.
pub(crate) const NAME: &str = "software";

/// Its products have one algorithm.
const ALGORITHMS: &str = "software\n";

/// Memory that one machine gives out in all, so that running out of it can be tested.
const MEMORY: usize = 1 << 30;

type SoftLaunch = unsafe extern "C" fn(*const c_char, *mut *mut c_void, *const c_uint, c_uint, usize, u64) -> c_int;
type SoftKernel = unsafe extern "C" fn(c_uint) -> *const c_char;

/// The software twin of a GPU.
pub(crate) struct Soft {
    /// Where compiled kernels are kept.
    folder: PathBuf,
    /// Sizes by address.
    memory: Mutex<HashMap<u64, usize>>,
    facts: Facts,
    /// Other than 0: threads run in a random order that starts from it.
    order: AtomicU64,
    /// Whether a stream is delayed.
    is_delayed: AtomicBool,
    streams: Mutex<Streams>,
    /// Events that were recorded and whose work is not done.
    ahead: Mutex<HashSet<EventId>>,
    events: AtomicU64,
}

/// Work of the streams that is put off.
#[derive(Default)]
struct Streams {
    delayed: Option<Stream>,
    queues: [VecDeque<Step>; Stream::ALL.len()],
}

enum Step {
    Work(Work),
    Record(EventId),
    Follow(EventId),
}

type Work = Box<dyn FnOnce(&Soft) -> Result<()> + Send>;

/// A program that this process has opened.
struct Opened {
    launch: SoftLaunch,
    /// With `ADVXL_SOFT_LOG`: its kernels that were not launched yet.
    idle: Mutex<BTreeSet<String>>,
}

type Slot = Arc<Mutex<Option<&'static Opened>>>;

/// By folder and program. Each has a lock of its own, so that threads compile different programs at once.
static OPENED: Mutex<BTreeMap<(PathBuf, Program), Slot>> = Mutex::new(BTreeMap::new());

/// Appends a line to the file that `ADVXL_SOFT_LOG` names, from which `scripts/test` sees that every kernel was launched.
fn record(line: &str) {
    let Some(path) = env::var_os("ADVXL_SOFT_LOG") else { return };
    // One write, since several processes may append.
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes())).expect("ADVXL_SOFT_LOG can be written");
}

/// Compiles a program for the CPU into a folder, unless it is there already; the library's path.
fn build(program: Program, folder: &Path) -> Result<PathBuf> {
    let (shim, launch) = (include_str!("../cuda/soft/shim.h"), include_str!("../cuda/soft/launch.h"));
    let folder = build_library(&program.name(), "kernels.so", &[shim, &program.body(), launch].concat(), folder)?;
    Ok(folder.join("kernels.so"))
}

/// Compiles a library with `c++` into a folder of its own below `folder`, unless it is there already; that folder.
///
/// `ADVXL_SOFT_FLAGS` are further flags of the compiler: `-fsanitize=address`.
fn build_library(name: &str, library: &str, text: &str, folder: &Path) -> Result<PathBuf> {
    let flags = env::var("ADVXL_SOFT_FLAGS").unwrap_or_default();
    let key = fingerprint([text, &flags].concat().as_bytes());
    let built = folder.join(format!("advxl-soft-{name}-{key:016x}"));
    if built.join(library).is_file() {
        return Ok(built);
    }
    let io = |error: std::io::Error| Error::failed(format!("cannot write below `{}`: {error}", folder.display()));
    // Several processes may build at once: each in a folder of its own, the first to rename wins.
    let work = built.with_extension(std::process::id().to_string());
    fs::create_dir_all(&work).map_err(io)?;
    fs::write(work.join("source.cpp"), text).map_err(io)?;
    // Contraction is off: kernels name what is fused, and the machine of the test must not decide.
    let output = Command::new("c++")
        .args(["-std=c++17", "-nostdinc++", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-pthread"])
        .args(flags.split_whitespace())
        .arg(work.join("source.cpp"))
        .arg("-o")
        .arg(work.join(library))
        .env_remove("LD_PRELOAD") // A sanitizer's runtime is for the tests.
        .output()
        .map_err(|error| Error::missing(format!("cannot run `c++`: {error}")).hint("install a C++ compiler"))?;
    if !output.status.success() {
        return Err(Error::failed(format!("`c++` failed:\n{}", String::from_utf8_lossy(&output.stderr))));
    }
    if let Err(error) = fs::rename(&work, &built) {
        let _ = fs::remove_dir_all(&work);
        if !built.join(library).is_file() {
            return Err(io(error));
        }
    }
    Ok(built)
}

/// The twin of NCCL, compiled into a folder at first use.
fn nccl(folder: &Path) -> Result<&'static Nccl> {
    static OPENED: Mutex<BTreeMap<PathBuf, &'static Nccl>> = Mutex::new(BTreeMap::new());
    let mut opened = OPENED.lock().expect("not poisoned");
    if let Some(nccl) = opened.get(folder) {
        return Ok(nccl);
    }
    let built = build_library("nccl", "libnccl.so.2", include_str!("../cuda/soft/nccl.cpp"), folder)?;
    let nccl: &'static Nccl = Box::leak(Box::new(libraries::nccl_in(&built)?));
    opened.insert(folder.to_owned(), nccl);
    Ok(nccl)
}

impl Soft {
    /// A machine that keeps compiled kernels in a folder.
    pub(crate) fn open(folder: &Path, shared_memory: usize) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let id = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let facts = Facts { name: NAME.into(), id, capability: (9, 0), multiprocessors: 2, shared_memory };
        Self {
            folder: folder.to_owned(),
            memory: Mutex::default(),
            facts,
            order: AtomicU64::new(0),
            is_delayed: AtomicBool::new(false),
            streams: Mutex::default(),
            ahead: Mutex::default(),
            events: AtomicU64::new(1),
        }
    }

    /// Does what a stream is asked to do, now or later.
    fn submit(&self, stream: Stream, step: Step) -> Result<()> {
        if !self.is_delayed.load(Ordering::Acquire) {
            return match step {
                Step::Work(work) => work(self),
                Step::Record(event) => {
                    self.ahead.lock().expect("not poisoned").remove(&event);
                    Ok(())
                }
                Step::Follow(_) => Ok(()), // All before it is done.
            };
        }
        let mut streams = self.streams.lock().expect("not poisoned");
        streams.queues[stream as usize].push_back(step);
        if streams.delayed == Some(stream) { Ok(()) } else { self.catch_up(&mut streams, stream, None) }
    }

    fn work(&self, stream: Stream, work: impl FnOnce(&Self) -> Result<()> + Send + 'static) -> Result<()> {
        self.submit(stream, Step::Work(Box::new(work)))
    }

    /// Does the work of a stream, all of it or up to an event; the first error.
    fn catch_up(&self, streams: &mut Streams, stream: Stream, until: Option<EventId>) -> Result<()> {
        let mut result = Ok(());
        while let Some(step) = streams.queues[stream as usize].pop_front() {
            let done = match step {
                Step::Work(work) => work(self),
                Step::Record(event) => {
                    self.ahead.lock().expect("not poisoned").remove(&event);
                    if until == Some(event) {
                        break;
                    }
                    Ok(())
                }
                Step::Follow(event) if self.ahead.lock().expect("not poisoned").contains(&event) => {
                    let records = |step: &Step| matches!(step, Step::Record(found) if *found == event);
                    let other = Stream::ALL.into_iter().find(|one| streams.queues[*one as usize].iter().any(records));
                    other.map_or(Ok(()), |other| self.catch_up(streams, other, Some(event)))
                }
                Step::Follow(_) => Ok(()),
            };
            result = result.and(done);
        }
        result
    }

    /// Waits for some streams.
    fn wait_for(&self, some: &[Stream]) -> Result<()> {
        let mut streams = self.streams.lock().expect("not poisoned");
        some.iter().map(|stream| self.catch_up(&mut streams, *stream, None)).fold(Ok(()), Result::and)
    }

    /// A program, compiled at first use.
    fn opened(&self, program: Program) -> Result<&'static Opened> {
        let key = (self.folder.clone(), program);
        let slot = OPENED.lock().expect("not poisoned").entry(key).or_default().clone();
        let mut slot = slot.lock().expect("not poisoned");
        if let Some(opened) = *slot {
            return Ok(opened);
        }
        let path = build(program, &self.folder)?;
        let failed = |error: libloading::Error| Error::failed(format!("`{}`: {error}", path.display()));
        // SAFETY: the library is ours; its initializers only list its kernels.
        let library: &'static Library = Box::leak(Box::new(unsafe { Library::new(&path) }.map_err(failed)?));
        // SAFETY: the signature is that of `soft/launch.h`.
        let launch = unsafe { *library.get::<SoftLaunch>(b"soft_launch").map_err(failed)? };
        let mut idle = BTreeSet::new();
        if env::var_os("ADVXL_SOFT_LOG").is_some() {
            // SAFETY: as above.
            let kernel = unsafe { *library.get::<SoftKernel>(b"soft_kernel").map_err(failed)? };
            record(&format!("program {}", program.name()));
            // SAFETY: names live as long as the library, which is not closed.
            let names = (0..).map_while(|index| unsafe {
                let name = kernel(index);
                (!name.is_null()).then(|| CStr::from_ptr(name).to_string_lossy().into_owned())
            });
            idle.extend(names);
            idle.iter().for_each(|name| record(&format!("kernel {name}")));
        }
        let opened: &'static Opened = Box::leak(Box::new(Opened { launch, idle: Mutex::new(idle) }));
        Ok(slot.insert(opened))
    }

    /// # Safety
    ///
    /// As for [`Machine::launch`].
    unsafe fn run(&self, launch: &Launch) -> Result<()> {
        if launch.shared > self.facts.shared_memory {
            let (shared, most) = (launch.shared, self.facts.shared_memory);
            let message = format!("kernel `{}` wants {shared} bytes of shared memory, there are {most}", launch.kernel);
            return Err(Error::failed(message));
        }
        let name = CString::new(launch.kernel).expect("no zeros");
        let mut cells: Vec<*mut c_void> =
            launch.arguments.iter().map(|argument| (&raw const argument.0).cast_mut().cast()).collect();
        let order = match self.order.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.order.fetch_add(1, Ordering::Relaxed),
        };
        let opened = self.opened(launch.program)?;
        if opened.idle.lock().expect("not poisoned").remove(launch.kernel) {
            record(&format!("launched {}", launch.kernel));
        }
        // SAFETY: the cells hold the kernel's arguments, by the caller's promise.
        let status = unsafe {
            (opened.launch)(
                name.as_ptr(),
                cells.as_mut_ptr(),
                launch.grid.as_ptr(),
                launch.threads,
                launch.shared,
                order,
            )
        };
        let why = match status {
            0 => return Ok(()),
            1 => "is not in its program",
            2 => "is launched with more threads than it is compiled for, or with part of a warp",
            _ => "waits at a barrier that some threads never reach",
        };
        Err(Error::failed(format!("kernel `{}` {why}", launch.kernel)))
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes.max(1), 256).expect("a size of memory")
}

impl Drop for Soft {
    fn drop(&mut self) {
        for (at, bytes) in self.memory.get_mut().expect("not poisoned").drain() {
            // SAFETY: allocated below with this layout, not released since.
            unsafe { dealloc(at as *mut u8, layout(bytes)) };
        }
    }
}

impl Machine for Soft {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn enter(&self) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let mut memory = self.memory.lock().expect("not poisoned");
        if memory.values().sum::<usize>() + bytes > MEMORY {
            return Err(Error::new(ErrorKind::Memory, "the software GPU is full"));
        }
        // SAFETY: the layout is not empty.
        let at = unsafe { alloc(layout(bytes)) };
        assert!(!at.is_null(), "the host has no memory left");
        // SAFETY: as many bytes were just allocated.
        unsafe { at.write_bytes(0xff, bytes) };
        memory.insert(at as u64, bytes);
        Ok(at as u64)
    }

    unsafe fn release(&self, at: u64) {
        if self.is_delayed.load(Ordering::Acquire) {
            // Errors of work that nobody waits for any more.
            let _ = self.wait_for(&Stream::ALL);
        }
        let bytes = self.memory.lock().expect("not poisoned").remove(&at).expect("allocated here");
        // SAFETY: allocated above with this layout.
        unsafe { dealloc(at as *mut u8, layout(bytes)) };
    }

    unsafe fn recycle(&self, at: u64, bytes: usize) {
        // In the order of the stream whose work used it before.
        let _ = self.work(Stream::Compute, move |_| {
            // SAFETY: by the caller's promise.
            unsafe { (at as *mut u8).write_bytes(0xff, bytes) };
            Ok(())
        });
    }

    fn memory(&self) -> (usize, usize) {
        let used: usize = self.memory.lock().expect("not poisoned").values().sum();
        (MEMORY - used, MEMORY)
    }

    unsafe fn send(&self, stream: Stream, from: &[u8], to: u64) -> Result<()> {
        let from = from.to_vec();
        self.work(stream, move |_| {
            // SAFETY: by the caller's promise; the copy and device memory are apart.
            unsafe { (to as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
            Ok(())
        })
    }

    unsafe fn fetch(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.wait()?;
        // SAFETY: as above.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from as *const u8, to.len()) };
        Ok(())
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.work(Stream::Compute, move |_| {
            // SAFETY: by the caller's promise.
            unsafe { (to as *mut u8).copy_from_nonoverlapping(from as *const u8, bytes) };
            Ok(())
        })
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        self.work(Stream::Compute, move |_| {
            // SAFETY: by the caller's promise.
            unsafe { (at as *mut u8).write_bytes(0, bytes) };
            Ok(())
        })
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let Launch { stream, program, grid, threads, shared, .. } = *launch;
        let (kernel, arguments) = (launch.kernel.to_owned(), launch.arguments.to_vec());
        self.work(stream, move |soft| {
            let launch = Launch { stream, program, kernel: &kernel, grid, threads, shared, arguments: &arguments };
            // SAFETY: by the caller's promise.
            unsafe { soft.run(&launch) }
        })
    }

    unsafe fn product(&self, product: &Product, operands: &Operands) -> Result<()> {
        let (product, operands) = (*product, *operands);
        self.work(Stream::Compute, move |_| {
            // SAFETY: by the caller's promise.
            unsafe { multiply(&product, &operands) };
            Ok(())
        })
    }

    /// As asked for, so that the address sanitizer sees what goes beyond.
    fn block_size(&self, bytes: usize) -> usize {
        bytes.max(1)
    }

    fn shuffle(&self, seed: u64) {
        self.order.store(seed, Ordering::Relaxed);
    }

    fn algorithms(&self) -> String {
        ALGORITHMS.into()
    }

    fn adopt_algorithms(&self, text: &str) -> bool {
        text == ALGORITHMS
    }

    fn prepare(&self, programs: &[Program]) -> Result<()> {
        programs.iter().try_for_each(|program| self.opened(*program).map(drop))
    }

    fn wait(&self) -> Result<()> {
        if self.is_delayed.load(Ordering::Acquire) { self.wait_for(&[Stream::Compute]) } else { Ok(()) }
    }

    fn delay(&self, stream: Option<Stream>) {
        // Errors of the work so far are those of whoever waits for it next.
        let _ = self.wait_for(&Stream::ALL);
        self.streams.lock().expect("not poisoned").delayed = stream;
        self.is_delayed.store(stream.is_some(), Ordering::Release);
    }

    fn time(&self, work: &mut dyn FnMut()) -> Result<f64> {
        self.wait()?;
        let start = Instant::now();
        work();
        self.wait()?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn record(&self, stream: Stream) -> Result<EventId> {
        let event = self.events.fetch_add(1, Ordering::Relaxed);
        self.ahead.lock().expect("not poisoned").insert(event);
        self.submit(stream, Step::Record(event)).map(|()| event)
    }

    unsafe fn follow(&self, stream: Stream, event: EventId) -> Result<()> {
        self.submit(stream, Step::Follow(event))
    }

    unsafe fn is_done(&self, event: EventId) -> Result<bool> {
        Ok(!self.ahead.lock().expect("not poisoned").contains(&event))
    }

    unsafe fn destroy(&self, _event: EventId) {}

    fn nccl(&self) -> Result<&'static Nccl> {
        nccl(&self.folder)
    }

    fn exchange(&self, work: ExchangeWork) -> Result<()> {
        self.work(Stream::Exchange, move |_| work(ptr::null_mut()))
    }
}

/// # Safety
///
/// As for [`Machine::product`].
unsafe fn multiply(product: &Product, operands: &Operands) {
    let Product { form, rows, columns, inner, operands: kind, out, .. } = *product;
    // SAFETY: by the caller's promise, for the operands' sizes below.
    let read = |at: u64, count: usize, kind: Kind| unsafe { read(at, count, kind) };
    let (mut a, mut b) = (read(operands.a, rows * inner, kind), read(operands.b, inner * columns, kind));
    if kind == Kind::E4m3 {
        assert!(form == Form::Forward && inner.is_multiple_of(16) && columns.is_multiple_of(16), "{product:?}");
        for (values, (scales, count)) in
            [&mut a, &mut b].into_iter().zip([(operands.scales[0], rows), (operands.scales[1], columns)])
        {
            let scales = read(scales, count, Kind::F32);
            values.chunks_mut(inner).zip(scales).for_each(|(row, scale)| row.iter_mut().for_each(|v| *v *= scale));
        }
    }
    let mut d = match product.add {
        true => read(operands.c, rows * columns, out),
        false => vec![0.0; rows * columns],
    };
    let bias = match product.epilogue {
        Epilogue::Bias | Epilogue::Gelu | Epilogue::GeluAux => read(operands.bias, columns, out),
        _ => vec![0.0; columns],
    };
    for row in 0..rows {
        let mut sums = vec![0.0f32; columns];
        if form == Form::Forward {
            // Rows of both are read as they lie in memory; in the same order as below.
            for (sum, b) in sums.iter_mut().zip(b.chunks(inner)) {
                *sum = a[row * inner..][..inner].iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b);
            }
        } else {
            for k in 0..inner {
                let left = if form == Form::Weight { a[k * rows + row] } else { a[row * inner + k] };
                let pairs = sums.iter_mut().zip(&b[k * columns..]);
                pairs.for_each(|(sum, b)| *sum += left * b);
            }
        }
        let to = &mut d[row * columns..][..columns];
        to.iter_mut().zip(sums).zip(&bias).for_each(|((to, sum), bias)| *to = sum + *to + bias);
    }
    // SAFETY: by the caller's promise.
    unsafe {
        if product.epilogue == Epilogue::GeluAux {
            write(operands.aux, &d, out);
        }
        match product.epilogue {
            Epilogue::Gelu | Epilogue::GeluAux => d.iter_mut().for_each(|v| *v = gelu(*v).0),
            Epilogue::GeluGradient => {
                let aux = read(operands.aux, rows * columns, out);
                d.iter_mut().zip(aux).for_each(|(v, aux)| *v *= gelu(aux).1);
            }
            Epilogue::None | Epilogue::Bias => {}
        }
        write(operands.d, &d, out);
    }
}

/// The tanh GELU and its slope, cuBLASLt's.
fn gelu(x: f32) -> (f32, f32) {
    let inner = 0.797_884_6 * (x + 0.044_715 * x * x * x);
    let (tanh, slope) = (inner.tanh(), 0.797_884_6 * (1.0 + 3.0 * 0.044_715 * x * x));
    (0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope)
}

/// # Safety
///
/// `at` holds `count` numbers of the kind.
unsafe fn read(at: u64, count: usize, kind: Kind) -> Vec<f32> {
    // SAFETY: by the caller's promise; device memory is aligned.
    unsafe {
        match kind {
            Kind::F32 => std::slice::from_raw_parts(at as *const f32, count).to_vec(),
            Kind::Bf16 => std::slice::from_raw_parts(at as *const u16, count)
                .iter()
                .map(|v| crate::values::from_bf16(*v))
                .collect(),
            Kind::E4m3 => std::slice::from_raw_parts(at as *const u8, count)
                .iter()
                .map(|v| crate::values::from_e4m3(*v))
                .collect(),
        }
    }
}

/// # Safety
///
/// `at` has room for as many numbers of the kind, which nobody else uses.
unsafe fn write(at: u64, values: &[f32], kind: Kind) {
    // SAFETY: by the caller's promise; device memory is aligned.
    unsafe {
        match kind {
            Kind::F32 => std::slice::from_raw_parts_mut(at as *mut f32, values.len()).copy_from_slice(values),
            Kind::Bf16 => std::slice::from_raw_parts_mut(at as *mut u16, values.len())
                .iter_mut()
                .zip(values)
                .for_each(|(to, v)| *to = crate::values::to_bf16(*v)),
            Kind::E4m3 => unreachable!("no product is stored in e4m3"),
        }
    }
}
