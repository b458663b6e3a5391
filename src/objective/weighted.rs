//! Weighted sums of terms over clean and adversarial outputs: the mechanism behind all objectives with more than one
//! term or a reference.

use std::ops::Range;

use burn::tensor::Tensor;

use super::batch_loss::{BatchLoss, Views};
use super::contrastive::ContrastiveLoss;
use super::labels::LabelLoss;
use crate::ops::{RowDistance, add, fork, row_distances, scale, scaled_similarities, unit_length};

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

impl TermKind {
    /// How often the term uses the model's outputs with their gradient.
    fn uses(&self, of: View) -> usize {
        match self {
            Self::CrossEntropy(view) => usize::from(*view == of),
            Self::Contrastive => usize::from(of == View::Adversarial),
            Self::Distance(_, from, to, _) => {
                let points = [from, to].into_iter();
                points.filter(|point| **point == Point::Output(of)).count()
            }
        }
    }
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

    fn at(&self, point: Point, outputs: &mut Outputs) -> Tensor<2> {
        match point {
            Point::Output(view) => outputs.copy(view),
            Point::Stopped(view) => outputs.constant(view),
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
    fn term(&self, kind: TermKind, outputs: &mut Outputs) -> Tensor<1> {
        match kind {
            TermKind::CrossEntropy(view) => {
                let labels = self.labels.as_ref().expect("terms have what they use");
                labels.cross_entropy(self.logits(outputs.copy(view)))
            }
            TermKind::Contrastive => {
                let captions = self.captions.as_ref().expect("terms have what they use");
                captions.losses(Views::adversarial(outputs.copy(View::Adversarial)))
            }
            TermKind::Distance(distance, from, to, space) => {
                let [from, to] = [from, to].map(|point| {
                    let point = self.at(point, outputs);
                    self.within(space, point)
                });
                row_distances(distance, from, to)
            }
        }
    }

    fn sum(&self, terms: &[Term], outputs: &Views<Tensor<2>>) -> Tensor<1> {
        let mut outputs = Outputs::new(outputs, terms);
        let weighted = terms
            .iter()
            .map(|term| scale(self.term(term.kind, &mut outputs), term.weight));
        weighted.reduce(add).expect("objectives have terms")
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

/// The model's outputs, with a copy for each use with a gradient.
struct Outputs {
    adversarial: Vec<Tensor<2>>,
    clean: Vec<Tensor<2>>,
    constants: Views<Tensor<2>>,
}

impl Outputs {
    fn new(outputs: &Views<Tensor<2>>, terms: &[Term]) -> Self {
        let copies = |view, of: &Tensor<2>| {
            let uses = terms.iter().map(|term| term.kind.uses(view)).sum();
            fork(of, uses)
        };
        let clean = outputs.clean.as_ref();
        Self {
            adversarial: copies(View::Adversarial, &outputs.adversarial),
            clean: clean.map_or_else(Vec::new, |clean| copies(View::Clean, clean)),
            constants: outputs.clone().map(Tensor::without_autodiff),
        }
    }

    fn copy(&mut self, view: View) -> Tensor<2> {
        let copies = match view {
            View::Adversarial => &mut self.adversarial,
            View::Clean => &mut self.clean,
        };
        copies.pop().expect("a copy for each use")
    }

    fn constant(&self, view: View) -> Tensor<2> {
        let constant = match view {
            View::Adversarial => Some(&self.constants.adversarial),
            View::Clean => self.constants.clean.as_ref(),
        };
        constant.expect("`uses_clean_images`").clone()
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
