//! Statistics of AutoAttack's fast version: how much lower robust accuracy could be if attacks that ran on a random sample
//! had run on all images.
//!
//! S images survive the attacks that run on all images. The last attacks would fool K of them, and K is not known. They run
//! on m of the S, drawn without replacement, and fool k. Then k is hypergeometric, and the largest K with
//! `P(at most k | S, K, m) > 5 %` is an exact one-sided 95 % upper bound: whatever K is, the bound is below it in at most
//! 5 % of all samples. Nothing is approximated, and no model of the images is assumed.
//!
//! Source: exact bounds for a finite population, as in audits ("discovery sampling"); Buonaccorsi 1987, The American
//! Statistician 41(3). docs/decisions/0028-fast-autoattack.md gives the reasons.

use serde::{Deserialize, Serialize};

use crate::rng::{Rng, Stream};

/// Confidence of the bound.
pub const CONFIDENCE: f64 = 0.95;
/// Default of the largest difference to the full version, in percentage points.
pub const POINTS: f64 = 0.4;
/// Relative error of a probability by rounding, far below this.
const ROUNDING: f64 = 1e-7;

/// Restricts the last attacks of an evaluation to a random sample of the images that survived the others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Number of attacks that run on all remaining images, before those that run on the sample only.
    pub first: usize,
    /// Bound that the smallest sample must give if no image of it is fooled, in percentage points of robust accuracy.
    pub points: f64,
}

impl Sample {
    /// Returns the size of the smallest sample of `survivors` with which the bound is at most `points` if no image is
    /// fooled. 0 if even fooling all survivors would not lower robust accuracy on `images` images by more.
    pub fn size(&self, images: usize, survivors: usize) -> usize {
        // The tolerance makes 0.4 % of 5000 images 20 images, whatever 0.4 is in binary.
        let allowed = (self.points / 100.0 * images as f64 + 1e-9).floor() as usize;
        let excluded = allowed.saturating_add(1);
        if excluded > survivors {
            return 0;
        }
        let chances = Hypergeometric::new(survivors);
        let (mut low, mut high) = (1, survivors);
        while low < high {
            let middle = low.midpoint(high);
            match chances.is_plausible(0, excluded, middle) {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        low
    }

    /// Draws the sample, a simple random sample without replacement, and returns it in increasing order.
    ///
    /// Each image has a random number of its own, keyed by `key`, and the images with the smallest ones are drawn. So the
    /// sample depends on the seed and on which images survive, not on their order, the batch size or the ranks.
    pub fn draw(
        &self,
        images: usize,
        survivors: &[usize],
        key: impl Fn(usize) -> u64,
        seed: u64,
    ) -> Vec<usize> {
        let number = |index: &usize| {
            let image = key(*index);
            (
                Rng::new(seed, Stream::Sample { image }).bits(),
                image,
                *index,
            )
        };
        let mut order: Vec<(u64, u64, usize)> = survivors.iter().map(number).collect();
        order.sort_unstable();
        order.truncate(self.size(images, survivors.len()));
        let mut sample: Vec<usize> = order.into_iter().map(|(.., index)| index).collect();
        sample.sort_unstable();
        sample
    }
}

/// The images that attacks on a sample run on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drawn {
    /// Number of images that survived all attacks before, from which the sample was drawn.
    pub of: usize,
    /// The sample, in increasing order.
    pub images: Vec<usize>,
}

/// Upper bound on the difference between the reported robust accuracy and that of the full version.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bound {
    /// Largest difference, in percentage points.
    pub points: f64,
    /// Confidence of the bound.
    pub confidence: f64,
    /// Size of the sample.
    pub sampled: usize,
    /// Number of images from which the sample was drawn.
    pub of: usize,
    /// Images of the sample that were fooled. They count as fooled in the reported robust accuracy.
    pub fooled: usize,
}

