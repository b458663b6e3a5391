//! The parts of many tensors in one message, and the sum of what comes from all ranks.

use crate::gpu::Gpu;
use crate::launch;
use crate::machine::{Argument, Kind, Stream};
use crate::programs::Program::Messages;
use crate::values::Values;

/// Elements of one block of threads, as the kernels have it.
const CHUNK: usize = 4096;

/// The most rows of a pairwise sum: the kernel keeps a sum for each of its twelve levels.
pub(crate) const MOST_ROWS: usize = (1 << 12) - 1;

/// Tensors and their places in the message of one rank, as the kernels take them.
pub(crate) struct Table {
    pub(crate) bytes: Vec<u8>,
    count: i32,
    chunks: usize,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self { bytes: Vec::new(), count: 0, chunks: 0 }
    }

    /// Adds a tensor of `len` numbers at an address. Rank r has those from `stride * r` on, at `begin` in its message;
    /// `covered` of them are walked over.
    pub(crate) fn add(&mut self, at: u64, [len, stride, begin, covered]: [usize; 4]) {
        if covered == 0 {
            return;
        }
        let numbers = [at, len as u64, stride as u64, begin as u64, self.chunks as u64];
        self.bytes.extend(numbers.into_iter().flat_map(u64::to_le_bytes));
        self.count += 1;
        self.chunks += covered.div_ceil(CHUNK);
    }

    /// Writes the message `[ranks, width]` on the exchange stream.
    ///
    /// # Safety
    ///
    /// The table is at `list` in the order of that stream and names live tensors; the message is as large, and every tensor's
    /// places are within it.
    pub(crate) unsafe fn lay_out(&self, gpu: &Gpu, list: u64, message: u64, [ranks, width]: [usize; 2]) {
        let arguments =
            [Argument(message), Argument(list), self.count.into(), (width as u64).into(), (ranks as i32).into()];
        let grid = [self.chunks, 1, 1];
        // SAFETY: by the caller's promise.
        unsafe { gpu.launch_on(Stream::Exchange, Messages, "lay_out", grid, [256, 0], &arguments) };
    }

    /// Writes the tensors from a message on the compute stream.
    ///
    /// # Safety
    ///
    /// The table names live tensors, and the message has all their places.
    pub(crate) unsafe fn take_apart(&self, gpu: &Gpu, message: u64, width: usize) {
        let (list, message) = (Values::send_bytes(gpu, &self.bytes), Argument(message));
        let grid = [self.chunks, 1, 1];
        // SAFETY: by the caller's promise.
        unsafe { launch!(gpu, Messages, "take_apart", grid, 256, 0, message, &list, self.count, width as u64) };
    }
}

/// The sum of `rows` rows `[rows, width]` as a pairwise tree: each row with its neighbor, those sums with theirs, and so on.
/// The bits are those of the same tree on the host.
///
/// # Panics
///
/// If the values are not this many whole rows, or not f32.
pub fn pairwise_sum(values: &Values, rows: usize) -> Values {
    assert!(values.kind() == Kind::F32 && (1..=MOST_ROWS).contains(&rows), "{rows} rows of {values:?}");
    assert!(values.len().is_multiple_of(rows), "{values:?} are not {rows} rows");
    let to = Values::new(values.gpu(), values.len() / rows, Kind::F32);
    // SAFETY: the lengths were checked above, and the sum is new.
    unsafe { sum_rows(values.gpu(), Stream::Compute, to.at(), values.at(), [rows, to.len()]) };
    to
}

/// The same at addresses, on any stream.
///
/// # Safety
///
/// `from` holds `rows * width` numbers and `to` has room for `width`, in the order of that stream.
pub(crate) unsafe fn sum_rows(gpu: &Gpu, stream: Stream, to: u64, from: u64, [rows, width]: [usize; 2]) {
    let arguments = [Argument(to), Argument(from), (width as u64).into(), (rows as i32).into()];
    let grid = [width.div_ceil(256).min(1 << 16), 1, 1];
    // SAFETY: by the caller's promise.
    unsafe { gpu.launch_on(stream, Messages, "pairwise_sum", grid, [256, 0], &arguments) };
}
