//! [`Lanes`] in plain Rust: the definition, and what processors without AVX2 run.

use super::{LANES, Lanes, Op, bf16_from_f32};

/// Plain arrays; the compiler makes of them what the target's baseline allows.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn map(a: [f32; LANES], f: impl Fn(f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i]))
}

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn halve(mut v: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            v[i] = f(v[i], v[i + width]);
        }
        width /= 2;
    }
    v[0]
}

#[inline(always)]
fn low(cell: u32) -> f32 {
    f32::from_bits(cell << 16)
}

#[inline(always)]
fn high(cell: u32) -> f32 {
    f32::from_bits(cell & 0xffff_0000)
}

impl Lanes for Portable {
    type V = [f32; LANES];
    type C = [u32; LANES];
    const TILE_ROWS: usize = 2;

    #[inline(never)]
    fn call<O: Op>(self, op: O) -> O::Output {
        op.run(self)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        *from
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], v: Self::V) {
        *to = v;
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn reciprocal(self, a: Self::V) -> Self::V {
        map(a, f32::recip)
    }
    #[inline(always)]
    fn copy_sign(self, magnitude: Self::V, sign: Self::V) -> Self::V {
        zip(magnitude, sign, f32::copysign)
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        map(a, f32::sqrt)
    }
    // Two roundings: without the instruction, `f32::mul_add` is a library call per lane.
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        // Adding and taking away 1.5 * 2^23 rounds to nearest and to even, for |a| < 2^22.
        const SHIFT: f32 = 12_582_912.0;
        map(a, |a| (a + SHIFT) - SHIFT)
    }
    #[inline(always)]
    fn scale(self, v: Self::V, n: Self::V) -> Self::V {
        zip(v, n, |v, n| v * f32::from_bits((((n as i32) + 127) << 23) as u32))
    }
    #[inline(always)]
    fn sign(self, a: Self::V) -> Self::V {
        map(a, |a| f32::from(i8::from(a > 0.0) - i8::from(a < 0.0)))
    }
    #[inline(always)]
    fn first(self, v: Self::V, count: usize) -> Self::V {
        std::array::from_fn(|i| if i < count { v[i] } else { 0.0 })
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        halve(v, |a, b| a + b)
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        halve(v, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u32; 8]) -> Self::V {
        std::array::from_fn(|i| if i % 2 == 0 { low(from[i / 2]) } else { high(from[i / 2]) })
    }
    #[inline(always)]
    fn store_bf16(self, to: &mut [u32; 8], v: Self::V) {
        *to =
            std::array::from_fn(|i| u32::from(bf16_from_f32(v[2 * i])) | u32::from(bf16_from_f32(v[2 * i + 1])) << 16);
    }

    #[inline(always)]
    fn splat_cell(self, cell: u32) -> Self::C {
        [cell; LANES]
    }
    #[inline(always)]
    fn load_cells(self, from: &[u32; LANES]) -> Self::C {
        *from
    }
    #[inline(always)]
    fn store_bytes(self, to: &mut [u8; LANES], c: Self::C) {
        for (byte, cell) in to.iter_mut().zip(c) {
            *byte = (cell as i32).clamp(0, 255) as u8;
        }
    }
    #[inline(always)]
    fn store_cells(self, to: &mut [u32; LANES], c: Self::C) {
        *to = c;
    }
    #[inline(always)]
    fn dot_f32(self, sum: Self::V, a: Self::C, b: Self::C) -> Self::V {
        std::array::from_fn(|i| sum[i] + f32::from_bits(a[i]) * f32::from_bits(b[i]))
    }
    #[inline(always)]
    fn dot_bf16(self, sum: Self::V, a: Self::C, b: Self::C) -> Self::V {
        std::array::from_fn(|i| sum[i] + low(a[i]) * low(b[i]) + high(a[i]) * high(b[i]))
    }
    #[inline(always)]
    fn interleave(self, even: &[u32; 8], odd: &[u32; 8]) -> Self::C {
        std::array::from_fn(|i| {
            if i % 2 == 0 {
                (even[i / 2] & 0xffff) | odd[i / 2] << 16
            } else {
                even[i / 2] >> 16 | (odd[i / 2] & 0xffff_0000)
            }
        })
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [Self::C; LANES]) {
        let from = *rows;
        for (i, row) in rows.iter_mut().enumerate() {
            *row = std::array::from_fn(|j| from[j][i]);
        }
    }
}
