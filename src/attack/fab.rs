//! Fast adaptive boundary (FAB): searches for the nearest point on the decision boundary.
//!
//! Each step linearizes the decision at the current point and moves to the boundary of that linear decision, close to
//! both the current point and the clean image. Points beyond the real boundary are pulled back towards the clean image.
//!
//! Source: Croce and Hein 2020 (arXiv:1907.02044), algorithm 1. `tests/attacks.rs` compares iterates with the reference
//! program's.
//! Differs from the reference: the pass that checks whether a new point is misclassified also computes the gradient
//! there, unless the point is pulled back; an image is finished once it is fooled within epsilon.

use burn::tensor::Tensor;
use rayon::prelude::*;
use serde::Serialize;

use super::attempt::{Adversarials, Attempt, Batch, Mark, images_of, in_turn};
use super::closest::Closest;
use super::draws::Draws;
use super::gradient::select;
use super::hyperplane;
use super::objective::Goal;
use super::target_model::{Logits, Passes, TargetModel};
use super::targets::{Ranking, Targets};
use super::threat::Norm;
use crate::ops::{
    Device, add_clamped, fab_step, from_vec, pull_back, put_rows, replace_rows, to_vec, zeros,
};
use crate::rng::AttackKind;
use crate::units::Fraction;

/// Fast adaptive boundary attack.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fab {
    /// The norm of the perturbation.
    pub norm: Norm,
    /// Largest perturbation that counts as a success.
    pub epsilon: Fraction,
    /// Number of target classes, in turn: those with the largest other logits on the clean image. With `None`, each
    /// step targets the class with the nearest boundary, which needs the gradients of all classes.
    pub targets: Option<u64>,
    /// Steps per run.
    pub steps: u64,
    /// Number of starts: the first is the clean image, the others are random points.
    pub restarts: u64,
}

/// Largest weight of the projection from the clean image.
const LARGEST_PULL: f64 = 0.1;
/// Overshoot beyond the projection.
const OVERSHOOT: f64 = 1.05;
/// Share of the perturbation that is kept when a misclassified point is pulled back.
const PULLED_BACK: f64 = 0.9;

impl Fab {
    /// Returns `fab` or `fab-t`.
    pub fn name(&self) -> &'static str {
        if self.targets.is_some() {
            "fab-t"
        } else {
            "fab"
        }
    }

    /// Returns the maximum number of passes per image.
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

    /// Runs all restarts and targets on the images not yet fooled; see [`crate::attack::Attack::go_on`].
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
            self.targets.map(|count| Targets {
                count,
                ranking: Ranking::Logit,
                norm: self.norm,
            }),
            self.restarts,
            |run, batch, targets| {
                let clean = batch.images.clone();
                let hunt = |(place, label): (usize, &u32)| Hunt {
                    place,
                    label: *label as usize,
                    target: targets[place],
                    difference: 0.0,
                    is_linear: false,
                    crosses: false,
                    margin: f64::INFINITY,
                };
                let hunts = Hunts {
                    norm: self.norm,
                    at: match run.restart {
                        0 => clean.clone(),
                        _ => self.start(batch, run.number),
                    },
                    normal: clean.clone(),
                    closest: Closest::new(classifier, &clean),
                    clean,
                    each: batch.labels.iter().enumerate().map(hunt).collect(),
                };
                self.run(classifier, hunts)
            },
        )
    }

    /// Returns random points at half of epsilon from the clean images.
    fn start(&self, batch: &Batch, run: usize) -> Tensor<4> {
        let draws = Draws::new(batch.seed, &batch.keys, AttackKind::Fab);
        let (clean, shape) = (&batch.images, batch.images.dims());
        let pixels: usize = shape[1..].iter().product();
        let noise: Vec<Vec<f32>> = (0..shape[0])
            .into_par_iter()
            .map(|index| self.norm.noise(&mut draws.stream(index, run, 0), pixels))
            .collect();
        let noise = from_vec(noise.concat(), shape, &Device::of(clean));
        let epsilon = self.epsilon.value().min(self.norm.longest(pixels));
        add_clamped(clean.clone(), noise, 0.5 * epsilon as f32)
    }

    /// Runs each hunt once and returns the images that were fooled within epsilon.
    fn run(&self, classifier: &TargetModel, mut hunts: Hunts) -> Adversarials {
        let mut found: Adversarials = vec![None; hunts.each.len()];
        hunts.linearize(classifier, &hunts.rows(|_| true));
        for step in 1..=self.steps {
            if hunts.each.is_empty() || classifier.is_stopped() {
                break;
            }
            hunts.approach();
            // A point that crossed the boundary at the last step will likely cross it again and be pulled back, so its
            // gradient beyond the boundary is not needed. A wrong guess costs a pass but does not change the result.
            let is_last = step == self.steps;
            let likely = hunts.rows(|hunt| is_last || hunt.crosses);
            let unlikely = hunts.rows(|hunt| !(is_last || hunt.crosses));
            let logits = hunts.look(classifier, &likely);
            hunts.settle(&likely, &logits, false);
            let logits = hunts.linearize(classifier, &unlikely);
            hunts.settle(&unlikely, &logits, true);
            hunts.finish(classifier, self.epsilon.value(), &mut found);
            if !is_last {
                let stale = hunts.rows(|hunt| !hunt.is_linear);
                hunts.linearize(classifier, &stale);
            }
        }
        if let Some(closest) = hunts.closest.filter(|_| !classifier.is_stopped()) {
            let each = hunts.each.iter().map(|hunt| (hunt.place, hunt.label));
            closest.confirm(classifier, each, &mut found);
        }
        found
    }
}

