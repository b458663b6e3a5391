//! Checks for signs that the results of an evaluation are misleading.
//!
//! The reference prints warnings; here each sign becomes a flag on the result, with advice.
//! All flags are documented in docs/reference/result_json.md.
//! Source: the checks of the AutoAttack program (Croce and Hein 2020).

use std::fmt;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::accuracy::{Evaluation, Outcome};
use super::images::check_labels;
use crate::attack::{Attack, Climbs, Goal, Logits, TargetModel};
use crate::error::Result;
use crate::ops::to_vec;

/// A sign that the results may be misleading.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flag {
    /// Name of the check, which is its heading in docs/reference/result_json.md.
    pub check: String,
    /// The finding and what to do about it.
    pub message: String,
}

impl Flag {
    pub(crate) fn new(check: &str, message: impl Into<String>) -> Self {
        Self {
            check: check.to_owned(),
            message: message.into(),
        }
    }
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "warning: {} (`{}` in docs/reference/result_json.md)",
            self.message, self.check
        )
    }
}

/// Number of evaluations of the same images that are compared.
const LOOKS: usize = 5;
/// Largest distance between the normalized logits of two evaluations that still count as equal.
const LARGEST_DIFFERENCE: f64 = 1e-4;
/// Tolerance within which outputs count as a probability distribution.
const NEAR_DISTRIBUTION: f64 = 1e-5;
/// Robust accuracy that Square may remove after the gradient-based attacks without a flag.
const SQUARE_SHARE: f64 = 0.002;

/// Checks the model on the first batch of images, before any attack. A stop request skips the remaining passes.
pub fn before(evaluation: &Evaluation) -> Result<Vec<Flag>> {
    let Evaluation {
        network,
        images,
        attacks,
        batch,
        device,
        comm,
        ..
    } = *evaluation;
    let indices: Vec<usize> = (0..images.count().min(batch.max(1))).collect();
    if indices.is_empty() {
        return Ok(Vec::new());
    }
    let (pixels, labels) = images.batch(&indices, device)?;
    let stop = || comm.stop_requested();
    let classifier = TargetModel::new(network, device).stopped_by(&stop);
    let first = classifier.logits(pixels.clone());
    check_labels(&labels, first.classes())?;
    let averages = attacks
        .iter()
        .any(|attack| matches!(attack, Attack::Apgd(a) if a.averages > 1));
    let mut flags = Vec::new();
    if !averages {
        let looks = (1..LOOKS)
            .map_while(|_| (!classifier.is_stopped()).then(|| classifier.logits(pixels.clone())));
        flags.extend(randomised(&first, looks, &labels));
    }
    let bad = (0..labels.len()).filter(|row| !first.is_finite(*row));
    flags.extend(not_finite(bad.count(), labels.len()));
    flags.extend(distribution(&first));
    flags.extend(few_classes(first.classes(), attacks));
    if attacks
        .iter()
        .any(|attack| matches!(attack, Attack::Apgd(_) | Attack::Unseen(_)))
        && !classifier.is_stopped()
    {
        flags.extend(zero_gradients(&classifier, pixels, &labels, &first));
    }
    Ok(flags)
}

/// Checks the results of the attacks.
pub fn after(outcome: &Outcome) -> Vec<Flag> {
    let count = outcome.robust.len().max(1) as f64;
    let mut flags = Vec::new();
    let stages = outcome.stages.iter().enumerate().skip(2);
    for (index, stage) in stages.filter(|(_, stage)| stage.attack == "square") {
        let before = outcome.stages[index - 1].robust_count;
        // An image of a sample stands for several.
        let (weight, estimated) = match &outcome.sample {
            Some(sample) if sample.images.len() < sample.of => (
                sample.of as f64 / sample.images.len().max(1) as f64,
                " (estimated from the sample)",
            ),
            _ => (1.0, ""),
        };
        let taken = weight * (before - stage.robust_count) as f64 / count;
        if taken > SQUARE_SHARE {
            let message = format!(
                "square, which uses no gradients, lowered robust accuracy by another {:.2} points{estimated} after the \
                 gradient-based attacks: gradients may be masked; try more queries, --version plus or an adaptive \
                 attack",
                100.0 * taken
            );
            flags.push(Flag::new("square_wins", message));
        }
    }
    flags.extend(not_finite(outcome.not_finite(), outcome.robust.len()));
    flags
}

