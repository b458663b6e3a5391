//! [`Lanes`] on AVX2 with fused multiply-add: sixteen lanes are two registers.

use std::arch::x86_64::*;

use super::{LANES, Lanes, Op};

/// Proof that the processor has AVX2 and FMA.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    ///
    /// The processor must have AVX2 and FMA.
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
}

/// Evaluates intrinsics that have no demand but the features.
macro_rules! intrinsic {
    ($call:expr) => {
        // SAFETY: `self` exists only where the features were detected (`Avx2::assume`), and every
        // pointer comes from a reference to an array as long as the access.
        unsafe { $call }
    };
}

#[inline(never)]
#[target_feature(enable = "avx2,fma")]
fn call_with_avx2<O: Op>(s: Avx2, op: O) -> O::Output {
    op.run(s)
}

/// The lower and the upper half of the lanes.
type Pair = [__m256; 2];

/// Rounds eight f32 to bf16, in the lower half of each lane.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn round_to_bf16(v: __m256) -> __m256i {
    let bits = _mm256_castps_si256(v);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
    _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
}

/// The first elements of bf16 pairs as f32, then the second.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn widen(cells: __m256i) -> Pair {
    let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(cells)), _mm256_castsi256_ps(_mm256_and_si256(cells, upper))]
}

/// Transposes eight rows of eight cells.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transpose_8x8(rows: [__m256i; 8]) -> [__m256i; 8] {
    let mut t = rows;
    for i in 0..4 {
        t[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    let mut u = t;
    for i in 0..2 {
        u[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        u[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    let mut out = u;
    for j in 0..4 {
        out[j] = _mm256_permute2x128_si256::<0x20>(u[j], u[4 + j]);
        out[4 + j] = _mm256_permute2x128_si256::<0x31>(u[j], u[4 + j]);
    }
    out
}

impl Lanes for Avx2 {
    type V = Pair;
    type C = [__m256i; 2];
    // 3 rows of 32 columns are 12 of the 16 registers.
    const TILE_ROWS: usize = 3;

    #[inline(always)]
    fn call<O: Op>(self, op: O) -> O::Output {
        intrinsic!(call_with_avx2(self, op))
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Pair {
        intrinsic!([_mm256_set1_ps(value); 2])
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Pair {
        intrinsic!([_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))])
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], v: Pair) {
        intrinsic!({
            _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), v[1]);
        })
    }
    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        intrinsic!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        intrinsic!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        intrinsic!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        intrinsic!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn reciprocal(self, a: Pair) -> Pair {
        self.div(self.splat(1.0), a)
    }
    #[inline(always)]
    fn copy_sign(self, magnitude: Pair, sign: Pair) -> Pair {
        intrinsic!({
            let mask = _mm256_set1_ps(-0.0);
            let of = |m, s| _mm256_or_ps(_mm256_andnot_ps(mask, m), _mm256_and_ps(mask, s));
            [of(magnitude[0], sign[0]), of(magnitude[1], sign[1])]
        })
    }
    #[inline(always)]
    fn sqrt(self, a: Pair) -> Pair {
        intrinsic!([_mm256_sqrt_ps(a[0]), _mm256_sqrt_ps(a[1])])
    }
    #[inline(always)]
    fn fma(self, a: Pair, b: Pair, c: Pair) -> Pair {
        intrinsic!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }
    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        intrinsic!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn min(self, a: Pair, b: Pair) -> Pair {
        intrinsic!([_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn round(self, a: Pair) -> Pair {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        intrinsic!([_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])])
    }
    #[inline(always)]
    fn scale(self, v: Pair, n: Pair) -> Pair {
        intrinsic!({
            let power = |n| {
                let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
            };
            [_mm256_mul_ps(v[0], power(n[0])), _mm256_mul_ps(v[1], power(n[1]))]
        })
    }
    #[inline(always)]
    fn sign(self, a: Pair) -> Pair {
        intrinsic!({
            let zero = _mm256_setzero_ps();
            let sign = |a| {
                let above = _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, zero), _mm256_set1_ps(1.0));
                let below = _mm256_and_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a, zero), _mm256_set1_ps(-1.0));
                _mm256_or_ps(above, below)
            };
            [sign(a[0]), sign(a[1])]
        })
    }
    #[inline(always)]
    fn first(self, v: Pair, count: usize) -> Pair {
        intrinsic!({
            let count = _mm256_set1_epi32(count.min(LANES) as i32);
            let low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
            let keep = |v, index| _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, index)));
            [keep(v[0], low), keep(v[1], high)]
        })
    }
    #[inline(always)]
    fn sum(self, v: Pair) -> f32 {
        intrinsic!({
            let eight = _mm256_add_ps(v[0], v[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn largest(self, v: Pair) -> f32 {
        intrinsic!({
            let eight = _mm256_max_ps(v[0], v[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u32; 8]) -> Pair {
        intrinsic!({
            let widen = |half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)));
            let cells = _mm256_loadu_si256(from.as_ptr().cast());
            [widen(_mm256_castsi256_si128(cells)), widen(_mm256_extracti128_si256::<1>(cells))]
        })
    }
    #[inline(always)]
    fn store_bf16(self, to: &mut [u32; 8], v: Pair) {
        intrinsic!({
            // Packing works within 128 bits; the permutation puts the quarters back in order.
            let packed = _mm256_packus_epi32(round_to_bf16(v[0]), round_to_bf16(v[1]));
            let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), ordered)
        })
    }

    #[inline(always)]
    fn splat_cell(self, cell: u32) -> Self::C {
        intrinsic!([_mm256_set1_epi32(cell as i32); 2])
    }
    #[inline(always)]
    fn load_cells(self, from: &[u32; LANES]) -> Self::C {
        intrinsic!([_mm256_loadu_si256(from.as_ptr().cast()), _mm256_loadu_si256(from.as_ptr().add(8).cast())])
    }
    #[inline(always)]
    fn store_bytes(self, to: &mut [u8; LANES], c: Self::C) {
        intrinsic!({
            // Packing works within 128 bits: fours of bytes come as 0 2 0 2 1 3 1 3.
            let shorts = _mm256_packs_epi32(c[0], c[1]);
            let bytes = _mm256_packus_epi16(shorts, shorts);
            let ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
            _mm_storeu_si128(to.as_mut_ptr().cast(), _mm256_castsi256_si128(ordered));
        })
    }
    #[inline(always)]
    fn store_cells(self, to: &mut [u32; LANES], c: Self::C) {
        intrinsic!({
            _mm256_storeu_si256(to.as_mut_ptr().cast(), c[0]);
            _mm256_storeu_si256(to.as_mut_ptr().add(8).cast(), c[1]);
        })
    }
    #[inline(always)]
    fn dot_f32(self, sum: Pair, a: Self::C, b: Self::C) -> Pair {
        intrinsic!([
            _mm256_fmadd_ps(_mm256_castsi256_ps(a[0]), _mm256_castsi256_ps(b[0]), sum[0]),
            _mm256_fmadd_ps(_mm256_castsi256_ps(a[1]), _mm256_castsi256_ps(b[1]), sum[1])
        ])
    }
    #[inline(always)]
    fn dot_bf16(self, sum: Pair, a: Self::C, b: Self::C) -> Pair {
        intrinsic!({
            let dot = |sum, a, b| {
                let (a, b) = (widen(a), widen(b));
                _mm256_fmadd_ps(a[1], b[1], _mm256_fmadd_ps(a[0], b[0], sum))
            };
            [dot(sum[0], a[0], b[0]), dot(sum[1], a[1], b[1])]
        })
    }
    #[inline(always)]
    fn interleave(self, low: &[u32; 8], high: &[u32; 8]) -> Self::C {
        intrinsic!({
            let low = _mm256_loadu_si256(low.as_ptr().cast());
            let high = _mm256_loadu_si256(high.as_ptr().cast());
            let pair = |low, high| {
                let high = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(high));
                _mm256_or_si256(_mm256_cvtepu16_epi32(low), high)
            };
            [
                pair(_mm256_castsi256_si128(low), _mm256_castsi256_si128(high)),
                pair(_mm256_extracti128_si256::<1>(low), _mm256_extracti128_si256::<1>(high)),
            ]
        })
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [Self::C; LANES]) {
        intrinsic!({
            let block = |i: usize, j: usize| {
                let mut block = [rows[0][0]; 8];
                for (k, row) in block.iter_mut().enumerate() {
                    *row = rows[8 * i + k][j];
                }
                transpose_8x8(block)
            };
            let (a, b, c, d) = (block(0, 0), block(1, 0), block(0, 1), block(1, 1));
            for k in 0..8 {
                rows[k] = [a[k], b[k]];
                rows[8 + k] = [c[k], d[k]];
            }
        })
    }
}
