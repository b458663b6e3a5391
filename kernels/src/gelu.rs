//! GELU, exact and by tanh, with the exponential and the error function they need.
//!
//! | function | error, against f64                                          |
//! |----------|-------------------------------------------------------------|
//! | `exp`    | 2 units in the last place between -87 and 88                 |
//! | `erf`    | 5e-7 absolute everywhere                                     |
//! | GELU     | 3e-7 times `1 + abs(x)` for value and slope, both kinds      |

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
}

/// Elements of a task: small beside the cache, large beside the cost of handing it out.
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
                None => value(s, kind, x),
                Some(dy) => s.mul(s.load_part(&dy[i * LANES..]), slope(s, kind, x)),
            };
            s.store_part(to, v);
        }
    }
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
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
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
    for coefficient in [2.770_681_4e-8, -2.101_024e-6, -5.692_506_5e-5, -7.349_906_3e-4, -2.954_6e-3, -1.609_603_3e-2] {
        above = s.fma(above, t, s.splat(coefficient));
    }
    let mut below = s.splat(-1.456_607_2e-5);
    for coefficient in [-2.133_740_5e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2] {
        below = s.fma(below, t, s.splat(coefficient));
    }
    s.div(s.mul(x, above), below)
}

/// The share of `x` that the exact GELU lets through: the normal distribution function.
#[inline(always)]
fn gate_erf<S: Lanes>(s: S, x: S::V) -> S::V {
    let erf = erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
    s.fma(erf, s.splat(0.5), s.splat(0.5))
}

/// The share of `x` that the GELU by tanh lets through, and the rest to 1 with its own digits.
#[inline(always)]
fn gate_tanh<S: Lanes>(s: S, x: S::V) -> (S::V, S::V) {
    // (1 + tanh u) / 2 = 1 / (1 + e^-2u), with -2 sqrt(2 / pi) = -1.5957691.
    let cubic = s.fma(s.mul(x, x), s.splat(0.044_715), s.splat(1.0));
    let power = exp(s, s.mul(s.mul(x, s.splat(-1.595_769)), cubic));
    let gate = s.div(s.splat(1.0), s.add(s.splat(1.0), power));
    (gate, s.mul(power, gate))
}

/// `gelu(x)`.
#[inline(always)]
pub(crate) fn value<S: Lanes>(s: S, kind: Gelu, x: S::V) -> S::V {
    let gate = match kind {
        Gelu::Erf => gate_erf(s, x),
        Gelu::Tanh => gate_tanh(s, x).0,
    };
    s.mul(x, gate)
}

/// The derivative of `gelu` at `x`.
#[inline(always)]
pub(crate) fn slope<S: Lanes>(s: S, kind: Gelu, x: S::V) -> S::V {
    match kind {
        // Distribution plus x times density, with 1 / sqrt(2 pi) = 0.3989423.
        Gelu::Erf => {
            let density = exp(s, s.mul(s.mul(x, x), s.splat(-0.5)));
            s.fma(s.mul(x, s.splat(0.398_942_3)), density, gate_erf(s, x))
        }
        // g + x g (1 - g) 2 u'(x), with 2 u' = 1.5957691 (1 + 3 * 0.044715 x^2).
        Gelu::Tanh => {
            let (gate, rest) = gate_tanh(s, x);
            let inner = s.fma(s.mul(x, x), s.splat(0.214_064_44), s.splat(1.595_769));
            s.fma(s.mul(s.mul(gate, rest), inner), x, gate)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Path, reference, with_path};

    struct Erf<'a>(&'a [f32], &'a mut [f32]);

    impl Op for Erf<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Lanes>(self, s: S) {
            for (x, y) in self.0.chunks(LANES).zip(self.1.chunks_mut(LANES)) {
                s.store_part(y, erf(s, s.load_part(x)));
            }
        }
    }

    #[test]
    fn erf_is_within_5e_7_of_f64_on_every_path() {
        let x: Vec<f32> = (-60_000..60_000).map(|i| i as f32 * 1e-4).collect();
        for path in Path::ALL.into_iter().filter(|path| path.is_available()) {
            let mut y = vec![0.0; x.len()];
            with_path(path, || Isa::current().run(Erf(&x, &mut y)));
            let off = |(&x, &y): (&f32, &f32)| (f64::from(y) - reference::erf(f64::from(x))).abs();
            let worst = x.iter().zip(&y).map(off).fold(0.0, f64::max);
            assert!(worst < 5e-7, "{path:?}: off by {worst}");
        }
    }
}
