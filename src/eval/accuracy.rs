//! Runs attacks in order, each on the images that survived the previous ones.

use std::collections::BTreeMap;
use std::time::Instant;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::bound::{Bound, Drawn, Sample};
use super::images::{Images, check_images, check_labels};
use super::recheck;
use crate::attack::unseen::Extent;
use crate::attack::{Attack, Batch, Logits, Mark, Network, Passes, TargetModel};
use crate::distributed::Comm;
use crate::error::{Error, Kind, Result};
use crate::ops::{Device, from_vec, to_vec};

/// An evaluation: the model, the images and the attacks.
pub struct Evaluation<'a> {
    /// The attacked model.
    pub network: &'a dyn Network,
    /// A faster approximation of it that attacks search with; what they find is confirmed with the model itself.
    pub search: Option<&'a dyn Network>,
    /// Images and their labels.
    pub images: &'a Images<'a>,
    /// Attacks, in the order in which they run after clean accuracy.
    pub attacks: &'a [Attack],
    /// Restricts the last attacks to a random sample of the images that survive the others; None for all.
    pub sample: Option<Sample>,
    /// Batch size; does not affect verdicts.
    pub batch: usize,
    /// Seed of the attacks' random numbers.
    pub seed: u64,
    /// Device of the computation.
    pub device: &'a Device,
    /// The ranks that share the images, one batch each at a time. Their number does not affect verdicts.
    pub comm: &'a Comm,
}

/// The results of an evaluation so far. Complete once every stage has run and `queue` is empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// One entry per attack, `clean` first.
    pub stages: Vec<StageOutcome>,
    /// For each image, whether it is classified correctly after all attacks.
    pub robust: Vec<bool>,
    /// For each image, the attack that fooled the model; `clean` if the clean image was misclassified.
    pub broken_by: Vec<Option<String>>,
    /// For each image that has an adversarial example, its distance in the attack's norm; for an unseen attack the norm of
    /// its parameters.
    pub distance: Vec<Option<f64>>,
    /// Logit of the label minus the largest other logit, on the adversarial image if there is one, else on the clean
    /// image. None where a logit is not finite.
    pub margin: Vec<Option<f64>>,
    /// Predicted class of the adversarial image if there is one, else of the clean image. None where a logit is not
    /// finite.
    pub predicted: Vec<Option<usize>>,
    /// Probability of the predicted class in `predicted`. None where a logit is not finite.
    #[serde(default)]
    pub confidence: Vec<Option<f64>>,
    /// The same on the clean image.
    #[serde(default)]
    pub clean_confidence: Vec<Option<f64>>,
    /// Number of classes of the model.
    pub classes: usize,
    /// Hash of the clean images and their labels, as passed to the model.
    pub images_hash: String,
    /// Smallest and largest pixel value of the clean and adversarial images.
    pub pixels: Option<[f32; 2]>,
    /// Images that the stage in progress has not attacked yet.
    pub queue: Vec<usize>,
    /// Attack state of images in `queue` whose attack was interrupted.
    pub marks: BTreeMap<usize, Mark>,
    /// The sample that the last attacks run on, drawn when the first of them starts; None without one.
    #[serde(default)]
    pub sample: Option<Drawn>,
}

/// The result of one attack.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageOutcome {
    /// Name of the attack.
    pub attack: String,
    /// Images that it attacked.
    pub tried: usize,
    /// Images still classified correctly after this attack and all previous ones.
    pub robust_count: usize,
    /// Forward and backward passes, counted in images.
    #[serde(flatten)]
    pub passes: Passes,
    /// Wall-clock time.
    pub seconds: f64,
}

/// The index of a misclassified image and its adversarial image; None if the clean image was misclassified.
pub type Misclassified = (usize, Option<Vec<f32>>);

/// Report on a batch that has just finished.
pub struct BatchReport<'a> {
    /// The attack.
    pub attack: &'a str,
    /// Number of the batch, from 1.
    pub number: usize,
    /// Total number of batches.
    pub of: usize,
    /// Images in the batch.
    pub tried: usize,
    /// The images on which the model was fooled.
    pub fooled: &'a [Misclassified],
}

/// Callbacks of an evaluation, for progress output and checkpoints.
pub trait Observer {
    /// Called after images passed through the model.
    fn passed(&self, _passes: Passes) {}

    /// Called when an attack starts or resumes on the outcome's queue.
    fn begun(&self, _outcome: &Outcome) {}

    /// Called when a batch has finished and is included in the outcome. An error ends the evaluation.
    fn batch(&self, _outcome: &Outcome, _done: &BatchReport) -> Result<()> {
        Ok(())
    }

