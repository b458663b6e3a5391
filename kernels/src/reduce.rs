//! Sums in f64 whose bits do not depend on the number of threads.
//!
//! The input is cut into chunks of fixed length, each chunk is summed in eight fixed lanes, and the
//! chunks' sums are added in order.

use rayon::prelude::*;

const CHUNK: usize = 16 * 1024;
const STREAMS: usize = 8;

/// The sum of all values.
pub fn sum(values: &[f32]) -> f64 {
    in_order(values, |chunk| serial(chunk, chunk, |v, _| f64::from(v)))
}

/// The sum of all squares: of gradients, for their norm.
pub fn sum_of_squares(values: &[f32]) -> f64 {
    in_order(values, serial_sum_of_squares)
}

/// The sum of all rows, in their order: the gradient of a bias.
///
/// Shapes: `values` `[rows, width]`, `to` `[width]`.
///
/// # Panics
///
/// If `values` is not whole rows.
pub fn sum_of_rows(values: &[f32], to: &mut [f32]) {
    let whole = if to.is_empty() { values.is_empty() } else { values.len().is_multiple_of(to.len()) };
    assert!(whole, "{} elements are not whole rows of {}", values.len(), to.len());
    to.fill(0.0);
    for row in values.chunks_exact(to.len().max(1)) {
        to.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
}

fn in_order(values: &[f32], of: impl Fn(&[f32]) -> f64 + Send + Sync) -> f64 {
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(of).collect();
    sums.into_iter().sum()
}

/// The sum of squares on the calling thread.
pub(crate) fn serial_sum_of_squares(values: &[f32]) -> f64 {
    serial(values, values, |v, _| f64::from(v) * f64::from(v))
}

/// The squared distance of two vectors on the calling thread.
pub(crate) fn serial_squared_distance(a: &[f32], b: &[f32]) -> f64 {
    serial(a, b, |a, b| f64::from(a - b) * f64::from(a - b))
}

/// The sum of `of` over pairs, in eight streams that do not wait for each other.
#[inline(always)]
fn serial(a: &[f32], b: &[f32], of: impl Fn(f32, f32) -> f64) -> f64 {
    let mut sums = [0.0; STREAMS];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<STREAMS>(), b.as_chunks::<STREAMS>());
    for (a, b) in a.iter().zip(b) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum += of(a[i], b[i]);
        }
    }
    sums.into_iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(&a, &b)| of(a, b)).sum::<f64>()
}