/// One image's search for the boundary.
struct Hunt {
    /// Index in the batch.
    place: usize,
    label: usize,
    target: Option<usize>,
    /// Logit of the other class minus that of the label, at the current point.
    difference: f64,
    /// Whether `difference` and its gradient are those of the current point.
    is_linear: bool,
    /// Whether the current point is misclassified.
    crosses: bool,
    /// Margin of the current point.
    margin: f64,
}

/// A batch of hunts; row i of each tensor belongs to hunt i.
struct Hunts {
    norm: Norm,
    each: Vec<Hunt>,
    clean: Tensor<4>,
    at: Tensor<4>,
    /// Gradients of the differences.
    normal: Tensor<4>,
    /// With an approximate search: points within epsilon.
    closest: Option<Closest>,
}

impl Hunts {
    /// Returns the rows of the hunts that satisfy a predicate.
    fn rows(&self, which: impl Fn(&Hunt) -> bool) -> Vec<usize> {
        let rows = 0..self.each.len();
        rows.filter(|row| which(&self.each[*row])).collect()
    }

    /// Moves to the boundary of the linearized decision, combining the projections of the current point and, with a
    /// small weight, of the clean image.
    fn approach(&mut self) {
        let differences: Vec<f64> = self.each.iter().map(|hunt| hunt.difference).collect();
        let (norm, on_device) = (self.norm, self.norm.on_device());
        let moved = fab_step(on_device, &self.at, &self.clean, &self.normal, &differences);
        self.at = moved.unwrap_or_else(|| {
            let (shape, device) = (self.at.dims(), Device::of(&self.at));
            let pixels: usize = shape[1..].iter().product();
            let mut at = to_vec(self.at.clone());
            let [clean, normal] = [&self.clean, &self.normal].map(|rows| to_vec(rows.clone()));
            at.par_chunks_exact_mut(pixels)
                .zip(clean.par_chunks_exact(pixels))
                .zip(normal.par_chunks_exact(pixels))
                .zip(&differences)
                .for_each(|(((at, clean), normal), difference)| {
                    approach(norm, at, clean, normal, *difference);
                });
            from_vec(at, shape, &device)
        });
        for hunt in &mut self.each {
            hunt.is_linear = false;
        }
    }

    /// Returns the logits at the current points of some hunts.
    fn look(&self, classifier: &TargetModel, rows: &[usize]) -> Logits {
        match rows.is_empty() {
            true => Logits::new(Vec::new(), 0),
            false => classifier.search_logits(select(self.at.clone(), rows)),
        }
    }

    /// Records whether the current points of some hunts are misclassified, and whether they were linearized there.
    fn settle(&mut self, rows: &[usize], logits: &Logits, is_linear: bool) {
        for (seen, row) in rows.iter().enumerate() {
            let hunt = &mut self.each[*row];
            hunt.crosses = !logits.is_right(seen, hunt.label);
            hunt.margin = logits.margin(seen, hunt.label);
            hunt.is_linear = is_linear;
        }
    }