    /// Called when an attack has finished.
    fn stage(&self, _outcome: &Outcome) -> Result<()> {
        Ok(())
    }
}

/// Ignores all events.
impl Observer for () {}

impl Outcome {
    /// Returns the share of images that survive the given stage and all previous ones.
    pub fn accuracy_after(&self, stage: usize) -> f64 {
        self.stages[stage].robust_count as f64 / self.robust.len().max(1) as f64
    }

    /// Counts images with non-finite logits, which are never robust. Valid once every image has been evaluated.
    pub fn not_finite(&self) -> usize {
        self.margin.iter().filter(|margin| margin.is_none()).count()
    }

    /// Counts the images that are robust so far.
    pub fn standing(&self) -> usize {
        self.robust.iter().filter(|robust| **robust).count()
    }

    /// Returns the bound on what is missed because the last attacks ran on a sample; None if all ran on all images.
    pub fn bound(&self) -> Option<Bound> {
        let sample = self.sample.as_ref()?;
        let fooled = sample.images.iter().filter(|index| !self.robust[**index]);
        let (sampled, fooled) = (sample.images.len(), fooled.count());
        Some(Bound::new(self.robust.len(), sample.of, sampled, fooled))
    }

    /// Returns the images that an attack starting now runs on.
    fn remaining(&self) -> Vec<usize> {
        let is_robust = |index: &usize| self.robust[*index];
        match &self.sample {
            Some(sample) => sample.images.iter().copied().filter(is_robust).collect(),
            None => (0..self.robust.len()).filter(is_robust).collect(),
        }
    }

    /// Returns how many images the attack at an index runs on if no further image is fooled.
    pub(crate) fn at_most_tried(&self, attack: usize, sample: Option<&Sample>) -> usize {
        match sample {
            Some(sample) if attack >= sample.first && self.sample.is_none() => {
                sample.size(self.robust.len(), self.standing())
            }
            _ => self.remaining().len(),
        }
    }

    fn begin(&mut self, attack: String) {
        self.queue = self.remaining();
        self.stages.push(StageOutcome {
            attack,
            tried: self.queue.len(),
            robust_count: self.standing(),
            passes: Passes::default(),
            seconds: 0.0,
        });
    }

    /// Hashes image by image, so that the hash does not depend on the batch size.
    fn hash(&mut self, of_image: &str) {
        let both = format!("{} {of_image}", self.images_hash);
        self.images_hash = blake3::hash(both.as_bytes()).to_hex().to_string();
    }

    fn see(&mut self, range: [f32; 2]) {
        let [low, high] = self.pixels.unwrap_or([f32::INFINITY, f32::NEG_INFINITY]);
        self.pixels = Some([low.min(range[0]), high.max(range[1])]);
    }

    /// Records the results of one rank's batch.
    fn take(&mut self, attack: &str, tried: &BatchOutcome) {
        for of_image in &tried.hashes {
            self.hash(of_image);
        }
        if let Some(range) = tried.pixels {
            self.see(range);
        }
        if let Some(classes) = tried.classes {
            self.classes = classes;
        }
        for answer in &tried.answers {
            let index = answer.index;
            self.margin[index] = Some(answer.margin).filter(|margin| margin.is_finite());
            self.predicted[index] = answer.predicted;
            self.confidence[index] = answer.confidence;
            if attack == "clean" {
                self.clean_confidence[index] = answer.confidence;
            }
        }
        for (index, distance) in &tried.distances {
            self.distance[*index] = Some(*distance);
        }
        for (index, _) in &tried.fooled {
            self.robust[*index] = false;
            self.broken_by[*index] = Some(attack.to_owned());
        }
        let stage = self.stages.last_mut().expect("a stage is in progress");
        stage.robust_count -= tried.fooled.len();
        stage.passes += tried.passes;
    }

    /// Returns the unfinished images of a stopped batch to the front of the queue.
    fn put_back(&mut self, left: Vec<(usize, Option<Mark>)>) {
        let indices = left.iter().map(|(index, _)| *index);
        self.queue.splice(0..0, indices);
        let marks = left
            .into_iter()
            .filter_map(|(index, mark)| Some((index, mark?)));
        self.marks.extend(marks);
    }
}

/// The result of an attack on one batch.
#[derive(Default, Serialize, Deserialize)]
struct BatchOutcome {
    /// Hashes of the clean images and labels; filled by the clean stage.
    hashes: Vec<String>,
    classes: Option<usize>,
    pixels: Option<[f32; 2]>,
    answers: Vec<Answer>,
    distances: Vec<(usize, f64)>,
    fooled: Vec<Misclassified>,
    passes: Passes,
    /// Images left unfinished by a stop, with the state of their attack.
    left: Vec<(usize, Option<Mark>)>,
    /// Whether this rank was asked to stop.
    stop: bool,
}

