//! The l1 ball around one image, intersected with the pixel range, on plain slices.

/// Projects `image` in place onto the points within l1 distance `epsilon` of `clean` whose pixels are in [0, 1]. Exact
/// up to rounding.
///
/// The range caps each pixel's change at c, so the projection is `min(max(|d| - t, 0), c)` with the sign of d, for the
/// unique t at which the changes sum to epsilon.
/// Source: Croce and Hein 2021 (arXiv:2103.01208), section 3.
pub fn project(image: &mut [f32], clean: &[f32], epsilon: f64) {
    let change = |x: f32, clean: f32| f64::from(x) - f64::from(clean);
    let cap = |change: f64, clean: f32| match change > 0.0 {
        true => 1.0 - f64::from(clean),
        false => f64::from(clean),
    };
    let mut changes = Changes {
        sizes: Vec::with_capacity(image.len()),
        caps: Vec::with_capacity(image.len()),
    };
    for (x, clean) in image.iter().zip(clean) {
        // Unchanged pixels do not affect the threshold, and sparse perturbations have many.
        if x != clean {
            let change = change(*x, *clean);
            changes.sizes.push(change.abs());
            changes.caps.push(cap(change, *clean));
        }
    }
    let threshold = changes.threshold(epsilon);
    for (x, clean) in image.iter_mut().zip(clean) {
        let change = change(*x, *clean);
        let size = (change.abs() - threshold).max(0.0).min(cap(change, *clean));
        if size != change.abs() {
            *x = towards(*clean, size.copysign(change));
        }
    }
}

/// The absolute change of each pixel, and the largest change that the range allows.
struct Changes {
    sizes: Vec<f64>,
    caps: Vec<f64>,
}

/// Number of bisection steps before the remaining breaks are sorted. Usually a thousandth of them remain.
const HALVINGS: usize = 12;

impl Changes {
    /// Returns the sum of `min(max(|d| - t, 0), c)`.
    fn sum_at(&self, t: f64) -> f64 {
        const LANES: usize = 8;
        let mut sums = [0.0; LANES];
        let term = |size: f64, cap: f64| {
            let size = size - t;
            let size = if size > 0.0 { size } else { 0.0 };
            if size < cap { size } else { cap }
        };
        let (sizes, last_sizes) = self.sizes.as_chunks::<LANES>();
        let (caps, last_caps) = self.caps.as_chunks::<LANES>();
        for (sizes, caps) in sizes.iter().zip(caps) {
            for lane in 0..LANES {
                sums[lane] += term(sizes[lane], caps[lane]);
            }
        }
        let rest = last_sizes.iter().zip(last_caps);
        sums.iter().sum::<f64>() + rest.map(|(size, cap)| term(*size, *cap)).sum::<f64>()
    }

    /// Returns the t at which the sum equals `epsilon`, or 0 if the sum at 0 is at most `epsilon`.
    ///
    /// The sum decreases in t and is linear between breaks: at |d| - c, beyond which a pixel's cap no longer applies,
    /// and at |d|, where its change becomes 0.
    fn threshold(&self, epsilon: f64) -> f64 {
        let (mut low, mut sum) = (0.0, self.sum_at(0.0));
        if sum <= epsilon {
            return 0.0;
        }
        let mut high = self
            .sizes
            .iter()
            .fold(0.0, |most: f64, size| most.max(*size));
        for _ in 0..HALVINGS {
            let middle = 0.5 * (low + high);
            let there = self.sum_at(middle);
            match there > epsilon {
                true => (low, sum) = (middle, there),
                false => high = middle,
            }
        }
        // The remaining breaks, with the change of the (negated) slope at each.
        let (mut breaks, mut slope) = (Vec::new(), 0.0);
        for (size, cap) in self.sizes.iter().zip(&self.caps) {
            let free = (size - cap).max(0.0);
            if free <= low && low < *size {
                slope += 1.0;
            }
            for (place, turn) in [(free, 1.0), (*size, -1.0)] {
                if low < place && place <= high {
                    breaks.push((place, turn));
                }
            }
        }
        breaks.push((high, 0.0));
        breaks.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let mut at = low;
        for (place, turn) in breaks {
            let next = sum - slope * (place - at);
            if next <= epsilon && slope > 0.0 {
                return at + (sum - epsilon) / slope;
            }
            (sum, at, slope) = (next, place, slope + turn);
        }
        at
    }
}

/// Returns `clean + change` rounded towards `clean`, so that rounding thousands of pixels cannot push the perturbation
/// above epsilon.
fn towards(clean: f32, change: f64) -> f32 {
    let exact = f64::from(clean) + change;
    let rounded = exact as f32;
    let beyond = (f64::from(rounded) - f64::from(clean)).abs() > change.abs();
    match (beyond, change > 0.0) {
        (false, _) => rounded,
        (true, true) => rounded.next_down(),
        (true, false) => rounded.next_up(),
    }
}

