//! GELU, exact, by tanh and by a sigmoid, and the exponential that it shares with the softmax.
//!
//! | function | error, against f64                                          |
//! |----------|-------------------------------------------------------------|
//! | `exp`    | 2 units in the last place between -87 and 88                 |
//! | GELU     | 3e-7 times `1 + abs(x)` for value and slope, of every kind   |

use rayon::prelude::*;

use crate::detect::Isa;
use crate::lanes::{LANES, Lanes, Op};

/// Which GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gelu {
    /// `x / 2 * (1 + erf(x / sqrt(2)))`, torch's default and timm's.
    Erf,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, big_vision's.
    Tanh,
    /// `x / (1 + e^(-1.702 x))`, that of OpenAI's CLIP.
    Quick,
}

/// Elements of a task: small compared with the cache, large compared with the cost of scheduling it.
const CHUNK: usize = 16 * 1024;

/// `y = gelu(x)`.
///
/// # Panics
///
/// If the lengths differ.
pub fn gelu(kind: Gelu, x: &[f32], y: &mut [f32]) {
    assert!(x.len() == y.len(), "`x` has {} elements, `y` {}", x.len(), y.len());
    let isa = Isa::current();
    (x.par_chunks(CHUNK).zip(y.par_chunks_mut(CHUNK))).for_each(|(x, y)| isa.run(Apply { kind, x, dy: None, to: y }));
}

/// `dx = dy * gelu'(x)`.
///
/// # Panics
///
/// If the lengths differ.
pub fn gelu_gradient(kind: Gelu, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    let found = (x.len(), dy.len());
    assert!(found == (dx.len(), dx.len()), "`x` and `dy` have {found:?} elements, `dx` {}", dx.len());
    let isa = Isa::current();
    (x.par_chunks(CHUNK).zip(dy.par_chunks(CHUNK)).zip(dx.par_chunks_mut(CHUNK)))
        .for_each(|((x, dy), dx)| isa.run(Apply { kind, x, dy: Some(dy), to: dx }));
}

/// One chunk of [`gelu`], or with `dy` of [`gelu_gradient`].
struct Apply<'a> {
    kind: Gelu,
    x: &'a [f32],
    dy: Option<&'a [f32]>,
    to: &'a mut [f32],
}

impl Op for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self { kind, x, dy, to } = self;
        for (i, (x, to)) in x.chunks(LANES).zip(to.chunks_mut(LANES)).enumerate() {
            let x = s.load_part(x);
            let v = match dy {
                None => value_and_slope(s, kind, x).0,
                Some(dy) => s.mul(s.load_part(&dy[i * LANES..]), value_and_slope(s, kind, x).1),
            };
            s.store_part(to, v);
        }
    }
}

/// `e^x`. Below -87 the result stays at `e^-87`, above 88 at `e^88`; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp<S: Lanes>(s: S, x: S::V) -> S::V {
    // The bounds come first: `max` and `min` return the second where one is not a number.
    exp_near(s, s.min(s.splat(88.0), s.max(s.splat(-87.0), x)))
}

/// `e^x` for `x` from -87 to 88.
#[inline(always)]
fn exp_near<S: Lanes>(s: S, x: S::V) -> S::V {
    // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts so that r is exact.
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    // Cephes' polynomial for (e^r - 1 - r) / r^2.
    let mut p = s.splat(1.987_569_1e-4);
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = s.fma(p, r, s.splat(coefficient));
    }
    let p = s.fma(s.mul(p, r), r, s.add(r, s.splat(1.0)));
    s.scale(p, n)
}

/// `gelu(x)` and its derivative, which share the expensive part. What is unused is not computed.
#[inline(always)]
pub(crate) fn value_and_slope<S: Lanes>(s: S, kind: Gelu, x: S::V) -> (S::V, S::V) {
    match kind {
        // With the distribution P and density p of the normal distribution: x P and P + x p.
        Gelu::Erf => {
            // Beyond 13 the tail is 0 to f32. The bound comes first, see `exp`.
            let size = s.min(s.splat(13.0), s.max(x, s.sub(s.splat(0.0), x)));
            let power = exp_near(s, s.mul(s.mul(size, size), s.splat(-0.5)));
            let tail = s.mul(power, tail_over_power(s, size));
            let value = s.sub(s.max(x, s.splat(0.0)), s.mul(size, tail));
            let distribution = s.add(s.splat(0.5), s.copy_sign(s.sub(s.splat(0.5), tail), x));
            // 1 / sqrt(2 pi) = 0.3989423.
            let density = s.mul(power, s.copy_sign(s.splat(0.398_942_3), x));
            let slope = s.fma(size, density, distribution);
            (value, slope)
        }
        // With the gate g = (1 + tanh u) / 2 = 1 / (1 + e^-2u): x g and g + x g (1 - g) 2 u', where
        // -2 sqrt(2 / pi) = -1.5957691 and 2 u' = 1.5957691 (1 + 3 * 0.044715 x^2).
        Gelu::Tanh => {
            let square = s.mul(x, x);
            let cubic = s.fma(square, s.splat(0.044_715), s.splat(1.0));
            let power = exp(s, s.mul(s.mul(x, s.splat(-1.595_769)), cubic));
            let gate = s.reciprocal(s.add(s.splat(1.0), power));
            let inner = s.fma(square, s.splat(0.214_064_44), s.splat(1.595_769));
            let slope = s.fma(s.mul(s.mul(gate, s.mul(power, gate)), inner), x, gate);
            (s.mul(x, gate), slope)
        }
        // With the gate g = 1 / (1 + e^(-1.702 x)): x g and g + x 1.702 g (1 - g), where 1 - g = e^(-1.702 x) g.
        Gelu::Quick => {
            let power = exp(s, s.mul(x, s.splat(-1.702)));
            let gate = s.reciprocal(s.add(s.splat(1.0), power));
            let inner = s.mul(s.mul(gate, s.mul(power, gate)), s.splat(1.702));
            (s.mul(x, gate), s.fma(inner, x, gate))
        }
    }
}

/// The normal distribution's share beyond `size`, over `e^(-size^2 / 2)`, for `size` from 0 on.
///
/// Source: Abramowitz and Stegun 7.1.26, for the complementary error function of `size / sqrt(2)`; half of it.
#[inline(always)]
fn tail_over_power<S: Lanes>(s: S, size: S::V) -> S::V {
    // 0.3275911 / sqrt(2).
    let t = s.reciprocal(s.fma(size, s.splat(0.231_641_9), s.splat(1.0)));
    let mut sum = s.splat(0.530_702_7);
    for coefficient in [-0.726_576, 0.710_706_9, -0.142_248_37, 0.127_414_8] {
        sum = s.fma(sum, t, s.splat(coefficient));
    }
    s.mul(sum, t)
}