impl Bound {
    /// Computes the bound for an evaluation on `images` images.
    ///
    /// # Panics
    /// If not `fooled <= sampled <= of`.
    pub fn new(images: usize, of: usize, sampled: usize, fooled: usize) -> Self {
        let more = most_fooled(of, sampled, fooled) - fooled;
        Self {
            points: 100.0 * more as f64 / images.max(1) as f64,
            confidence: CONFIDENCE,
            sampled,
            of,
            fooled,
        }
    }

    /// Returns the bound as a clause about the reported robust accuracy. Rounded up, to two decimals.
    pub fn text(&self) -> String {
        text(self.points, self.confidence)
    }
}

/// Returns points and confidence of a bound on the sum of the differences, by the union bound: it holds for the images
/// that are robust in several norms.
pub fn joint(bounds: impl Iterator<Item = Bound>) -> (f64, f64) {
    bounds.fold((0.0, 1.0), |(points, confidence), bound| {
        let confidence: f64 = confidence - (1.0 - bound.confidence);
        (points + bound.points, (1e9 * confidence).round() / 1e9)
    })
}

/// Returns a bound as a clause about the reported robust accuracy.
pub fn text(points: f64, confidence: f64) -> String {
    let points = (100.0 * points - 1e-9).ceil().max(0.0) / 100.0;
    let confidence = (100.0 * confidence).round();
    format!("the full standard version would be at most {points} points lower ({confidence:.0} %)")
}

/// Returns the largest number of fooled images among `of` that is plausible at 95 % if `fooled` of `sampled` were.
///
/// # Panics
/// If not `fooled <= sampled <= of`.
pub fn most_fooled(of: usize, sampled: usize, fooled: usize) -> usize {
    assert!(
        fooled <= sampled && sampled <= of,
        "{fooled} of {sampled} of {of}"
    );
    let chances = Hypergeometric::new(of);
    // `fooled` is always plausible, and every number above `high` impossible.
    let (mut low, mut high) = (fooled, of - (sampled - fooled));
    while low < high {
        let middle = low.midpoint(high) + (high - low) % 2;
        match chances.is_plausible(fooled, middle, sampled) {
            true => low = middle,
            false => high = middle - 1,
        }
    }
    low
}

/// The number of marked members in a sample without replacement from a population.
struct Hypergeometric {
    /// Logarithms of the factorials of 0 to the population's size.
    factorials: Vec<f64>,
}

impl Hypergeometric {
    fn new(population: usize) -> Self {
        let (mut sum, mut lost) = (0.0f64, 0.0);
        let factorials = (0..=population).map(|number| {
            // Kahan's summation: rounding does not grow with the population.
            let term = (number.max(1) as f64).ln() - lost;
            let next = sum + term;
            lost = (next - sum) - term;
            sum = next;
            sum
        });
        Self {
            factorials: factorials.collect(),
        }
    }

    /// Returns the logarithm of a binomial coefficient.
    fn choices(&self, of: usize, number: usize) -> f64 {
        self.factorials[of] - self.factorials[number] - self.factorials[of - number]
    }

    /// Returns the probability of at most `count` marked members in a sample, if `marked` of the population are.
    fn at_most(&self, count: usize, marked: usize, sampled: usize) -> f64 {
        let population = self.factorials.len() - 1;
        if count >= marked.min(sampled) {
            return 1.0;
        }
        let unmarked = population - marked;
        let least = sampled.saturating_sub(unmarked);
        let all = self.choices(population, sampled);
        let terms = (least..=count).map(|found| {
            let ways = self.choices(marked, found) + self.choices(unmarked, sampled - found);
            (ways - all).exp()
        });
        terms.sum()
    }