/// Turns a gradient into a step of length 1, equal on each of the steepest 1 % of the pixels that can still move in
/// that direction, at least one.
pub fn steepest(gradient: &mut [f32], at: &[f32]) {
    let free =
        |slope: f32, pixel: f32| (slope > 0.0 && pixel < 1.0) || (slope < 0.0 && pixel > 0.0);
    let mut order: Vec<usize> = (0..gradient.len())
        .filter(|&i| free(gradient[i], at[i]))
        .collect();
    let count = (gradient.len() / 100).max(1).min(order.len());
    // Ties go to the first pixel, for the same result on every platform.
    order.sort_by(|&a, &b| gradient[b].abs().total_cmp(&gradient[a].abs()));
    let steps: Vec<(usize, f32)> = order[..count]
        .iter()
        .map(|&i| (i, gradient[i].signum() / count as f32))
        .collect();
    gradient.fill(0.0);
    for (index, step) in steps {
        gradient[index] = step;
    }
}

/// Turns a gradient into a step of length 1, equal on each of the steepest `share` of the pixels.
///
/// Pixels tied with the smallest selected slope are included, so there can be more.
/// Source: Croce and Hein 2021, section 4.1; the count is computed as in the reference program.
pub fn steepest_share(gradient: &mut [f32], share: f64) {
    let pixels = gradient.len();
    if pixels == 0 {
        return;
    }
    let rank = (((1.0 - share) * pixels as f64).max(0.0) as usize).min(pixels - 1);
    let mut sizes: Vec<f32> = gradient.iter().map(|slope| slope.abs()).collect();
    let (_, least, _) = sizes.select_nth_unstable_by(rank, f32::total_cmp);
    let least = *least;
    let taken = |slope: f32| slope.abs() >= least && slope != 0.0;
    let count = gradient.iter().filter(|slope| taken(**slope)).count();
    for slope in gradient {
        *slope = if taken(*slope) {
            slope.signum() / count as f32
        } else {
            0.0
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Rng, Stream};

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        let pairs = a.iter().zip(b);
        pairs
            .map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs())
            .sum()
    }

    fn squared(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn projections_match_the_analytic_solutions() {
        // Without the range: soft thresholding. |d| = (0.5, 0.3, 0), epsilon = 0.4, t = 0.2.
        let mut image = [0.9, 0.2, 0.5];
        project(&mut image, &[0.4, 0.5, 0.5], 0.4);
        for (found, right) in image.iter().zip([0.7, 0.4, 0.5]) {
            assert!((found - right).abs() < 1e-6, "{image:?}");
        }
        // With the range: the first pixel can move by only 0.1, so the second takes the rest.
        let mut image = [2.0, 1.4];
        project(&mut image, &[0.9, 0.5], 0.4);
        for (found, right) in image.iter().zip([1.0, 0.8]) {
            assert!((found - right).abs() < 1e-6, "{image:?}");
        }
    }

    #[test]
    fn no_feasible_point_is_nearer_than_the_projection() {
        let mut rng = Rng::new(3, Stream::Bench);
        for round in 0..200 {
            let n = 1 + rng.below(20);
            let clean: Vec<f32> = (0..n).map(|_| rng.uniform()).collect();
            let point: Vec<f32> = clean.iter().map(|c| c + rng.normal()).collect();
            let epsilon = f64::from(rng.between(0.05, 2.0));
            let mut nearest = point.clone();
            project(&mut nearest, &clean, epsilon);
            assert!(
                distance(&nearest, &clean) <= epsilon + 1e-12,
                "round {round}"
            );
            assert!(
                nearest.iter().all(|x| (0.0..=1.0).contains(x)),
                "round {round}"
            );

            let mut again = nearest.clone();
            project(&mut again, &clean, epsilon + 1e-5);
            assert_eq!(again, nearest, "projecting twice changes nothing");

            for _ in 0..20 {
                // A random feasible point: a random image pulled towards the clean one.
                let other: Vec<f32> = (0..n).map(|_| rng.uniform()).collect();
                let pull = (epsilon / distance(&other, &clean).max(1e-9)).min(1.0) as f32;
                let other: Vec<f32> = other
                    .iter()
                    .zip(&clean)
                    .map(|(o, c)| c + (o - c) * pull)
                    .collect();
                assert!(squared(&nearest, &point) <= squared(&other, &point) + 1e-5);
            }
        }
    }

    #[test]
    fn the_steepest_share_moves_by_one_together() {
        let mut gradient = [3.0, -2.0, 1.0, 0.0];
        steepest_share(&mut gradient, 0.5);
        assert_eq!(gradient, [0.5, -0.5, 0.0, 0.0]);
        let mut flat = [0.0; 4];
        steepest_share(&mut flat, 0.5);
        assert_eq!(flat, [0.0; 4]);
    }

    #[test]
    fn a_step_leaves_out_pixels_that_cannot_move() {
        let mut gradient = [3.0, -2.0, 1.0];
        steepest(&mut gradient, &[1.0, 0.0, 0.5]);
        assert_eq!(gradient, [0.0, 0.0, 1.0]);
        let mut gradient = [3.0, -2.0];
        steepest(&mut gradient, &[1.0, 0.0]);
        assert_eq!(gradient, [0.0, 0.0]);
    }
}
