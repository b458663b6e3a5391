//! Auto-PGD: projected gradient ascent with adaptive step sizes and restarts from the best point.
//!
//! Source: Croce and Hein 2020 (arXiv:2003.01690), algorithm 1; for l1, 2021 (arXiv:2103.01208). `tests/attacks.rs`
//! compares iterates with the reference program's.
//! Differs from the reference: an image leaves the batch at its first misclassified iterate, which already settles the
//! verdict; random starts are keyed by image, so they do not depend on the batch.

use burn::tensor::Tensor;
use serde::Serialize;

use super::attempt::{Adversarials, Attempt, Batch, Mark, images_of, in_turn};
use super::closest::Closest;
use super::draws::Draws;
use super::gradient::{AttackLoss, select};
use super::objective::Goal;
use super::pgd;
use super::pgd::Pgd;
use super::target_model::{Logits, Passes, Slope, TargetModel};
use super::targets::{Ranking, Targets};
use super::threat::{Ball, Norm};
use crate::ops::{add, changed_pixels, momentum, replace_rows, to_vec};
use crate::rng::AttackKind;
use crate::units::Fraction;

/// Auto-PGD.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Apgd {
    /// The norm that bounds the perturbation.
    pub norm: Norm,
    /// Largest perturbation.
    pub epsilon: Fraction,
    /// The loss that it maximizes.
    pub climbs: Climbs,
    /// Steps per run.
    pub steps: u64,
    /// Runs from different random starts on images not yet fooled (for a targeted loss, per target).
    pub restarts: u64,
    /// Number of gradients that are averaged (EOT); 1 except for randomized defenses.
    pub averages: u64,
    /// Whether to start with three times epsilon, then twice, then epsilon. Used for l1.
    pub enlarged: bool,
}

/// The loss that APGD maximizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Climbs {
    /// Cross entropy.
    CrossEntropy,
    /// Difference of logits ratio (DLR).
    Dlr,
    /// The targeted DLR loss, for each target class in turn.
    TargetedDlr {
        /// Number of target classes; capped at the number of other classes.
        targets: u64,
        /// Which classes become targets, and in which order.
        #[serde(skip_serializing_if = "Ranking::is_by_logit")]
        ranking: Ranking,
    },
    /// Margin of the probabilities, `max p_i - p_y` over the other classes (PMA).
    ProbabilityMargin,
}

/// Share of a window's steps that must increase the loss for the step size to be kept.
const RISING_SHARE: f64 = 0.75;
/// Weight of the new step against the momentum of the last one.
const DIRECTION_SHARE: f64 = 0.75;
/// l1: share of pixels that the first steps from a random start change.
const FIRST_SHARE: f64 = 0.2;
/// The same in training, with few steps.
const FIRST_SHARE_IN_TRAINING: f64 = 0.05;

