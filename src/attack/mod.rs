//! Attacks, which maximize a loss within a threat model.
//!
//! An attack takes images in [0, 1] and a function from images to logits. It is independent of models, normalization
//! and data sets.
//!
//! | attack | maximizes | norms |
//! |---|---|---|
//! | [`Pgd`] | any loss, with a fixed step size; the attack used in training | linf, l2, l1 |
//! | [`Apgd`] | cross entropy, DLR loss (also targeted: MALT) or margin of probabilities (PMA), with adaptive steps | linf, l2, l1 |
//! | [`Fab`] | nothing: finds a minimal perturbation that changes the decision | linf, l2, l1 |
//! | [`Square`] | the margin loss, by random search without gradients | linf, l2, l1 |
//! | [`Unseen`] | cross entropy, over the parameters of a corruption | none |

pub mod apgd;
pub mod attempt;
pub mod batch;
pub(crate) mod closest;
pub mod draws;
pub mod fab;
pub mod gradient;
pub mod hyperplane;
pub mod l1;
pub mod objective;
pub mod pgd;
pub mod square;
pub mod target_model;
pub mod targets;
pub mod threat;
pub mod unseen;

pub use apgd::{Apgd, Climbs};
pub use attempt::{Adversarials, Attempt, Batch, Mark};
pub use batch::{Algorithm, BatchAttack, Combine};
pub use draws::Draws;
pub use fab::Fab;
pub use gradient::{AttackLoss, input_gradient, pull};
pub use objective::Goal;
pub use pgd::{Pgd, Start};
pub use square::Square;
pub use target_model::{Logits, Network, Passes, TargetModel};
pub use targets::{Ranking, Targets};
pub use threat::{Ball, Norm};
pub use unseen::Unseen;

use burn::tensor::Tensor;
use serde::Serialize;

use crate::ops::{Device, zeros};
use crate::rng::AttackKind;
use crate::units::Fraction;

use attempt::images_of;

/// An evaluation attack.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Attack {
    /// Projected gradient ascent.
    Pgd(Pgd),
    /// Auto-PGD.
    Apgd(Apgd),
    /// Fast adaptive boundary.
    Fab(Fab),
    /// Square attack.
    Square(Square),
    /// Ascent over the parameters of a corruption.
    Unseen(Unseen),
}

impl Attack {
    /// Returns the attack's name as shown in tables, such as `apgd-ce`.
    pub fn name(&self) -> String {
        match self {
            Self::Pgd(attack) => attack.name(),
            Self::Apgd(attack) => attack.name().to_owned(),
            Self::Fab(attack) => attack.name().to_owned(),
            Self::Square(_) => "square".to_owned(),
            Self::Unseen(attack) => attack.name().to_owned(),
        }
    }

    /// Returns the norm that bounds the perturbation; None for an unseen attack, which bounds its parameters instead.
    pub fn norm(&self) -> Option<Norm> {
        Some(match self {
            Self::Pgd(attack) => attack.norm,
            Self::Apgd(attack) => attack.norm,
            Self::Fab(attack) => attack.norm,
            Self::Square(attack) => attack.norm,
            Self::Unseen(_) => return None,
        })
    }

    /// Returns the largest perturbation in that norm.
    pub fn epsilon(&self) -> Option<&Fraction> {
        Some(match self {
            Self::Pgd(attack) => &attack.epsilon,
            Self::Apgd(attack) => &attack.epsilon,
            Self::Fab(attack) => &attack.epsilon,
            Self::Square(attack) => &attack.epsilon,
            Self::Unseen(_) => return None,
        })
    }

    /// Returns the maximum number of passes per image, for a model with `classes` classes.
    pub fn most_passes(&self, classes: usize) -> Passes {
        match self {
            Self::Pgd(attack) => Passes {
                forward: attack.steps,
                backward: attack.steps,
            },
            Self::Apgd(attack) => attack.most_passes(classes),
            Self::Fab(attack) => attack.most_passes(classes),
            Self::Square(attack) => Passes {
                forward: attack.queries.saturating_add(1),
                backward: 0,
            },
            Self::Unseen(attack) => attack.most_passes(),
        }
    }

    /// Searches for an adversarial example within epsilon of each image of a batch.
    ///
    /// The result for an image does not depend on the other images of the batch.
    pub fn perturb(&self, classifier: &TargetModel, batch: &Batch) -> Adversarials {
        self.go_on(classifier, batch, &[]).found
    }

    /// Resumes a stopped attempt from the marks that it returned, one per image; without marks, starts a new attempt.
    ///
    /// When the classifier requests a stop, the unit of work in progress is abandoned, and
    /// [`TargetModel::forget_passes`] discards its passes. An interrupted and resumed attempt therefore gives the same
    /// results with the same number of passes.
    pub fn go_on(
        &self,
        classifier: &TargetModel,
        batch: &Batch,
        marks: &[Option<Mark>],
    ) -> Attempt {
        let [count, channels, height, width] = batch.images.dims();
        let is_empty = count * channels * height * width == 0;
        let is_still = self.epsilon().is_some_and(|epsilon| epsilon.value() <= 0.0);
        if is_empty || is_still {
            return Attempt::nothing(count);
        }
        match self {
            Self::Pgd(attack) => climb_cross_entropy(attack, classifier, batch),
            Self::Apgd(attack) => attack.go_on(classifier, batch, marks),
            Self::Fab(attack) => attack.go_on(classifier, batch, marks),
            Self::Square(attack) => attack.go_on(classifier, batch, marks),
            Self::Unseen(attack) => attack.go_on(classifier, batch),
        }
    }
}

