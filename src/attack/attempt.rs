//! A batch under attack: the images that were fooled, and the attack state of the others.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::gradient::select;
use super::target_model::TargetModel;
use super::targets::Targets;
use crate::ops::to_vec;

/// A batch of images to attack.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The clean images, `[batch, 3, height, width]`, all classified correctly.
    pub images: Tensor<4>,
    /// Their labels.
    pub labels: Vec<u32>,
    /// One key per image, which selects its random streams.
    pub keys: Vec<u64>,
    /// Seed of the evaluation.
    pub seed: u64,
}

impl Batch {
    /// Returns the images at the given indices.
    pub(crate) fn select(&self, kept: &[usize]) -> Self {
        Self {
            images: select(self.images.clone(), kept),
            labels: kept.iter().map(|index| self.labels[*index]).collect(),
            keys: kept.iter().map(|index| self.keys[*index]).collect(),
            seed: self.seed,
        }
    }
}

/// For each image of a batch, the adversarial candidate, if the attack has one.
pub type Adversarials = Vec<Option<Vec<f32>>>;

/// The state of a stopped attack on an image not yet fooled, sufficient to resume it with identical results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Mark {
    /// Completed runs, each from one start and for one target.
    Runs {
        /// Number of runs that the image survived.
        survived: usize,
        /// The targets, chosen before the first run; empty if they are not known yet, or without targets.
        targets: Vec<usize>,
    },
    /// Queries of random search.
    Queries {
        /// Number of queries made.
        asked: u64,
        /// Queries that improved the best image; replaying them reproduces it.
        accepted: Vec<u64>,
        /// Margin of the best image.
        margin: f64,
    },
}

/// The result of an attack on a batch.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// For each image, the adversarial candidate.
    pub found: Adversarials,
    /// For each candidate of an unseen attack, the parameters that render it.
    pub parameters: Vec<Option<Vec<f32>>>,
    /// Whether the attack was stopped before its last run on the images not yet fooled.
    pub stopped: bool,
    /// If it was stopped, its state for each of those images.
    pub marks: Vec<Option<Mark>>,
}

impl Attempt {
    /// Returns a result without adversarial examples for `count` images.
    pub(crate) fn nothing(count: usize) -> Self {
        Self {
            found: vec![None; count],
            parameters: vec![None; count],
            stopped: false,
            marks: vec![None; count],
        }
    }
}

/// A run of an attack: its number, and the number of its restart for the current target, both from 0.
pub(crate) struct Run {
    pub(crate) number: usize,
    pub(crate) restart: usize,
}

/// Executes the runs of an attack in sequence, each on the images not yet fooled: all restarts for each target class in
/// turn, or all restarts without a target.
///
/// `marks` come from a stopped attempt. `attempt` receives the run, the remaining images and the target of each.
pub(crate) fn in_turn(
    classifier: &TargetModel,
    batch: &Batch,
    marks: &[Option<Mark>],
    targets: Option<Targets>,
    restarts: u64,
    mut attempt: impl FnMut(&Run, &Batch, &[Option<usize>]) -> Adversarials,
) -> Attempt {
    let mut survived = vec![0; batch.labels.len()];
    let mut targets_of: Vec<Vec<usize>> = vec![Vec::new(); batch.labels.len()];
    for (index, mark) in marks.iter().enumerate() {
        if let Some(Mark::Runs {
            survived: s,
            targets,
        }) = mark
        {
            (survived[index], targets_of[index]) = (*s, targets.clone());
        }
    }
    let mark = |(survived, targets)| Some(Mark::Runs { survived, targets });
    if let Some(targets) = targets {
        let new: Vec<usize> = (0..targets_of.len())
            .filter(|index| targets_of[*index].is_empty())
            .collect();
        if !new.is_empty() {
            let Batch { images, labels, .. } = batch.select(&new);
            let Some(chosen) = targets.choose(classifier, &images, &labels) else {
                return Attempt {
                    stopped: true,
                    marks: survived.into_iter().zip(targets_of).map(mark).collect(),
                    ..Attempt::nothing(batch.labels.len())
                };
            };
            // Ranking may take as many passes as a run, so it is not repeated: the marks hold the targets.
            classifier.keep_passes();
            for (index, targets) in new.into_iter().zip(chosen) {
                targets_of[index] = targets;
            }
        }
    }
    let aims = match targets {
        Some(_) => targets_of.iter().map(Vec::len).max().unwrap_or_default(),
        None => 1,
    };
    let restarts = restarts as usize;
    let mut found: Adversarials = vec![None; batch.labels.len()];
    let mut stopped = false;
    for number in 0..aims * restarts {
        let target = |index: &usize| targets_of[*index].get(number / restarts).copied();
        let remains = |index: &usize| {
            let is_aimed = targets.is_none() || target(index).is_some();
            found[*index].is_none() && survived[*index] <= number && is_aimed
        };
        let remaining: Vec<usize> = (0..found.len()).filter(remains).collect();
        if remaining.is_empty() {
            continue;
        }
        let aimed_at: Vec<Option<usize>> = remaining.iter().map(target).collect();
        let run = Run {
            number,
            restart: number % restarts,
        };
        let images = attempt(&run, &batch.select(&remaining), &aimed_at);
        if classifier.is_stopped() {
            stopped = true;
            break;
        }
        classifier.keep_passes();
        for (index, image) in remaining.iter().zip(images) {
            found[*index] = image;
            survived[*index] = number + 1;
        }
    }
    Attempt {
        parameters: vec![None; found.len()],
        found,
        stopped,
        marks: survived.into_iter().zip(targets_of).map(mark).collect(),
    }
}

/// Returns the pixels of each image of a batch.
pub(crate) fn images_of(images: Tensor<4>) -> Vec<Vec<f32>> {
    let pixels = images.dims()[1..].iter().product();
    to_vec(images)
        .chunks_exact(pixels)
        .map(<[f32]>::to_vec)
        .collect()
}