fn randomised(first: &Logits, looks: impl Iterator<Item = Logits>, labels: &[u32]) -> Option<Flag> {
    let right = |logits: &Logits| {
        (0..labels.len())
            .filter(|row| logits.is_right(*row, labels[*row] as usize))
            .count()
    };
    let unit = |row: &[f32]| -> Vec<f64> {
        let length = row
            .iter()
            .map(|z| f64::from(*z).powi(2))
            .sum::<f64>()
            .sqrt()
            + 1e-10;
        row.iter().map(|z| f64::from(*z) / length).collect()
    };
    let mut worst = 0.0f64;
    let mut changed = false;
    for look in looks {
        changed |= right(&look) != right(first);
        for (a, b) in first.rows().zip(look.rows()) {
            let squares = unit(a)
                .iter()
                .zip(unit(b))
                .map(|(a, b)| (a - b).powi(2))
                .sum::<f64>();
            worst = worst.max(squares.sqrt());
        }
    }
    let message = "the model returns different logits for the same images, as randomized defenses do: use --version \
                   rand, which averages gradients";
    (changed || worst > LARGEST_DIFFERENCE).then(|| Flag::new("randomised", message))
}

/// Checks the gradient of the DLR loss, which does not vanish for confident predictions, on correctly classified
/// images.
fn zero_gradients(
    classifier: &TargetModel,
    pixels: Tensor<4>,
    labels: &[u32],
    logits: &Logits,
) -> Option<Flag> {
    let goals: Vec<Goal> = labels
        .iter()
        .map(|label| Goal::Dlr {
            label: *label as usize,
        })
        .collect();
    let gradient = to_vec(classifier.climb(pixels, &goals).gradient);
    let is_right = |row: &usize| logits.is_right(*row, labels[*row] as usize);
    let right: Vec<usize> = (0..labels.len()).filter(is_right).collect();
    let pixels = gradient.len() / labels.len();
    let is_zero = |row: &&usize| {
        gradient[**row * pixels..][..pixels]
            .iter()
            .all(|slope| *slope == 0.0)
    };
    let zero = right.iter().filter(is_zero).count();
    let message = format!(
        "{zero} of {} correctly classified images have a gradient of exactly zero: gradient-based attacks cannot be \
         trusted; look for saturated or rounding layers, and compare with square",
        right.len()
    );
    (zero > 0).then(|| Flag::new("zero_gradients", message))
}

fn not_finite(count: usize, of: usize) -> Option<Flag> {
    let message = format!(
        "{count} of {of} images have non-finite logits and count as misclassified: check the model for overflow, and \
         its weights"
    );
    (count > 0).then(|| Flag::new("not_finite", message))
}

fn distribution(logits: &Logits) -> Option<Flag> {
    let is_one = |row: &[f32]| {
        let sum: f64 = row.iter().map(|z| f64::from(*z)).sum();
        let inside =
            |z: &f32| (-NEAR_DISTRIBUTION..1.0 + NEAR_DISTRIBUTION).contains(&f64::from(*z));
        row.iter().all(inside) && (sum - 1.0).abs() < NEAR_DISTRIBUTION
    };
    let message = "the model outputs probabilities, but attacks need logits: the softmax hides the gradient of \
                   confident predictions; remove the softmax";
    logits
        .rows()
        .all(is_one)
        .then(|| Flag::new("probabilities", message))
}