/// Runs PGD on the cross entropy with the labels. The last iterate is the result.
fn climb_cross_entropy(attack: &Pgd, classifier: &TargetModel, batch: &Batch) -> Attempt {
    let labels = batch.labels.iter();
    let goals: Vec<Goal> = labels
        .map(|label| Goal::CrossEntropy {
            label: *label as usize,
        })
        .collect();
    let gradient = |images: Tensor<4>| match classifier.is_stopped() {
        // The rest of this run will be discarded.
        true => zeros(images.dims(), &Device::of(&images)),
        false => classifier.climb(images, &goals).gradient,
    };
    let draws = Draws::new(batch.seed, &batch.keys, AttackKind::Pgd);
    let last = attack.climb(batch.images.clone(), &gradient, &draws);
    let nothing = Attempt::nothing(batch.labels.len());
    match classifier.is_stopped() {
        true => Attempt {
            stopped: true,
            ..nothing
        },
        false => Attempt {
            found: images_of(last).into_iter().map(Some).collect(),
            ..nothing
        },
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::attack::unseen::{Corruption, Strength};
    use crate::eval::autoattack::{ATTACKS, Settings, Version};
    use crate::ops::{Device, from_vec};
    use crate::rng::{Rng, Stream};
    use crate::settings::Words;

    const CLASSES: usize = 5;

    fn draw(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed, Stream::Bench);
        (0..count).map(|_| rng.uniform()).collect()
    }

    /// Two layers on images of 3 x 4 x 4 pixels.
    fn logits(images: Tensor<4>) -> Tensor<2> {
        let device = Device::of(&images);
        let layer = |rows, columns, seed| {
            from_vec(draw(rows * columns, seed), [rows, columns], &device) - 0.5
        };
        let [batch, ..] = images.dims();
        let hidden = images.reshape([batch, 48]).matmul(layer(48, 8, 1)).tanh();
        hidden.matmul(layer(8, CLASSES, 2)) * 4.0
    }

    fn batch() -> Batch {
        let images = from_vec(draw(6 * 48, 3), [6, 3, 4, 4], &Device::cpu());
        Batch {
            labels: crate::loss::predictions(logits(images.clone())),
            images,
            keys: vec![4, 9, 2, 7, 0, 5],
            seed: 1,
        }
    }

    /// Runs an attack that is stopped after a growing number of passes until it completes. Returns the number of stops
    /// too.
    fn with_stops(attack: &Attack, batch: &Batch) -> (Adversarials, Passes, usize) {
        let device = Device::cpu();
        let mut found: Adversarials = vec![None; batch.labels.len()];
        let mut left: Vec<(usize, Option<Mark>)> = (0..found.len()).map(|i| (i, None)).collect();
        let (mut passes, mut stops) = (Passes::default(), 0);
        for limit in 1.. {
            let seen = Cell::new(0);
            let watch = |_| seen.set(seen.get() + 1);
            let stop = || seen.get() >= limit;
            let classifier = TargetModel::watched(&logits, &device, &watch).stopped_by(&stop);
            let (rows, marks): (Vec<usize>, Vec<Option<Mark>>) = left.drain(..).unzip();
            let attempt = attack.go_on(&classifier, &batch.select(&rows), &marks);
            if attempt.stopped {
                stops += 1;
                classifier.forget_passes();
                let marks = rows.iter().copied().zip(attempt.marks);
                let undone = marks.zip(&attempt.found);
                left = undone
                    .filter_map(|(mark, found)| found.is_none().then_some(mark))
                    .collect();
            }
            passes += classifier.take_passes();
            for (row, image) in rows.into_iter().zip(attempt.found) {
                found[row] = found[row].take().or(image);
            }
            if left.is_empty() {
                break;
            }
        }
        (found, passes, stops)
    }

    #[test]
    fn an_attack_resumed_after_stops_gives_the_same_result_with_the_same_number_of_passes() {
        let batch = batch();
        let (mut fooled, mut tried) = (0, 0);
        for (norm, epsilon) in [(Norm::Linf, "0.05"), (Norm::L2, "0.3"), (Norm::L1, "1.2")] {
            for name in ATTACKS {
                let settings = Settings {
                    steps: Some(6),
                    targets: Some(3),
                    restarts: Some(2),
                    queries: Some(40),
                    ..Settings::new(Version::Standard, norm, epsilon.parse().unwrap())
                };
                let attack = settings.attack(name).unwrap();
                let classifier = TargetModel::new(&logits, &Device::of(&batch.images));
                let whole = attack.perturb(&classifier, &batch);
                let (found, passes, stops) = with_stops(&attack, &batch);
                assert!(stops > 0, "{name}");
                assert!(found == whole, "{name}");
                fooled += whole.iter().flatten().count() * usize::from(name != "pgd");
                tried += whole.len() * usize::from(name != "pgd");
                assert_eq!(passes, classifier.take_passes(), "{name}");
            }
        }
        assert!(0 < fooled && fooled < tried, "{fooled} of {tried}");
    }

    #[test]
    fn an_unseen_attack_resumed_after_stops_gives_the_same_result() {
        let batch = batch();
        for corruption in Corruption::VALUES {
            let mut attack = Unseen::new(*corruption, Strength::High, 4);
            attack.steps = 5;
            let attack = Attack::Unseen(attack);
            let classifier = TargetModel::new(&logits, &Device::of(&batch.images));
            let whole = attack.perturb(&classifier, &batch);
            let (found, passes, stops) = with_stops(&attack, &batch);
            assert!(stops > 0 && found == whole, "{}", attack.name());
            assert_eq!(passes, classifier.take_passes(), "{}", attack.name());
        }
    }
}