impl Apgd {
    /// Returns `apgd-ce`, `apgd-dlr`, `apgd-t`, `malt` or `pma`.
    pub fn name(&self) -> &'static str {
        match self.climbs {
            Climbs::CrossEntropy => "apgd-ce",
            Climbs::Dlr => "apgd-dlr",
            Climbs::TargetedDlr { ranking, .. } => match ranking {
                Ranking::Logit => "apgd-t",
                Ranking::Malt { .. } => "malt",
            },
            Climbs::ProbabilityMargin => "pma",
        }
    }

    /// Returns the number of targets for a number of classes; 1 if untargeted.
    fn aims(&self, classes: usize) -> u64 {
        match self.climbs {
            Climbs::TargetedDlr { targets, .. } => targets.min(classes.saturating_sub(1) as u64),
            _ => 1,
        }
    }

    /// Returns the maximum number of passes per image.
    pub fn most_passes(&self, classes: usize) -> Passes {
        let runs = self.restarts.saturating_mul(self.aims(classes));
        let times = |looks: u64| runs.saturating_mul(looks).saturating_mul(self.averages);
        let mut passes = Passes {
            forward: times(self.steps.saturating_add(1)),
            backward: times(self.steps),
        };
        if let Climbs::TargetedDlr { ranking, .. } = self.climbs {
            let more = ranking.most_passes(classes);
            passes.forward = passes.forward.saturating_add(more.forward);
            passes.backward = passes.backward.saturating_add(more.backward);
        }
        passes
    }

    /// Runs all restarts and targets on the images not yet fooled; see [`crate::attack::Attack::go_on`].
    pub(crate) fn go_on(
        &self,
        classifier: &TargetModel,
        batch: &Batch,
        marks: &[Option<Mark>],
    ) -> Attempt {
        let targets = match self.climbs {
            Climbs::TargetedDlr { targets, ranking } => Some(Targets {
                count: targets,
                ranking,
                norm: self.norm,
            }),
            _ => None,
        };
        in_turn(
            classifier,
            batch,
            marks,
            targets,
            self.restarts,
            |run, batch, targets| {
                let goal = |(label, target): (&u32, &Option<usize>)| {
                    let label = *label as usize;
                    match (self.climbs, *target) {
                        (Climbs::CrossEntropy, _) => Goal::CrossEntropy { label },
                        (Climbs::ProbabilityMargin, _) => Goal::ProbabilityMargin { label },
                        (_, None) => Goal::Dlr { label },
                        (_, Some(target)) => Goal::TargetedDlr { label, target },
                    }
                };
                let goals: Vec<Goal> = batch.labels.iter().zip(targets).map(goal).collect();
                self.run(classifier, batch, &goals, run.number)
            },
        )
    }

    /// Runs one ascent per image from a random start.
    fn run(
        &self,
        classifier: &TargetModel,
        batch: &Batch,
        goals: &[Goal],
        run: usize,
    ) -> Adversarials {
        let epsilon = self.epsilon.value();
        let draws = Draws::new(batch.seed, &batch.keys, AttackKind::Apgd);
        let ball = |factor: f64| Ball::new(self.norm, factor * epsilon, batch.images.clone());
        if !self.enlarged {
            let ball = ball(1.0);
            let start = ball.sample_surface(&draws, run);
            return self
                .climb(classifier, &ball, start, goals, self.steps, Start::Random)
                .0;
        }
        let first = (0.3 * self.steps as f64).ceil() as u64;
        let mut images = ball(3.0).sample_surface(&draws, run);
        for factor in [3.0, 2.0] {
            let ball = ball(factor);
            let start = ball.project(images);
            images = self
                .climb(classifier, &ball, start, goals, first, Start::Outside)
                .1;
        }
        let ball = ball(1.0);
        let rest = self.steps.saturating_sub(2 * first);
        self.climb(
            classifier,
            &ball,
            ball.project(images),
            goals,
            rest,
            Start::Given,
        )
        .0
    }

    /// Runs one ascent per image from the given start, such as another attack's result.
    ///
    /// Shapes: `clean` and `start` `[batch, 3, height, width]`, `goals` `[batch]`.
    pub fn climb_from(
        &self,
        classifier: &TargetModel,
        clean: Tensor<4>,
        start: Tensor<4>,
        goals: &[Goal],
    ) -> Adversarials {
        let ball = Ball::new(self.norm, self.epsilon.value(), clean);
        self.climb(classifier, &ball, start, goals, self.steps, Start::Given)
            .0
    }

    /// Returns the images that were misclassified inside the ball, and the iterates with the largest loss.
    ///
    /// An image is dropped once it is misclassified, unless the ball is larger than epsilon (`Start::Outside`).
    fn climb(
        &self,
        classifier: &TargetModel,
        ball: &Ball,
        start: Tensor<4>,
        goals: &[Goal],
        steps: u64,
        kind: Start,
    ) -> (Adversarials, Tensor<4>) {
        let mut found: Adversarials = vec![None; goals.len()];
        let closest = match kind {
            Start::Outside => None,
            _ => Closest::new(classifier, &start),
        };
        let mut climb = Climb {
            goals: goals.to_vec(),
            averages: self.averages,
            closest,
            ..Climb::new(self.norm, ball.clone(), start, steps as usize, kind)
        };
        for step in 0..=climb.steps {
            if classifier.is_stopped() {
                break;
            }
            let needs_gradient = step < climb.steps;
            let logits = climb.look(classifier, needs_gradient);
            if kind != Start::Outside {
                let label = |row: usize| climb.goals[row].label();
                let logits = classifier.confirmed(&climb.images, logits, label);
                if let Some(closest) = &mut climb.closest {
                    let goals = climb.goals.iter().enumerate();
                    let margins = goals.map(|(row, goal)| logits.margin(row, goal.label()));
                    closest.see(&climb.images, margins);
                }
                climb.drop_fooled(&logits, &mut found);
            }
            if climb.climbs.is_empty() {
                break;
            }
            climb.remember(step);
            if needs_gradient {
                climb.step(step);
            }
        }
        if let Some(closest) = climb.closest.filter(|_| !classifier.is_stopped()) {
            let each = climb.climbs.iter().zip(&climb.goals);
            let each = each.map(|(climb, goal)| (climb.place, goal.label()));
            closest.confirm(classifier, each, &mut found);
        }
        (found, climb.best)
    }
}

