//! Pieces of projected gradient descent on pixels: a step along the gradient, then back into the ball.
//!
//! Units: pixels in `[0, 1]`, `epsilon` and `step` in the same unit. Loss, gradient, loop and random
//! start are the caller's.
//!
//! Source: Madry et al. 2018, section 2.1.

use rayon::prelude::*;

use crate::detect::Isa;
use crate::lanes::{LANES, Lanes, Op};
use crate::reduce;

/// `x = clip(x + step * sign(gradient))` for the linf ball: to `epsilon` around `origin`, then to `[0, 1]`.
///
/// A gradient that is zero or not a number moves nothing. With a step of 0 it is the projection alone.
///
/// Shapes: `x`, `gradient`, `origin` `[samples, sample_len]`; `steps` `[samples]`.
///
/// # Panics
///
/// If the lengths do not fit.
pub fn linf_step(x: &mut [f32], gradient: &[f32], origin: &[f32], steps: &[f32], epsilon: f32) {
    by_sample(x, gradient, origin, steps, |isa, x, gradient, origin, step| {
        isa.run(LinfStep { x, gradient, origin, step, epsilon });
    });
}

/// One step for the l2 ball: each sample moves by its step along its own gradient, is pulled back to
/// at most `epsilon` from `origin`, and clipped to `[0, 1]`.
///
/// A sample whose gradient is zero or not finite does not move. With a step of 0 it is the projection alone.
///
/// Shapes: `x`, `gradient`, `origin` `[samples, sample_len]`; `steps` `[samples]`.
///
/// # Panics
///
/// If the lengths do not fit.
pub fn l2_step(x: &mut [f32], gradient: &[f32], origin: &[f32], steps: &[f32], epsilon: f32) {
    by_sample(x, gradient, origin, steps, |isa, x, gradient, origin, step| {
        isa.run(L2Step { x, gradient, origin, step, epsilon });
    });
}

/// Runs `work` on `(x, gradient, origin, step)` of every sample.
fn by_sample(
    x: &mut [f32],
    gradient: &[f32],
    origin: &[f32],
    steps: &[f32],
    work: impl Fn(Isa, &mut [f32], &[f32], &[f32], f32) + Sync,
) {
    let found = (gradient.len(), origin.len());
    assert!(found == (x.len(), x.len()), "`gradient` and `origin` have {found:?} elements, `x` {}", x.len());
    if x.is_empty() {
        return;
    }
    let sample_len = x.len() / steps.len().max(1);
    check_samples(x.len(), sample_len);
    assert!(x.len() == sample_len * steps.len(), "{} steps for {} elements", steps.len(), x.len());
    let isa = Isa::current();
    let samples = x.par_chunks_mut(sample_len).zip(gradient.par_chunks(sample_len));
    let samples = samples.zip(origin.par_chunks(sample_len)).zip(steps);
    samples.for_each(|(((x, gradient), origin), step)| work(isa, x, gradient, origin, *step));
}

/// The l2 norm of every sample.
///
/// # Panics
///
/// If `values` is not a multiple of `sample_len`.
pub fn l2_norms(values: &[f32], sample_len: usize) -> Vec<f32> {
    if values.is_empty() {
        return Vec::new();
    }
    check_samples(values.len(), sample_len);
    values.par_chunks(sample_len).map(|sample| reduce::serial_sum_of_squares(sample).sqrt() as f32).collect()
}

fn check_samples(len: usize, sample_len: usize) {
    let whole = sample_len > 0 && len.is_multiple_of(sample_len);
    assert!(whole, "{len} elements are not whole samples of {sample_len}");
}

struct LinfStep<'a> {
    x: &'a mut [f32],
    gradient: &'a [f32],
    origin: &'a [f32],
    step: f32,
    epsilon: f32,
}

impl Op for LinfStep<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self { x, gradient, origin, step, epsilon } = self;
        let (step, epsilon) = (s.splat(step), s.splat(epsilon));
        let parts = x.chunks_mut(LANES).zip(gradient.chunks(LANES)).zip(origin.chunks(LANES));
        for ((x, gradient), origin) in parts {
            let origin = s.load_part(origin);
            let moved = s.fma(s.sign(s.load_part(gradient)), step, s.load_part(x));
            let low = s.max(s.splat(0.0), s.sub(origin, epsilon));
            let high = s.min(s.splat(1.0), s.add(origin, epsilon));
            s.store_part(x, s.min(high, s.max(low, moved)));
        }
    }
}

struct L2Step<'a> {
    x: &'a mut [f32],
    gradient: &'a [f32],
    origin: &'a [f32],
    step: f32,
    epsilon: f32,
}

impl Op for L2Step<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self { x, gradient, origin, step, epsilon } = self;
        let norm = reduce::serial_sum_of_squares(gradient).sqrt();
        // A direction has a length above 0 that is finite. A quotient beyond f32 makes a shorter step, never infinity times 0.
        let length = if norm > 0.0 && norm.is_finite() { f64::from(step) / norm } else { 0.0 };
        let length = length.min(f64::from(f32::MAX)) as f32;
        if length > 0.0 {
            let length = s.splat(length);
            for (x, gradient) in x.chunks_mut(LANES).zip(gradient.chunks(LANES)) {
                let moved = s.fma(s.load_part(gradient), length, s.load_part(x));
                s.store_part(x, moved);
            }
        }
        let distance = reduce::serial_squared_distance(x, origin).sqrt();
        let shrink = if distance > f64::from(epsilon) { (f64::from(epsilon) / distance) as f32 } else { 1.0 };
        let shrink = s.splat(shrink);
        for (x, origin) in x.chunks_mut(LANES).zip(origin.chunks(LANES)) {
            let origin = s.load_part(origin);
            let pulled = s.fma(s.sub(s.load_part(x), origin), shrink, origin);
            s.store_part(x, s.min(s.splat(1.0), s.max(s.splat(0.0), pulled)));
        }
    }
}
