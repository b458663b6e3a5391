//! Layer norm over the last dimension: `(x - mean) / sqrt(variance + eps) * weight + bias`.

use crate::launch;
use crate::machine::{Facts, Kind};
use crate::programs::Program::{Norm, NormAny};
use crate::rows::{same_gpu, sum_of_parts};
use crate::values::Values;

/// What the gradient of a norm needs of its forward pass: the input, and each row's mean and `1 / sqrt(variance +
/// eps)`.
#[derive(Clone, Debug)]
pub struct NormSaved {
    pub(crate) x: Values,
    mean: Values,
    inverse: Values,
    /// The result, where a layer's gradient needs it and the norm's does not compute it again.
    y: Option<Values>,
}

impl NormSaved {
    pub(crate) fn new(x: Values, mean: Values, inverse: Values) -> Self {
        Self { x, mean, inverse, y: None }
    }

    /// Means and inverse deviations of the rows.
    pub(crate) fn statistics(&self) -> [&Values; 2] {
        [&self.mean, &self.inverse]
    }

    /// With the result, where [`gradient`] does not compute it again.
    pub(crate) fn with_result(self, y: &Values) -> Self {
        Self { y: (!self.comes_again()).then(|| y.clone()), ..self }
    }

    /// Whether the kernel of the gradient has registers for the result.
    fn comes_again(&self) -> bool {
        self.x.kind() == Kind::F32 && Route::of(self.x.len() / self.mean.len().max(1)) == Route::Fast
    }
}

/// What [`gradient`] gives.
pub(crate) struct NormGradient {
    /// Of the input, and of what is added to it.
    pub(crate) dx: Values,
    /// Of weight and bias, where they are wanted.
    pub(crate) parameters: Option<(Values, Values)>,
    /// The norm's result, where it is wanted.
    pub(crate) normed: Option<Values>,
}

/// What [`gradient`] computes besides the gradient of the input.
#[derive(Clone, Copy, Default)]
pub(crate) struct Also<'a> {
    /// The gradients of weight and bias.
    pub(crate) parameters: bool,
    /// The bf16 form of an f32 input's gradient, which [`Values::cast`] then finds, and with `parameters` the sum of
    /// its rows, which [`Values::row_sum`] finds.
    pub(crate) rounded: bool,
    /// The norm's result, for which its bias is needed.
    pub(crate) normed: Option<&'a Values>,
}

/// Rows that one block has in its registers.
const ROWS: usize = 4;

/// The longest row that stays in registers: eight numbers for each of 256 threads.
const WIDEST: usize = 2048;

/// Which kernels serve rows of a width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// Rows in registers.
    Fast,
    /// Rows that are read again for each sum: longer ones.
    Wide,
    /// The same a number at a time, in f32: the width is not a multiple of 8.
    Odd,
}

impl Route {
    fn of(width: usize) -> Self {
        match width {
            _ if !width.is_multiple_of(8) => Self::Odd,
            ..=WIDEST => Self::Fast,
            _ => Self::Wide,
        }
    }

    /// Of a kernel, for an input and a result of two formats.
    fn name(self, what: &str, x: Kind, y: Kind) -> String {
        let of = match self {
            Self::Fast => "",
            Self::Wide => "wide_",
            Self::Odd => "odd_",
        };
        format!("{what}_{of}{}_{}", x.suffix(), y.suffix())
    }

    /// Columns that a thread takes at a time.
    fn columns(self) -> usize {
        if self == Self::Odd { 1 } else { 8 }
    }
}

