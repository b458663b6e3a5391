//! Attacks in order, each on the images that survived those before it.

use std::time::Instant;

use burn::tensor::{Device, Tensor};

use crate::attack::{Norm, Pgd};
use crate::data::{Dataset, EvaluationTransform, evaluation_batch};
use crate::error::{Error, Result};
use crate::fused::{from_vec, to_vec};
use crate::loss::{Targets, cross_entropy, predictions};

/// The first `count` images of a data set, loaded batch by batch.
pub struct Images<'a> {
    /// The data set.
    pub dataset: &'a Dataset,
    /// How images are brought to the model's size.
    pub transform: EvaluationTransform,
    /// How many.
    pub count: usize,
}

impl Images<'_> {
    /// The images of given indices and their labels.
    ///
    /// Shapes: the images `[indices, 3, size, size]`.
    pub fn batch(&self, indices: &[usize], device: &Device) -> Result<(Tensor<4>, Vec<u32>)> {
        let size = self.transform.image_size;
        let values = evaluation_batch(self.dataset, indices, &self.transform)?;
        let images = from_vec(values, [indices.len(), 3, size, size], device);
        Ok((
            images,
            indices
                .iter()
                .map(|index| self.dataset.label(*index))
                .collect(),
        ))
    }
}

/// What an evaluation found.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// One entry an attack, `clean` first.
    pub stages: Vec<StageOutcome>,
    /// For each image whether it is classified correctly after every attack.
    pub robust: Vec<bool>,
    /// The attack that fooled the model on an image; `clean` where no attack was needed.
    pub broken_by: Vec<Option<String>>,
    /// Distance of the adversarial image in its attack's norm, where there is one.
    pub distance: Vec<Option<f64>>,
}

/// What one attack left standing.
#[derive(Clone, Debug, PartialEq)]
pub struct StageOutcome {
    /// Its name.
    pub attack: String,
    /// Images classified correctly after it and all before it.
    pub robust_count: usize,
    /// Images passed forward.
    pub forward: u64,
    /// Images passed backward.
    pub backward: u64,
    /// Wall time.
    pub seconds: f64,
}

impl Outcome {
    /// Share of images that survive the given attack and those before it.
    pub fn accuracy_after(&self, stage: usize) -> f64 {
        self.stages[stage].robust_count as f64 / self.robust.len().max(1) as f64
    }
}

/// Where an evaluation is, for progress: attack, images done, images of this attack, survivors.
pub type Progress<'a> = &'a mut dyn FnMut(&str, usize, usize, usize);

/// Clean accuracy, then each attack on what survived.
///
/// Batch size changes nothing: random starts are keyed by the image, and the survivors are packed
/// into full batches anew for each attack.
/// Every adversarial image is checked again here, apart from the attack: in its norm, in [0, 1],
/// no NaN.
pub fn evaluate(
    logits: &dyn Fn(Tensor<4>) -> Tensor<2>,
    images: &Images,
    attacks: &[Pgd],
    batch: usize,
    seed: u64,
    device: &Device,
    progress: Progress,
) -> Result<Outcome> {
    let count = images.count;
    let mut outcome = Outcome {
        stages: Vec::new(),
        robust: vec![true; count],
        broken_by: vec![None; count],
        distance: vec![None; count],
    };
    for attack in std::iter::once(None).chain(attacks.iter().map(Some)) {
        let name = attack.map_or("clean".to_owned(), Pgd::name);
        let begun = Instant::now();
        let standing: Vec<usize> = (0..count).filter(|index| outcome.robust[*index]).collect();
        let mut survivors = standing.len();
        progress(&name, 0, standing.len(), survivors);
        for (number, indices) in standing.chunks(batch).enumerate() {
            let (clean, labels) = images.batch(indices, device)?;
            let shown = match attack {
                None => clean,
                Some(attack) => {
                    let found = perturb(attack, logits, clean.clone(), &labels, seed, indices);
                    let lengths = check(attack, &name, &clean, &found)?;
                    for (index, length) in indices.iter().zip(lengths) {
                        outcome.distance[*index] = Some(length);
                    }
                    found
                }
            };
            let predicted = predictions(logits(shown));
            for ((index, label), predicted) in indices.iter().zip(&labels).zip(predicted) {
                if predicted == *label {
                    outcome.distance[*index] = None;
                } else {
                    outcome.robust[*index] = false;
                    outcome.broken_by[*index] = Some(name.clone());
                    survivors -= 1;
                }
            }
            progress(
                &name,
                number * batch + indices.len(),
                standing.len(),
                survivors,
            );
        }
        let steps = attack.map_or(0, |attack| attack.steps);
        outcome.stages.push(StageOutcome {
            attack: name,
            robust_count: survivors,
            forward: (steps + 1) * standing.len() as u64,
            backward: steps * standing.len() as u64,
            seconds: begun.elapsed().as_secs_f64(),
        });
    }
    Ok(outcome)
}

