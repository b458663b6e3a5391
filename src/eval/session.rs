//! Runs an evaluation with progress output and checkpoints, saved after each batch and on a stop request.
//!
//! The log lines are those of the AutoAttack program, so that existing log parsers keep working.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::accuracy::{BatchReport, Evaluation, Misclassified, Observer, Outcome};
use super::bound::Sample;
use super::images::Images;
use super::interval::wilson;
use super::result::Findings;
use super::{checks, result};
use crate::attack::{Attack, Norm, Passes, TargetModel};
use crate::data::sources::tensors;
use crate::distributed::Comm;
use crate::error::{Error, Result};
use crate::files;
use crate::ops::{Device, to_vec};
use crate::screen::Screen;
use crate::units::duration;

/// Interval between redraws of the progress line.
const REDRAWN_AFTER: Duration = Duration::from_millis(200);
/// Bytes of saved images to read at once.
const AT_ONCE: u64 = 64 << 20;

/// The saved state of an evaluation in progress, in a format that preserves every bit of a float.
#[derive(Serialize, Deserialize)]
pub(crate) struct Saved {
    /// Fingerprint of the evaluation.
    fingerprint: String,
    outcome: Outcome,
    /// Number of bytes of the adversarial image file that belong to this state, and their hash.
    images: u64,
    images_hash: String,
}

impl Saved {
    /// Serializes the state, preceded by its hash.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut text = Vec::new();
        ciborium::into_writer(self, &mut text).expect("writing to memory cannot fail");
        [blake3::hash(&text).as_bytes(), &text[..]].concat()
    }

    /// Parses the output of [`Self::to_bytes`]. Returns `None` for anything else: a flipped bit in a count would change
    /// the accuracy.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let (hash, text) = bytes.split_at_checked(blake3::OUT_LEN)?;
        if *blake3::hash(text).as_bytes() != *hash {
            return None;
        }
        ciborium::from_reader(text).ok()
    }
}

/// Receives the misclassified images of each batch. A resumed evaluation passes the saved ones first.
pub type Sink<'a> = &'a dyn Fn(&[Misclassified]) -> Result<()>;

/// The files of an evaluation in progress. With several ranks, only the first rank writes them.
pub struct Progress<'a> {
    fingerprint: String,
    /// State file; None if nothing is saved.
    state: Option<PathBuf>,
    /// Whether the user chose the file name, so that the file may belong to something else.
    is_named: bool,
    images: Option<PathBuf>,
    /// Hash of the adversarial images so far.
    hasher: RefCell<blake3::Hasher>,
    comm: &'a Comm,
    sink: Option<Sink<'a>>,
    /// Lock on a user-named file, against concurrent writers.
    _lock: Option<File>,
}

impl<'a> Progress<'a> {
    /// Saves progress in a folder, in a file specific to the given fingerprint, so that other evaluations' progress is
    /// left alone.
    pub fn new(folder: &Path, fingerprint: &str, keep_images: bool, comm: &'a Comm) -> Self {
        // An evaluation that saves images cannot resume from progress without images.
        let kind = if keep_images { "-images" } else { "" };
        let name = format!(
            "eval-{}{kind}.progress",
            &fingerprint[..12.min(fingerprint.len())]
        );
        Self {
            fingerprint: fingerprint.to_owned(),
            images: keep_images.then(|| folder.join(format!("{name}.images"))),
            state: Some(folder.join(name)),
            is_named: false,
            ..Self::unsaved(comm)
        }
    }

    /// Saves progress in the given file and in `NAME.images`, locked against other processes. Both files are kept when
    /// the evaluation is done. A file with other content is rejected when the evaluation starts.
    ///
    /// Errors: the files cannot be written, or another process holds the lock.
    pub fn at(state: &Path, fingerprint: &str, comm: &'a Comm) -> Result<Self> {
        let mut images = state.as_os_str().to_owned();
        images.push(".images");
        let images = PathBuf::from(images);
        let lock = files::lock_kept(&images)?.ok_or_else(|| {
            let message = format!("`{}` is in use by another process", state.display());
            Error::input(message).hint("wait for it to finish, or choose another file")
        })?;
        Ok(Self {
            fingerprint: fingerprint.to_owned(),
            state: Some(state.to_owned()),
            is_named: true,
            images: Some(images),
            _lock: Some(lock),
            ..Self::unsaved(comm)
        })
    }

