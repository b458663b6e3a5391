//! Robust accuracy over epsilon: a check against masked gradients.
//!
//! With a large enough epsilon every image can be turned into any other. A curve that does not fall from clean accuracy
//! to about zero therefore shows a failing attack, not a robust model (Athalye et al. 2018, arXiv:1802.00420,
//! section 3.1; Carlini et al. 2019, arXiv:1902.06705, section 5).

use serde::Serialize;

use super::accuracy::Outcome;
use super::autoattack::Settings;
use super::checks::Flag;
use super::interval::wilson;
use crate::attack::{Attack, Norm};
use crate::units::Fraction;

/// Multiples of epsilon on the curve.
pub const MULTIPLES: [f64; 8] = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0];
/// Robust accuracy allowed at the largest epsilon.
const NEARLY_ZERO: f64 = 0.02;

/// A point of the curve.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Largest perturbation.
    pub epsilon: Fraction,
    /// Epsilon as a number.
    pub value: f64,
    /// Share of images that are robust.
    pub robust_accuracy: f64,
    /// Its 95 % interval.
    pub interval_95: (f64, f64),
}

/// Returns APGD attacks on cross entropy with increasing epsilon. An image fooled at one epsilon also counts as fooled
/// at every larger one, since the smaller ball is part of the larger one.
pub fn attacks(settings: &Settings) -> Vec<Attack> {
    let multiples = MULTIPLES.iter().filter(|multiple| **multiple > 0.0);
    let at = |multiple: &f64| {
        let epsilon = match *multiple {
            1.0 => settings.epsilon.clone(),
            multiple => settings.epsilon.times(multiple),
        };
        let whole: Fraction = "1".parse().expect("a number");
        let is_whole = settings.norm == Norm::Linf && epsilon.value() > 1.0;
        let epsilon = if is_whole { whole } else { epsilon };
        let settings = Settings {
            epsilon,
            restarts: Some(1),
            ..settings.clone()
        };
        settings.attack("apgd-ce").expect("a known name")
    };
    let mut attacks: Vec<Attack> = multiples.map(at).collect();
    // Drops the duplicates left by clamping to the pixel range.
    attacks.dedup_by(|next, last| next.epsilon() == last.epsilon());
    attacks
}

/// Returns the curve from the outcome of an evaluation with [`attacks`].
pub fn points(outcome: &Outcome, attacks: &[Attack]) -> Vec<Point> {
    let zero: Fraction = "0".parse().expect("a number");
    let epsilons = std::iter::once(&zero).chain(attacks.iter().filter_map(Attack::epsilon));
    let points = epsilons
        .zip(&outcome.stages)
        .enumerate()
        .map(|(index, (epsilon, stage))| Point {
            epsilon: epsilon.clone(),
            value: epsilon.value(),
            robust_accuracy: outcome.accuracy_after(index),
            interval_95: wilson(stage.robust_count, outcome.robust.len()),
        });
    points.collect()
}

/// Returns a flag if the curve does not fall to about zero.
pub fn check(points: &[Point]) -> Option<Flag> {
    let last = points.last()?;
    let message = format!(
        "{:.1} % of the images are still robust at epsilon {}, where almost none can be: the attack fails because \
         gradients are masked or rounded away",
        100.0 * last.robust_accuracy,
        last.epsilon
    );
    (last.robust_accuracy > NEARLY_ZERO).then(|| Flag::new("masked_gradients", message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::autoattack::Version;

    #[test]
    fn the_curve_ends_at_the_pixel_range() {
        let epsilons = |norm, epsilon: &str| -> Vec<f64> {
            let settings = Settings::new(Version::Standard, norm, epsilon.parse().unwrap());
            let attacks = attacks(&settings);
            attacks
                .iter()
                .map(|a| a.epsilon().unwrap().value())
                .collect()
        };
        assert_eq!(
            epsilons(Norm::Linf, "0.1"),
            [0.025, 0.05, 0.1, 0.15000000000000002, 0.2, 0.4, 0.8]
        );
        assert_eq!(
            epsilons(Norm::Linf, "0.6"),
            [0.15, 0.3, 0.6, 0.8999999999999999, 1.0]
        );
        assert_eq!(epsilons(Norm::L2, "0.5").last(), Some(&4.0));
    }
}
