//! What the engine asks of a GPU: memory, copies, launches and products, in the order of a stream.
//!
//! All work is on [`Stream::Compute`], but for exchanges with other GPUs and images on their way here, which overlap
//! with it.
//!
//! Two machines do it: [`Real`](crate::real), NVIDIA's driver, and [`Soft`](crate::soft), a software twin for tests.

use std::fmt;

use crate::bindings::{Handle, Nccl};
use crate::error::Result;
use crate::programs::Program;

/// A device that runs work in the order it is given. Addresses are those of device memory.
pub(crate) trait Machine: Send + Sync {
    /// What it is.
    fn facts(&self) -> &Facts;
    /// Makes it the device of the calling thread, for calls of libraries.
    fn enter(&self) -> Result<()>;
    /// New memory, aligned to 256 bytes.
    fn allocate(&self, bytes: usize) -> Result<u64>;
    /// Returns memory; work that uses it may still be running.
    ///
    /// # Safety
    ///
    /// `at` came from `allocate` and is not used by later work.
    unsafe fn release(&self, at: u64);
    /// Called before memory is used again for something else, so that a test machine can spoil what was there.
    ///
    /// # Safety
    ///
    /// `bytes` at `at` are allocated and nobody's.
    unsafe fn recycle(&self, _at: u64, _bytes: usize) {}
    /// The size of the block that serves a request.
    fn block_size(&self, bytes: usize) -> usize {
        block_size(bytes)
    }
    /// Free and total memory in bytes.
    fn memory(&self) -> (usize, usize);
    /// Copies to the device; `from` may be changed once this returns.
    ///
    /// # Safety
    ///
    /// `to` is allocated for as many bytes.
    unsafe fn send(&self, stream: Stream, from: &[u8], to: u64) -> Result<()>;
    /// Waits for all work on the compute stream, then copies to the host.
    ///
    /// # Safety
    ///
    /// `from` is allocated for as many bytes.
    unsafe fn fetch(&self, from: u64, to: &mut [u8]) -> Result<()>;
    /// Copies within the device.
    ///
    /// # Safety
    ///
    /// Both are allocated for `bytes` and do not overlap.
    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;
    /// Sets all bytes to zero.
    ///
    /// # Safety
    ///
    /// `at` is allocated for `bytes`.
    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()>;
    /// Runs a kernel.
    ///
    /// # Safety
    ///
    /// The arguments are those of the kernel's source, and the memory they point to is allocated as it expects.
    unsafe fn launch(&self, launch: &Launch) -> Result<()>;
    /// Multiplies matrices.
    ///
    /// # Safety
    ///
    /// The operands are allocated for the sizes and formats of `product`.
    unsafe fn product(&self, product: &Product, operands: &Operands) -> Result<()>;
    /// The algorithms that products of each shape use, as text; see `Gpu::algorithms`.
    fn algorithms(&self) -> String;
    /// Uses algorithms of a checkpoint; whether they are of this GPU model and library.
    fn adopt_algorithms(&self, text: &str) -> bool;
    /// Makes programs ready before they are needed, several at a time where that is faster.
    fn prepare(&self, programs: &[Program]) -> Result<()>;
    /// Waits until all work on the compute stream is done.
    fn wait(&self) -> Result<()>;
    /// Changes the order of threads, where that can be chosen.
    fn shuffle(&self, _seed: u64) {}
    /// Does the work of a stream as late as possible, where that can be chosen.
    fn delay(&self, _stream: Option<Stream>) {}
    /// Seconds that work takes on the compute stream.
    fn time(&self, work: &mut dyn FnMut()) -> Result<f64>;
    /// Records an event behind the work of a stream so far.
    fn record(&self, stream: Stream) -> Result<EventId>;
    /// Later work of `stream` waits for an event.
    ///
    /// # Safety
    ///
    /// The event was recorded here and not destroyed.
    unsafe fn follow(&self, stream: Stream, event: EventId) -> Result<()>;
    /// Whether the work before an event is done.
    ///
    /// # Safety
    ///
    /// The event was recorded here and not destroyed.
    unsafe fn is_done(&self, event: EventId) -> Result<bool>;
    /// Destroys an event. What waits for it keeps waiting.
    ///
    /// # Safety
    ///
    /// The event was recorded here and is destroyed once.
    unsafe fn destroy(&self, event: EventId);
    /// NCCL, or its twin for this machine's memory.
    fn nccl(&self) -> Result<&'static Nccl>;
    /// Calls a library that queues work on the exchange stream, whose handle it gets. On the software GPU the call may
    /// come later, in the order of that stream.
    fn exchange(&self, work: ExchangeWork) -> Result<()>;
}

