//! Sums in f64 whose bits do not depend on the number of threads.
//!
//! The input is cut into chunks of fixed length, each chunk is summed in eight fixed lanes, and the
//! chunks' sums are added in order.

use rayon::prelude::*;

const CHUNK: usize = 16 * 1024;
const STREAMS: usize = 8;

/// The sum of all values.
pub fn sum(values: &[f32]) -> f64 {
    in_order(values, |chunk| serial_sum(chunk.iter().map(|&v| f64::from(v))))
}

/// The sum of all squares: of gradients, for their norm.
pub fn sum_of_squares(values: &[f32]) -> f64 {
    in_order(values, serial_sum_of_squares)
}

fn in_order(values: &[f32], of: impl Fn(&[f32]) -> f64 + Send + Sync) -> f64 {
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(of).collect();
    sums.into_iter().sum()
}

/// The sum of squares on the calling thread.
pub(crate) fn serial_sum_of_squares(values: &[f32]) -> f64 {
    let mut sums = [0.0; STREAMS];
    let (whole, rest) = values.as_chunks::<STREAMS>();
    for part in whole {
        for (sum, &value) in sums.iter_mut().zip(part) {
            *sum += f64::from(value) * f64::from(value);
        }
    }
    sums.into_iter().sum::<f64>() + rest.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>()
}

/// A sum on the calling thread.
#[inline(always)]
pub(crate) fn serial_sum(values: impl Iterator<Item = f64>) -> f64 {
    let mut sums = [0.0; STREAMS];
    for (i, value) in values.enumerate() {
        sums[i % STREAMS] += value;
    }
    sums.into_iter().sum()
}