    /// Saves nothing: a stopped evaluation starts over.
    pub fn unsaved(comm: &'a Comm) -> Self {
        Self {
            fingerprint: String::new(),
            state: None,
            is_named: false,
            images: None,
            hasher: RefCell::default(),
            comm,
            sink: None,
            _lock: None,
        }
    }

    /// Adds a sink for the misclassified images.
    pub fn with_sink(self, sink: Sink<'a>) -> Self {
        Self {
            sink: Some(sink),
            ..self
        }
    }

    /// Loads the saved outcome, or `None` for a new evaluation, and a notice about the files for the user.
    fn load(&self) -> Result<(Option<Outcome>, Option<String>)> {
        let found = match self.comm.is_main() {
            true => self.load_here(),
            false => Ok((None, None)),
        };
        Ok(self.comm.broadcast(self.comm.all_ok(found)?))
    }

    fn load_here(&self) -> Result<(Option<Outcome>, Option<String>)> {
        let begin = |notice| {
            // Clears images left by a process that was killed before its first save.
            if let Some(images) = &self.images {
                files::truncate(images, 0)?;
            }
            Ok((None, notice))
        };
        let Some(state) = self.state.as_ref().filter(|state| state.exists()) else {
            return begin(None);
        };
        let damaged = |path: &Path| {
            let path = path.display();
            begin(Some(format!(
                "warning: `{path}` is damaged: starting the evaluation over"
            )))
        };
        let saved = Saved::read(&files::read(state)?);
        let saved = match saved {
            Some(saved) if saved.fingerprint == self.fingerprint => saved,
            _ if !self.is_named => return damaged(state),
            Some(_) => {
                let what =
                    "belongs to a different evaluation: images, labels, attacks or seed differ";
                return Err(refused(state, what));
            }
            None => {
                let what = "is not an evaluation state file, or is damaged";
                return Err(refused(state, what));
            }
        };
        if let Some(images) = &self.images {
            files::truncate(images, saved.images)?;
            let mut hasher = self.hasher.borrow_mut();
            *hasher = hash_of(images)?;
            if hasher.finalize().to_string() != saved.images_hash {
                hasher.reset();
                return damaged(images);
            }
        }
        Ok((Some(saved.outcome), None))
    }

    fn save(&self, outcome: &Outcome, done: &BatchReport) -> Result<()> {
        if !self.comm.is_main() {
            return Ok(());
        }
        if let Some(sink) = self.sink {
            sink(done.fooled)?;
        }
        let Some(state) = &self.state else {
            return Ok(());
        };
        let mut hasher = self.hasher.borrow_mut();
        if let Some(path) = &self.images {
            let mut records = Vec::new();
            for (index, image) in done.fooled {
                if let Some(image) = image {
                    records.extend((*index as u64).to_le_bytes());
                    records.extend_from_slice(bytemuck::cast_slice(image));
                }
            }
            files::append_bytes(path, &records)?;
            hasher.update(&records);
        }
        let saved = Saved {
            fingerprint: self.fingerprint.clone(),
            outcome: outcome.clone(),
            images: hasher.count(),
            images_hash: hasher.finalize().to_string(),
        };
        files::write(state, &saved.to_bytes())
    }