fn perturb(
    attack: &Pgd,
    logits: &dyn Fn(Tensor<4>) -> Tensor<2>,
    clean: Tensor<4>,
    labels: &[u32],
    seed: u64,
    indices: &[usize],
) -> Tensor<4> {
    let device = clean.device();
    let targets = Targets::classes(labels);
    let loss = |images: Tensor<4>| {
        let logits = logits(images);
        let targets = targets.distributions(logits.dims()[1], 0.0, &device);
        cross_entropy(logits, targets)
    };
    let keys: Vec<u64> = indices.iter().map(|index| *index as u64).collect();
    attack.perturb(clean, &loss, seed, &keys)
}

/// The distance of each adversarial image; an error where it is not what the attack promises.
fn check(attack: &Pgd, name: &str, clean: &Tensor<4>, found: &Tensor<4>) -> Result<Vec<f64>> {
    let pixels = clean.dims()[1..].iter().product();
    let (clean, found) = (to_vec(clean.clone()), to_vec(found.clone()));
    if let Some(pixel) = found.iter().find(|pixel| !(0.0..=1.0).contains(*pixel)) {
        return Err(Error::failed(format!(
            "{name} made a pixel of {pixel}, outside [0, 1]"
        )));
    }
    let delta: Vec<f32> = found
        .iter()
        .zip(&clean)
        .map(|(found, clean)| found - clean)
        .collect();
    let lengths = attack.norm.lengths(&delta, pixels);
    // Each pixel is rounded to f32 once, which l1 adds up.
    let slack = match attack.norm {
        Norm::L1 => pixels as f64 * 6e-8,
        Norm::L2 | Norm::Linf => 1e-6,
    };
    match lengths
        .iter()
        .find(|length| **length > attack.epsilon.value() + slack)
    {
        None => Ok(lengths),
        Some(length) => {
            let epsilon = &attack.epsilon;
            Err(Error::failed(format!(
                "{name} left its ball: {length} > {epsilon}"
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::Start;
    use crate::data::resize::Filter;
    use crate::data::{Spec, Split};

    /// A linear classifier of mean colour, easy to fool.
    fn logits(images: Tensor<4>) -> Tensor<2> {
        let [batch, ..] = images.dims();
        let means = images
            .reshape([batch, 3, 32 * 32])
            .mean_dim(2)
            .reshape([batch, 3]);
        Tensor::cat(vec![means.clone(), -means.clone(), means * 0.5], 1)
    }

    fn run(batch: usize, epsilon: &str) -> Outcome {
        let spec: Spec = "synthetic:40".parse().unwrap();
        let dataset = Dataset::open(&spec, Split::Test, 0).unwrap();
        let transform = EvaluationTransform {
            image_size: 32,
            crop_fraction: 1.0,
            interpolation: Filter::Bilinear,
        };
        let images = Images {
            dataset: &dataset,
            transform,
            count: 40,
        };
        let attack = Pgd {
            norm: Norm::Linf,
            epsilon: epsilon.parse().unwrap(),
            step_size: "4/255".parse().unwrap(),
            steps: 3,
            start: Start::Random,
        };
        evaluate(
            &logits,
            &images,
            &[attack],
            batch,
            0,
            &Device::flex(),
            &mut |_, _, _, _| {},
        )
        .unwrap()
    }

    #[test]
    fn batch_size_does_not_change_robust_accuracy() {
        let whole = run(40, "8/255");
        for batch in [1, 7] {
            let found = run(batch, "8/255");
            assert_eq!(found.robust, whole.robust);
            assert_eq!(found.broken_by, whole.broken_by);
        }
    }

    #[test]
    fn no_attack_raises_accuracy_and_epsilon_zero_changes_nothing() {
        let outcome = run(16, "8/255");
        assert!(outcome.stages[1].robust_count <= outcome.stages[0].robust_count);
        let nothing = run(16, "0");
        assert_eq!(
            nothing.stages[1].robust_count,
            nothing.stages[0].robust_count
        );
    }
}
