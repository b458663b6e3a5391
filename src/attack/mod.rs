//! Attacks: each climbs a loss from given images without leaving a threat model.
//!
//! An attack gets images in [0, 1] and a function to fool. It knows no model, no mean, no data set.
//!
//! | attack | climbs | norms |
//! |---|---|---|
//! | [`Pgd`] | any loss, fixed steps; the attack of training | linf, l2, l1 |
//! | [`Apgd`] | cross entropy or the ratio of logits, with steps that adapt | linf, l2, l1 |
//! | [`Fab`] | nothing: looks for the least change of the decision | linf, l2, l1 |
//! | [`Square`] | the margin, by random search without gradients | linf, l2, l1 |

pub mod apgd;
pub mod attempt;
pub mod draws;
pub mod fab;
pub mod gradient;
pub mod hyperplane;
pub mod l1;
pub mod objective;
pub mod pgd;
pub mod square;
pub mod target_model;
pub mod threat;

pub use apgd::{Apgd, Climbs};
pub use attempt::{Adversarials, Attempt, Batch, Mark};
pub use draws::Draws;
pub use fab::Fab;
pub use gradient::{input_gradient, pull};
pub use objective::Goal;
pub use pgd::{Pgd, Start};
pub use square::Square;
pub use target_model::{Logits, Network, Passes, TargetModel};
pub use threat::{Ball, Norm};

use burn::tensor::Tensor;
use serde::Serialize;

use crate::ops::{Device, zeros};
use crate::rng::Purpose;
use crate::units::Fraction;

use attempt::images_of;

/// An attack of an evaluation.
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
}

impl Attack {
    /// `apgd-ce`, as tables call it.
    pub fn name(&self) -> String {
        match self {
            Self::Pgd(attack) => attack.name(),
            Self::Apgd(attack) => attack.name().to_owned(),
            Self::Fab(attack) => attack.name().to_owned(),
            Self::Square(_) => "square".to_owned(),
        }
    }

    /// The norm that bounds the perturbation.
    pub fn norm(&self) -> Norm {
        match self {
            Self::Pgd(attack) => attack.norm,
            Self::Apgd(attack) => attack.norm,
            Self::Fab(attack) => attack.norm,
            Self::Square(attack) => attack.norm,
        }
    }

    /// Largest perturbation.
    pub fn epsilon(&self) -> &Fraction {
        match self {
            Self::Pgd(attack) => &attack.epsilon,
            Self::Apgd(attack) => &attack.epsilon,
            Self::Fab(attack) => &attack.epsilon,
            Self::Square(attack) => &attack.epsilon,
        }
    }

    /// The most passes that an image with `classes` classes can cost.
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
        }
    }

    /// Tries to fool the classifier about each image of a batch, inside epsilon.
    ///
    /// Whether an image is fooled does not depend on the others of the batch.
    pub fn perturb(&self, classifier: &TargetModel, batch: &Batch) -> Adversarials {
        self.go_on(classifier, batch, &[]).found
    }

    /// The same from where an earlier attempt was stopped: with the marks that it left, as many as there are images.
    ///
    /// Once the classifier says stop, what is in hand is left undone, and [`TargetModel::forget_passes`] forgets its
    /// passes: attempts that were stopped find the same with the same number of passes.
    pub fn go_on(
        &self,
        classifier: &TargetModel,
        batch: &Batch,
        marks: &[Option<Mark>],
    ) -> Attempt {
        let [count, channels, height, width] = batch.images.dims();
        let is_empty = count * channels * height * width == 0;
        if is_empty || self.epsilon().value() <= 0.0 {
            return Attempt::nothing(count);
        }
        match self {
            Self::Pgd(attack) => climb_cross_entropy(attack, classifier, batch),
            Self::Apgd(attack) => attack.go_on(classifier, batch, marks),
            Self::Fab(attack) => attack.go_on(classifier, batch, marks),
            Self::Square(attack) => attack.go_on(classifier, batch, marks),
        }
    }
}

/// PGD on the cross entropy with the labels; its last iterate is what counts.
fn climb_cross_entropy(attack: &Pgd, classifier: &TargetModel, batch: &Batch) -> Attempt {
    let labels = batch.labels.iter();
    let goals: Vec<Goal> = labels
        .map(|label| Goal::CrossEntropy {
            label: *label as usize,
        })
        .collect();
    let gradient = |images: Tensor<4>| match classifier.is_stopped() {
        // What is left of the climb is thrown away.
        true => zeros(images.dims(), &Device::of(&images)),
        false => classifier.climb(images, &goals).gradient,
    };
    let draws = Draws::new(batch.seed, &batch.keys, Purpose::AttackStart);
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
    use crate::eval::autoattack::{ATTACKS, Settings, Version};
    use crate::ops::{Device, from_vec};
    use crate::rng::Rng;

    const CLASSES: usize = 5;

    fn draw(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed, Purpose::Bench, 0, 0);
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

    /// An attempt that is stopped after so many passes of the model, which grow until it is done.
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
    fn an_attack_that_is_stopped_and_goes_on_finds_the_same_with_as_many_passes() {
        let batch = batch();
        let (mut fell, mut tried) = (0, 0);
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
                fell += whole.iter().flatten().count() * usize::from(name != "pgd");
                tried += whole.len() * usize::from(name != "pgd");
                assert_eq!(passes, classifier.take_passes(), "{name}");
            }
        }
        assert!(0 < fell && fell < tried, "{fell} of {tried}");
    }
}