    /// Removes the images that are fooled within epsilon, and pulls back the other misclassified points.
    fn finish(&mut self, classifier: &TargetModel, epsilon: f64, found: &mut Adversarials) {
        if let Some(closest) = &mut self.closest {
            let distances = self.norm.distances(&self.at, &self.clean);
            let margins = self.each.iter().zip(distances);
            let margins = margins.map(|(hunt, distance)| match distance <= epsilon {
                true => hunt.margin,
                false => f64::INFINITY,
            });
            closest.see(&self.at, margins);
        }
        let crossing = self.rows(|hunt| hunt.crosses);
        if crossing.is_empty() {
            return;
        }
        let [at, clean] = [&self.at, &self.clean].map(|rows| select(rows.clone(), &crossing));
        let distances = self.norm.distances(&at, &clean);
        let near = crossing.iter().zip(distances);
        let mut fooled: Vec<usize> = near
            .filter_map(|(row, distance)| (distance <= epsilon).then_some(*row))
            .collect();
        if classifier.is_approximate() && !fooled.is_empty() {
            let logits = classifier.logits(select(self.at.clone(), &fooled));
            let mut seen = 0..;
            fooled.retain(|row| {
                let seen = seen.next().expect("endless");
                !logits.is_right(seen, self.each[*row].label)
            });
        }
        if !fooled.is_empty() {
            let images = images_of(select(self.at.clone(), &fooled));
            for (row, image) in fooled.iter().zip(images) {
                found[self.each[*row].place] = Some(image);
            }
            let remains = |row: &usize| fooled.binary_search(row).is_err();
            let kept: Vec<usize> = (0..self.each.len()).filter(remains).collect();
            let mut row = 0..;
            self.each.retain(|_| remains(&row.next().expect("endless")));
            for tensor in [&mut self.clean, &mut self.at, &mut self.normal] {
                *tensor = select(tensor.clone(), &kept);
            }
            if let Some(closest) = &mut self.closest {
                closest.keep(&kept);
            }
        }
        let pulled: Vec<bool> = self.each.iter().map(|hunt| hunt.crosses).collect();
        self.at = pull_back(self.at.clone(), &self.clean, &pulled, PULLED_BACK as f32);
        for hunt in self.each.iter_mut().filter(|hunt| hunt.crosses) {
            hunt.is_linear = false;
        }
    }

    /// Evaluates the model at the current points of some hunts and linearizes the decision there.
    fn linearize(&mut self, classifier: &TargetModel, rows: &[usize]) -> Logits {
        if rows.is_empty() {
            return Logits::new(Vec::new(), 0);
        }
        let images = select(self.at.clone(), rows);
        // Default: with no rival class, or with non-finite logits, there is no boundary to cross.
        for row in rows {
            let hunt = &mut self.each[*row];
            (hunt.difference, hunt.is_linear) = (0.0, true);
        }
        let mut normals = zeros(images.dims(), &Device::of(&images));
        // Targeted: one rival per image. Untargeted: every class is a rival except the label, which is skipped below.
        let is_targeted = self.each[rows[0]].target.is_some();
        let mut nearest = vec![f64::INFINITY; rows.len()];
        let mut first = None;
        for rival in 0.. {
            let goal = |row: &usize| {
                let hunt = &self.each[*row];
                Goal::Difference {
                    label: hunt.label,
                    target: hunt.target.unwrap_or(rival),
                }
            };
            let goals: Vec<Goal> = rows.iter().map(goal).collect();
            let slope = classifier.climb(images.clone(), &goals);
            let classes = slope.logits.classes();
            let lengths = match is_targeted {
                // With a single rival the distance only has to be finite.
                true => vec![1.0; rows.len()],
                false => self.norm.dual_lengths(&slope.gradient),
            };
            let mut nearer = vec![false; rows.len()];
            for (seen, row) in rows.iter().enumerate() {
                let hunt = &mut self.each[*row];
                if hunt.target.is_none() && hunt.label == rival {
                    continue;
                }
                let difference = slope.losses[seen];
                let distance = difference.abs() / (1e-12 + lengths[seen]);
                if distance < nearest[seen] {
                    (nearest[seen], nearer[seen]) = (distance, true);
                    hunt.difference = difference;
                }
            }
            normals = replace_rows(normals, &slope.gradient, &nearer);
            first = first.or(Some(slope.logits));
            if is_targeted || rival + 1 >= classes || classifier.is_stopped() {
                break;
            }
        }
        self.normal = put_rows(self.normal.clone(), rows, normals);
        first.unwrap_or(Logits::new(Vec::new(), 0))
    }
}

/// Moves an image to the boundary of the linearized decision, with a small pull towards the clean image's projection.
fn approach(norm: Norm, at: &mut [f32], clean: &[f32], normal: &[f32], difference: f64) {
    let of_clean = {
        let pairs = clean.iter().zip(&*at).zip(normal);
        let terms =
            pairs.map(|((clean, at), n)| (f64::from(*clean) - f64::from(*at)) * f64::from(*n));
        difference + terms.sum::<f64>()
    };
    let from_at = hyperplane::project(norm, at, normal, difference);
    let from_clean = hyperplane::project(norm, clean, normal, of_clean);
    let length = |change: &[f32]| norm.length(change.iter().map(|d| f64::from(*d))).max(1e-8);
    let (near, far) = (length(&from_at), length(&from_clean));
    let pull = (near / (near + far)).min(LARGEST_PULL);
    let changes = from_at.iter().zip(&from_clean);
    for ((at, clean), (d1, d2)) in at.iter_mut().zip(clean).zip(changes) {
        let by_at = f64::from(*at) + OVERSHOOT * f64::from(*d1);
        let by_clean = f64::from(*clean) + OVERSHOOT * f64::from(*d2);
        *at = (by_at * (1.0 - pull) + by_clean * pull).clamp(0.0, 1.0) as f32;
    }
}
