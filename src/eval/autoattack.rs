//! AutoAttack, the standard robustness evaluation with four attacks.
//!
//! The attacks run in this order, each on the images that survived the previous ones. The share that survives the last
//! one is the robust accuracy.
//!
//! | attack | maximizes | linf and l2 | l1 |
//! |---|---|---|---|
//! | `apgd-ce` | cross entropy | 100 steps, 1 start | 100 steps from three times epsilon, 5 starts |
//! | `apgd-t` | targeted DLR loss | 100 steps, 9 targets | 100 steps from three times epsilon, 5 targets |
//! | `fab-t` | nothing: finds a minimal perturbation | 100 steps, 9 targets | 100 steps, 9 targets |
//! | `square` | margin loss, without gradients | 5000 queries | 5000 queries |
//!
//! The fast version runs `fab-t` and `square` on a random sample of the images that survive `apgd-t`, with an exact bound
//! on what it misses ([`crate::eval::bound`]).
//!
//! Requires logits, not probabilities, and more classes than targets. [`crate::eval::checks`] flags violations.
//! Source: Croce and Hein 2020 (arXiv:2003.01690); for l1, 2021 (arXiv:2103.01208).

use super::bound::{self, Sample};
use crate::attack::{Apgd, Attack, Climbs, Fab, Norm, Pgd, Ranking, Square, Start};
use crate::settings::{nearest, words};
use crate::units::Fraction;

words! {
    /// Version of AutoAttack, which selects its attacks.
    pub enum Version {
        /// The version used by leaderboards.
        Standard = "standard",
        /// More restarts and untargeted attacks.
        Plus = "plus",
        /// For models with random outputs: gradients are averaged over 20 evaluations.
        Rand = "rand",
        /// Standard with fab-t and square on a sample, and a bound on what it misses.
        Fast = "fast",
    }
}

impl Version {
    /// Returns the names of its attacks, in order.
    pub fn attacks(self) -> &'static [&'static str] {
        match self {
            Self::Standard | Self::Fast => &["apgd-ce", "apgd-t", "fab-t", "square"],
            Self::Plus => &["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
            Self::Rand => &["apgd-ce", "apgd-dlr"],
        }
    }

    /// Returns the names of those of its attacks that run on a sample only: the last ones.
    pub fn sampled(self) -> &'static [&'static str] {
        match self {
            Self::Fast => &self.attacks()[2..],
            _ => &[],
        }
    }

    /// Returns whether its attacks have the settings of the standard version.
    fn is_like_standard(self) -> bool {
        matches!(self, Self::Standard | Self::Fast)
    }
}

/// The names of all attacks.
pub const ATTACKS: [&str; 9] = [
    "pgd", "apgd-ce", "apgd-dlr", "apgd-t", "malt", "pma", "fab", "fab-t", "square",
];

/// Number of classes that MALT ranks.
const MALT_CANDIDATES: u64 = 100;

/// Attacks to run in order, and which of them run on a sample of the images.
#[derive(Clone, Debug, PartialEq)]
pub struct Suite {
    /// The attacks.
    pub attacks: Vec<Attack>,
    /// The attacks that run on a sample only, from the first one on; None if all run on all remaining images.
    pub sample: Option<Sample>,
}

/// Settings of the attacks. AutoAttack's defaults apply where a value is None.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The version that supplies the defaults.
    pub version: Version,
    /// The norm that bounds perturbations.
    pub norm: Norm,
    /// Largest perturbation.
    pub epsilon: Fraction,
    /// Step size of PGD; a quarter of epsilon if None, as in the paper's PGD-20.
    pub step_size: Option<Fraction>,
    /// Steps of PGD (default 20), APGD and FAB (default 100).
    pub steps: Option<u64>,
    /// Number of target classes of the targeted attacks.
    pub targets: Option<u64>,
    /// Restarts of APGD and FAB.
    pub restarts: Option<u64>,
    /// Queries of Square (default 5000).
    pub queries: Option<u64>,
    /// Fast version: largest difference to the standard version if no sampled image is fooled, in percentage points
    /// (default 0.4).
    pub bound: Option<f64>,
}

impl Settings {
    /// Returns the settings of AutoAttack as published.
    pub fn new(version: Version, norm: Norm, epsilon: Fraction) -> Self {
        Self {
            version,
            norm,
            epsilon,
            step_size: None,
            steps: None,
            targets: None,
            restarts: None,
            queries: None,
            bound: None,
        }
    }

    /// Returns the attacks of the version.
    pub fn autoattack(&self) -> Vec<Attack> {
        let names = self.version.attacks().iter();
        names
            .map(|name| self.attack(name).expect("versions name attacks"))
            .collect()
    }

    /// Returns the named attacks in order. A name is any of [`ATTACKS`], `autoattack` for all attacks of the version,
    /// or `clean`, which is accepted and ignored because clean accuracy is always computed first.
    ///
    /// Errors: the first unknown name, with a hint.
    pub fn named(&self, words: &[String]) -> Result<Suite, (String, String)> {
        let (mut attacks, mut sample) = (Vec::new(), None);
        for word in words {
            match &word[..] {
                "clean" => {}
                "autoattack" => {
                    attacks.extend(self.autoattack());
                    let sampled = self.version.sampled().len();
                    if sampled > 0 && sample.is_none() {
                        let first = attacks.len() - sampled;
                        let points = self.bound.unwrap_or(bound::POINTS);
                        sample = Some(Sample { first, points });
                    }
                }
                word => attacks.push(self.attack(word).ok_or_else(|| {
                    let known = [&ATTACKS[..], &["clean", "autoattack"]].concat();
                    let hint = match nearest(word, &known) {
                        Some(near) => format!("did you mean `{near}`?"),
                        None => format!("use any of {}", known.join(", ")),
                    };
                    (word.to_owned(), hint)
                })?),
            }
        }
        Ok(Suite { attacks, sample })
    }

