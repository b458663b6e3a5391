//! Layer norm over the last dimension: `(x - mean) / sqrt(variance + eps) * weight + bias`.
//!
//! Inside a block only the normalized rows are written; weight and bias are folded into the product
//! that follows ([`crate::block`]). The public pair has them.

use rayon::prelude::*;

use crate::buffer::Buffer;
use crate::cells::{Element, F32, padded};
use crate::detect::Isa;
use crate::lanes::{LANES, Lanes, Op};

/// Rows of a task. Fixed, because partial sums of the parameters' gradients are made per task.
const ROWS: usize = 64;

/// Layer norm of every row: `y = (x - mean) / sqrt(variance + eps) * weight + bias`.
///
/// Shapes: `weight` and `bias` `[width]`, `x` and `y` `[rows, width]`.
///
/// # Panics
///
/// If the lengths do not match.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
    let width = weight.len();
    check(width, &[("bias", bias.len())], &[("x", x.len()), ("y", y.len())]);
    let isa = Isa::current();
    let size = (ROWS * width).max(1);
    (x.par_chunks(size).zip(y.par_chunks_mut(size))).for_each(|(x, y)| isa.run(Normed { x, weight, bias, eps, y }));
}

/// Gradient of [`layer_norm`]; with `parameters` also those of its weight and bias (set, not added).
///
/// # Panics
///
/// If the lengths do not match.
pub fn layer_norm_gradient(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    parameters: Option<(&mut [f32], &mut [f32])>,
) {
    let width = weight.len();
    check(width, &[], &[("x", x.len()), ("dy", dy.len()), ("dx", dx.len())]);
    let isa = Isa::current();
    let size = (ROWS * width).max(1);
    let wanted = parameters.is_some();
    let sums: Vec<_> = (x.par_chunks(size).zip(dy.par_chunks(size)).zip(dx.par_chunks_mut(size)))
        .map(|((x, dy), dx)| isa.run(Gradient { x, weight, eps, dy, dx, wanted }))
        .collect();
    let Some((to_weight, to_bias)) = parameters else {
        return;
    };
    check(width, &[("weight gradient", to_weight.len()), ("bias gradient", to_bias.len())], &[]);
    to_weight.fill(0.0);
    to_bias.fill(0.0);
    for (weight, bias) in &sums {
        for (to, from) in [(&mut *to_weight, weight), (&mut *to_bias, bias)] {
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
    }
}

fn check(width: usize, vectors: &[(&str, usize)], matrices: &[(&str, usize)]) {
    for (name, found) in vectors {
        assert!(*found == width, "`{name}` has {found} elements, `weight` {width}");
    }
    for (name, found) in matrices {
        let same = *found == matrices[0].1 && (*found == 0 || width > 0 && found.is_multiple_of(width));
        assert!(same, "`{name}` has {found} elements, `{}` {}, rows {width}", matrices[0].0, matrices[0].1);
    }
}

/// A few rows of [`layer_norm`].
struct Normed<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Op for Normed<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self { x, weight, bias, eps, y } = self;
        for (x, y) in x.chunks_exact(weight.len()).zip(y.chunks_exact_mut(weight.len())) {
            let (mean, inverse) = moments(s, x, eps);
            let (center, factor) = (s.splat(mean), s.splat(inverse));
            for (i, (x, y)) in x.chunks(LANES).zip(y.chunks_mut(LANES)).enumerate() {
                let (at, end) = (i * LANES, i * LANES + x.len());
                let normalized = s.mul(s.sub(s.load_part(x), center), factor);
                s.store_part(y, s.fma(normalized, s.load_part(&weight[at..end]), s.load_part(&bias[at..end])));
            }
        }
    }
}

/// A few rows of [`layer_norm_gradient`]; returns their sums for weight and bias.
struct Gradient<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    dy: &'a [f32],
    dx: &'a mut [f32],
    wanted: bool,
}

