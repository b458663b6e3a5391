//! Pieces of projected gradient descent on pixels in `[0, 1]`: `advxl_kernels::pgd` on a GPU, rounded as there.

use crate::launch;
use crate::machine::{Argument, Kind};
use crate::programs::Program::{self, Attack, L1};
use crate::values::Values;

/// `x = clip(x + step * sign(gradient))` for the linf ball: to `epsilon` around `origin`, then to `[0, 1]`.
///
/// A gradient that is zero or not a number moves nothing. With a step of 0 it is the projection alone.
///
/// Shapes: `x`, `gradient`, `origin` `[samples, sample_len]`; `steps` `[samples]`; all in f32.
///
/// # Panics
///
/// If the lengths do not fit.
pub fn linf_step(x: &mut Values, gradient: &Values, origin: &Values, steps: &Values, epsilon: f32) {
    let pixels = check(x, &[gradient, origin], steps.len());
    let x = x.own();
    let grid = [pixels.div_ceil(256).clamp(1, 64), steps.len(), 1];
    // SAFETY: the lengths were checked above; `x` is nobody else's.
    unsafe { launch!(x.gpu(), Attack, "linf_step", grid, 256, 0, x, gradient, origin, steps, epsilon, pixels as i32) };
}

/// One step for the l2 ball: each sample moves by its step along its own gradient, is pulled back to at most `epsilon` from
/// `origin`, and clipped to `[0, 1]`.
///
/// A sample whose gradient is zero does not move. With a step of 0 it is the projection alone.
///
/// Shapes: `x`, `gradient`, `origin` `[samples, sample_len]`; `steps` `[samples]`; all in f32.
///
/// # Panics
///
/// If the lengths do not fit.
pub fn l2_step(x: &mut Values, gradient: &Values, origin: &Values, steps: &Values, epsilon: f32) {
    let pixels = check(x, &[gradient, origin], steps.len());
    let x = x.own();
    let grid = [steps.len(), 1, 1];
    // SAFETY: the lengths were checked above; `x` is nobody else's.
    unsafe {
        launch!(x.gpu(), Attack, "l2_step", grid, 512, 512 * 8, x, gradient, origin, steps, epsilon, pixels as i32)
    };
}

/// One step for the l1 ball: each sample moves by its step in all, equally on the steepest hundredth of the pixels that
/// still can move that way, at least one, and is then projected as by [`l1_project`].
///
/// Of equal slopes the first pixels move. A pixel whose gradient is not a number does not move.
///
/// Shapes: `x`, `gradient`, `origin` `[samples, sample_len]`; `steps` `[samples]`; all in f32.
///
/// # Panics
///
/// If the lengths do not fit, or a sample has 2^24 pixels or more.
pub fn l1_step(x: &mut Values, gradient: &Values, origin: &Values, steps: &Values, epsilon: f64) {
    let pixels = check_l1(x, &[gradient, origin], steps.len());
    let x = x.own();
    let grid = [steps.len(), 1, 1];
    let epsilon = epsilon.to_bits();
    // SAFETY: the lengths were checked above; `x` is nobody else's; the kernel takes the bits of a double.
    unsafe { launch!(x.gpu(), L1, "l1_step", grid, 512, 512 * 8, x, gradient, origin, steps, epsilon, pixels as i32) };
}

/// The same on the steepest share of the pixels, a share of its own for each sample. Pixels whose slopes equal the smallest
/// of these move too, so there can be more; those with a slope of zero do not.
///
/// Shapes: as for [`l1_step`], with a share a sample.
///
/// # Panics
///
/// As for [`l1_step`].
pub fn l1_sparse_step(
    x: &mut Values,
    gradient: &Values,
    origin: &Values,
    steps: &Values,
    shares: &[f64],
    epsilon: f64,
) {
    let pixels = check_l1(x, &[gradient, origin], steps.len());
    assert!(shares.len() == steps.len(), "{} shares for {} steps", shares.len(), steps.len());
    let rank = |share: &f64| (((1.0 - share) * pixels as f64).max(0.0) as usize).min(pixels.saturating_sub(1));
    let ranks: Vec<u8> = shares.iter().flat_map(|share| (rank(share) as i32).to_le_bytes()).collect();
    let ranks = Values::send_bytes(x.gpu(), &ranks);
    let x = x.own();
    let grid = [steps.len(), 1, 1];
    let epsilon = epsilon.to_bits();
    // SAFETY: as above; there is a rank a sample, below the number of pixels.
    unsafe {
        launch!(
            x.gpu(),
            L1,
            "l1_sparse_step",
            grid,
            512,
            512 * 8,
            x,
            gradient,
            origin,
            steps,
            &ranks,
            epsilon,
            pixels as i32
        )
    };
}

/// The nearest points to `x` that are at most `epsilon` from `origin` in l1 and in `[0, 1]`. Exact but for rounding, which
/// is towards `origin`. A pixel that is not a number becomes that of `origin`.
///
/// Shapes: `x`, `origin` `[samples, sample_len]` in f32.
///
/// # Panics
///
/// If the lengths do not fit.
pub fn l1_project(x: &mut Values, origin: &Values, samples: usize, epsilon: f64) {
    let pixels = check(x, &[origin], samples);
    let x = x.own();
    let grid = [samples, 1, 1];
    // SAFETY: as above.
    unsafe {
        launch!(x.gpu(), L1, "l1_project", grid, 512, 512 * 8, x, origin, epsilon.to_bits(), pixels as i32);
    }
}