/// Layer norm of every row of `x`, the result in `kind`.
///
/// Shapes: `weight` and `bias` `[width]` in f32, `x` `[rows, width]`.
///
/// # Panics
///
/// If the lengths do not match, or the width is not a multiple of 8 and `x` or the result is not f32.
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
    let rows = check(x, kind, width, &[weight, bias]);
    same_gpu(gpu, &[weight, bias]);
    let sum = branch.map(|_| Values::new(gpu, x.len(), x.kind()));
    let tokens = branch.map_or(1, |(branch, factors)| {
        assert!((branch.len(), branch.kind()) == (x.len(), kind), "`x` is {x:?}, its branch {branch:?}");
        assert!(rows.is_multiple_of(factors.len().max(1)), "{} factors for {rows} rows", factors.len());
        rows / factors.len().max(1)
    });
    let y = Values::new(gpu, x.len(), kind);
    let [mean, inverse] = [(); 2].map(|()| Values::new(gpu, rows, Kind::F32));
    let route = Route::of(width);
    let name = route.name("norm", x.kind(), kind);
    let (branch, factors) = branch.unzip();
    let (program, threads) = (if route == Route::Fast { Norm } else { NormAny }, threads(route, width));
    // Enough blocks to fill the GPU, few enough that weights are read once for many rows.
    let grid = match route {
        Route::Fast => [rows.div_ceil(ROWS).min(blocks(gpu.facts(), width)), 1, 1],
        _ => [rows.min(1 << 16), 1, 1],
    };
    // SAFETY: sizes were checked above; the statistics have a number a row; all kernels take these arguments.
    unsafe {
        launch!(
            gpu,
            program,
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
    (y, NormSaved::new(x, mean, inverse))
}

/// The gradient of [`layer_norm`]'s input, added to `residual` where there is one, and those of weight and bias where
/// they are wanted.
///
/// # Panics
///
/// If the lengths do not match.
pub fn layer_norm_gradient(
    saved: &NormSaved,
    weight: &Values,
    dy: &Values,
    residual: Option<&Values>,
    parameters: bool,
) -> (Values, Option<(Values, Values)>) {
    let also = Also { parameters, ..Also::default() };
    let NormGradient { dx, parameters, .. } = gradient(saved, weight, dy, residual, also);
    (dx, parameters)
}

/// The same, and more.
pub(crate) fn gradient(
    saved: &NormSaved,
    weight: &Values,
    dy: &Values,
    residual: Option<&Values>,
    Also { parameters, rounded, normed: bias }: Also,
) -> NormGradient {
    let NormSaved { x, mean, inverse, y } = saved;
    let (gpu, width) = (x.gpu(), weight.len());
    let rows = check(x, dy.kind(), width, &[weight]);
    same_gpu(gpu, &[weight, dy]);
    assert!(dy.len() == x.len(), "`dy` is {dy:?}, `x` {x:?}");
    assert!(residual.is_none_or(|residual| (residual.len(), residual.kind()) == (x.len(), x.kind())));
    let dx = Values::new(gpu, x.len(), x.kind());
    let route = Route::of(width);
    if route != Route::Fast {
        return NormGradient {
            dx: gradient_of_input(route, saved, weight, dy, residual, dx),
            parameters: parameters.then(|| gradient_of_parameters(route, saved, dy, width)),
            normed: bias.and(y.clone()),
        };
    }
    // As many blocks as an H100 holds at once, on every GPU: the number of partial sums decides how they round.
    let group = if x.kind() == Kind::Bf16 { ROWS } else { ROWS / 2 };
    let count = rows.div_ceil(group).clamp(1, 132 * (512 / threads(route, width)).max(1));
    let low =
        (rounded && x.kind() == Kind::F32 && dy.kind() == Kind::Bf16).then(|| Values::new(gpu, x.len(), Kind::Bf16));
    let sums = if low.is_some() { 3 } else { 2 };
    let parts = parameters.then(|| Values::new(gpu, count * sums * width, Kind::F32));
    let normed = (bias.is_some() && saved.comes_again()).then(|| Values::new(gpu, x.len(), dy.kind()));
    let name = route.name("norm_gradient", x.kind(), dy.kind());
    let threads = threads(route, width);
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
            low.as_ref(),
            normed.as_ref(),
            parts.as_ref(),
            dy,
            x,
            mean,
            inverse,
            weight,
            bias,
            residual,
            rows as i32,
            width as i32
        );
    }
    let sums = parts.map(|parts| sum_of_parts(&parts, count, sums * width));
    let dx = match (low, &sums) {
        (Some(low), Some(sums)) => dx.with_rounded(low).with_row_sum(sums.part(2 * width..3 * width)),
        (Some(low), None) => dx.with_rounded(low),
        (None, _) => dx,
    };
    NormGradient {
        dx,
        parameters: sums.map(|sums| (sums.part(0..width), sums.part(width..2 * width))),
        normed: normed.or_else(|| bias.and(y.clone())),
    }
}