/// Maximizes any loss of a training batch with APGD. Returns the iterate of each image with the largest loss, and that
/// loss, which is not computed if epsilon is 0.
///
/// Shapes: `images` and the result `[batch, 3, height, width]`.
/// Source: Croce and Hein 2020, algorithm 1; as in the training code of Singh et al. 2023. Differs from it: the first
/// step is compared with the loss at the start, as in the algorithm, and not with 0, which suits losses of either sign.
pub(crate) fn maximize(
    threat: &Pgd,
    images: Tensor<4>,
    loss: &AttackLoss,
    draws: &Draws,
) -> (Tensor<4>, Option<Vec<f32>>) {
    if threat.epsilon.value() <= 0.0 {
        return (images, None);
    }
    let ball = Ball::new(threat.norm, threat.epsilon.value(), images.clone());
    let start = match threat.start {
        pgd::Start::Clean => images,
        pgd::Start::Random => ball.sample(draws),
    };
    let steps = threat.steps as usize;
    let mut climb = Climb::new(threat.norm, ball, start, steps, Start::Training);
    for step in 0..=climb.steps {
        let losses = if step < climb.steps {
            let (gradient, losses) = (loss.gradient)(climb.images.clone());
            climb.gradient = gradient;
            losses
        } else {
            (loss.losses)(&climb.images)
        };
        let losses = to_vec(losses);
        for (climb, loss) in climb.climbs.iter_mut().zip(losses) {
            climb.loss = f64::from(loss);
            if step == 0 {
                climb.first = climb.loss;
            }
        }
        climb.remember(step);
        if step < climb.steps {
            climb.step(step);
        }
    }
    let losses = climb.climbs.iter().map(|climb| climb.best as f32);
    (climb.best, Some(losses.collect()))
}

/// The starting point of an ascent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// A random point of the ball.
    Random,
    /// The clean image or a random point, in training.
    Training,
    /// A point found earlier.
    Given,
    /// A point found earlier, in a ball larger than epsilon, where misclassification does not count.
    Outside,
}

/// State of one image's ascent.
struct Climber {
    /// Index in the batch.
    place: usize,
    /// What the loss after the first step is compared with: 0 in evaluations, like the reference program.
    first: f64,
    /// Loss after each step.
    losses: Vec<f64>,
    /// Loss at the current iterate.
    loss: f64,
    best: f64,
    best_at_check: f64,
    halved_at_check: bool,
    step_size: f64,
    /// l1: share of pixels that a step changes, and number of pixels changed in the best image at the last check.
    share: f64,
    moved: usize,
}

/// A batch of ascents; row i of each tensor belongs to ascent i.
struct Climb {
    climbs: Vec<Climber>,
    /// The loss of each ascent; empty in training, where the caller has it.
    goals: Vec<Goal>,
    averages: u64,
    norm: Norm,
    ball: Ball,
    largest_step: f64,
    steps: usize,
    pixels: usize,
    /// Current iterates, previous iterates, and iterates with the largest loss.
    images: Tensor<4>,
    before: Tensor<4>,
    best: Tensor<4>,
    gradient: Tensor<4>,
    best_gradient: Tensor<4>,
    /// With an approximate search that counts misclassifications.
    closest: Option<Closest>,
    /// Steps until the next check, and between checks.
    until_check: usize,
    window: usize,
}