/// The streams of random numbers of a batch: those of `advxl`'s `rng`, ChaCha8 keyed by (seed, purpose, a key an image, a
/// second key).
#[derive(Clone, Copy, Debug)]
pub struct Draws<'a> {
    /// Of the run.
    pub seed: u64,
    /// What the numbers are for.
    pub purpose: u32,
    /// One an image.
    pub keys: &'a [u64],
    /// The same for all images.
    pub sub_key: u64,
}

/// Uniform points of the linf balls around `origin`, clipped to `[0, 1]`.
///
/// Shapes: `origin` and the result `[samples, sample_len]` in f32.
///
/// # Panics
///
/// If `origin` is not whole samples, one a key.
pub fn linf_start(origin: &Values, draws: &Draws, epsilon: f32) -> Values {
    let grid = |pixels: usize| [pixels.div_ceil(256 * 16), draws.keys.len(), 1];
    start(Attack, "linf_start", origin, draws, epsilon.into(), grid, 256, 0)
}

/// Points of the l2 balls around `origin` in random directions, at lengths uniform in `[0, epsilon]`, clipped to `[0, 1]`.
///
/// The numbers are those of the CPU's streams up to the last places of the host's logarithm and cosine.
///
/// Shapes: `origin` and the result `[samples, sample_len]` in f32.
///
/// # Panics
///
/// If `origin` is not whole samples, one a key.
pub fn l2_start(origin: &Values, draws: &Draws, epsilon: f32) -> Values {
    start(Attack, "l2_start", origin, draws, epsilon.into(), |_| [draws.keys.len(), 1, 1], 512, 512 * 8)
}

/// The same for the l1 balls, with Laplace noise.
///
/// Shapes: `origin` and the result `[samples, sample_len]` in f32.
///
/// # Panics
///
/// If `origin` is not whole samples, one a key.
pub fn l1_start(origin: &Values, draws: &Draws, epsilon: f64) -> Values {
    by_image("l1_start", origin, draws, epsilon)
}

/// Points on the surfaces of the linf balls around `origin`, clipped to `[0, 1]`: noise uniform in a box, scaled so that its
/// largest is `epsilon`. Where APGD starts.
///
/// Shapes: `origin` and the result `[samples, sample_len]` in f32.
///
/// # Panics
///
/// If `origin` is not whole samples, one a key.
pub fn linf_surface(origin: &Values, draws: &Draws, epsilon: f32) -> Values {
    let mut start = by_image("uniform_surface", origin, draws, epsilon.into());
    let nowhere = Values::zeros(origin.gpu(), draws.keys.len(), Kind::F32);
    linf_step(&mut start, origin, origin, &nowhere, epsilon);
    start
}

/// The same for the l2 balls: normal noise of length `epsilon`.
///
/// Shapes: `origin` and the result `[samples, sample_len]` in f32.
///
/// # Panics
///
/// If `origin` is not whole samples, one a key.
pub fn l2_surface(origin: &Values, draws: &Draws, epsilon: f32) -> Values {
    let mut start = by_image("normal_surface", origin, draws, epsilon.into());
    let nowhere = Values::zeros(origin.gpu(), draws.keys.len(), Kind::F32);
    l2_step(&mut start, origin, origin, &nowhere, epsilon);
    start
}

/// The same for the l1 balls: normal noise on every pixel, projected.
///
/// Shapes: `origin` and the result `[samples, sample_len]` in f32.
///
/// # Panics
///
/// If `origin` is not whole samples, one a key.
pub fn l1_surface(origin: &Values, draws: &Draws, epsilon: f64) -> Values {
    let mut start = by_image("normal_surface", origin, draws, 0.0);
    l1_project(&mut start, origin, draws.keys.len(), epsilon);
    start
}

/// By a kernel of `l1.cuh`, which takes epsilon as a double.
fn by_image(kernel: &str, origin: &Values, draws: &Draws, epsilon: f64) -> Values {
    start(L1, kernel, origin, draws, epsilon.to_bits().into(), |_| [draws.keys.len(), 1, 1], 512, 512 * 8)
}

#[allow(clippy::too_many_arguments)] // A launch has as many.
fn start(
    program: Program,
    kernel: &str,
    origin: &Values,
    draws: &Draws,
    epsilon: Argument,
    grid: impl FnOnce(usize) -> [usize; 3],
    threads: usize,
    shared: usize,
) -> Values {
    let pixels = check(origin, &[], draws.keys.len());
    let gpu = origin.gpu();
    let keys: Vec<u8> = draws.keys.iter().flat_map(|key| key.to_le_bytes()).collect();
    let keys = Values::send_bytes(gpu, &keys);
    let start = Values::new(gpu, origin.len(), Kind::F32);
    let Draws { seed, purpose, sub_key, .. } = *draws;
    // SAFETY: the lengths were checked above; there is a key an image; all kernels take these arguments.
    unsafe {
        launch!(
            gpu,
            program,
            kernel,
            grid(pixels),
            threads,
            shared,
            &start,
            origin,
            &keys,
            seed,
            sub_key,
            purpose as i32,
            epsilon,
            pixels as i32
        );
    }
    start
}

/// As `check`, for kernels that count pixels in f32.
fn check_l1(x: &Values, others: &[&Values], samples: usize) -> usize {
    let pixels = check(x, others, samples);
    assert!(pixels < 1 << 24, "samples of {pixels} pixels; steps in the l1 ball take fewer than 2^24");
    pixels
}

/// The length of a sample.
fn check(x: &Values, others: &[&Values], samples: usize) -> usize {
    for other in others {
        assert!(other.len() == x.len() && other.kind() == Kind::F32, "`gradient` or `origin` is {other:?}, `x` {x:?}");
    }
    assert!(x.kind() == Kind::F32, "`x` is {x:?}");
    let pixels = x.len() / samples.max(1);
    assert!(pixels * samples == x.len(), "{x:?} for {samples} samples");
    pixels
}
