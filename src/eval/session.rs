//! An evaluation that prints its progress and survives a kill: saved after each batch, and when it is stopped.
//!
//! The lines are those of the AutoAttack program, which people search logs for.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::accuracy::{BatchReport, Evaluation, Misclassified, Observer, Outcome};
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

/// Progress on a screen is drawn anew after this long.
const REDRAWN_AFTER: Duration = Duration::from_millis(200);
/// Bytes of saved images that are read at once.
const AT_ONCE: u64 = 64 << 20;

/// What is saved of an evaluation in progress, in a form that keeps every bit of a float.
#[derive(Serialize, Deserialize)]
pub(crate) struct Saved {
    /// The evaluation that it belongs to.
    fingerprint: String,
    outcome: Outcome,
    /// Bytes of the file of adversarial images that belong to it, and their hash.
    images: u64,
    images_hash: String,
}

impl Saved {
    /// Its hash, then itself.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut text = Vec::new();
        ciborium::into_writer(self, &mut text).expect("memory takes all that is written");
        [blake3::hash(&text).as_bytes(), &text[..]].concat()
    }

    /// `None` for anything but what [`Self::to_bytes`] gave: a flipped bit in a count would be a wrong accuracy.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let (hash, text) = bytes.split_at_checked(blake3::OUT_LEN)?;
        if *blake3::hash(text).as_bytes() != *hash {
            return None;
        }
        ciborium::from_reader(text).ok()
    }
}

/// Takes the misclassified images of each batch; of a resumed evaluation first those that were saved.
pub type Sink<'a> = &'a dyn Fn(&[Misclassified]) -> Result<()>;

/// The files of an evaluation in progress; of several processes the first has them.
pub struct Progress<'a> {
    fingerprint: String,
    /// None where nothing is saved.
    state: Option<PathBuf>,
    /// Whether the user named the file, which may then be another's.
    is_named: bool,
    images: Option<PathBuf>,
    /// Of the adversarial images so far.
    hasher: RefCell<blake3::Hasher>,
    comm: &'a Comm,
    sink: Option<Sink<'a>>,
    /// Of a named file, against other processes that would write to it.
    _lock: Option<File>,
}

impl<'a> Progress<'a> {
    /// In a folder, for the evaluation with the given fingerprint: another one's progress is left alone.
    pub fn new(folder: &Path, fingerprint: &str, keep_images: bool, comm: &'a Comm) -> Self {
        // Progress without images is of no use to an evaluation that is to save them.
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

    /// In a file of a given name and in `NAME.images`, which stay when the evaluation is done, for one process at a time.
    /// A file that holds anything else is refused when the evaluation begins.
    ///
    /// Errors: files that cannot be written, or that another process has.
    pub fn at(state: &Path, fingerprint: &str, comm: &'a Comm) -> Result<Self> {
        let mut images = state.as_os_str().to_owned();
        images.push(".images");
        let images = PathBuf::from(images);
        let lock = files::lock_kept(&images)?.ok_or_else(|| {
            let message = format!("`{}` is in use by another process", state.display());
            Error::input(message).hint("wait for it, or choose another file")
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

    /// Nowhere: a stopped evaluation starts over.
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

    /// The same, passing on the misclassified images.
    pub fn with_sink(self, sink: Sink<'a>) -> Self {
        Self {
            sink: Some(sink),
            ..self
        }
    }

    /// Where the evaluation was, or `None` at its beginning; and what the user should know of the files.
    fn load(&self) -> Result<(Option<Outcome>, Option<String>)> {
        let found = match self.comm.is_main() {
            true => self.load_here(),
            false => Ok((None, None)),
        };
        Ok(self.comm.broadcast(self.comm.all_ok(found)?))
    }

    fn load_here(&self) -> Result<(Option<Outcome>, Option<String>)> {
        let begin = |notice| {
            // What a process left that was killed before it saved.
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
                let what = "holds another evaluation: images, labels, attacks or seed differ";
                return Err(refused(state, what));
            }
            None => {
                let what = "is not the saved state of an evaluation, or is damaged";
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

    /// Passes the saved adversarial images to `take`, some at a time; `numbers` make up an image.
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

    /// Writes the images as the model was judged by them, with their labels, as `tensors:FILE` reads them: the
    /// adversarial one where the model was fooled, else the clean one.
    pub fn save_adversarial(&self, images: &Images, path: &Path, device: &Device) -> Result<()> {
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
        tensors::save(path, &values, shape, &labels, &[])
    }

    /// Removes the files, when the result is safe.
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

/// The error of a state file that an evaluation cannot continue.
fn refused(state: &Path, what: &str) -> Error {
    Error::input(format!("`{}` {what}", state.display()))
        .hint("choose another file, or delete this one to start over")
}

/// How much of a model's largest logit the margin of a clean image may change from one run to the next.
const SAME_MODEL: f64 = 0.01;

/// An error where an evaluation that the user's file continues was begun with another model: it answers otherwise about
/// clean images that were not fooled. Random defences may.
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
                "`{state}` was saved with another model: its margin of image {index} was {then:.4} and is {now:.4}"
            );
            return Err(
                Error::input(message).hint("choose another file, or delete this one to start over")
            );
        }
    }
    Ok(())
}

/// The hash of a file as far as it goes; of nothing where there is none.
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

/// Looks at the model before and after an evaluation, which is run, or what is left of it; tells about all.
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
    // Of all images and not of the first ones.
    flags.retain(|flag| late.iter().all(|late| late.check != flag.check));
    flags.extend(late);
    Ok(Findings {
        outcome,
        attacks: evaluation.attacks.to_vec(),
        flags,
        curve: None,
    })
}

/// Writes the result of evaluations; then their progress can go.
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
        screen.line(&format!("the earlier result is kept as `{kept}`"));
    }
    finished.iter().try_for_each(|progress| progress.remove())
}

