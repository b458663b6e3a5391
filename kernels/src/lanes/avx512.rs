//! [`Lanes`] on AVX-512; `BF16` says whether the processor multiplies bf16 pairs itself.

use std::arch::x86_64::*;

use super::{Assembly, LANES, Lanes, Op};

/// Proof that the processor has AVX-512 F, BW, VL and DQ, and for `BF16` also its bf16 products.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool>(());

impl<const BF16: bool> Avx512<BF16> {
    /// # Safety
    ///
    /// The processor must have the features named on the type.
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
}

/// Evaluates intrinsics that have no demand but the features.
macro_rules! intrinsic {
    ($call:expr) => {
        // SAFETY: `self` exists only where the features were detected (`Avx512::assume`), and every
        // pointer comes from a reference to an array as long as the access.
        unsafe { $call }
    };
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
fn call_with_bf16<O: Op>(s: Avx512<true>, op: O) -> O::Output {
    op.run(s)
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
fn call_without_bf16<O: Op>(s: Avx512<false>, op: O) -> O::Output {
    op.run(s)
}

impl<const BF16: bool> Lanes for Avx512<BF16> {
    type V = __m512;
    type C = __m512i;
    const TILE_ROWS: usize = 12;

    #[inline(always)]
    fn tile_in_assembly(self, per_cell: usize) -> Option<Assembly> {
        match per_cell {
            1 => Some(Assembly::F32),
            _ if BF16 => Some(Assembly::Bf16),
            _ => None,
        }
    }
    #[inline(always)]
    fn call<O: Op>(self, op: O) -> O::Output {
        if BF16 {
            intrinsic!(call_with_bf16(Avx512::<true>(()), op))
        } else {
            intrinsic!(call_without_bf16(Avx512::<false>(()), op))
        }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        intrinsic!(_mm512_set1_ps(value))
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        intrinsic!(_mm512_loadu_ps(from.as_ptr()))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], v: Self::V) {
        intrinsic!(_mm512_storeu_ps(to.as_mut_ptr(), v))
    }
    #[inline(always)]
    fn load_part(self, from: &[f32]) -> Self::V {
        match from.first_chunk() {
            Some(full) => self.load(full),
            // Lanes that the mask leaves out are not read.
            None => intrinsic!(_mm512_maskz_loadu_ps((1 << from.len()) - 1, from.as_ptr())),
        }
    }
    #[inline(always)]
    fn store_part(self, to: &mut [f32], v: Self::V) {
        let count = to.len();
        match to.first_chunk_mut() {
            Some(full) => self.store(full, v),
            // Lanes that the mask leaves out are not written.
            None => intrinsic!(_mm512_mask_storeu_ps(to.as_mut_ptr(), (1 << count) - 1, v)),
        }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsic!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsic!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsic!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsic!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn reciprocal(self, a: Self::V) -> Self::V {
        // 14 bits from the table, all of them after one step of Newton's.
        intrinsic!({
            let near = _mm512_rcp14_ps(a);
            _mm512_fmadd_ps(near, _mm512_fnmadd_ps(a, near, _mm512_set1_ps(1.0)), near)
        })
    }
    #[inline(always)]
    fn copy_sign(self, magnitude: Self::V, sign: Self::V) -> Self::V {
        // Bits of the mask from `sign`, the others from `magnitude`.
        intrinsic!({
            let [magnitude, sign] = [magnitude, sign].map(|v| _mm512_castps_si512(v));
            let mask = _mm512_set1_epi32(i32::MIN);
            _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xca>(mask, sign, magnitude))
        })
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        intrinsic!(_mm512_sqrt_ps(a))
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        intrinsic!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsic!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsic!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        intrinsic!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT }>(a))
    }
    #[inline(always)]
    fn scale(self, v: Self::V, n: Self::V) -> Self::V {
        intrinsic!(_mm512_scalef_ps(v, n))
    }
    #[inline(always)]
    fn sign(self, a: Self::V) -> Self::V {
        intrinsic!({
            let zero = _mm512_setzero_ps();
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, zero);
            let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, zero);
            let ones = _mm512_maskz_mov_ps(above, _mm512_set1_ps(1.0));
            _mm512_mask_mov_ps(ones, below, _mm512_set1_ps(-1.0))
        })
    }
    #[inline(always)]
    fn first(self, v: Self::V, count: usize) -> Self::V {
        let mask = if count >= LANES { u16::MAX } else { (1 << count) - 1 };
        intrinsic!(_mm512_maskz_mov_ps(mask, v))
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        intrinsic!(_mm512_reduce_add_ps(v))
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(v))
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u32; 8]) -> Self::V {
        intrinsic!({
            let halves = _mm256_loadu_si256(from.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        })
    }
    #[inline(always)]
    fn store_bf16(self, to: &mut [u32; 8], v: Self::V) {
        if BF16 {
            intrinsic!({
                let halves: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(v));
                _mm256_storeu_si256(to.as_mut_ptr().cast(), halves)
            })
        } else {
            intrinsic!({
                let bits = _mm512_castps_si512(v);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
                let rounded = _mm512_add_epi32(bits, half);
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
                let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
                let chosen = _mm512_mask_mov_epi32(rounded, nan, quiet);
                let halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(chosen));
                _mm256_storeu_si256(to.as_mut_ptr().cast(), halves)
            })
        }
    }

    #[inline(always)]
    fn splat_cell(self, cell: u32) -> Self::C {
        intrinsic!(_mm512_set1_epi32(cell as i32))
    }
    #[inline(always)]
    fn load_cells(self, from: &[u32; LANES]) -> Self::C {
        intrinsic!(_mm512_loadu_si512(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn store_bytes(self, to: &mut [u8; LANES], c: Self::C) {
        intrinsic!({
            let bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(c, _mm512_setzero_si512()));
            _mm_storeu_si128(to.as_mut_ptr().cast(), bytes);
        })
    }
    #[inline(always)]
    fn store_cells(self, to: &mut [u32; LANES], c: Self::C) {
        intrinsic!(_mm512_storeu_si512(to.as_mut_ptr().cast(), c))
    }
    #[inline(always)]
    fn dot_f32(self, sum: Self::V, a: Self::C, b: Self::C) -> Self::V {
        intrinsic!(_mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum))
    }
    #[inline(always)]
    fn dot_bf16(self, sum: Self::V, a: Self::C, b: Self::C) -> Self::V {
        if BF16 {
            intrinsic!(_mm512_dpbf16_ps(
                sum,
                std::mem::transmute::<__m512i, __m512bh>(a),
                std::mem::transmute::<__m512i, __m512bh>(b)
            ))
        } else {
            intrinsic!({
                let low = |c| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(c));
                let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                let high = |c| _mm512_castsi512_ps(_mm512_and_si512(c, upper));
                let sum = _mm512_fmadd_ps(low(a), low(b), sum);
                _mm512_fmadd_ps(high(a), high(b), sum)
            })
        }
    }
    #[inline(always)]
    fn interleave(self, low: &[u32; 8], high: &[u32; 8]) -> Self::C {
        intrinsic!({
            let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(low.as_ptr().cast()));
            let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(high.as_ptr().cast()));
            _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
        })
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [Self::C; LANES]) {
        intrinsic!({
            // Pairs of rows, then fours, as 4 x 4 blocks inside each 128-bit quarter ...
            let mut t = *rows;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
            }
            let mut u = t;
            for i in 0..4 {
                u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
                u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
                u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
                u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
            }
            // ... then the quarters: u[4 i + j] holds columns j, j + 4, j + 8, j + 12 of rows 4 i ..
            for j in 0..4 {
                let even = _mm512_shuffle_i32x4::<0x88>(u[j], u[4 + j]);
                let odd = _mm512_shuffle_i32x4::<0xdd>(u[j], u[4 + j]);
                let even_low = _mm512_shuffle_i32x4::<0x88>(u[8 + j], u[12 + j]);
                let odd_low = _mm512_shuffle_i32x4::<0xdd>(u[8 + j], u[12 + j]);
                rows[j] = _mm512_shuffle_i32x4::<0x88>(even, even_low);
                rows[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even, even_low);
                rows[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, odd_low);
                rows[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_low);
            }
        })
    }
}
