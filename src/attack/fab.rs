//! Fast adaptive boundary: looks for the nearest point where the decision changes.
//!
//! From where an image is, the decision is taken to be linear; the next point lies on the boundary of
//! that linear decision, near both the last point and the clean image. What was found beyond the real
//! boundary is pulled back towards the clean image.
//!
//! Source: Croce and Hein 2020 (arXiv:1907.02044), algorithm 1. Iterates are held to the reference
//! program's by `tests/attacks.rs`.
//! Differs from the reference: the pass that tells whether a new point is misclassified also gives the
//! gradient there, unless the point is pulled back; an image is finished when it is fooled within epsilon.

use burn::tensor::Tensor;
use rayon::prelude::*;
use serde::Serialize;

use super::attempt::{Adversarials, Attempt, Batch, Mark, images_of, in_turn};
use super::draws::Draws;
use super::hyperplane;
use super::objective::Goal;
use super::target_model::{Logits, Passes, TargetModel};
use super::threat::Norm;
use crate::ops::from_vec;
use crate::rng::Purpose;
use crate::units::Fraction;

/// Fast adaptive boundary attack.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fab {
    /// The norm of perturbations.
    pub norm: Norm,
    /// Perturbations up to this count.
    pub epsilon: Fraction,
    /// Towards so many classes in turn, those that the clean image is taken for next; `None`: towards
    /// the class that seems nearest at each step, which needs the gradients of all.
    pub targets: Option<u64>,
    /// Steps of a run.
    pub steps: u64,
    /// Runs from each start: the first from the image, others from random points.
    pub restarts: u64,
}

/// The largest weight of the clean image's projection.
const LARGEST_PULL: f64 = 0.1;
/// How far beyond the projection to go.
const OVERSHOOT: f64 = 1.05;
/// What is left of the perturbation when a misclassified point is pulled back.
const PULLED_BACK: f64 = 0.9;

impl Fab {
    /// `fab` or `fab-t`.
    pub fn name(&self) -> &'static str {
        if self.targets.is_some() {
            "fab-t"
        } else {
            "fab"
        }
    }

    /// The most passes that an image can cost.
    pub fn most_passes(&self, classes: usize) -> Passes {
        let others = classes.saturating_sub(1) as u64;
        let (runs, gradients) = match self.targets {
            Some(targets) => (targets.min(others), 1),
            None => (1, others),
        };
        let looks = runs
            .saturating_mul(self.restarts)
            .saturating_mul(self.steps);
        Passes {
            forward: looks.saturating_mul(1 + gradients),
            backward: looks.saturating_mul(gradients),
        }
    }

    /// Looks for the boundary from every start, towards every target, on the images that stand; see
    /// [`crate::attack::Attack::go_on`].
    pub(crate) fn go_on(
        &self,
        classifier: &TargetModel,
        batch: &Batch,
        marks: &[Option<Mark>],
    ) -> Attempt {
        in_turn(
            classifier,
            batch,
            marks,
            self.targets,
            self.restarts,
            |run, batch, targets| {
                let draws = Draws::new(batch.seed, &batch.keys, Purpose::Fab);
                let hunt = |(index, clean): (usize, Vec<f32>)| {
                    let mut at = clean.clone();
                    if run.restart > 0 {
                        let noise = self
                            .norm
                            .noise(&mut draws.stream(index, run.number, 0), clean.len());
                        let epsilon = self.epsilon.value().min(self.norm.longest(clean.len()));
                        let half = 0.5 * epsilon as f32;
                        let pairs = at.iter_mut().zip(noise);
                        pairs.for_each(|(at, noise)| *at = (*at + half * noise).clamp(0.0, 1.0));
                    }
                    Hunt {
                        place: index,
                        label: batch.labels[index] as usize,
                        target: targets[index],
                        clean,
                        at,
                        difference: 0.0,
                        normal: Vec::new(),
                        is_linear: false,
                        crosses: false,
                    }
                };
                let clean = images_of(batch.images.clone()).into_iter();
                let [_, channels, height, width] = batch.images.dims();
                let model = Model {
                    classifier,
                    norm: self.norm,
                    dims: [channels, height, width],
                };
                self.run(&model, clean.enumerate().map(hunt).collect())
            },
        )
    }

    /// One run of each hunt; the images that were fooled within epsilon.
    fn run(&self, model: &Model, mut hunts: Vec<Hunt>) -> Adversarials {
        let mut found: Adversarials = vec![None; hunts.len()];
        model.linearise(&mut hunts.iter_mut().collect::<Vec<_>>());
        for step in 1..=self.steps {
            if hunts.is_empty() || model.classifier.is_stopped() {
                break;
            }
            hunts
                .par_iter_mut()
                .for_each(|hunt| hunt.approach(self.norm));
            // Whoever crossed the boundary at the last step will likely cross it again and be pulled back: then
            // the gradient beyond is not needed. A guess costs or saves a pass and changes no result.
            let is_last = step == self.steps;
            let (mut likely, mut unlikely): (Vec<_>, Vec<_>) =
                hunts.iter_mut().partition(|hunt| is_last || hunt.crosses);
            let logits = model.look(&likely);
            for (row, hunt) in likely.iter_mut().enumerate() {
                hunt.settle(logits.is_right(row, hunt.label), false);
            }
            let logits = model.linearise(&mut unlikely);
            for (row, hunt) in unlikely.iter_mut().enumerate() {
                hunt.settle(logits.is_right(row, hunt.label), true);
            }
            let epsilon = self.epsilon.value();
            hunts.retain_mut(|hunt| {
                let fooled = hunt.crosses && self.norm.distance(&hunt.at, &hunt.clean) <= epsilon;
                if fooled {
                    found[hunt.place] = Some(std::mem::take(&mut hunt.at));
                } else if hunt.crosses {
                    hunt.pull_back();
                }
                !fooled
            });
            let mut stale: Vec<&mut Hunt> =
                hunts.iter_mut().filter(|hunt| !hunt.is_linear).collect();
            if !is_last {
                model.linearise(&mut stale);
            }
        }
        found
    }
}

