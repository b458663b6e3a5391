//! The contrastive objective, which aligns image embeddings with the embeddings of their captions (the paper's
//! equations 2 and 3).

use std::ops::Range;

use burn::tensor::{Gradients, Tensor};

use super::batch_loss::{BatchLoss, Views};
use crate::distributed::Comm;
use crate::distributed::zero::PairwiseSum;
use crate::loss::{contrastive, count_correct};
use crate::ops;
use crate::ops::{Device, row_dots, similarities, zeros};
use crate::text::TextTower;

/// The symmetric contrastive loss of a batch over all ranks.
#[derive(Clone)]
pub struct ContrastiveLoss {
    /// Caption embeddings of all ranks, normalized to length 1: `[batch, dimensions]`.
    texts: Tensor<2>,
    /// Logarithm of the scale of the similarities: `[1]`.
    log_scale: Tensor<1>,
    /// The text tower's passes, if the tower is trained.
    tower: Option<TowerPasses>,
}

impl ContrastiveLoss {
    /// Creates the loss.
    ///
    /// Shapes: `texts` `[batch, dimensions]`, of all ranks and with rows of length 1; `log_scale` `[1]`.
    pub fn new(texts: Tensor<2>, log_scale: Tensor<1>, tower: Option<TowerPasses>) -> Self {
        Self {
            texts,
            log_scale,
            tower,
        }
    }

    /// Returns the caption embeddings of all ranks: `[batch, dimensions]`.
    pub(super) fn texts(&self) -> &Tensor<2> {
        &self.texts
    }
}

impl BatchLoss for ContrastiveLoss {
    fn losses(&self, outputs: Views<Tensor<2>>) -> Tensor<1> {
        contrastive(
            outputs.adversarial,
            self.texts.clone(),
            self.log_scale.clone(),
        )
    }

    fn of_rows(&self, _: Range<usize>) -> Option<Box<dyn BatchLoss>> {
        None
    }

    /// Counts the images whose own caption is the most similar in the batch.
    fn count_correct(&self, outputs: Tensor<2>) -> Option<u64> {
        let own: Vec<u32> = (0..outputs.dims()[0] as u32).collect();
        let logits = similarities(outputs, self.texts.clone());
        Some(count_correct(logits, &own))
    }

    fn tracked(&self) -> Option<Box<dyn BatchLoss>> {
        let mut tracked = self.clone();
        tracked.log_scale = tracked.log_scale.autodiff().require_grad();
        if self.tower.is_some() {
            tracked.texts = tracked.texts.autodiff().require_grad();
        }
        Some(Box::new(tracked))
    }

    /// All ranks compute the same loss, so only rank 0 contributes the scale's gradient, and each rank's text tower
    /// gets the gradient of its own captions.
    fn parameter_gradients(&self, gradients: &mut Gradients, comm: &Comm) -> Vec<Tensor<1>> {
        let scale = self.log_scale.grad_remove(gradients);
        let once = |scale: Tensor<1>| match comm.is_main() {
            true => scale,
            false => zeros([1], &Device::of(&scale)),
        };
        let mut found: Vec<_> = scale.map(once).into_iter().collect();
        if let Some(tower) = &self.tower
            && let Some(texts) = self.texts.grad_remove(gradients)
        {
            let count = texts.dims()[0] / comm.world_size();
            found.extend(tower.gradients(texts.narrow(0, comm.rank() * count, count)));
        }
        found
    }
}

/// The forward passes of a trainable text tower over a rank's captions: for each shard, the tracked tower and the
/// embeddings.
#[derive(Clone)]
pub struct TowerPasses(pub Vec<(TextTower, Tensor<2>)>);

impl TowerPasses {
    /// Returns the gradients of the tower's weights from the gradient of this rank's embeddings.
    fn gradients(&self, of_texts: Tensor<2>) -> Vec<Tensor<1>> {
        let mut sum = PairwiseSum::default();
        let mut start = 0;
        for (tower, embeddings) in &self.0 {
            let count = embeddings.dims()[0];
            let gradient = of_texts.clone().narrow(0, start, count);
            let along = ops::sum(row_dots(embeddings.clone(), &gradient));
            sum.add(tower.gradients(&mut along.backward()));
            start += count;
        }
        sum.sum()
    }
}
