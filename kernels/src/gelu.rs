//! GELU, exact and by tanh, with the exponential and the error function they need.
//!
//! | function | error, against f64                                          |
//! |----------|-------------------------------------------------------------|
//! | `exp`    | 2 units in the last place between -87 and 88                 |
//! | `erf`    | 2e-7 absolute everywhere                                     |
//! | GELU     | 3e-7 times `1 + abs(x)` for value and slope, both kinds      |

use crate::lanes::Lanes;

/// Which GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gelu {
    /// `x / 2 * (1 + erf(x / sqrt(2)))`, torch's default and timm's.
    Erf,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, big_vision's.
    Tanh,
}

/// `e^x`. Below -87 the result stays at `e^-87`, above 88 at `e^88`; not a number stays so.
#[inline(always)]
pub(crate) fn exp<S: Lanes>(s: S, x: S::V) -> S::V {
    // The bounds come first: `max` and `min` return the second where one is not a number.
    let x = s.min(s.splat(88.0), s.max(s.splat(-87.0), x));
    // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts so that r is exact.
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    // Cephes' polynomial for (e^r - 1 - r) / r^2.
    let mut p = s.splat(1.987_569_1e-4);
    for coefficient in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        5e-1,
    ] {
        p = s.fma(p, r, s.splat(coefficient));
    }
    let p = s.fma(s.mul(p, r), r, s.add(r, s.splat(1.0)));
    s.scale(p, n)
}

/// The error function.
///
/// Source: the rational approximation of Eigen and XLA, odd of degree 13 over even of degree 8.
#[inline(always)]
pub(crate) fn erf<S: Lanes>(s: S, x: S::V) -> S::V {
    // Beyond 4 the error function is 1 to f32.
    let x = s.min(s.splat(4.0), s.max(s.splat(-4.0), x));
    let t = s.mul(x, x);
    let mut above = s.splat(-2.726_142_3e-10);
    for coefficient in [
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_5e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ] {
        above = s.fma(above, t, s.splat(coefficient));
    }
    let mut below = s.splat(-1.456_607_2e-5);
    for coefficient in [
        -2.133_740_5e-4,
        -1.682_827e-3,
        -7.373_329e-3,
        -1.426_473_9e-2,
    ] {
        below = s.fma(below, t, s.splat(coefficient));
    }
    s.div(s.mul(x, above), below)
}

/// The share of `x` that GELU lets through: `gelu(x) = x * gate(x)`.
#[inline(always)]
fn gate<S: Lanes>(s: S, kind: Gelu, x: S::V) -> S::V {
    match kind {
        Gelu::Erf => {
            let erf = erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
            s.fma(erf, s.splat(0.5), s.splat(0.5))
        }
        Gelu::Tanh => {
            // (1 + tanh u) / 2 = 1 / (1 + e^-2u), with -2 sqrt(2 / pi) = -1.5957691.
            let cubic = s.fma(s.mul(x, x), s.splat(0.044_715), s.splat(1.0));
            let u = s.mul(s.mul(x, s.splat(-1.595_769_1)), cubic);
            s.div(s.splat(1.0), s.add(s.splat(1.0), exp(s, u)))
        }
    }
}

/// `gelu(x)`.
#[inline(always)]
pub(crate) fn value<S: Lanes>(s: S, kind: Gelu, x: S::V) -> S::V {
    s.mul(x, gate(s, kind, x))
}

/// `gelu(x)` and its derivative.
#[inline(always)]
pub(crate) fn value_and_slope<S: Lanes>(s: S, kind: Gelu, x: S::V) -> (S::V, S::V) {
    let gate = gate(s, kind, x);
    let steepness = match kind {
        // The normal density, 1 / sqrt(2 pi) = 0.3989423.
        Gelu::Erf => {
            let density = exp(s, s.mul(s.mul(x, x), s.splat(-0.5)));
            s.mul(density, s.splat(0.398_942_3))
        }
        // g (1 - g) 2 u'(x), with 2 u' = 1.5957691 (1 + 3 * 0.044715 x^2).
        Gelu::Tanh => {
            let inner = s.fma(s.mul(x, x), s.splat(0.214_064_07), s.splat(1.595_769_1));
            s.mul(s.mul(gate, s.sub(s.splat(1.0), gate)), inner)
        }
    };
    (s.mul(x, gate), s.fma(x, steepness, gate))
}
