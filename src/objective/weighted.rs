//! Weighted sums of terms over clean and adversarial outputs: the mechanism behind all objectives with more than one
//! term or a reference.

use std::ops::Range;

use burn::tensor::Tensor;

use super::batch_loss::{BatchLoss, Views};
use super::contrastive::ContrastiveLoss;
use super::labels::LabelLoss;
use crate::ops::{RowDistance, row_distances, scaled_similarities, unit_length};

/// The images that outputs were computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// The adversarial images.
    Adversarial,
    /// The clean images.
    Clean,
}

/// Outputs that a distance compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// The model's, with their gradient.
    Output(View),
    /// The model's, as a constant.
    Stopped(View),
    /// The reference's: of the frozen model, or of the model itself before the attack.
    Reference(View),
}

/// What a distance is measured between.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Space {
    /// The outputs.
    Outputs,
    /// The outputs, scaled to length 1.
    UnitLength,
    /// Similarities of the outputs to the captions of the batch, times a scale.
    Captions(f64),
}

/// A loss of each image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TermKind {
    /// Cross entropy with the labels.
    CrossEntropy(View),
    /// The contrastive loss of the adversarial images.
    Contrastive,
    /// Distance of two points, in a space.
    Distance(RowDistance, Point, Point, Space),
}

/// A loss of each image and its weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Term {
    /// Weight in the sum.
    pub weight: f64,
    /// The loss.
    pub kind: TermKind,
}

/// A sum of terms to minimize and a term for the attack to maximize, with everything they compare outputs with.
#[derive(Clone, Default)]
pub struct WeightedLoss {
    /// What training minimizes.
    pub terms: Vec<Term>,
    /// What the attack maximizes. It sees adversarial outputs only, besides the reference.
    pub attack: Vec<Term>,
    /// The labels, if a term uses them or accuracy is counted.
    pub labels: Option<LabelLoss>,
    /// Embedded class names `[classes, dimensions]`, of length 1, and a scale: logits are the scaled similarities of the
    /// outputs with them. Without them the outputs are the logits.
    pub classes: Option<(Tensor<2>, f64)>,
    /// Captions of the batch, if a term uses them.
    pub captions: Option<ContrastiveLoss>,
    /// The reference's outputs `[images, outputs]` on clean images, and on adversarial images after the attack.
    pub reference: [Option<Tensor<2>>; 2],
}

impl WeightedLoss {
    fn logits(&self, outputs: Tensor<2>) -> Tensor<2> {
        match &self.classes {
            Some((texts, scale)) => scaled_similarities(outputs, texts, *scale),
            None => outputs,
        }
    }

    fn at(&self, point: Point, outputs: &Views<Tensor<2>>) -> Tensor<2> {
        let output = |view| match view {
            View::Adversarial => outputs.adversarial.clone(),
            View::Clean => outputs.clean.clone().expect("`uses_clean_images`"),
        };
        match point {
            Point::Output(view) => output(view),
            Point::Stopped(view) => output(view).without_autodiff(),
            Point::Reference(view) => {
                let reference = &self.reference[usize::from(view == View::Adversarial)];
                reference.clone().expect("set before it is used")
            }
        }
    }

    fn within(&self, space: Space, outputs: Tensor<2>) -> Tensor<2> {
        match space {
            Space::Outputs => outputs,
            Space::UnitLength => unit_length(outputs),
            Space::Captions(scale) => {
                let captions = self.captions.as_ref().expect("terms have what they use");
                scaled_similarities(outputs, captions.texts(), scale)
            }
        }
    }

    /// The loss of each image in one term.
    fn term(&self, kind: TermKind, outputs: &Views<Tensor<2>>) -> Tensor<1> {
        match kind {
            TermKind::CrossEntropy(view) => {
                let labels = self.labels.as_ref().expect("terms have what they use");
                labels.cross_entropy(self.logits(self.at(Point::Output(view), outputs)))
            }
            TermKind::Contrastive => {
                let captions = self.captions.as_ref().expect("terms have what they use");
                captions.losses(Views::adversarial(outputs.adversarial.clone()))
            }
            TermKind::Distance(distance, from, to, space) => {
                let [from, to] =
                    [from, to].map(|point| self.within(space, self.at(point, outputs)));
                row_distances(distance, from, to)
            }
        }
    }

    fn sum(&self, terms: &[Term], outputs: &Views<Tensor<2>>) -> Tensor<1> {
        let weighted = terms.iter().map(|term| {
            let losses = self.term(term.kind, outputs);
            if term.weight == 1.0 {
                losses
            } else {
                losses * term.weight
            }
        });
        let sum = weighted.reduce(|sum, losses| sum + losses);
        sum.expect("objectives have terms")
    }

    fn refers_to(&self, view: View) -> bool {
        let point = &Point::Reference(view);
        let mut all = self.terms.iter().chain(&self.attack);
        all.any(|term| matches!(&term.kind, TermKind::Distance(_, from, to, _) if [from, to].contains(&point)))
    }

    /// Returns whether a term compares with the reference on clean images.
    pub fn uses_clean_reference(&self) -> bool {
        self.refers_to(View::Clean)
    }
}

impl BatchLoss for WeightedLoss {
    fn losses(&self, outputs: Views<Tensor<2>>) -> Tensor<1> {
        self.sum(&self.terms, &outputs)
    }

    fn attack_losses(&self, outputs: Tensor<2>) -> Tensor<1> {
        self.sum(&self.attack, &Views::adversarial(outputs))
    }

    fn uses_clean_images(&self) -> bool {
        let is_clean = |point: &Point| {
            matches!(
                point,
                Point::Output(View::Clean) | Point::Stopped(View::Clean)
            )
        };
        self.terms.iter().any(|term| match &term.kind {
            TermKind::CrossEntropy(view) => *view == View::Clean,
            TermKind::Contrastive => false,
            TermKind::Distance(_, from, to, _) => is_clean(from) || is_clean(to),
        })
    }

    fn of_rows(&self, rows: Range<usize>) -> Option<Box<dyn BatchLoss>> {
        if self.captions.is_some() {
            return None;
        }
        let part = |all: &Tensor<2>| all.clone().narrow(0, rows.start, rows.len());
        Some(Box::new(Self {
            labels: self.labels.as_ref().map(|labels| labels.narrowed(&rows)),
            reference: self
                .reference
                .each_ref()
                .map(|outputs| outputs.as_ref().map(part)),
            ..self.clone()
        }))
    }

    fn count_correct(&self, outputs: Tensor<2>) -> Option<u64> {
        match (&self.labels, &self.captions) {
            (Some(labels), _) => labels.count_correct(self.logits(outputs)),
            (None, Some(captions)) => captions.count_correct(outputs),
            (None, None) => None,
        }
    }

    fn uses_adversarial_reference(&self) -> bool {
        self.refers_to(View::Adversarial)
    }

    fn set_adversarial_reference(&mut self, outputs: Tensor<2>) {
        self.reference[1] = Some(outputs);
    }
}