/// A queue of work that is done in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Of all operations.
    Compute,
    /// Of exchanges with other GPUs.
    Exchange,
    /// Of copies from the host that later work waits for.
    Upload,
}

impl Stream {
    /// All of them, in their order.
    pub(crate) const ALL: [Self; 3] = [Self::Compute, Self::Exchange, Self::Upload];
}

/// What a machine calls an event.
pub(crate) type EventId = u64;

/// A call of a library, given the handle of its stream.
pub(crate) type ExchangeWork = Box<dyn FnOnce(Handle) -> Result<()> + Send>;

/// Sizes of blocks: eight to a power of two, so that a block is at most an eighth larger than requested.
fn block_size(bytes: usize) -> usize {
    let bytes = bytes.max(512);
    let step = (bytes.next_power_of_two() / 16).max(512);
    bytes.next_multiple_of(step)
}

/// What a machine is.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The GPU's name.
    pub name: String,
    /// Identifies a GPU of the machine independently of its index in this process: its PCI address.
    pub id: String,
    /// Compute capability, 9.0 for an H100.
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Shared memory that one block may use, in bytes.
    pub shared_memory: usize,
}

/// One launch of a kernel.
pub(crate) struct Launch<'a> {
    pub(crate) stream: Stream,
    pub(crate) program: Program,
    pub(crate) kernel: &'a str,
    pub(crate) grid: [u32; 3],
    pub(crate) threads: u32,
    /// Dynamic shared memory in bytes.
    pub(crate) shared: usize,
    pub(crate) arguments: &'a [Argument],
}

/// An argument of a kernel in a cell of eight bytes, little-endian.
#[derive(Clone, Copy)]
pub(crate) struct Argument(pub(crate) u64);

impl From<u64> for Argument {
    fn from(value: u64) -> Self {
        Self(value)
    }
}

impl From<i32> for Argument {
    fn from(value: i32) -> Self {
        Self(u64::from(value as u32))
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self(u64::from(value.to_bits()))
    }
}

/// The format of numbers in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// 32 bits.
    F32,
    /// The upper 16 bits of an f32.
    Bf16,
    /// FP8: 4 bits of exponent, 3 of fraction. Operands of products only, with a scale for each row.
    E4m3,
}

impl Kind {
    /// Size of a number in bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::E4m3 => 1,
        }
    }

    /// As kernels' names have it.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::E4m3 => "e4m3",
        }
    }
}

/// How the operands of a product lie in memory, all row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// A `[rows, inner]`, B `[columns, inner]`: a layer's output from its input and weight.
    Forward,
    /// A `[rows, inner]`, B `[inner, columns]`: the gradient of its input from that of its output.
    Input,
    /// A `[inner, rows]`, B `[inner, columns]`: the gradient of its weight.
    Weight,
}

/// What happens to a product before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Epilogue {
    None,
    /// Adds a bias, one number a column, in the format of D.
    Bias,
    /// `gelu(.. + bias)`, by tanh.
    Gelu,
    /// The same, and stores what the GELU is taken of.
    GeluAux,
    /// Multiplies with the slope of the tanh GELU at what was stored.
    GeluGradient,
}

/// D `[rows, columns]` = A B, and what follows it. Sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    pub(crate) form: Form,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) inner: usize,
    /// Of A and B.
    pub(crate) operands: Kind,
    /// Of C and D.
    pub(crate) out: Kind,
    /// Whether f32 operands may be rounded to TF32.
    pub(crate) tf32: bool,
    /// Whether C is added.
    pub(crate) add: bool,
    pub(crate) epilogue: Epilogue,
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { form, rows, columns, inner, operands, out, tf32, add, epilogue } = self;
        let operands = if *tf32 { "tf32" } else { operands.suffix() };
        write!(f, "{form:?} [{rows} x {inner}] [{inner} x {columns}] {operands} to {}, {epilogue:?}", out.suffix())?;
        if *add { f.write_str(", C") } else { Ok(()) }
    }
}

/// Addresses of a product's operands; 0 where there is none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Operands {
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) c: u64,
    pub(crate) d: u64,
    pub(crate) bias: u64,
    pub(crate) aux: u64,
    /// Of e4m3 operands: f32 factors, one for each row of A and each row of B, which is in the form `Forward`.
    pub(crate) scales: [u64; 2],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_at_most_an_eighth_larger_than_asked_for() {
        for bytes in [1, 512, 513, 5000, 78_643_200, 235_929_600, (1 << 30) + 1] {
            let size = block_size(bytes);
            assert!(size >= bytes && size.is_multiple_of(512), "{bytes}: {size}");
            assert!(size <= bytes + (bytes / 8).max(512), "{bytes}: {size}");
        }
    }
}
