//! What a search with an approximate network came closest with, for confirmation by the network itself.

use burn::tensor::Tensor;

use super::attempt::{Adversarials, images_of};
use super::gradient::select;
use super::target_model::TargetModel;
use crate::ops::replace_rows;

/// For each image under attack, the iterate with the smallest margin so far.
pub(crate) struct Closest {
    images: Tensor<4>,
    margins: Vec<f64>,
}

impl Closest {
    /// Starts from these images, whose margins are unknown; only for approximate searches.
    pub(crate) fn new(classifier: &TargetModel, images: &Tensor<4>) -> Option<Self> {
        classifier.is_approximate().then(|| Self {
            images: images.clone(),
            margins: vec![f64::INFINITY; images.dims()[0]],
        })
    }

    /// Keeps the iterates with smaller margins; infinity excludes one.
    pub(crate) fn see(&mut self, images: &Tensor<4>, margins: impl Iterator<Item = f64>) {
        let pairs = self.margins.iter_mut().zip(margins);
        let closer: Vec<bool> = pairs
            .map(|(smallest, margin)| {
                let is_closer = margin < *smallest;
                *smallest = smallest.min(margin);
                is_closer
            })
            .collect();
        self.images = replace_rows(self.images.clone(), images, &closer);
    }

    /// Drops the images that are not among `kept`.
    pub(crate) fn keep(&mut self, kept: &[usize]) {
        self.images = select(self.images.clone(), kept);
        self.margins = kept.iter().map(|row| self.margins[*row]).collect();
    }

    /// Evaluates the images by the network itself; see [`confirm`].
    pub(crate) fn confirm(
        &self,
        classifier: &TargetModel,
        each: impl Iterator<Item = (usize, usize)>,
        found: &mut Adversarials,
    ) {
        confirm(classifier, &self.images, each, found);
    }
}

/// Evaluates images by the network itself and records those that it misclassifies. `each` has their indices in the batch
/// and labels.
pub(crate) fn confirm(
    classifier: &TargetModel,
    images: &Tensor<4>,
    each: impl Iterator<Item = (usize, usize)>,
    found: &mut Adversarials,
) {
    if images.dims()[0] == 0 {
        return;
    }
    let logits = classifier.logits(images.clone());
    let rows = images_of(images.clone()).into_iter().zip(each).enumerate();
    for (row, (image, (place, label))) in rows {
        if !logits.is_right(row, label) {
            found[place] = Some(image);
        }
    }
}
