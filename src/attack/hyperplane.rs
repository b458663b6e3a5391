//! Projection onto a hyperplane within the pixel range, in three norms, on plain slices.
//!
//! Source: Croce and Hein 2020 (arXiv:1907.02044), section 2.3 and appendix. `tests/attacks.rs` compares it with the
//! reference.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use super::threat::Norm;

/// Returns the smallest move, in the norm, that takes `point` onto a hyperplane without leaving [0, 1]. If the plane is
/// out of reach, returns the move that comes closest to it.
///
/// `excess` is `<normal, point> - offset`, the distance of the point from the plane in units of the normal.
/// Shapes: `point`, `normal` and the result `[pixels]`.
pub fn project(norm: Norm, point: &[f32], normal: &[f32], excess: f64) -> Vec<f32> {
    // Moving pixel i against `sign * normal[i]` reduces the excess by |normal[i]| per unit, until the pixel reaches the
    // end of its range.
    let sign = if excess >= 0.0 { 1.0 } else { -1.0 };
    let need = excess.abs();
    let room = |index: usize| {
        let down = sign * f64::from(normal[index]) > 0.0;
        let pixel = f64::from(point[index]);
        if down { pixel } else { 1.0 - pixel }
    };
    let slope = |index: usize| f64::from(normal[index].abs());
    let pixels = 0..point.len();
    let sizes: Vec<f64> = match norm {
        Norm::Linf => {
            // All pixels move by the same amount, within their range.
            let rooms: Vec<f64> = pixels.clone().map(room).collect();
            let slopes: Vec<f64> = pixels.map(slope).collect();
            let most = reach(&rooms, &slopes, need);
            rooms.into_iter().map(|room| room.min(most)).collect()
        }
        Norm::L2 => {
            // Each pixel moves in proportion to its slope, within its range.
            let places = pixels.clone().map(|i| match moves(slope(i)) {
                true => room(i) / slope(i),
                false => f64::INFINITY,
            });
            let places: Vec<f64> = places.collect();
            let squares = pixels.clone().map(|i| match moves(slope(i)) {
                true => slope(i) * slope(i),
                false => 0.0,
            });
            let squares: Vec<f64> = squares.collect();
            let factor = reach(&places, &squares, need);
            pixels.map(|i| room(i).min(factor * slope(i))).collect()
        }
        Norm::L1 => {
            // The steepest pixels move first, each as far as it can. Usually few move, so a heap beats a full sort.
            let steepest_first = |i: usize| (TotalOrder(slope(i)), Reverse(i));
            let movable = pixels.filter(|i| moves(slope(*i))).map(steepest_first);
            let mut left: BinaryHeap<_> = movable.collect();
            let mut sizes = vec![0.0; point.len()];
            let mut need = need;
            while let Some((_, Reverse(index))) = left.pop() {
                sizes[index] = room(index).min(need / slope(index));
                need -= sizes[index] * slope(index);
                if need <= 0.0 {
                    break;
                }
            }
            sizes
        }
    };
    let signed = sizes
        .iter()
        .zip(normal)
        .map(|(size, normal)| match *normal {
            0.0 => 0.0,
            normal => (-sign * f64::from(normal.signum()) * size) as f32,
        });
    signed.collect()
}

/// Whether a slope is large enough to divide by. The reference also skips smaller ones.
fn moves(slope: f64) -> bool {
    slope > 1e-8
}

/// A float with the IEEE 754 total order.
#[derive(Clone, Copy, PartialEq)]
struct TotalOrder(f64);

impl Eq for TotalOrder {}