    /// Returns the attack with the given name, one of [`ATTACKS`].
    pub fn attack(&self, name: &str) -> Option<Attack> {
        let (norm, epsilon) = (self.norm, self.epsilon.clone());
        let is_l1 = norm == Norm::L1;
        let steps = self.steps.unwrap_or(100);
        let standard = self.version.is_like_standard();
        let restarts = |most: u64| self.restarts.unwrap_or(most);
        let apgd = |climbs, most| {
            Attack::Apgd(Apgd {
                norm,
                epsilon: epsilon.clone(),
                climbs,
                steps,
                restarts: restarts(most),
                averages: if self.version == Version::Rand { 20 } else { 1 },
                // Only the standard version enlarges the l1 ball, as in the reference.
                enlarged: is_l1 && standard,
            })
        };
        let untargeted = match self.version {
            Version::Standard | Version::Fast => {
                if is_l1 {
                    5
                } else {
                    1
                }
            }
            Version::Plus => 5,
            Version::Rand => 1,
        };
        let fab = |targets, most| {
            let restarts = restarts(most);
            Attack::Fab(Fab {
                norm,
                epsilon: epsilon.clone(),
                targets,
                steps,
                restarts,
            })
        };
        let targets = |count| self.targets.unwrap_or(count);
        Some(match name {
            "pgd" => Attack::Pgd(Pgd {
                norm,
                step_size: self
                    .step_size
                    .clone()
                    .unwrap_or_else(|| epsilon.times(0.25)),
                epsilon: epsilon.clone(),
                steps: self.steps.unwrap_or(20),
                start: Start::Random,
            }),
            "apgd-ce" => apgd(Climbs::CrossEntropy, untargeted),
            "apgd-dlr" => apgd(Climbs::Dlr, untargeted),
            "apgd-t" => {
                let targets = targets(if is_l1 && standard { 5 } else { 9 });
                let ranking = Ranking::Logit;
                apgd(Climbs::TargetedDlr { targets, ranking }, 1)
            }
            "malt" => {
                let ranking = Ranking::Malt {
                    candidates: MALT_CANDIDATES,
                };
                let targets = targets(9);
                apgd(Climbs::TargetedDlr { targets, ranking }, 1)
            }
            "pma" => apgd(Climbs::ProbabilityMargin, untargeted),
            "fab" => fab(None, 5),
            "fab-t" => fab(Some(targets(9)), 1),
            "square" => Attack::Square(Square {
                norm,
                epsilon,
                queries: self.queries.unwrap_or(5000),
            }),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::Passes;

    #[test]
    fn the_standard_version_has_the_published_settings() {
        let of =
            |norm| Settings::new(Version::Standard, norm, "8/255".parse().unwrap()).autoattack();
        let passes = |norm| -> Vec<u64> {
            of(norm)
                .iter()
                .map(|attack| attack.most_passes(1000).forward)
                .collect()
        };
        assert_eq!(passes(Norm::Linf), [101, 9 * 101, 9 * 200, 5001]);
        assert_eq!(passes(Norm::L1), [5 * 101, 5 * 101, 9 * 200, 5001]);
        let names: Vec<String> = of(Norm::L2).iter().map(Attack::name).collect();
        assert_eq!(names, Version::Standard.attacks());
    }

    #[test]
    fn the_fast_version_has_the_settings_of_the_standard_version_and_a_sample() {
        for norm in [Norm::Linf, Norm::L2, Norm::L1] {
            let of = |version| Settings::new(version, norm, "0.1".parse().unwrap());
            let words = ["pgd".to_owned(), "autoattack".to_owned()];
            let [fast, standard] = [Version::Fast, Version::Standard]
                .map(|version| of(version).named(&words).unwrap());
            assert_eq!(fast.attacks, standard.attacks);
            assert_eq!(standard.sample, None);
            let (first, points) = (3, 0.4);
            assert_eq!(fast.sample, Some(Sample { first, points }));
            assert_eq!(fast.attacks[first].name(), "fab-t");
            let named = of(Version::Fast).named(&["apgd-ce".to_owned(), "fab-t".to_owned()]);
            assert_eq!(named.unwrap().sample, None);
        }
    }

    #[test]
    fn malt_has_the_published_settings() {
        let settings = Settings::new(Version::Standard, Norm::Linf, "4/255".parse().unwrap());
        let malt = settings.attack("malt").unwrap();
        let Passes { forward, backward } = malt.most_passes(1000);
        assert_eq!((forward, backward), (9 * 101 + 101, 9 * 100 + 100));
        let settings = serde_json::to_value(&malt).unwrap();
        let climbs = serde_json::json!({ "targeted_dlr": { "targets": 9, "ranking": { "malt": { "candidates": 100 } } } });
        assert_eq!(settings["climbs"], climbs);
    }

    #[test]
    fn every_name_is_an_attack() {
        let settings = Settings::new(Version::Plus, Norm::Linf, "0.1".parse().unwrap());
        for name in ATTACKS {
            let found = settings.attack(name).unwrap().name();
            assert!(found.starts_with(name), "{found} is not {name}");
        }
        assert!(settings.attack("pdg").is_none());
    }
}