/// What the model answers to an image.
#[derive(Serialize, Deserialize)]
struct Answer {
    index: usize,
    margin: f64,
    predicted: Option<usize>,
    confidence: Option<f64>,
}

impl Answer {
    fn new(index: usize, logits: &Logits, row: usize, label: usize) -> Self {
        Self {
            index,
            margin: logits.margin(row, label),
            predicted: logits.prediction(row),
            confidence: logits.confidence(row),
        }
    }
}

fn stopped(outcome: &Outcome) -> Error {
    let stage = outcome.stages.last().expect("a stage is in progress");
    let done = stage.tried - outcome.queue.len();
    let message = format!(
        "stopped by signal after {done} of {} images of {}",
        stage.tried, stage.attack
    );
    let error = Error::new(Kind::TryAgain, message);
    error
        .hint("run the same command again to resume")
        .everywhere()
}

fn hash_of(image: &[f32], label: u32) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&label.to_le_bytes());
    hasher.update(bytemuck::cast_slice(image));
    hasher.finalize().to_hex().to_string()
}

/// Returns the smallest and the largest value.
fn range_of(pixels: &[f32]) -> [f32; 2] {
    let none = [f32::INFINITY, f32::NEG_INFINITY];
    pixels.iter().fold(none, |[low, high], pixel| {
        [low.min(*pixel), high.max(*pixel)]
    })
}

