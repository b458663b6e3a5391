//! Loss functions, which training minimizes and attacks maximize.
//!
//! Losses are per image. Attacks sum them, since an image's perturbation must not depend on the batch size; updates
//! take the mean.

use burn::tensor::Tensor;

use crate::ops::Device;
pub use crate::ops::{contrastive, count_correct, cross_entropy, predictions, unit_length};

/// Largest scale of the similarities: the inverse of the lowest temperature. As in CLIP, the parameter is clamped after
/// each update, so that gradients at the bound can still move it away.
pub const LARGEST_SCALE: f64 = 100.0;

/// Labels of a batch: one class per image, or two mixed by MixUp or CutMix.
#[derive(Clone, Debug, PartialEq)]
pub struct Targets {
    /// The class of each image.
    pub first: Vec<u32>,
    /// The class that is mixed in; equal to `first` without mixing.
    pub second: Vec<u32>,
    /// Weight of `first`; 1 without mixing.
    pub weight: Vec<f32>,
}

impl Targets {
    /// Creates targets without mixing.
    pub fn classes(labels: &[u32]) -> Self {
        Self {
            first: labels.to_vec(),
            second: labels.to_vec(),
            weight: vec![1.0; labels.len()],
        }
    }

    /// Returns the target distributions over classes.
    ///
    /// Labels are smoothed before mixing, as in timm; since both are linear, the order does not matter.
    /// Shapes: the result is `[batch, classes]`; rows sum to 1.
    pub fn distributions(&self, classes: usize, smoothing: f64, device: &Device) -> Tensor<2> {
        let rest = (smoothing / classes as f64) as f32;
        let hot = 1.0 - smoothing as f32;
        if let Some(gpu) = device.gpu() {
            let pairs = [&self.first[..], &self.second];
            return crate::ops::targets(gpu, pairs, &self.weight, classes, rest, hot);
        }
        let mut values = vec![rest; self.first.len() * classes];
        for (row, index) in values.chunks_exact_mut(classes).zip(0..) {
            row[self.first[index] as usize] += hot * self.weight[index];
            row[self.second[index] as usize] += hot * (1.0 - self.weight[index]);
        }
        crate::ops::from_vec(values, [self.first.len(), classes], device)
    }

    /// Returns the class with the larger weight, which accuracy is measured against under mixing.
    pub fn dominant(&self) -> Vec<u32> {
        let both = self.first.iter().zip(&self.second).zip(&self.weight);
        both.map(|((first, second), weight)| if *weight >= 0.5 { *first } else { *second })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixed_and_smoothed_target_has_the_requested_weights_and_sums_to_one() {
        let targets = Targets {
            first: vec![0],
            second: vec![2],
            weight: vec![0.75],
        };
        let row = crate::ops::to_vec(targets.distributions(4, 0.1, &Device::cpu()));
        let expected = [0.025 + 0.675, 0.025, 0.025 + 0.225, 0.025];
        for (found, expected) in row.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{row:?}");
        }
        assert_eq!(targets.dominant(), [0]);
    }

    #[test]
    fn cross_entropy_of_equal_logits_is_the_log_of_the_class_count() {
        let device = Device::cpu();
        let targets = Targets::classes(&[1, 3]).distributions(4, 0.1, &device);
        let loss = crate::ops::to_vec(cross_entropy(crate::ops::zeros([2, 4], &device), targets));
        assert!(
            loss.iter().all(|loss| (loss - 4f32.ln()).abs() < 1e-6),
            "{loss:?}"
        );
    }

    fn tensor<const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<D> {
        crate::ops::from_vec(values.to_vec(), shape, &Device::cpu())
    }

    #[test]
    fn contrastive_loss_of_identical_embeddings_is_the_log_of_the_batch_size() {
        let same = tensor(&[0.6, 0.8].repeat(5), [5, 2]);
        let loss = contrastive(same.clone() * 3.0, same, tensor(&[2.0], [1]));
        for loss in crate::ops::to_vec(loss) {
            assert!((loss - 5f32.ln()).abs() < 1e-6, "{loss}");
        }
    }

    #[test]
    fn contrastive_loss_of_two_pairs_matches_the_hand_calculation() {
        // Images along the axes, texts at 0 and 60 degrees, scale 2.
        let images = tensor(&[5.0, 0.0, 0.0, 0.1], [2, 2]);
        let half = 0.5f32;
        let high = 0.75f32.sqrt();
        let texts = tensor(&[1.0, 0.0, half, high], [2, 2]);
        let found = contrastive(images, texts, tensor(&[2f32.ln()], [1]));
        // Similarities: [[2, 1], [0, 2 sin 60]].
        let cross = |own: f64, other: f64| (1.0 + (other - own).exp()).ln();
        let right = 3f64.sqrt();
        let expected = [
            0.5 * (cross(2.0, 1.0) + cross(2.0, 0.0)),
            0.5 * (cross(right, 0.0) + cross(right, 1.0)),
        ];
        for (found, expected) in crate::ops::to_vec(found).iter().zip(expected) {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-6,
                "{found} {expected}"
            );
        }
    }
}