impl PartialOrd for TotalOrder {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for TotalOrder {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Returns the t at which `sum of slope * min(t, place)` reaches `need`, or infinity if it never does.
///
/// The sum is concave and piecewise linear in t, so Newton's method from 0 never overshoots, and ends once no place is
/// between two consecutive points. That usually takes a few passes, fewer than sorting the places.
/// Shapes: `places` and `slopes` `[parts]`.
fn reach(places: &[f64], slopes: &[f64], need: f64) -> f64 {
    let mut at = 0.0f64;
    loop {
        let Split { used, slope, next } = Split::at(at, places, slopes);
        if slope <= 0.0 {
            return f64::INFINITY;
        }
        // The sum reaches `need` here unless another part is used up before.
        let to = (need - used) / slope;
        if to <= next {
            return to.max(0.0);
        }
        at = to;
    }
}

/// The sums of [`reach`] at a point.
struct Split {
    /// Contribution of the parts that are used up.
    used: f64,
    /// Slope of the others, and the next place at which one of them is used up.
    slope: f64,
    next: f64,
}

impl Split {
    /// Sums in separate lanes, so that the compiler can vectorize the loop.
    fn at(at: f64, places: &[f64], slopes: &[f64]) -> Self {
        const LANES: usize = 8;
        let (mut used, mut slope) = ([0.0; LANES], [0.0; LANES]);
        let mut next = [f64::INFINITY; LANES];
        let mut add = |lane: usize, place: f64, of_part: f64| {
            let is_left = place > at;
            used[lane] += if is_left { 0.0 } else { place * of_part };
            slope[lane] += if is_left { of_part } else { 0.0 };
            let place = if is_left { place } else { f64::INFINITY };
            next[lane] = if place < next[lane] {
                place
            } else {
                next[lane]
            };
        };
        let (whole, rest) = places.as_chunks::<LANES>();
        let (of_whole, of_rest) = slopes.as_chunks::<LANES>();
        for (places, slopes) in whole.iter().zip(of_whole) {
            for lane in 0..LANES {
                add(lane, places[lane], slopes[lane]);
            }
        }
        for (lane, (place, of_part)) in rest.iter().zip(of_rest).enumerate() {
            add(lane, *place, *of_part);
        }
        Self {
            used: used.iter().sum(),
            slope: slope.iter().sum(),
            next: next.into_iter().fold(f64::INFINITY, f64::min),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Rng, Stream};

    const NORMS: [Norm; 3] = [Norm::Linf, Norm::L2, Norm::L1];

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    }

    #[test]
    fn projections_match_the_analytic_solutions() {
        // Onto 3 a + 4 b = 2 from (0.5, 0.5): the excess is 1.5.
        let right = [
            (Norm::Linf, [-1.5 / 7.0, -1.5 / 7.0]),
            (Norm::L2, [-0.18, -0.24]),
            (Norm::L1, [0.0, -0.375]),
        ];
        for (norm, right) in right {
            let found = project(norm, &[0.5, 0.5], &[3.0, 4.0], 1.5);
            for (found, right) in found.iter().zip(right) {
                assert!((found - right).abs() < 1e-6, "{norm:?} {found} {right}");
            }
        }
        // The second pixel can only move by 0.1, so the first takes the rest: 1.5 - 0.4 = 3 * 0.3667.
        for norm in NORMS {
            let found = project(norm, &[0.5, 0.1], &[3.0, 4.0], 1.5);
            assert!((found[0] + 1.1 / 3.0).abs() < 1e-6, "{norm:?} {found:?}");
            assert!((found[1] + 0.1).abs() < 1e-6, "{norm:?} {found:?}");
        }
        // Out of reach: the corner. A flat pixel stays.
        for norm in NORMS {
            let found = project(norm, &[0.5, 0.25, 0.5], &[1.0, -1.0, 0.0], 9.0);
            assert_eq!(found, [-0.5, 0.75, 0.0], "{norm:?}");
        }
    }

    #[test]
    fn the_move_lands_on_the_plane_and_no_shorter_one_does() {
        let mut rng = Rng::new(5, Stream::Bench);
        for round in 0..100 {
            let n = 2 + rng.below(12);
            let mut draw = |low: f32, high: f32| -> Vec<f32> {
                (0..n).map(|_| rng.between(low, high)).collect()
            };
            let (point, normal, elsewhere) = (draw(0.0, 1.0), draw(-1.0, 1.0), draw(0.0, 1.0));
            // A plane through some point of the box can be reached.
            let offset = dot(&normal, &elsewhere);
            let excess = dot(&normal, &point) - offset;
            for norm in NORMS {
                let found = project(norm, &point, &normal, excess);
                let there: Vec<f32> = point.iter().zip(&found).map(|(p, d)| p + d).collect();
                assert!(
                    there.iter().all(|x| (-1e-6..=1.0 + 1e-6).contains(x)),
                    "round {round}"
                );
                assert!(
                    (dot(&normal, &there) - offset).abs() < 1e-5,
                    "round {round} {norm:?}"
                );
                let length = norm.distance(&there, &point);
                assert!(
                    length <= norm.distance(&elsewhere, &point) + 1e-5,
                    "round {round} {norm:?}"
                );
            }
        }
    }
}