impl Evaluation<'_> {
    /// Computes clean accuracy, then runs each attack on the images that survived the previous ones.
    ///
    /// Every adversarial image is checked again here, independently of the attack that produced it: within epsilon in
    /// the attack's norm, in [0, 1], no NaN, and misclassified. For an unseen attack, the parameters are within their
    /// set, and rendered again they give this image.
    /// Errors: there are no images; an image cannot be read or is not in [0, 1]; the model has fewer than two classes;
    /// an attack left its threat model; the observer failed; or, with kind [`Kind::TryAgain`], a rank was asked to
    /// stop, which takes a pass or two.
    pub fn run(&self, observer: &dyn Observer) -> Result<Outcome> {
        self.resume(Outcome::default(), observer)
    }

    /// Resumes an evaluation with the same settings from an [`Outcome`] that an observer received.
    pub fn resume(&self, mut outcome: Outcome, observer: &dyn Observer) -> Result<Outcome> {
        let watch = |passes| observer.passed(passes);
        let stop = || self.comm.stop_requested();
        let classifier = TargetModel::watched(self.network, self.device, &watch)
            .searched_by(self.search)
            .stopped_by(&stop);
        let count = self.images.count();
        if count == 0 {
            return Err(Error::input("no images to evaluate"));
        }
        if outcome.stages.is_empty() {
            outcome.robust = vec![true; count];
            outcome.broken_by = vec![None; count];
            outcome.distance = vec![None; count];
            outcome.margin = vec![None; count];
            outcome.predicted = vec![None; count];
            outcome.confidence = vec![None; count];
            outcome.clean_confidence = vec![None; count];
            outcome.begin("clean".to_owned());
        }
        // Progress of earlier versions has none.
        outcome.confidence.resize(count, None);
        outcome.clean_confidence.resize(count, None);
        if self.comm.any_stop_requested() {
            return Err(stopped(&outcome));
        }
        loop {
            observer.begun(&outcome);
            let is_last = outcome.stages.len() > self.attacks.len();
            while !outcome.queue.is_empty() {
                let stop = self.batch(&classifier, &mut outcome, observer)?;
                // If nothing is left to do, return the result instead of stopping.
                if stop && !(is_last && outcome.queue.is_empty()) {
                    return Err(stopped(&outcome));
                }
            }
            observer.stage(&outcome)?;
            let next = outcome.stages.len() - 1;
            let Some(attack) = self.attacks.get(next) else {
                return Ok(outcome);
            };
            if let Some(sample) = self.sample.filter(|sample| sample.first == next) {
                let survivors = outcome.remaining();
                let key = |index| self.images.key(index);
                outcome.sample = Some(Drawn {
                    images: sample.draw(count, &survivors, key, self.seed),
                    of: survivors.len(),
                });
            }
            outcome.begin(attack.name());
        }
    }

    /// Runs the attack in progress on the first images of the queue, one batch per rank. Returns whether a rank was
    /// asked to stop.
    fn batch(
        &self,
        classifier: &TargetModel,
        outcome: &mut Outcome,
        observer: &dyn Observer,
    ) -> Result<bool> {
        let begun = Instant::now();
        let attack = outcome
            .stages
            .len()
            .checked_sub(2)
            .map(|index| &self.attacks[index]);
        let round = self.batch.max(1).saturating_mul(self.comm.world_size());
        let size = round.min(outcome.queue.len());
        let indices: Vec<usize> = outcome.queue.drain(..size).collect();
        let own: Vec<(usize, Option<Mark>)> = indices[self.comm.local_range(size)]
            .iter()
            .map(|index| (*index, outcome.marks.get(index).cloned()))
            .collect();
        let tried = match own.is_empty() {
            true => Ok(BatchOutcome::default()),
            false => self.tried(attack, classifier, own),
        };
        let tried = tried.map(|tried| BatchOutcome {
            stop: self.comm.stop_requested(),
            ..tried
        });
        let mut all = self.comm.all_gather(self.comm.all_ok(tried)?);
        let name = attack.map_or("clean".to_owned(), Attack::name);
        for index in &indices {
            outcome.marks.remove(index);
        }
        for tried in &all {
            outcome.take(&name, tried);
        }
        let stop = all.iter().any(|tried| tried.stop);
        let undone: Vec<_> = all
            .iter_mut()
            .flat_map(|tried| std::mem::take(&mut tried.left))
            .collect();
        let done = size - undone.len();
        outcome.put_back(undone);
        let left = outcome.queue.len();
        let stage = outcome.stages.last_mut().expect("a stage is in progress");
        stage.seconds += begun.elapsed().as_secs_f64();
        let fooled: Vec<Misclassified> = all.into_iter().flat_map(|tried| tried.fooled).collect();
        let done = BatchReport {
            attack: &name,
            number: (stage.tried - left).div_ceil(round),
            of: stage.tried.div_ceil(round),
            tried: done,
            fooled: &fooled,
        };
        observer.batch(outcome, &done)?;
        Ok(stop)
    }

    fn tried(
        &self,
        attack: Option<&Attack>,
        classifier: &TargetModel,
        own: Vec<(usize, Option<Mark>)>,
    ) -> Result<BatchOutcome> {
        let (indices, marks): (Vec<usize>, Vec<Option<Mark>>) = own.iter().cloned().unzip();
        let (clean, labels) = self.images.batch(&indices, self.device)?;
        if classifier.is_stopped() {
            return Ok(BatchOutcome {
                left: own,
                ..BatchOutcome::default()
            });
        }
        let mut tried = match attack {
            None => self.clean(classifier, &indices, clean, &labels)?,
            Some(attack) => self.attacked(attack, classifier, &indices, &marks, clean, labels)?,
        };
        tried.passes = classifier.take_passes();
        Ok(tried)
    }

    /// Evaluates the clean images.
    fn clean(
        &self,
        classifier: &TargetModel,
        indices: &[usize],
        clean: Tensor<4>,
        labels: &[u32],
    ) -> Result<BatchOutcome> {
        let pixels = to_vec(clean.clone());
        check_images(indices, &pixels)?;
        let images = pixels.chunks_exact(pixels.len() / labels.len()).zip(labels);
        let logits = classifier.logits(clean);
        check_labels(labels, logits.classes())?;
        let mut tried = BatchOutcome {
            hashes: images
                .map(|(image, label)| hash_of(image, *label))
                .collect(),
            classes: Some(logits.classes()),
            pixels: Some(range_of(&pixels)),
            ..BatchOutcome::default()
        };
        for (row, (index, label)) in indices.iter().zip(labels).enumerate() {
            let answer = Answer::new(*index, &logits, row, *label as usize);
            tried.answers.push(answer);
            if !logits.is_right(row, *label as usize) {
                tried.fooled.push((*index, None));
            }
        }
        Ok(tried)
    }

    /// Runs an attack and checks its adversarial images.
    fn attacked(
        &self,
        attack: &Attack,
        classifier: &TargetModel,
        indices: &[usize],
        marks: &[Option<Mark>],
        clean: Tensor<4>,
        labels: Vec<u32>,
    ) -> Result<BatchOutcome> {
        let [_, channels, height, width] = clean.dims();
        let pixels = channels * height * width;
        let extent = Extent { height, width };
        let batch = Batch {
            images: clean.clone(),
            labels: labels.clone(),
            keys: indices
                .iter()
                .map(|index| self.images.key(*index))
                .collect(),
            seed: self.seed,
        };
        let attempt = attack.go_on(classifier, &batch, marks);
        let mut tried = BatchOutcome::default();
        if attempt.stopped {
            classifier.forget_passes();
            let rows = attempt.found.iter().zip(attempt.marks).zip(indices);
            let left = rows.filter(|((found, _), _)| found.is_none());
            tried.left = left.map(|((_, mark), index)| (*index, mark)).collect();
        }
        let shown: Vec<(usize, Vec<f32>)> = attempt
            .found
            .into_iter()
            .enumerate()
            .filter_map(|(row, image)| Some((row, image?)))
            .collect();
        if shown.is_empty() {
            return Ok(tried);
        }
        let values = shown
            .iter()
            .flat_map(|(_, image)| image.iter().copied())
            .collect();
        let images = from_vec(values, [shown.len(), channels, height, width], self.device);
        let logits = classifier.logits(images);
        let clean = to_vec(clean);
        for (shown_row, (row, image)) in shown.into_iter().enumerate() {
            let (index, label) = (indices[row], labels[row] as usize);
            let clean = &clean[row * pixels..][..pixels];
            let distance = match attack {
                Attack::Unseen(attack) => {
                    let parameters = attempt.parameters[row].as_deref().unwrap_or_default();
                    let again =
                        attack.render(clean, extent, self.seed, batch.keys[row], parameters);
                    recheck::corrupted(attack, parameters, again.as_deref(), &image)
                }
                _ => recheck::distance(attack, clean, &image),
            };
            let distance =
                distance.map_err(|fault| Error::failed(format!("image {index}: {fault}")))?;
            if logits.is_right(shown_row, label) {
                continue;
            }
            let [low, high] = range_of(&image);
            let [lowest, highest] = tried.pixels.unwrap_or([low, high]);
            tried.pixels = Some([low.min(lowest), high.max(highest)]);
            tried.distances.push((index, distance));
            let answer = Answer::new(index, &logits, shown_row, label);
            tried.answers.push(answer);
            tried.fooled.push((index, Some(image)));
        }
        Ok(tried)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::pgd::{Pgd, Start};
    use crate::attack::threat::Norm;
    use crate::data::dataset::Dataset;
    use crate::data::spec::{Spec, Split};
    use crate::data::subset::{Selection, Subset};
    use crate::image::preprocessing::Preprocessing;

    /// A linear classifier of the mean color, easy to fool.
    fn logits(images: Tensor<4>) -> Tensor<2> {
        let [batch, ..] = images.dims();
        let means = images
            .reshape([batch, 3, 32 * 32])
            .mean_dim(2)
            .reshape([batch, 3]);
        let shares = [1.0, -1.0, 0.5, 0.2];
        Tensor::cat(shares.map(|share| means.clone() * share).to_vec(), 1)
    }

    fn run(batch: usize, epsilon: &str) -> Outcome {
        run_on(&Selection::All, batch, epsilon).0
    }

    fn run_on(selection: &Selection, batch: usize, epsilon: &str) -> (Outcome, Subset) {
        let spec: Spec = "synthetic:40".parse().unwrap();
        let dataset = Dataset::open(&spec, Split::Test, 0).unwrap();
        let subset = Subset::choose(&dataset, selection).unwrap();
        let attack = Attack::Pgd(Pgd {
            norm: Norm::Linf,
            epsilon: epsilon.parse().unwrap(),
            step_size: "4/255".parse().unwrap(),
            steps: 3,
            start: Start::Random,
        });
        let evaluation = Evaluation {
            network: &logits,
            search: None,
            images: &Images::Stored {
                dataset: &dataset,
                subset: &subset,
                preprocessing: Preprocessing::new(32),
            },
            attacks: &[attack],
            sample: None,
            batch,
            seed: 0,
            device: &Device::cpu(),
            comm: &Comm::single(),
        };
        let outcome = evaluation.run(&()).unwrap();
        (outcome, subset)
    }

    #[test]
    fn an_image_has_the_same_verdict_in_every_subset() {
        let whole = run(40, "8/255");
        let (part, subset) = run_on(&Selection::Sample(15), 4, "8/255");
        assert_eq!(part.robust.len(), 15);
        for index in 0..15 {
            let place = subset.place(index);
            assert_eq!(part.broken_by[index], whole.broken_by[place]);
            assert_eq!(part.margin[index], whole.margin[place]);
        }
    }

    #[test]
    fn batch_size_does_not_change_robust_accuracy() {
        let whole = run(40, "8/255");
        for batch in [1, 7] {
            let found = run(batch, "8/255");
            assert_eq!(found.robust, whole.robust);
            assert_eq!(found.broken_by, whole.broken_by);
            assert_eq!(found.images_hash, whole.images_hash);
            assert_eq!(found.stages[1].passes, whole.stages[1].passes);
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