    /// Passes the saved adversarial images to `take`, a chunk at a time. An image has `numbers` values.
    fn adversarial(
        &self,
        numbers: usize,
        take: &mut dyn FnMut(&[Misclassified]) -> Result<()>,
    ) -> Result<()> {
        let Some(path) = self.images.as_ref().filter(|path| path.is_file()) else {
            return Ok(());
        };
        let source = files::Source::open(path)?;
        let length = 8 + 4 * numbers as u64;
        let at_once = (AT_ONCE / length).max(1);
        let count = source.length() / length;
        for first in (0..count).step_by(at_once as usize) {
            let mut bytes = vec![0; (length * at_once.min(count - first)) as usize];
            source.fill(first * length, &mut bytes)?;
            let records = bytes.chunks_exact(length as usize).map(|record| {
                let (index, image) = record.split_at(8);
                let index = u64::from_le_bytes(index.try_into().expect("eight bytes"));
                (index as usize, Some(bytemuck::pod_collect_to_vec(image)))
            });
            take(&records.collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// Writes the final images and their labels in the format of `tensors:FILE`: the adversarial image where the model
    /// was fooled, else the clean one. `classes` are the names of the labels, if they are known.
    pub fn save_adversarial(
        &self,
        images: &Images,
        classes: &[String],
        path: &Path,
        device: &Device,
    ) -> Result<()> {
        if !self.comm.is_main() {
            return Ok(());
        }
        let indices: Vec<usize> = (0..images.count()).collect();
        let (clean, labels) = images.batch(&indices, device)?;
        let shape = clean.dims();
        let numbers: usize = shape[1..].iter().product();
        let mut values = to_vec(clean);
        self.adversarial(numbers, &mut |found| {
            for (index, image) in found {
                let place = values.chunks_exact_mut(numbers).nth(*index);
                let (Some(place), Some(image)) = (place, image) else {
                    let state = self.state.as_deref().unwrap_or(path).display();
                    return Err(Error::failed(format!("`{state}` is damaged"))
                        .hint("run the same command again: the evaluation starts over"));
                };
                place.copy_from_slice(image);
            }
            Ok(())
        })?;
        let labels: Vec<i64> = labels.iter().map(|label| i64::from(*label)).collect();
        tensors::save(path, &values, shape, &labels, classes)
    }

    /// Removes the files. Call it after the result has been written.
    fn remove(&self) -> Result<()> {
        for path in self.state.iter().chain(&self.images) {
            if path.is_file() {
                files::remove_file(path)?;
            }
            let name = path.file_name().unwrap_or_default();
            let folder = path.parent().unwrap_or(Path::new("."));
            files::remove_leftovers(folder, &name.to_string_lossy())?;
        }
        Ok(())
    }
}

/// Returns the error for a state file that cannot be resumed.
fn refused(state: &Path, what: &str) -> Error {
    Error::input(format!("`{}` {what}", state.display()))
        .hint("choose another file, or delete this one to start over")
}

/// Tolerated change of a clean image's margin between runs, as a share of the model's largest logit.
const SAME_MODEL: f64 = 0.01;

/// Checks that a user's state file was saved with the same model, by comparing margins on clean images that were not
/// fooled. Skipped for attacks that average gradients, since randomized defenses may differ between runs.
fn check_same_model(evaluation: &Evaluation, earlier: &Outcome, state: &Path) -> Result<()> {
    let averages = |attack: &Attack| matches!(attack, Attack::Apgd(apgd) if apgd.averages > 1);
    if evaluation.attacks.iter().any(averages) {
        return Ok(());
    }
    let is_known = |index: &usize| {
        let clean = earlier.robust[*index] || earlier.distance[*index].is_none();
        clean && earlier.margin[*index].is_some()
    };
    let known = (0..earlier.robust.len()).filter(is_known);
    let indices: Vec<usize> = known.take(evaluation.batch.max(1)).collect();
    if indices.is_empty() {
        return Ok(());
    }
    let (images, labels) = evaluation.images.batch(&indices, evaluation.device)?;
    let logits = TargetModel::new(evaluation.network, evaluation.device).logits(images);
    for (row, (index, label)) in indices.iter().zip(labels).enumerate() {
        let now = logits.margin(row, label as usize);
        let then = earlier.margin[*index].expect("known above");
        let largest = logits
            .row(row)
            .iter()
            .fold(0.0f64, |most, z| most.max(f64::from(*z).abs()));
        let is_same = (now - then).abs() <= SAME_MODEL * largest.max(then.abs());
        if !is_same {
            let state = state.display();
            let message = format!(
                "`{state}` was saved with a different model: the margin of image {index} was {then:.4} and is now \
                 {now:.4}"
            );
            return Err(
                Error::input(message).hint("choose another file, or delete this one to start over")
            );
        }
    }
    Ok(())
}

/// Hashes a file. A missing file hashes as empty.
fn hash_of(path: &Path) -> Result<blake3::Hasher> {
    let mut hasher = blake3::Hasher::new();
    if path.is_file() {
        let source = files::Source::open(path)?;
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < source.length() {
            let part = &mut buffer[..(source.length() - at).min(1 << 20) as usize];
            source.fill(at, part)?;
            hasher.update(part);
            at += part.len() as u64;
        }
    }
    Ok(hasher)
}

/// Runs or resumes an evaluation with the checks before and after it, and prints progress and flags.
pub fn examine(
    evaluation: &Evaluation,
    progress: &Progress,
    screen: &mut dyn Screen,
) -> Result<Findings> {
    let _saved = evaluation.comm.allow_exit();
    let mut flags = checks::before(evaluation)?;
    flags.iter().for_each(|flag| screen.line(&flag.to_string()));
    let outcome = watch(evaluation, progress, screen)?;
    let late = checks::after(&outcome);
    late.iter().for_each(|flag| screen.line(&flag.to_string()));
    // A late flag covers all images and replaces the early one, which covers the first batch.
    flags.retain(|flag| late.iter().all(|late| late.check != flag.check));
    flags.extend(late);
    Ok(Findings {
        outcome,
        attacks: evaluation.attacks.to_vec(),
        sample: evaluation.sample,
        flags,
        curve: None,
    })
}

/// Writes the result of evaluations, then removes their progress files.
pub fn conclude(
    path: &Path,
    result: &Value,
    finished: &[Progress],
    screen: &mut dyn Screen,
    comm: &Comm,
) -> Result<()> {
    if !comm.is_main() {
        return Ok(());
    }
    if let Some(kept) = result::write(path, result)? {
        let kept = kept.display();
        screen.line(&format!("kept the earlier result as `{kept}`"));
    }
    finished.iter().try_for_each(|progress| progress.remove())
}

/// Runs or resumes an evaluation and prints its progress.
pub fn watch(
    evaluation: &Evaluation,
    progress: &Progress,
    screen: &mut dyn Screen,
) -> Result<Outcome> {
    // Exiting is safe at any moment: the evaluation resumes after the last saved batch.
    let _saved = evaluation.comm.allow_exit();
    let (earlier, notice) = progress.load()?;
    if let Some(notice) = notice {
        screen.line(&notice);
    }
    if let Some(earlier) = &earlier {
        let stage = earlier.stages.last().expect("saved after a batch");
        let left = earlier.queue.len();
        let done = stage.tried - left;
        screen.line(&format!(
            "resuming after {done} of {} images of {}",
            stage.tried, stage.attack
        ));
        if let Some(state) = progress.state.as_ref().filter(|_| progress.is_named) {
            check_same_model(evaluation, earlier, state)?;
        }
        if let Some(sink) = progress.sink.filter(|_| evaluation.comm.is_main()) {
            progress.adversarial(evaluation.images.numbers(), &mut |found| sink(found))?;
        }
    }
    let watcher = Watcher {
        attacks: evaluation.attacks,
        sample: evaluation.sample,
        progress,
        screen: RefCell::new(screen),
        begun: Instant::now(),
        drawn: Cell::new(Instant::now()),
        state: RefCell::new(Counts::default()),
    };
    let outcome = evaluation.resume(earlier.unwrap_or_default(), &watcher)?;
    watcher.print_summary(&outcome);
    Ok(outcome)
}

/// Prints and saves the progress of an evaluation.
struct Watcher<'a> {
    attacks: &'a [Attack],
    sample: Option<Sample>,
    progress: &'a Progress<'a>,
    screen: RefCell<&'a mut dyn Screen>,
    begun: Instant,
    drawn: Cell<Instant>,
    state: RefCell<Counts>,
}

/// Progress counters.
#[derive(Default)]
struct Counts {
    attack: String,
    tried: usize,
    left: usize,
    /// Number of leading images that the current attack has finished, and how many of them are robust.
    known: usize,
    standing: usize,
    /// Cost of passes by this process, in the batch in progress, and at most remaining.
    done: f64,
    of_batch: f64,
    to_come: f64,
}

/// Returns the cost in forward passes. A backward pass to the pixels costs about as much as a forward pass.
fn cost(passes: Passes) -> f64 {
    (passes.forward + passes.backward) as f64
}

impl Counts {
    /// Returns the remaining cost, less what the batch in progress has already done.
    fn left_to_come(&self) -> f64 {
        (self.to_come - self.of_batch).max(0.0)
    }

    fn text(&self, seconds: f64) -> String {
        let done = self.tried - self.left;
        let mut text = format!("{}: {done} of {} images", self.attack, self.tried);
        let to_come = self.left_to_come();
        if self.done > 0.0 && to_come > 0.0 {
            let left = to_come * seconds / self.done;
            text += &format!(", at most {} left", duration(left));
        }
        if done > 0 {
            let percent = |share: f64| 100.0 * share;
            let share = percent(self.standing as f64 / self.known.max(1) as f64);
            let (low, high) = wilson(self.standing, self.known);
            let (low, high) = (percent(low), percent(high));
            text += &format!(", robust accuracy so far {share:.1} % (95 %: {low:.1} to {high:.1})");
        }
        text
    }
}

impl Watcher<'_> {
    /// Returns an upper bound on the remaining cost: every robust image stays robust.
    fn to_come(&self, outcome: &Outcome) -> f64 {
        let at = outcome.stages.len();
        // The number of classes is unknown before the first pass.
        let classes = if outcome.classes == 0 {
            1000
        } else {
            outcome.classes
        };
        let of_current = at
            .checked_sub(2)
            .map_or(1.0, |index| cost(self.attacks[index].most_passes(classes)));
        let sample = self.sample.as_ref();
        let later = self.attacks.iter().enumerate().skip(at - 1);
        let of_later: f64 = later
            .map(|(index, attack)| {
                let images = outcome.at_most_tried(index, sample);
                cost(attack.most_passes(classes)) * images as f64
            })
            .sum();
        of_current * outcome.queue.len() as f64 + of_later
    }

    fn draw(&self) {
        let state = self.state.borrow();
        let to_come = state.left_to_come();
        let text = state.text(self.begun.elapsed().as_secs_f64());
        self.screen
            .borrow_mut()
            .progress(state.done as u64, (state.done + to_come) as u64, &text);
        self.drawn.set(Instant::now());
    }

    fn line(&self, text: &str) {
        self.screen.borrow_mut().line(text);
    }

    /// Prints which attacks will run on a sample, if the next attack is the first of them.
    fn announce_sample(&self, outcome: &Outcome) {
        let next = outcome.stages.len() - 1;
        if self.sample.is_none_or(|sample| sample.first != next) {
            return;
        }
        let names: Vec<String> = self.attacks[next..].iter().map(Attack::name).collect();
        let (names, of) = (names.join(", "), outcome.standing());
        let size = outcome.at_most_tried(next, self.sample.as_ref());
        self.line(&format!(
            "{names}: on a random sample of {size} of the {of} remaining images"
        ));
    }

    /// Prints the last two lines of the reference, and the confidence interval.
    fn print_summary(&self, outcome: &Outcome) {
        let Some(attack) = self.attacks.last() else {
            return;
        };
        let bounded = match (attack, attack.norm()) {
            (Attack::Unseen(_), _) => format!("norm of the {} parameters", attack.name()),
            (_, Some(Norm::L2)) => "L2 perturbation".to_owned(),
            (_, Some(Norm::L1)) => "L1 perturbation".to_owned(),
            (_, _) => "Linf perturbation".to_owned(),
        };
        let largest = outcome
            .distance
            .iter()
            .flatten()
            .fold(0.0, |most: f64, d| most.max(*d));
        let [low, high] = outcome.pixels.unwrap_or_default();
        self.line(&format!(
            "max {bounded}: {largest:.5}, nan in tensor: 0, max: {high:.5}, min: {low:.5}"
        ));
        let count = outcome.robust.len();
        let share = 100.0 * outcome.accuracy_after(outcome.stages.len() - 1);
        self.line(&format!("robust accuracy: {share:.2}%"));
        let (low, high) = wilson(outcome.standing(), count);
        let (low, high) = (100.0 * low, 100.0 * high);
        self.line(&format!(
            "95 % interval: {low:.1} to {high:.1} % ({} of {count} images)",
            outcome.standing()
        ));
        if let Some(bound) = outcome.bound() {
            let bound = bound.text();
            self.line(&format!("autoattack fast: robust {share:.1} %; {bound}"));
        }
    }
}

impl Observer for Watcher<'_> {
    fn passed(&self, passes: Passes) {
        {
            let mut state = self.state.borrow_mut();
            state.done += cost(passes);
            state.of_batch += cost(passes);
        }
        if self.drawn.get().elapsed() > REDRAWN_AFTER {
            self.draw();
        }
    }