/// One image's way to the boundary.
struct Hunt {
    /// Its place in the batch.
    place: usize,
    label: usize,
    target: Option<usize>,
    clean: Vec<f32>,
    at: Vec<f32>,
    /// At `at`: the other class's logit less the label's, and its gradient.
    difference: f64,
    normal: Vec<f32>,
    /// Whether these belong to `at`.
    is_linear: bool,
    /// Whether `at` is misclassified.
    crosses: bool,
}

impl Hunt {
    /// Goes to the boundary of the linear decision, from `at` and a little from the clean image.
    fn approach(&mut self, norm: Norm) {
        let of_clean = {
            let pairs = self.clean.iter().zip(&self.at).zip(&self.normal);
            let terms =
                pairs.map(|((clean, at), n)| (f64::from(*clean) - f64::from(*at)) * f64::from(*n));
            self.difference + terms.sum::<f64>()
        };
        let from_at = hyperplane::project(norm, &self.at, &self.normal, self.difference);
        let from_clean = hyperplane::project(norm, &self.clean, &self.normal, of_clean);
        let length = |change: &[f32]| norm.length(change.iter().map(|d| f64::from(*d))).max(1e-8);
        let (near, far) = (length(&from_at), length(&from_clean));
        let pull = (near / (near + far)).min(LARGEST_PULL);
        let changes = from_at.iter().zip(&from_clean);
        for ((at, clean), (d1, d2)) in self.at.iter_mut().zip(&self.clean).zip(changes) {
            let by_at = f64::from(*at) + OVERSHOOT * f64::from(*d1);
            let by_clean = f64::from(*clean) + OVERSHOOT * f64::from(*d2);
            *at = (by_at * (1.0 - pull) + by_clean * pull).clamp(0.0, 1.0) as f32;
        }
        self.is_linear = false;
    }

    /// Books what the model says about `at`, and whether it was linearised there.
    fn settle(&mut self, is_right: bool, is_linear: bool) {
        self.crosses = !is_right;
        self.is_linear = is_linear;
    }

    fn pull_back(&mut self) {
        for (at, clean) in self.at.iter_mut().zip(&self.clean) {
            *at = clean + (*at - clean) * PULLED_BACK as f32;
        }
        self.is_linear = false;
    }
}

/// The classifier as the hunts use it.
struct Model<'a> {
    classifier: &'a TargetModel<'a>,
    norm: Norm,
    dims: [usize; 3],
}

impl Model<'_> {
    fn images(&self, hunts: &[&mut Hunt]) -> Tensor<4> {
        let [channels, height, width] = self.dims;
        let pixels = hunts
            .iter()
            .flat_map(|hunt| hunt.at.iter().copied())
            .collect();
        from_vec(
            pixels,
            [hunts.len(), channels, height, width],
            self.classifier.device(),
        )
    }

    /// What the model says where the hunts are.
    fn look(&self, hunts: &[&mut Hunt]) -> Logits {
        match hunts.is_empty() {
            true => Logits::new(Vec::new(), 0),
            false => self.classifier.logits(self.images(hunts)),
        }
    }

    /// The same, and the linear decision there.
    fn linearise(&self, hunts: &mut [&mut Hunt]) -> Logits {
        if hunts.is_empty() {
            return Logits::new(Vec::new(), 0);
        }
        let images = self.images(hunts);
        // Without a rival, or with logits that are not finite, there is no decision to cross.
        for hunt in hunts.iter_mut() {
            (hunt.difference, hunt.normal) = (0.0, vec![0.0; hunt.at.len()]);
            hunt.is_linear = true;
        }
        // Targeted: one rival each. Else every class is a rival, the label's own standing in for nothing.
        let is_targeted = hunts[0].target.is_some();
        let mut nearest = vec![f64::INFINITY; hunts.len()];
        let mut first = None;
        for rival in 0.. {
            let goal = |hunt: &&mut Hunt| Goal::Difference {
                label: hunt.label,
                target: hunt.target.unwrap_or(rival),
            };
            let goals: Vec<Goal> = hunts.iter().map(goal).collect();
            let slope = self.classifier.climb(images.clone(), &goals);
            let classes = slope.logits.classes();
            let gradients = images_of(slope.gradient);
            let seen = slope.losses.into_iter().zip(gradients);
            for ((hunt, nearest), (difference, normal)) in
                hunts.iter_mut().zip(&mut nearest).zip(seen)
            {
                if hunt.target.is_none() && hunt.label == rival {
                    continue;
                }
                let distance = difference.abs() / (1e-12 + dual_length(self.norm, &normal));
                if distance < *nearest {
                    *nearest = distance;
                    (hunt.difference, hunt.normal) = (difference, normal);
                }
            }
            first = first.or(Some(slope.logits));
            if is_targeted || rival + 1 >= classes || self.classifier.is_stopped() {
                break;
            }
        }
        first.unwrap_or(Logits::new(Vec::new(), 0))
    }
}

/// The length of a gradient in the dual norm: how much a move of length 1 changes the value.
fn dual_length(norm: Norm, gradient: &[f32]) -> f64 {
    let dual = match norm {
        Norm::Linf => Norm::L1,
        Norm::L2 => Norm::L2,
        Norm::L1 => Norm::Linf,
    };
    dual.length(gradient.iter().map(|slope| f64::from(*slope)))
}
