//! Sixteen f32 at a time: the small vocabulary in which every kernel is written once.
//!
//! A kernel is an [`Op`]: a struct of its arguments with a body generic over [`Lanes`]. Running it
//! through [`Lanes::call`] compiles the body with the instructions of that path, because everything
//! on the way is inlined into a function that carries the `#[target_feature]`.
//!
//! A *cell* is 32 bits of a matrix product's operand: one f32, or two bf16 that follow each other
//! along the summed dimension (the lower half first). See [`crate::cells`].
//!
//! There are no kernels here, only arithmetic.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod portable;

/// A kernel and its arguments.
pub(crate) trait Op {
    /// What the kernel returns.
    type Output;
    /// The kernel. Implementations are `#[inline(always)]`, see the module's text.
    fn run<S: Lanes>(self, s: S) -> Self::Output;
}

/// Register tiles of products that are written in assembly.
#[cfg(target_arch = "x86_64")]
pub(crate) enum Assembly {
    /// On cells of one f32.
    F32,
    /// On cells of two bf16.
    Bf16,
}

/// Number of f32 in a vector, on every path.
pub(crate) const LANES: usize = 16;

/// Arithmetic on sixteen f32 lanes. A value of the type proves that the processor can do it.
pub(crate) trait Lanes: Copy + Send + Sync + 'static {
    /// Sixteen f32.
    type V: Copy;
    /// Sixteen cells.
    type C: Copy;
    /// Rows of the register tile of products; its columns are 32.
    const TILE_ROWS: usize;

    /// This path's assembly tile for cells of `per_cell` elements, if there is one.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn tile_in_assembly(self, _per_cell: usize) -> Option<Assembly> {
        None
    }

    /// Runs `op` in a function of its own that has this path's instructions.
    fn call<O: Op>(self, op: O) -> O::Output;

    fn splat(self, value: f32) -> Self::V;
    fn load(self, from: &[f32; LANES]) -> Self::V;
    fn store(self, to: &mut [f32; LANES], v: Self::V);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn sqrt(self, a: Self::V) -> Self::V;
    /// `1 / a` to two units in the last place, for finite `a` that are not zero.
    fn reciprocal(self, a: Self::V) -> Self::V;
    /// Lanes of `magnitude` with the signs of `sign`.
    fn copy_sign(self, magnitude: Self::V, sign: Self::V) -> Self::V;
    /// `a * b + c`, with one rounding where the path has it.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger lane by lane; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller lane by lane; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest whole number.
    fn round(self, a: Self::V) -> Self::V;
    /// `v * 2^n` for whole `n` between -126 and 127.
    fn scale(self, v: Self::V, n: Self::V) -> Self::V;
    /// The sign of each lane as -1, 0 or 1; 0 for NaN.
    fn sign(self, a: Self::V) -> Self::V;
    /// The first `count` lanes of `v`, zero in the others.
    fn first(self, v: Self::V, count: usize) -> Self::V;
    /// Sum of the lanes: halves added, then halves of the halves, and so on.
    fn sum(self, v: Self::V) -> f32;
    /// The largest lane.
    fn largest(self, v: Self::V) -> f32;

    /// Sixteen bf16, the first in the lower half of the first cell.
    fn load_bf16(self, from: &[u32; 8]) -> Self::V;
    /// To bf16, to nearest and to even.
    fn store_bf16(self, to: &mut [u32; 8], v: Self::V);

    fn splat_cell(self, cell: u32) -> Self::C;
    fn load_cells(self, from: &[u32; LANES]) -> Self::C;
    fn store_cells(self, to: &mut [u32; LANES], c: Self::C);
    /// Cells of one i32 as bytes; the nearest where one does not fit.
    fn store_bytes(self, to: &mut [u8; LANES], c: Self::C);
    /// `sum + a * b` on cells of one f32.
    fn dot_f32(self, sum: Self::V, a: Self::C, b: Self::C) -> Self::V;
    /// `sum + a.0 * b.0 + a.1 * b.1` on cells of two bf16.
    fn dot_bf16(self, sum: Self::V, a: Self::C, b: Self::C) -> Self::V;
    /// Cells of (bf16 of `low`, bf16 of `high`) for sixteen columns of two rows.
    fn interleave(self, low: &[u32; 8], high: &[u32; 8]) -> Self::C;
    /// Transposes sixteen vectors of sixteen cells.
    fn transpose(self, rows: &mut [Self::C; LANES]);

    /// The first lanes from a slice of fewer than sixteen or more; zero where it ends.
    #[inline(always)]
    fn load_part(self, from: &[f32]) -> Self::V {
        if let Some(full) = from.first_chunk() {
            return self.load(full);
        }
        let mut padded = [0.0; LANES];
        padded[..from.len()].copy_from_slice(from);
        self.load(&padded)
    }

    /// As many lanes as the slice takes.
    #[inline(always)]
    fn store_part(self, to: &mut [f32], v: Self::V) {
        if let Some(full) = to.first_chunk_mut() {
            return self.store(full, v);
        }
        let mut padded = [0.0; LANES];
        self.store(&mut padded, v);
        let count = to.len();
        to.copy_from_slice(&padded[..count]);
    }
}

/// `N` values from `start` on.
#[inline(always)]
pub(crate) fn chunk<T, const N: usize>(slice: &[T], start: usize) -> &[T; N] {
    slice[start..].first_chunk().expect("slice holds a whole vector")
}

/// `N` values from `start` on, to be written.
#[inline(always)]
pub(crate) fn chunk_mut<T, const N: usize>(slice: &mut [T], start: usize) -> &mut [T; N] {
    slice[start..].first_chunk_mut().expect("slice holds a whole vector")
}

/// One f32 as bf16, to nearest and to even; what is NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16_from_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}