    /// Returns whether `count` or fewer marked members are likelier than 5 %. Exactly 5 % is not.
    fn is_plausible(&self, count: usize, marked: usize, sampled: usize) -> bool {
        self.at_most(count, marked, sampled) > (1.0 - CONFIDENCE) * (1.0 + ROUNDING)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(images: usize, survivors: usize, points: f64) -> usize {
        Sample { first: 0, points }.size(images, survivors)
    }

    #[test]
    fn probabilities_are_those_known_on_paper() {
        let of = |population: usize| Hypergeometric::new(population);
        let close = |found: f64, right: f64| {
            assert!((found - right).abs() < 1e-12, "{found} is not {right}");
        };
        // C(7, 4) / C(10, 4) = 35 / 210; with C(3, 1) C(7, 3) / C(10, 4) = 105 / 210 for one.
        close(of(10).at_most(0, 3, 4), 1.0 / 6.0);
        close(of(10).at_most(1, 3, 4), 4.0 / 6.0);
        // Poker: at most one ace in five cards, (C(48, 5) + 4 C(48, 4)) / C(52, 5).
        close(of(52).at_most(1, 4, 5), 2_490_624.0 / 2_598_960.0);
        // Every sample of 8 of 10 holds at least one of 3.
        close(of(10).at_most(0, 3, 8), 0.0);
        close(of(10).at_most(3, 3, 8), 1.0);
        close(of(0).at_most(0, 0, 0), 1.0);
    }

    /// Sample sizes to find at least one of a share of the population with 95 % confidence: 59 of infinitely many at 5 %
    /// (Wilks 1941), and in finite populations (Cannon and Roe 1982, table 1).
    #[test]
    fn sample_sizes_are_the_published_ones() {
        assert_eq!(size(1_000_000, 1_000_000, 5.0 - 1e-4), 59);
        assert_eq!(size(100, 100, 4.0), 45); // one of 5
        assert_eq!(size(100, 100, 9.0), 25); // one of 10
        assert_eq!(size(500, 500, 4.8), 56); // one of 25
        assert_eq!(size(1000, 1000, 9.9), 29); // one of 100
    }

    #[test]
    fn the_sample_is_the_smallest_one_that_gives_the_bound() {
        for (images, survivors, points) in [
            (5000, 1250, 0.4),
            (5000, 3000, 0.4),
            (1000, 431, 1.0),
            (60, 17, 4.0),
            (50_000, 20_000, 0.1),
        ] {
            let m = size(images, survivors, points);
            let bound = |m| Bound::new(images, survivors, m, 0).points;
            assert!(bound(m) <= points + 1e-9, "{m}: {}", bound(m));
            assert!(bound(m - 1) > points, "{m}: {}", bound(m - 1));
        }
        let m = size(5000, 1250, 0.4);
        assert!((160..=170).contains(&m), "{m}");
    }

    #[test]
    fn all_or_no_survivors_are_drawn_in_the_extreme_cases() {
        // No single image may be missed.
        assert_eq!(size(100, 40, 0.5), 38); // one of 40 is missed with 2 / 40, exactly 5 %
        assert_eq!(size(100, 10, 0.5), 10);
        assert_eq!(Bound::new(100, 10, 10, 0).points, 0.0);
        assert_eq!(Bound::new(100, 10, 10, 7).points, 0.0);
        // Even if all survivors were fooled, the difference would be small enough.
        assert_eq!(size(1000, 4, 0.4), 0);
        assert_eq!(Bound::new(1000, 4, 0, 0).points, 0.4);
        assert_eq!(size(1000, 0, 0.4), 0);
        assert_eq!(Bound::new(1000, 0, 0, 0).points, 0.0);
        assert_eq!(size(1000, 1000, 100.0), 0);
        assert_eq!(size(0, 0, 0.4), 0);
    }

    #[test]
    fn a_tie_with_five_percent_is_decided_without_rounding() {
        // One image of 20 is missed by a sample of 19 with probability 1 / 20.
        assert_eq!(most_fooled(20, 19, 0), 0);
        assert_eq!(most_fooled(20, 18, 0), 1);
    }

    #[test]
    fn the_clause_is_rounded_up() {
        let clause = |points, confidence| text(points, confidence);
        assert_eq!(
            clause(100.0 * 20.0 / 5000.0, 0.95),
            "the full standard version would be at most 0.4 points lower (95 %)"
        );
        assert!(clause(100.0 / 60.0, 0.95).contains("at most 1.67 points"));
        assert!(clause(0.0, 0.95).contains("at most 0 points"));
        let bounds = [Bound::new(100, 10, 0, 0), Bound::new(100, 20, 20, 3)];
        assert_eq!(joint(bounds.into_iter()), (10.0, 0.9));
    }

    /// Exhaustive: in no small population does the bound miss the truth in more than 5 % of the samples.
    #[test]
    fn the_bound_covers_the_truth_in_every_small_population() {
        for of in 0..=24 {
            let chances = Hypergeometric::new(of);
            for sampled in 0..=of {
                let bounds: Vec<usize> = (0..=sampled)
                    .map(|fooled| most_fooled(of, sampled, fooled))
                    .collect();
                for truth in 0..=of {
                    // Bounds increase with the number found, so those that miss are the first.
                    let missed = bounds.iter().take_while(|bound| **bound < truth).count();
                    let chance = match missed {
                        0 => 0.0,
                        missed => chances.at_most(missed - 1, truth, sampled),
                    };
                    assert!(
                        chance <= 0.05 + 1e-8,
                        "{truth} of {of}, {sampled}: {chance}"
                    );
                }
                assert!(bounds.is_sorted());
            }
        }
    }

    /// With the samples that evaluations draw, of simulated survivors.
    #[test]
    fn the_bound_covers_the_truth_in_simulated_evaluations() {
        let runs = 2500;
        for (images, survivors, truth, points) in [
            (5000, 1250, 0, 0.4),
            (5000, 1250, 6, 0.4),
            (5000, 1250, 21, 0.4),
            (5000, 1250, 60, 0.4),
            (1000, 300, 11, 1.0),
            (200, 90, 3, 1.0),
            (60, 20, 2, 2.0),
        ] {
            let sample = Sample { first: 2, points };
            // Survivors and fooled images anywhere in the data set.
            let places: Vec<usize> = (0..survivors).map(|i| i * images / survivors).collect();
            let fooled = |index: &usize| index * survivors / images * 7 % survivors < truth;
            let fooled: Vec<bool> = (0..images).map(|index| fooled(&index)).collect();
            let all = places.iter().filter(|index| fooled[**index]).count();
            let m = sample.size(images, survivors);
            let bounds: Vec<usize> = (0..=m.min(all))
                .map(|k| most_fooled(survivors, m, k))
                .collect();
            let (mut missed, mut drawn) = (0, 0);
            for seed in 0..runs {
                let found = sample.draw(images, &places, |index| index as u64, seed);
                assert_eq!(found.len(), m);
                let k = found.iter().filter(|index| fooled[**index]).count();
                drawn += k;
                missed += usize::from(bounds[k] < all);
            }
            let case = format!("{images} {survivors} {all} {points}: {missed} of {runs}");
            let error = (0.05 * 0.95 / runs as f64).sqrt();
            assert!(missed as f64 / runs as f64 <= 0.05 + 3.0 * error, "{case}");
            // The mean is that of the hypergeometric distribution.
            let (share, m) = (all as f64 / survivors as f64, m as f64);
            let spread = (m * share * (1.0 - share) / runs as f64).sqrt();
            let off = drawn as f64 / runs as f64 - m * share;
            assert!(off.abs() <= 4.5 * spread, "{case}: {off}");
        }
    }

    #[test]
    fn the_sample_depends_on_keys_and_not_on_the_order() {
        let sample = Sample {
            first: 2,
            points: 2.0,
        };
        let survivors: Vec<usize> = (0..100).collect();
        let drawn = sample.draw(200, &survivors, |index| 1000 + index as u64, 7);
        assert!(drawn.is_sorted() && (10..100).contains(&drawn.len()));
        // The same images at other positions.
        let mirrored = sample.draw(200, &survivors, |index| 1099 - index as u64, 7);
        let mut back: Vec<usize> = mirrored.iter().map(|index| 99 - index).collect();
        back.sort_unstable();
        assert_eq!(back, drawn);
        assert_ne!(
            sample.draw(200, &survivors, |index| 1000 + index as u64, 8),
            drawn
        );
    }
}