    fn begun(&self, outcome: &Outcome) {
        let stage = outcome.stages.last().expect("a stage is in progress");
        let to_come = self.to_come(outcome);
        let mut state = self.state.borrow_mut();
        state.attack = stage.attack.clone();
        (state.tried, state.left) = (stage.tried, outcome.queue.len());
        state.known = outcome
            .queue
            .first()
            .copied()
            .unwrap_or(outcome.robust.len());
        state.standing = outcome.robust[..state.known]
            .iter()
            .filter(|robust| **robust)
            .count();
        (state.of_batch, state.to_come) = (0.0, to_come);
    }

    fn batch(&self, outcome: &Outcome, done: &BatchReport) -> Result<()> {
        self.progress.save(outcome, done)?;
        self.begun(outcome);
        if outcome.stages.len() > 1 {
            let BatchReport {
                attack,
                number,
                of,
                tried,
                fooled,
                ..
            } = done;
            let fooled = fooled.len();
            self.line(&format!(
                "{attack} - {number}/{of} - {fooled} out of {tried} successfully perturbed"
            ));
            if number < of {
                self.line(&self.state.borrow().text(self.begun.elapsed().as_secs_f64()));
            }
        }
        self.draw();
        Ok(())
    }

    fn stage(&self, outcome: &Outcome) -> Result<()> {
        let at = outcome.stages.len() - 1;
        let share = 100.0 * outcome.accuracy_after(at);
        if at == 0 {
            self.line(&format!("initial accuracy: {share:.2}%"));
            self.announce_sample(outcome);
            return Ok(());
        }
        let name = outcome.stages[at].attack.to_uppercase();
        let seconds: f64 = outcome.stages[1..].iter().map(|stage| stage.seconds).sum();
        let epsilon = self.attacks[at - 1].epsilon();
        let varies = self
            .attacks
            .iter()
            .any(|attack| attack.epsilon() != epsilon);
        let name = match epsilon.filter(|_| varies) {
            Some(epsilon) => format!("{name} at {:.5}", epsilon.value()),
            None => name,
        };
        self.line(&format!(
            "robust accuracy after {name}: {share:.2}% (total time {seconds:.1} s)"
        ));
        self.announce_sample(outcome);
        Ok(())
    }
}
