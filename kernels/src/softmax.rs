//! Softmax of rows, with the largest element taken off first, so that no exponential overflows.

use rayon::prelude::*;

use crate::buffer::{Buffer, as_f32_mut};
use crate::cells::{Element, F32, padded};
use crate::detect::Isa;
use crate::gelu::exp;
use crate::lanes::{LANES, Lanes, Op};

/// Softmax of every row of `width` elements of `x`, into `y`.
///
/// # Panics
///
/// If the lengths differ or are not a multiple of `width`.
pub fn softmax(x: &[f32], width: usize, y: &mut [f32]) {
    assert!(x.len() == y.len(), "`x` has {} elements, `y` {}", x.len(), y.len());
    if x.is_empty() {
        return;
    }
    assert!(width > 0 && x.len().is_multiple_of(width), "`x` has {} elements, rows of {width}", x.len());
    let isa = Isa::current();
    let rows = (16 * 1024 / width).max(1);
    (x.par_chunks(rows * width).zip(y.par_chunks_mut(rows * width))).for_each(|(x, y)| isa.run(Rows { x, y, width }));
}

struct Rows<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
    width: usize,
}

impl Op for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let width = self.width;
        let mut scratch = Buffer::new(2 * padded(width));
        let (row, to) = scratch.split_at_mut(padded(width));
        for (x, y) in self.x.chunks_exact(width).zip(self.y.chunks_exact_mut(width)) {
            as_f32_mut(row)[..width].copy_from_slice(x);
            softmax_row::<S, F32>(s, as_f32_mut(row), width, 1.0, to);
            y.copy_from_slice(&as_f32_mut(to)[..width]);
        }
    }
}

/// Softmax of `scale * row`, of which `count` columns are real, written as cells; the rest is zero.
#[inline(always)]
pub(crate) fn softmax_row<S: Lanes, P: Element>(s: S, row: &mut [f32], count: usize, scale: f32, to: &mut [u32]) {
    let mut largest = f32::NEG_INFINITY;
    let mut best = s.splat(f32::NEG_INFINITY);
    let whole = count / LANES;
    for part in &row.as_chunks::<LANES>().0[..whole] {
        best = s.max(best, s.load(part));
    }
    if whole > 0 {
        largest = s.largest(best);
    }
    for &value in &row[whole * LANES..count] {
        largest = if largest > value { largest } else { value };
    }
    let (factor, shift) = (s.splat(scale), s.splat(-largest * scale));
    let mut sum = s.splat(0.0);
    for (i, part) in row.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let power = exp(s, s.fma(s.load(part), factor, shift));
        let power = s.first(power, count.saturating_sub(i * LANES));
        sum = s.add(sum, power);
        s.store(part, power);
    }
    let inverse = s.splat(1.0 / s.sum(sum));
    for (i, part) in row.as_chunks::<LANES>().0.iter().enumerate() {
        P::store(s, to, P::cells(i * LANES), s.mul(s.load(part), inverse));
    }
}