impl Op for Gradient<'_> {
    type Output = (Vec<f32>, Vec<f32>);

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) -> Self::Output {
        let Self { x, weight, eps, dy, dx, wanted } = self;
        let (width, pad) = (weight.len(), padded(weight.len()));
        let mut sums = if wanted { (vec![0.0; pad], vec![0.0; pad]) } else { (Vec::new(), Vec::new()) };
        let mut normalized = Buffer::new(pad);
        // The row functions want whole vectors: weight and the row of dy are copied with padding.
        let mut rows = vec![0.0; 2 * pad];
        let (padded_weight, padded_dy) = rows.split_at_mut(pad);
        padded_weight[..width].copy_from_slice(weight);
        for ((x, dy), dx) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
            let mut inverse = [0.0];
            normalize::<S, F32>(s, x, width, eps, &mut normalized, &mut inverse);
            padded_dy[..width].copy_from_slice(dy);
            dx.fill(0.0);
            add_gradient::<S, F32>(s, padded_dy, &normalized, inverse[0], padded_weight, dx);
            if wanted {
                add_parameter_gradients::<S, F32>(s, padded_dy, &normalized, &mut sums.0, &mut sums.1);
            }
        }
        sums
    }
}

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
    let center = s.splat(mean);
    let mut sum = s.splat(0.0);
    for part in row.chunks(LANES) {
        let difference = s.first(s.sub(s.load_part(part), center), part.len());
        sum = s.fma(difference, difference, sum);
    }
    let variance = s.sum(sum) / row.len() as f32;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// Writes the normalized rows as cells, zero in the padding, and `1 / sqrt(variance + eps)`.
#[inline(always)]
pub(crate) fn normalize<S: Lanes, P: Element>(
    s: S,
    x: &[f32],
    width: usize,
    eps: f32,
    normalized: &mut [u32],
    inverse_deviation: &mut [f32],
) {
    let stride = P::cells(padded(width));
    for ((row, to), inverse) in x.chunks_exact(width).zip(normalized.chunks_exact_mut(stride)).zip(inverse_deviation) {
        let (mean, found) = moments(s, row, eps);
        *inverse = found;
        let (center, factor) = (s.splat(mean), s.splat(found));
        for (i, part) in row.chunks(LANES).enumerate() {
            let v = s.mul(s.sub(s.load_part(part), center), factor);
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
    normalized: &[u32],
    inverse_deviation: f32,
    weight: &[f32],
    dx: &mut [f32],
) {
    let (dy, weight) = (dy.as_chunks::<LANES>().0, weight.as_chunks::<LANES>().0);
    let (mut sum, mut sum_along) = (s.splat(0.0), s.splat(0.0));
    for (i, (dy, weight)) in dy.iter().zip(weight).enumerate() {
        let g = s.mul(s.load(dy), s.load(weight));
        sum = s.add(sum, g);
        sum_along = s.fma(g, P::load(s, normalized, P::cells(i * LANES)), sum_along);
    }
    let width = dx.len() as f32;
    let mean = s.splat(s.sum(sum) / width);
    let mean_along = s.splat(-s.sum(sum_along) / width);
    let factor = s.splat(inverse_deviation);
    for (i, ((dy, weight), dx)) in dy.iter().zip(weight).zip(dx.chunks_mut(LANES)).enumerate() {
        let g = s.sub(s.mul(s.load(dy), s.load(weight)), mean);
        let g = s.fma(P::load(s, normalized, P::cells(i * LANES)), mean_along, g);
        let sum = s.fma(g, factor, s.load_part(dx));
        s.store_part(dx, sum);
    }
}

/// Adds one row to the gradients of the norm's weight and bias.
#[inline(always)]
pub(crate) fn add_parameter_gradients<S: Lanes, P: Element>(
    s: S,
    dy: &[f32],
    normalized: &[u32],
    weight: &mut [f32],
    bias: &mut [f32],
) {
    let weight = weight.as_chunks_mut::<LANES>().0;
    let bias = bias.as_chunks_mut::<LANES>().0;
    for (i, ((dy, weight), bias)) in dy.as_chunks::<LANES>().0.iter().zip(weight).zip(bias).enumerate() {
        let dy = s.load(dy);
        let sum = s.fma(dy, P::load(s, normalized, P::cells(i * LANES)), s.load(weight));
        s.store(weight, sum);
        let sum = s.add(s.load(bias), dy);
        s.store(bias, sum);
    }
}
