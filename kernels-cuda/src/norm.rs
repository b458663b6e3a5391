//! Layer norm over the last dimension: `(x - mean) / sqrt(variance + eps) * weight + bias`.

use crate::launch;
use crate::machine::{Facts, Kind};
use crate::programs::Program::Norm;
use crate::rows::{rows_of, same_gpu, sum_of_parts};
use crate::values::Values;

/// What the gradient of a norm needs of its forward pass: the input, and each row's mean and `1 / sqrt(variance + eps)`.
#[derive(Clone, Debug)]
pub struct NormSaved {
    pub(crate) x: Values,
    mean: Values,
    inverse: Values,
}

/// Rows that one block has in its registers.
const ROWS: usize = 4;

/// The longest row: eight numbers for each of 256 threads.
const WIDEST: usize = 2048;

/// Layer norm of every row of `x`, the result in `kind`.
///
/// Shapes: `weight` and `bias` `[width]` in f32, `x` `[rows, width]`.
///
/// # Panics
///
/// If the lengths do not fit each other, or the width is no multiple of 8 or above 2048.
pub fn layer_norm(x: &Values, weight: &Values, bias: &Values, eps: f32, kind: Kind) -> (Values, NormSaved) {
    normed(x, None, weight, bias, eps, kind)
}

/// The norm of `x + factor * branch`, a factor a sample. The sum, rounded to the format of `x`, is what the result
/// saved.
pub(crate) fn normed(
    x: &Values,
    branch: Option<(&Values, &Values)>,
    weight: &Values,
    bias: &Values,
    eps: f32,
    kind: Kind,
) -> (Values, NormSaved) {
    let (gpu, width) = (x.gpu(), weight.len());
    let rows = rows_of(x, width);
    check(width, &[weight, bias]);
    same_gpu(gpu, &[weight, bias]);
    let sum = branch.map(|_| Values::new(gpu, x.len(), x.kind()));
    let tokens = branch.map_or(1, |(branch, factors)| {
        assert!((branch.len(), branch.kind()) == (x.len(), kind), "`x` is {x:?}, its branch {branch:?}");
        assert!(rows.is_multiple_of(factors.len().max(1)), "{} factors for {rows} rows", factors.len());
        rows / factors.len().max(1)
    });
    let y = Values::new(gpu, x.len(), kind);
    let [mean, inverse] = [(); 2].map(|()| Values::new(gpu, rows, Kind::F32));
    let name = format!("norm_{}_{}", x.kind().suffix(), kind.suffix());
    let (branch, factors) = branch.unzip();
    // Enough blocks to fill the GPU, few enough that weights are read once for many rows.
    let grid = [rows.div_ceil(ROWS).min(blocks(gpu.facts(), width)), 1, 1];
    let threads = threads(width);
    // SAFETY: sizes were checked above; the statistics have a number a row.
    unsafe {
        launch!(
            gpu,
            Norm,
            &name,
            grid,
            threads,
            threads / 32 * 2 * ROWS * 4,
            &y,
            &mean,
            &inverse,
            sum.as_ref(),
            x,
            branch,
            factors,
            tokens as i32,
            weight,
            bias,
            rows as i32,
            width as i32,
            eps
        );
    }
    let x = sum.unwrap_or_else(|| x.clone());
    (y, NormSaved { x, mean, inverse })
}

/// The gradient of [`layer_norm`]'s input, added to `residual` where there is one, and those of weight and bias where they
/// are wanted.
///
/// # Panics
///
/// If the lengths do not fit each other.
pub fn layer_norm_gradient(
    saved: &NormSaved,
    weight: &Values,
    dy: &Values,
    residual: Option<&Values>,
    parameters: bool,
) -> (Values, Option<(Values, Values)>) {
    let NormSaved { x, mean, inverse } = saved;
    let (gpu, width) = (x.gpu(), weight.len());
    let rows = rows_of(x, width);
    check(width, &[weight]);
    same_gpu(gpu, &[weight, dy]);
    assert!(dy.len() == x.len(), "`dy` is {dy:?}, `x` {x:?}");
    assert!(residual.is_none_or(|residual| (residual.len(), residual.kind()) == (x.len(), x.kind())));
    let dx = Values::new(gpu, x.len(), x.kind());
    // As many blocks as an H100 holds at once, on every GPU: the number of partial sums decides how they round.
    let group = if x.kind() == Kind::Bf16 { ROWS } else { ROWS / 2 };
    let count = rows.div_ceil(group).clamp(1, 132 * (512 / threads(width)).max(1));
    let parts = parameters.then(|| Values::new(gpu, count * 2 * width, Kind::F32));
    let name = format!("norm_gradient_{}_{}", x.kind().suffix(), dy.kind().suffix());
    let threads = threads(width);
    // SAFETY: sizes were checked above; every block leaves its part.
    unsafe {
        launch!(
            gpu,
            Norm,
            &name,
            [count, 1, 1],
            threads,
            threads / 32 * 2 * ROWS * 4,
            &dx,
            parts.as_ref(),
            dy,
            x,
            mean,
            inverse,
            weight,
            residual,
            rows as i32,
            width as i32
        );
    }
    let sums = parts.map(|parts| sum_of_parts(&parts, count, 2 * width));
    (dx, sums.map(|sums| (sums.part(0..width), sums.part(width..2 * width))))
}

fn threads(width: usize) -> usize {
    (width / 8).next_multiple_of(32).max(32)
}

/// About 1536 threads a multiprocessor.
fn blocks(facts: &Facts, width: usize) -> usize {
    facts.multiprocessors * (1536 / threads(width)).max(1)
}

fn check(width: usize, vectors: &[&Values]) {
    assert!(width <= WIDEST, "rows of {width} numbers; the GPU's norms take up to {WIDEST}");
    for vector in vectors {
        assert!(
            (vector.len(), vector.kind()) == (width, Kind::F32),
            "weight or bias of a norm is {vector:?}, rows {width}"
        );
    }
}
