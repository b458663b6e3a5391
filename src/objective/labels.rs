//! Cross entropy with labels: the objective of supervised adversarial training.

use std::ops::Range;

use burn::tensor::Tensor;

use super::batch_loss::{BatchLoss, Views};
use crate::loss::{Targets, count_correct, cross_entropy};
use crate::ops::Device;

/// Cross entropy between logits and labels, which may be mixed and smoothed.
#[derive(Clone, Debug)]
pub struct LabelLoss {
    /// Target distributions `[batch, classes]`; rows sum to 1.
    targets: Tensor<2>,
    /// The class with the largest weight.
    labels: Vec<u32>,
}

impl LabelLoss {
    /// Creates the loss of a batch.
    pub fn new(targets: &Targets, classes: usize, smoothing: f64, device: &Device) -> Self {
        Self {
            targets: targets.distributions(classes, smoothing, device),
            labels: targets.dominant(),
        }
    }

    /// Returns the cross entropy of each row of logits.
    pub(super) fn cross_entropy(&self, logits: Tensor<2>) -> Tensor<1> {
        cross_entropy(logits, self.targets.clone())
    }

    /// Returns the loss of some of the rows.
    pub(super) fn narrowed(&self, rows: &Range<usize>) -> Self {
        Self {
            targets: self.targets.clone().narrow(0, rows.start, rows.len()),
            labels: self.labels[rows.clone()].to_vec(),
        }
    }
}

impl BatchLoss for LabelLoss {
    fn losses(&self, outputs: Views<Tensor<2>>) -> Tensor<1> {
        self.cross_entropy(outputs.adversarial)
    }

    fn of_rows(&self, rows: Range<usize>) -> Option<Box<dyn BatchLoss>> {
        Some(Box::new(self.narrowed(&rows)))
    }

    fn count_correct(&self, outputs: Tensor<2>) -> Option<u64> {
        Some(count_correct(outputs, &self.labels))
    }
}
