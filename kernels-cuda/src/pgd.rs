//! Pieces of projected gradient descent on pixels in `[0, 1]`: `advxl_kernels::pgd` on a GPU, rounded as there.

use crate::launch;
use crate::machine::Kind;
use crate::programs::Program::Attack;
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
    start("linf_start", origin, draws, epsilon, grid, 256, 0)
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
    start("l2_start", origin, draws, epsilon, |_| [draws.keys.len(), 1, 1], 512, 512 * 8)
}

fn start(
    kernel: &str,
    origin: &Values,
    draws: &Draws,
    epsilon: f32,
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
    // SAFETY: the lengths were checked above; there is a key an image; both kernels take these arguments.
    unsafe {
        launch!(
            gpu,
            Attack,
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
