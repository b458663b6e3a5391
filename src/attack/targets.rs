//! Target classes of targeted attacks: how many, and which first.
//!
//! AutoAttack takes the classes with the largest other logits on the clean image. MALT ranks more classes by their
//! estimated distance to the decision boundary: if the network is almost linear near the image, the boundary to class t
//! is `(z_y - z_t) / |gradient of (z_y - z_t)|` away, with the dual norm of the threat's norm.
//!
//! Source: Melamed, Yehudai and Shamir 2024 (arXiv:2407.02240). `tests/attacks.rs` compares the ranking with one computed
//! by PyTorch.

use burn::tensor::Tensor;
use serde::Serialize;

use super::objective::{Goal, largest};
use super::target_model::{Passes, TargetModel};
use super::threat::Norm;

/// The order in which other classes become targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ranking {
    /// By decreasing logit on the clean image, as in AutoAttack.
    #[default]
    Logit,
    /// By increasing estimated distance to the decision boundary (MALT).
    Malt {
        /// Number of classes that are ranked: those with the largest other logits on the clean image.
        candidates: u64,
    },
}

impl Ranking {
    /// Returns whether targets are chosen by their logits alone.
    pub(crate) fn is_by_logit(&self) -> bool {
        *self == Self::Logit
    }

    /// Returns the maximum number of passes per image that ranking takes in addition to an attack's runs.
    pub(crate) fn most_passes(self, classes: usize) -> Passes {
        match self {
            // Not counted: one pass, as in the reference.
            Self::Logit => Passes::default(),
            Self::Malt { candidates } => {
                let candidates = candidates.min(classes.saturating_sub(1) as u64);
                Passes {
                    forward: candidates + 1,
                    backward: candidates,
                }
            }
        }
    }
}

/// How an attack chooses its targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Targets {
    /// Number of targets per image; capped at the number of other classes.
    pub count: u64,
    /// Their order.
    pub ranking: Ranking,
    /// The norm that bounds the perturbation.
    pub norm: Norm,
}

impl Targets {
    /// Returns the target classes of each image, first target first, or `None` if the classifier requests a stop before
    /// they are known.
    ///
    /// Shapes: `images` `[batch, 3, height, width]`, clean; `labels` `[batch]`; the result `[batch, at most count]`.
    pub fn choose(
        &self,
        classifier: &TargetModel,
        images: &Tensor<4>,
        labels: &[u32],
    ) -> Option<Vec<Vec<usize>>> {
        let considered = match self.ranking {
            Ranking::Logit => self.count,
            Ranking::Malt { candidates } => candidates,
        };
        let considered = usize::try_from(considered).unwrap_or(usize::MAX);
        let logits = classifier.logits(images.clone());
        let others = |(row, label): (usize, &u32)| {
            let mut order = largest(logits.row(row), considered.saturating_add(1));
            order.retain(|class| *class != *label as usize);
            order.truncate(considered);
            order
        };
        let mut targets: Vec<Vec<usize>> = labels.iter().enumerate().map(others).collect();
        if !self.ranking.is_by_logit() {
            targets = self.by_distance(classifier, images, labels, &targets)?;
        }
        let count = usize::try_from(self.count).unwrap_or(usize::MAX);
        targets
            .iter_mut()
            .for_each(|targets| targets.truncate(count));
        Some(targets)
    }

    /// Sorts the candidates of each image by estimated distance to the boundary. Ties keep their order.
    fn by_distance(
        &self,
        classifier: &TargetModel,
        images: &Tensor<4>,
        labels: &[u32],
        candidates: &[Vec<usize>],
    ) -> Option<Vec<Vec<usize>>> {
        let most = candidates.iter().map(Vec::len).max().unwrap_or_default();
        let mut ranked: Vec<Vec<(f64, usize)>> = vec![Vec::new(); labels.len()];
        for place in 0..most {
            if classifier.is_stopped() {
                return None;
            }
            let goal = |(label, candidates): (&u32, &Vec<usize>)| {
                let label = *label as usize;
                Goal::Difference {
                    label,
                    // An image with fewer candidates, which has none left to rank.
                    target: candidates.get(place).copied().unwrap_or(label),
                }
            };
            let goals: Vec<Goal> = labels.iter().zip(candidates).map(goal).collect();
            let slope = classifier.climb(images.clone(), &goals);
            let lengths = self.norm.dual_lengths(&slope.gradient);
            for (row, candidates) in candidates.iter().enumerate() {
                if let Some(class) = candidates.get(place) {
                    let distance = -slope.losses[row] / (1e-12 + lengths[row]);
                    ranked[row].push((distance, *class));
                }
            }
        }
        let sorted = ranked.into_iter().map(|mut ranked| {
            ranked.sort_by(|(one, _), (other, _)| one.total_cmp(other));
            ranked.into_iter().map(|(_, class)| class).collect()
        });
        Some(sorted.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Device, from_vec};

    /// On a linear model the estimated distance is exact, so the ranking is known on paper.
    #[test]
    fn malt_ranks_a_near_boundary_before_a_large_logit() {
        let device = Device::cpu();
        // Logits x, 0.9 x - 0.5, 0.5 x - 4 (y + z) + 3.25 and -9 of an image (x, y, z).
        let logits = |images: Tensor<4>| {
            let pixels = images.reshape([1, 3]);
            let weights = vec![1.0, 0.9, 0.5, 0.0, 0.0, 0.0, -4.0, 0.0, 0.0, 0.0, -4.0, 0.0];
            let weights = from_vec(weights, [3, 4], &device);
            let bias = from_vec(vec![0.0, -0.5, 3.25, -9.0], [1, 4], &device);
            pixels.matmul(weights) + bias
        };
        let images = from_vec(vec![0.5, 0.5, 0.5], [1, 3, 1, 1], &device);
        // Logits 0.5, -0.05, -0.5, -9. Distances in linf: 0.55 / 0.1, 1 / 8.5, 9.5 / 1.
        let targets = |ranking, count| {
            let targets = Targets {
                count,
                ranking,
                norm: Norm::Linf,
            };
            let classifier = TargetModel::new(&logits, &device);
            let chosen = targets.choose(&classifier, &images, &[0]).unwrap();
            (chosen[0].clone(), classifier.take_passes())
        };
        let malt = |candidates| Ranking::Malt { candidates };
        assert_eq!(targets(Ranking::Logit, 9).0, [1, 2, 3]);
        assert_eq!(targets(malt(100), 9).0, [2, 1, 3]);
        assert_eq!(targets(malt(100), 1).0, [2]);
        assert_eq!(targets(malt(1), 9).0, [1], "only the candidates are ranked");
        let (_, passes) = targets(malt(100), 9);
        assert_eq!(passes, malt(100).most_passes(4));
    }

    #[test]
    fn a_stop_ends_the_ranking() {
        let device = Device::cpu();
        let logits = |images: Tensor<4>| images.reshape([1, 3]);
        let images = from_vec(vec![0.5, 0.4, 0.3], [1, 3, 1, 1], &device);
        let classifier = TargetModel::new(&logits, &device).stopped_by(&|| true);
        let targets = Targets {
            count: 2,
            ranking: Ranking::Malt { candidates: 2 },
            norm: Norm::L2,
        };
        assert_eq!(targets.choose(&classifier, &images, &[0]), None);
    }
}