impl Climb {
    fn new(norm: Norm, ball: Ball, start: Tensor<4>, steps: usize, kind: Start) -> Self {
        let count = start.dims()[0];
        let of = |share: f64| ((share * steps as f64) as usize).max(1);
        let window = if norm == Norm::L1 { of(0.04) } else { of(0.22) };
        let epsilon = ball.epsilon();
        let largest_step = if norm == Norm::L1 {
            epsilon
        } else {
            2.0 * epsilon
        };
        let pixels: usize = start.dims()[1..].iter().product();
        let moved = match (norm, kind) {
            (Norm::L1, Start::Given | Start::Outside) => changed_pixels(&start, &ball.center()),
            _ => vec![pixels; count],
        };
        let climbers = (0..count).map(|place| Climber {
            place,
            first: 0.0,
            losses: Vec::new(),
            loss: 0.0,
            best: f64::NEG_INFINITY,
            best_at_check: f64::NEG_INFINITY,
            halved_at_check: true,
            step_size: largest_step,
            share: match kind {
                Start::Random => FIRST_SHARE,
                Start::Training => FIRST_SHARE_IN_TRAINING,
                _ => share(moved[place], pixels),
            },
            moved: moved[place],
        });
        Self {
            climbs: climbers.collect(),
            goals: Vec::new(),
            averages: 1,
            norm,
            largest_step,
            ball,
            steps,
            pixels,
            before: start.clone(),
            gradient: start.clone(),
            best: start.clone(),
            best_gradient: start.clone(),
            closest: None,
            images: start,
            until_check: window,
            window,
        }
    }

    /// Evaluates the model at the current iterates, summing gradients over `averages` passes.
    fn look(&mut self, classifier: &TargetModel, needs_gradient: bool) -> Logits {
        let goals = &self.goals;
        if !needs_gradient {
            let logits = classifier.search_logits(self.images.clone());
            let mut slope = vec![0.0; logits.classes()];
            let climbs = self.climbs.iter_mut().zip(goals);
            for ((climb, goal), row) in climbs.zip(logits.rows()) {
                climb.loss = goal.slope(row, &mut slope);
            }
            return logits;
        }
        let mut seen = classifier.climb(self.images.clone(), goals);
        for _ in 1..self.averages {
            if classifier.is_stopped() {
                break;
            }
            let again = classifier.climb(self.images.clone(), goals);
            seen = Slope {
                gradient: add(seen.gradient, again.gradient),
                ..again
            };
        }
        // The sum of the gradients is as good as their mean: only direction and order matter.
        self.gradient = seen.gradient;
        for (climb, loss) in self.climbs.iter_mut().zip(seen.losses) {
            climb.loss = loss;
        }
        seen.logits
    }

    /// Removes misclassified images from the batch.
    fn drop_fooled(&mut self, logits: &Logits, found: &mut Adversarials) {
        let is_right = |row: &usize| logits.is_right(*row, self.goals[*row].label());
        let (kept, fooled): (Vec<usize>, Vec<usize>) = (0..self.climbs.len()).partition(is_right);
        if fooled.is_empty() {
            return;
        }
        let images = images_of(select(self.images.clone(), &fooled));
        for (row, image) in fooled.iter().zip(images) {
            found[self.climbs[*row].place] = Some(image);
        }
        let mut row = 0..;
        self.climbs
            .retain(|_| kept.binary_search(&row.next().expect("endless")).is_ok());
        self.goals = kept.iter().map(|row| self.goals[*row]).collect();
        self.ball = self.ball.select(&kept);
        for tensor in [
            &mut self.images,
            &mut self.before,
            &mut self.gradient,
            &mut self.best,
            &mut self.best_gradient,
        ] {
            *tensor = select(tensor.clone(), &kept);
        }
        if let Some(closest) = &mut self.closest {
            closest.keep(&kept);
        }
    }