fn few_classes(classes: usize, attacks: &[Attack]) -> Vec<Flag> {
    let mut flags = Vec::new();
    for attack in attacks {
        let (needs, wanted) = match attack {
            Attack::Apgd(apgd) => match apgd.climbs {
                Climbs::CrossEntropy | Climbs::ProbabilityMargin => continue,
                Climbs::Dlr => (3, None),
                Climbs::TargetedDlr { targets, .. } => (4, Some(targets)),
            },
            Attack::Fab(fab) => (2, fab.targets),
            _ => continue,
        };
        let name = attack.name();
        if classes < needs {
            let message = format!(
                "the loss of {name} needs {needs} classes and the model has {classes}: {name} maximizes a simplified \
                 loss instead, and its results are not comparable with published ones"
            );
            flags.push(Flag::new("few_classes", message));
        } else if let Some(wanted) = wanted.filter(|wanted| *wanted + 1 > classes as u64) {
            let message = format!(
                "{name} should target {wanted} classes, but there are only {} others: it targets all of them",
                classes - 1
            );
            flags.push(Flag::new("few_classes", message));
        }
    }
    flags
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::attack::Network;
    use crate::attack::threat::Norm;
    use crate::distributed::comm::Comm;
    use crate::eval::autoattack::{Settings, Version};
    use crate::eval::images::Images;
    use crate::ops::{Device, from_vec};

    /// Returns the names of the flags raised for a model, on four images of one pixel.
    fn flags(network: &dyn Network) -> Vec<String> {
        let device = Device::cpu();
        let pixels = vec![0.9, 0.1, 0.2, 0.1, 0.8, 0.3, 0.2, 0.3, 0.7, 0.6, 0.5, 0.4];
        let images = Images::Given {
            images: &from_vec(pixels, [4, 3, 1, 1], &device),
            labels: &[0, 1, 2, 0],
        };
        let settings = Settings::new(Version::Standard, Norm::Linf, "8/255".parse().unwrap());
        let found = before(&Evaluation {
            network,
            search: None,
            images: &images,
            attacks: &settings.autoattack(),
            sample: None,
            batch: 4,
            seed: 0,
            device: &device,
            comm: &Comm::single(),
        })
        .unwrap();
        found.into_iter().map(|flag| flag.check).collect()
    }

    /// A sound model with twelve classes.
    fn wide(images: Tensor<4>) -> Tensor<2> {
        let [batch, ..] = images.dims();
        let pixels = images.reshape([batch, 3]);
        Tensor::cat(
            vec![
                pixels.clone() * 4.0,
                pixels.clone(),
                pixels.clone() * -1.0,
                pixels * -2.0,
            ],
            1,
        )
    }

    #[test]
    fn a_sound_model_has_no_flag() {
        assert_eq!(flags(&wide), Vec::<String>::new());
    }

    #[test]
    fn gradient_masking_defenses_are_flagged() {
        let softmax = |images| burn::tensor::activation::softmax(wide(images), 1);
        assert_eq!(flags(&softmax), ["probabilities"]);

        let look = std::cell::Cell::new(0.0);
        let random = |images| {
            look.set(look.get() + 0.01);
            let logits = wide(images);
            let noise = logits.zeros_like().slice_fill([0..4, 0..1], look.get());
            logits + noise
        };
        assert_eq!(flags(&random), ["randomised"]);

        let rounded = |images: Tensor<4>| wide(images.without_autodiff().round() + 0.001);
        assert!(flags(&rounded).contains(&"zero_gradients".to_owned()));

        let broken = |images| wide(images) / 0.0;
        assert!(flags(&broken).contains(&"not_finite".to_owned()));

        let three = |images: Tensor<4>| images.reshape([4, 3]);
        assert_eq!(flags(&three), ["few_classes", "few_classes"]);
    }

    #[test]
    fn an_out_of_range_label_is_an_error_that_names_it() {
        let device = Device::cpu();
        let images = Images::Given {
            images: &crate::ops::zeros([1, 3, 1, 1], &device),
            labels: &[7],
        };
        let three = |images: Tensor<4>| images.reshape([1, 3]);
        let error = before(&Evaluation {
            network: &three,
            search: None,
            images: &images,
            attacks: &[],
            sample: None,
            batch: 1,
            seed: 0,
            device: &device,
            comm: &Comm::single(),
        })
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("label 7 is out of range: the model has 3 classes"),
            "{error}"
        );
    }
}