/// [`layer_norm_gradient`]'s first part for rows that do not stay in registers.
fn gradient_of_input(
    route: Route,
    saved: &NormSaved,
    weight: &Values,
    dy: &Values,
    residual: Option<&Values>,
    dx: Values,
) -> Values {
    let NormSaved { x, mean, inverse, .. } = saved;
    let (width, threads) = (weight.len(), threads(route, weight.len()));
    let rows = x.len() / width;
    let name = route.name("norm_gradient", x.kind(), dy.kind());
    let (grid, shared) = ([rows.min(1 << 16), 1, 1], threads / 32 * 2 * 4);
    let (n, columns) = (rows as i32, width as i32);
    // SAFETY: sizes were checked by the caller.
    unsafe {
        launch!(x.gpu(), NormAny, &name, grid, threads, shared, &dx, dy, x, mean, inverse, weight, residual, n, columns)
    };
    dx
}

/// The gradients of weight and bias for such rows.
fn gradient_of_parameters(route: Route, saved: &NormSaved, dy: &Values, width: usize) -> (Values, Values) {
    let NormSaved { x, mean, inverse, .. } = saved;
    let rows = x.len() / width;
    let across = width.div_ceil(32 * route.columns());
    // Depends on the sizes alone, as the order of the sums does.
    let count = (1056 / across).clamp(1, 352).min(rows.div_ceil(8)).max(1);
    let parts = [(); 2].map(|()| Values::new(x.gpu(), count * width, Kind::F32));
    let name = route.name("norm_parameters", x.kind(), dy.kind());
    let shared = 2 * 256 * route.columns() * 4;
    let (n, columns) = (rows as i32, width as i32);
    // SAFETY: sizes were checked by the caller; every block leaves its part.
    unsafe {
        launch!(
            x.gpu(),
            NormAny,
            &name,
            [across, count, 1],
            256,
            shared,
            &parts[0],
            &parts[1],
            dy,
            x,
            mean,
            inverse,
            n,
            columns
        )
    };
    let [weight, bias] = parts.map(|parts| sum_of_parts(&parts, count, width));
    (weight, bias)
}

fn threads(route: Route, width: usize) -> usize {
    width.div_ceil(route.columns()).next_multiple_of(32).clamp(32, 256)
}

/// About 1536 threads a multiprocessor.
fn blocks(facts: &Facts, width: usize) -> usize {
    facts.multiprocessors * (1536 / threads(Route::Fast, width)).max(1)
}

/// The number of rows.
fn check(x: &Values, kind: Kind, width: usize, vectors: &[&Values]) -> usize {
    assert!(width > 0 && x.len().is_multiple_of(width), "{x:?} is not whole rows of {width}");
    assert!(
        width.is_multiple_of(8) || (x.kind(), kind) == (Kind::F32, Kind::F32),
        "rows of {width} numbers; the GPU's norms take multiples of 8, others in f32 alone"
    );
    for vector in vectors {
        assert!(
            (vector.len(), vector.kind()) == (width, Kind::F32),
            "weight or bias of a norm is {vector:?}, rows {width}"
        );
    }
    x.len() / width
}
