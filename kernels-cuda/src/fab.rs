//! The step of the fast adaptive boundary attack.

use crate::evaluation::{Norm, row_len, same};
use crate::launch;
use crate::programs::Program::Fab;
use crate::values::Values;

/// Takes each image to the boundary of the linear decision at `at`, a little from the clean image.
///
/// The decision is that of another class's logit less the label's: `difference` at `at`, with the gradient `normal`.
/// From `at` and from `clean` the nearest point of the boundary within `[0, 1]` is found; the image goes a little
/// beyond the first, with a share of at most a tenth of the second. Sums are f64 in a fixed order, so that results are
/// the CPU's but for rounding.
///
/// Shapes: `at`, `clean` and `normal` `[differences, ..]` in f32, normals finite.
///
/// # Panics
///
/// If the lengths do not match.
pub fn fab_step(norm: Norm, at: &mut Values, clean: &Values, normal: &Values, differences: &[f64]) {
    same(at, &[clean, normal]);
    let pixels = row_len(at, differences.len()) as i32;
    let bytes: Vec<u8> = differences.iter().flat_map(|difference| difference.to_le_bytes()).collect();
    let sent = Values::send_bytes(at.gpu(), &bytes);
    let at = at.own();
    let (name, shared) = match norm {
        Norm::Linf => ("fab_linf", 4 * 512 * 8),
        Norm::L2 => ("fab_l2", 4 * 512 * 8),
        Norm::L1 => ("fab_l1", 6 * 512 * 8),
    };
    let grid = [differences.len(), 1, 1];
    // SAFETY: the lengths were checked above; `at` is nobody else's.
    unsafe { launch!(at.gpu(), Fab, name, grid, 512, shared, at, clean, normal, &sent, pixels) };
}
