//! Narrow formats in software: values rounded as a GPU rounds them, and kept as f32.
//!
//! | format | largest | smallest normal | fraction |
//! |---|---|---|---|
//! | bf16 | 3.4e38 | 1.2e-38 | 7 bits |
//! | e4m3 | 448 | 2^-6 | 3 bits |
//! | e5m2 | 57344 | 2^-14 | 2 bits |
//!
//! Source: Micikevicius et al. 2022, "FP8 formats for deep learning", table 1.

use rayon::prelude::*;

/// A format of 8 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fp8 {
    /// 4 bits of exponent, 3 of fraction, no infinities: for weights and activations.
    E4m3,
    /// 5 bits of exponent, 2 of fraction: for gradients of a wide range.
    E5m2,
}

impl Fp8 {
    /// The largest number.
    pub const fn largest(self) -> f32 {
        match self {
            Self::E4m3 => 448.0,
            Self::E5m2 => 57344.0,
        }
    }

    /// Bits of the fraction, and the smallest normal number.
    const fn shape(self) -> (u32, f32) {
        match self {
            Self::E4m3 => (3, 1.0 / 64.0),
            Self::E5m2 => (2, 1.0 / 16384.0),
        }
    }

    /// The nearest number of the format, of two as near the even one; the largest beyond its range. NaN stays NaN.
    #[inline(always)]
    pub fn round(self, value: f32) -> f32 {
        let (fraction, normal) = self.shape();
        // Keeps this many bits of f32's 23.
        let cut = 23 - fraction;
        let bits = value.to_bits();
        let even = (bits >> cut) & 1;
        let rounded = bits.wrapping_add((1 << (cut - 1)) - 1 + even) & !((1u32 << cut) - 1);
        // Below the normal numbers steps are equal: the sum with 1.5 * 2^23 of them has no finer digits.
        let step = normal / (1u32 << fraction) as f32;
        let magic = 12_582_912.0 * step;
        let small = (value + magic) - magic;
        let rounded = if value.abs() < normal { small.copysign(value) } else { f32::from_bits(rounded) };
        let largest = self.largest();
        if value.is_nan() { value } else { rounded.clamp(-largest, largest) }
    }
}

/// Rows of a task.
const ROWS: usize = 32;

/// Every row as 8-bit numbers times a scale of its own, which puts the row's largest magnitude at the format's largest.
///
/// Shapes: `values` and `to` `[rows, width]`.
///
/// # Panics
///
/// If the lengths differ, or are not whole rows.
pub fn round_rows(format: Fp8, values: &[f32], width: usize, to: &mut [f32]) {
    assert!(values.len() == to.len(), "`values` has {} elements, `to` {}", values.len(), to.len());
    assert!(width > 0 && values.len().is_multiple_of(width), "{} elements are not rows of {width}", values.len());
    let size = ROWS * width;
    (values.par_chunks(size).zip(to.par_chunks_mut(size))).for_each(|(values, to)| {
        for (row, to) in values.chunks_exact(width).zip(to.chunks_exact_mut(width)) {
            let largest = row.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            // Of a row of zeros, or as good as that, there is nothing to scale.
            let (scale, back) = match largest > 1e-30 {
                true => (format.largest() / largest, largest / format.largest()),
                false => (1.0, 1.0),
            };
            to.iter_mut().zip(row).for_each(|(to, value)| *to = format.round(value * scale) * back);
        }
    });
}

/// Every value as bf16, to nearest, ties to even. NaN stays NaN.
pub fn round_to_bf16(values: &mut [f32]) {
    values.par_chunks_mut(16 * 1024).for_each(|values| {
        for value in values {
            let bits = value.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
            *value = if value.is_nan() { *value } else { f32::from_bits(rounded) };
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every number of a format, from its bits.
    fn numbers(format: Fp8) -> Vec<f32> {
        let (fraction, normal) = format.shape();
        let mut all: Vec<f32> = (0..128u32)
            .map(|bits| {
                let (exponent, part) =
                    (bits >> fraction, (bits & ((1 << fraction) - 1)) as f32 / (1 << fraction) as f32);
                match exponent {
                    0 => part * normal,
                    _ => (1.0 + part) * normal * 2f32.powi(exponent as i32 - 1),
                }
            })
            .filter(|value| *value <= format.largest())
            .collect();
        all.sort_by(f32::total_cmp);
        all
    }

    #[test]
    fn a_value_becomes_the_nearest_number_of_the_format_and_the_even_one_of_two() {
        for format in [Fp8::E4m3, Fp8::E5m2] {
            let numbers = numbers(format);
            assert_eq!(numbers.last().copied(), Some(format.largest()), "{format:?}");
            for (index, pair) in numbers.windows(2).enumerate() {
                let (low, high) = (pair[0], pair[1]);
                let middle = (low + high) / 2.0;
                let even = if index % 2 == 0 { low } else { high };
                for (value, right) in [(low, low), (middle, even), (middle.next_down(), low), (middle.next_up(), high)]
                {
                    assert_eq!(format.round(value), right, "{format:?} {value}");
                    assert_eq!(format.round(-value), -right, "{format:?} -{value}");
                }
            }
            assert_eq!(format.round(1e9), format.largest());
            assert_eq!(format.round(f32::NEG_INFINITY), -format.largest());
            assert!(format.round(f32::NAN).is_nan());
        }
    }

    #[test]
    fn a_rows_largest_value_is_kept_and_zeros_stay_zeros() {
        let rows = [0.3, -0.001, 0.0, 70.0, 0.0, 0.0, 0.0, 0.0];
        let mut found = [1.0; 8];
        round_rows(Fp8::E4m3, &rows, 4, &mut found);
        assert_eq!(found[3], 70.0);
        assert_eq!(found[4..], [0.0; 4]);
        assert!((found[0] - 0.3).abs() <= 0.3 / 16.0);
    }

    #[test]
    fn bf16_keeps_eight_bits() {
        let mut values = [1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::INFINITY, -0.0];
        round_to_bf16(&mut values);
        assert_eq!(values, [1.0, 1.0, 1.015_625, f32::INFINITY, 0.0]);
    }
}