/// Runs an evaluation, or what is left of it, and tells about it.
pub fn watch(
    evaluation: &Evaluation,
    progress: &Progress,
    screen: &mut dyn Screen,
) -> Result<Outcome> {
    // After a kill at any moment the evaluation goes on from the last batch.
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
        progress,
        screen: RefCell::new(screen),
        begun: Instant::now(),
        drawn: Cell::new(Instant::now()),
        state: RefCell::new(Counts::default()),
    };
    let outcome = evaluation.resume(earlier.unwrap_or_default(), &watcher)?;
    watcher.told_last(&outcome);
    Ok(outcome)
}

/// Shows and saves.
struct Watcher<'a> {
    attacks: &'a [Attack],
    progress: &'a Progress<'a>,
    screen: RefCell<&'a mut dyn Screen>,
    begun: Instant,
    drawn: Cell<Instant>,
    state: RefCell<Counts>,
}

/// What is known between batches.
#[derive(Default)]
struct Counts {
    attack: String,
    tried: usize,
    left: usize,
    /// The first images, whose fate under this attack is known, and how many of them stand.
    known: usize,
    standing: usize,
    /// Passes of this process, of the batch in progress, and at most to come.
    done: f64,
    of_batch: f64,
    to_come: f64,
}

/// A backward pass to the pixels costs about as much as a forward pass.
fn cost(passes: Passes) -> f64 {
    (passes.forward + passes.backward) as f64
}

impl Counts {
    /// At most to come, less what the batch in progress has done of it.
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
    /// The passes that are still to come if every image that stands keeps standing.
    fn to_come(&self, outcome: &Outcome) -> f64 {
        let at = outcome.stages.len();
        // Before the first pass many classes are as good a guess as any.
        let classes = if outcome.classes == 0 {
            1000
        } else {
            outcome.classes
        };
        let of_current = at
            .checked_sub(2)
            .map_or(1.0, |index| cost(self.attacks[index].most_passes(classes)));
        let later = self.attacks.iter().skip(at - 1);
        let of_later: f64 = later.map(|attack| cost(attack.most_passes(classes))).sum();
        of_current * outcome.queue.len() as f64 + of_later * outcome.standing() as f64
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

    /// The reference's last two lines, and the interval.
    fn told_last(&self, outcome: &Outcome) {
        let Some(attack) = self.attacks.last() else {
            return;
        };
        let norm = match attack.norm() {
            Norm::Linf => "Linf",
            Norm::L2 => "L2",
            Norm::L1 => "L1",
        };
        let largest = outcome
            .distance
            .iter()
            .flatten()
            .fold(0.0, |most: f64, d| most.max(*d));
        let [low, high] = outcome.pixels.unwrap_or_default();
        self.line(&format!(
            "max {norm} perturbation: {largest:.5}, nan in tensor: 0, max: {high:.5}, min: {low:.5}"
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
            return Ok(());
        }
        let name = outcome.stages[at].attack.to_uppercase();
        let seconds: f64 = outcome.stages[1..].iter().map(|stage| stage.seconds).sum();
        let epsilon = self.attacks[at - 1].epsilon();
        let varies = self
            .attacks
            .iter()
            .any(|attack| attack.epsilon() != epsilon);
        let name = if varies {
            format!("{name} at {:.5}", epsilon.value())
        } else {
            name
        };
        self.line(&format!(
            "robust accuracy after {name}: {share:.2}% (total time {seconds:.1} s)"
        ));
        Ok(())
    }
}