    /// Updates the best images after `step` steps, and the step sizes at a check.
    fn remember(&mut self, step: usize) {
        let better: Vec<bool> = self
            .climbs
            .iter()
            .map(|climb| climb.loss > climb.best)
            .collect();
        replace(&mut self.best, &self.images, &better);
        replace(&mut self.best_gradient, &self.gradient, &better);
        for climb in &mut self.climbs {
            climb.best = climb.best.max(climb.loss);
        }
        if step == 0 {
            for climb in &mut self.climbs {
                climb.best_at_check = climb.best;
            }
            return;
        }
        for climb in &mut self.climbs {
            climb.losses.push(climb.loss);
        }
        self.until_check -= 1;
        if self.until_check > 0 {
            return;
        }
        let restart = match self.norm {
            Norm::L1 => self.check_sparsity(),
            Norm::Linf | Norm::L2 => {
                let window = self.window;
                let shrink = (0.03 * self.steps as f64) as usize;
                let least = (0.06 * self.steps as f64) as usize;
                self.window = (window.saturating_sub(shrink.max(1))).max(least.max(1));
                self.climbs
                    .iter_mut()
                    .map(|climb| climb.check_steps(step - 1, window))
                    .collect()
            }
        };
        replace(&mut self.images, &self.best, &restart);
        replace(&mut self.gradient, &self.best_gradient, &restart);
        self.until_check = self.window;
    }

    /// l1: while the best image gets sparser, continues from it with the largest step size; otherwise reduces the step
    /// size.
    fn check_sparsity(&mut self) -> Vec<bool> {
        let moved = changed_pixels(&self.best, &self.ball.center());
        let check = |(climb, moved): (&mut Climber, usize)| {
            let sparser = (moved as f64) < 0.95 * climb.moved as f64;
            climb.step_size = if sparser {
                self.largest_step
            } else {
                (climb.step_size / 1.5).max(self.largest_step / 10.0)
            };
            climb.share = share(moved, self.pixels);
            climb.moved = moved;
            sparser
        };
        self.climbs.iter_mut().zip(moved).map(check).collect()
    }

    /// Takes a step along the gradient, with momentum except in l1.
    fn step(&mut self, step: usize) {
        let sizes: Vec<f32> = self
            .climbs
            .iter()
            .map(|climb| climb.step_size as f32)
            .collect();
        let (images, gradient) = (self.images.clone(), self.gradient.clone());
        let next = if self.norm == Norm::L1 {
            let shares: Vec<f64> = self.climbs.iter().map(|climb| climb.share).collect();
            self.ball.sparse_step(images, gradient, &sizes, &shares)
        } else {
            let ahead = self.ball.step(images.clone(), gradient, &sizes);
            let new = if step == 0 { 1.0 } else { DIRECTION_SHARE };
            self.ball
                .project(momentum(&images, ahead, &self.before, new))
        };
        self.before = std::mem::replace(&mut self.images, next);
    }
}

impl Climber {
    /// Returns whether to halve the step size and restart from the best image, after step `last` of a window.
    fn check_steps(&mut self, last: usize, window: usize) -> bool {
        let before = |at: usize| {
            at.checked_sub(1)
                .map_or(self.first, |before| self.losses[before])
        };
        let rises = |at: &usize| self.losses[*at] > before(*at);
        let rises = (last + 1 - window..=last).filter(rises).count();
        let few = rises as f64 <= RISING_SHARE * window as f64;
        let idle = !self.halved_at_check && self.best_at_check >= self.best;
        self.halved_at_check = few || idle;
        self.best_at_check = self.best;
        if self.halved_at_check {
            self.step_size /= 2.0;
        }
        self.halved_at_check
    }
}

/// Returns the next share of pixels to change, given the number changed in the best image.
fn share(moved: usize, pixels: usize) -> f64 {
    moved as f64 / pixels as f64 / 1.5
}

/// Replaces the `chosen` rows by those of `others`.
fn replace(images: &mut Tensor<4>, others: &Tensor<4>, chosen: &[bool]) {
    *images = replace_rows(images.clone(), others, chosen);
}
