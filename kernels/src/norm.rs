//! Layer norm over the last dimension: `(x - mean) / sqrt(variance + eps) * weight + bias`.
//!
//! Inside a block only the normalised rows are written; weight and bias are folded into the product
//! that follows ([`crate::block`]). The public pair at the end has them.

use crate::cells::{Element, padded};
use crate::lanes::{LANES, Lanes};

/// Mean of a row.
#[inline(always)]
fn mean<S: Lanes>(s: S, row: &[f32]) -> f32 {
    let mut sum = s.splat(0.0);
    for part in row.chunks(LANES) {
        sum = s.add(sum, s.load_part(part));
    }
    s.sum(sum) / row.len() as f32
}

/// Mean and `1 / sqrt(variance + eps)` of a row, in two passes: the difference of the mean square
/// and the squared mean loses all digits for a row far from zero.
#[inline(always)]
pub(crate) fn moments<S: Lanes>(s: S, row: &[f32], eps: f32) -> (f32, f32) {
    let mean = mean(s, row);
    let centre = s.splat(mean);
    let mut sum = s.splat(0.0);
    for part in row.chunks(LANES) {
        let difference = s.first(s.sub(s.load_part(part), centre), part.len());
        sum = s.fma(difference, difference, sum);
    }
    let variance = s.sum(sum) / row.len() as f32;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// Writes the normalised rows as cells, zero in the padding, and `1 / sqrt(variance + eps)`.
#[inline(always)]
pub(crate) fn normalise<S: Lanes, P: Element>(
    s: S,
    x: &[f32],
    width: usize,
    eps: f32,
    normalised: &mut [u32],
    inverse_deviation: &mut [f32],
) {
    let stride = P::cells(padded(width));
    for ((row, to), inverse) in x
        .chunks_exact(width)
        .zip(normalised.chunks_exact_mut(stride))
        .zip(inverse_deviation)
    {
        let (mean, found) = moments(s, row, eps);
        *inverse = found;
        let (centre, factor) = (s.splat(mean), s.splat(found));
        for (i, part) in row.chunks(LANES).enumerate() {
            let v = s.mul(s.sub(s.load_part(part), centre), factor);
            P::store(s, to, P::cells(i * LANES), s.first(v, part.len()));
        }
    }
}

/// Adds the gradient of a row of the norm to `dx`.
///
/// With `g = dy * weight` and means over the row: `dx += (g - mean(g) - x^ mean(g x^)) / deviation`.
/// `dy` and `weight` are padded with zeros.
#[inline(always)]
pub(crate) fn add_gradient<S: Lanes, P: Element>(
    s: S,
    dy: &[f32],
    normalised: &[u32],
    inverse_deviation: f32,
    weight: &[f32],
    dx: &mut [f32],
) {
    let (dy, weight) = (dy.as_chunks::<LANES>().0, weight.as_chunks::<LANES>().0);
    let (mut sum, mut sum_along) = (s.splat(0.0), s.splat(0.0));
    for (i, (dy, weight)) in dy.iter().zip(weight).enumerate() {
        let g = s.mul(s.load(dy), s.load(weight));
        sum = s.add(sum, g);
        sum_along = s.fma(g, P::load(s, normalised, P::cells(i * LANES)), sum_along);
    }
    let width = dx.len() as f32;
    let mean = s.splat(s.sum(sum) / width);
    let mean_along = s.splat(-s.sum(sum_along) / width);
    let factor = s.splat(inverse_deviation);
    for (i, ((dy, weight), dx)) in dy.iter().zip(weight).zip(dx.chunks_mut(LANES)).enumerate() {
        let g = s.sub(s.mul(s.load(dy), s.load(weight)), mean);
        let g = s.fma(P::load(s, normalised, P::cells(i * LANES)), mean_along, g);
        let sum = s.fma(g, factor, s.load_part(dx));
        s.store_part(dx, sum);
    }
}

/// Adds one row to the gradients of the norm's weight and bias.
#[inline(always)]
pub(crate) fn add_parameter_gradients<S: Lanes, P: Element>(
    s: S,
    dy: &[f32],
    normalised: &[u32],
    weight: &mut [f32],
    bias: &mut [f32],
) {
    let weight = weight.as_chunks_mut::<LANES>().0;
    let bias = bias.as_chunks_mut::<LANES>().0;
    for (i, ((dy, weight), bias)) in dy
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(weight)
        .zip(bias)
        .enumerate()
    {
        let dy = s.load(dy);
        let sum = s.fma(
            dy,
            P::load(s, normalised, P::cells(i * LANES)),
            s.load(weight),
        );
        s.store(weight, sum);
        let sum = s.add(s.load(bias), dy);
        s.store(bias, sum);
    }
}
