//! Reporting during a run: log lines, metrics, warnings, progress.

use std::time::{Duration, Instant};

use serde_json::json;

use super::folder::RunFolder;
use super::phase::PhaseContext;
use super::reduce::StepMetrics;
use super::state::State;
use crate::attack::Norm;
use crate::data::{Broken, Loader, Split};
use crate::distributed::Comm;
use crate::error::Error;
use crate::recipe::{Evaluation, Recipe, Stage};
use crate::screen::Screen;
use crate::units::{duration, grouped};

/// Tracks and reports one run.
pub struct Monitor<'a> {
    comm: &'a Comm,
    folder: &'a RunFolder,
    screen: &'a mut dyn Screen,
    recipe: &'a Recipe,
    /// Index of the stage that was announced.
    stage: Option<usize>,
    total: u64,
    started: Instant,
    /// Multiply-adds left when this process started training.
    macs_at_start: Option<f64>,
    /// Seconds of training since then, without evaluations and the current interval.
    trained: f64,
    /// Number of reported broken samples of the current loader.
    broken: usize,
    /// Number of reported broken samples of all ranks' loaders.
    all_broken: u64,
    interval: Interval,
}

/// Sums since the last log line.
struct Interval {
    begun: Instant,
    samples: u64,
    loss: f64,
    /// `None` if the objective has no correct answers.
    correct: Option<u64>,
    gradient_norm: f64,
    updates: u64,
    waited: f64,
}

impl Interval {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            samples: 0,
            loss: 0.0,
            correct: Some(0),
            gradient_norm: 0.0,
            updates: 0,
            waited: 0.0,
        }
    }
}

/// The result of an evaluation during training.
pub struct Accuracies {
    /// Accuracy on clean images.
    pub clean: f64,
    /// Accuracy under the evaluation's attack: in the union of its norms.
    pub strong: f64,
    /// Accuracy in each norm.
    pub norms: Vec<(Norm, f64)>,
    /// Accuracy under the stage's own attack.
    pub weak: Option<f64>,
    /// Number of images.
    pub images: usize,
    /// Number of unreadable images, which are not counted in `images`.
    pub broken: usize,
    /// Number of images with non-finite logits.
    pub not_finite: usize,
    /// Duration of the evaluation.
    pub took: Duration,
}

impl<'a> Monitor<'a> {
    /// Creates a monitor that writes to a folder and a screen.
    pub fn new(
        recipe: &'a Recipe,
        folder: &'a RunFolder,
        comm: &'a Comm,
        screen: &'a mut dyn Screen,
    ) -> Self {
        Self {
            comm,
            folder,
            screen,
            recipe,
            stage: None,
            total: recipe.samples(),
            started: Instant::now(),
            macs_at_start: None,
            trained: 0.0,
            broken: 0,
            all_broken: 0,
            interval: Interval::new(),
        }
    }

    /// Prints a line to the screen and the log.
    pub fn line(&mut self, text: &str) {
        self.screen.line(text);
        self.folder.log(text);
        if let Some(error) = self.folder.unwritten() {
            self.screen
                .line(&format!("warning: log lines are lost: {error}"));
        }
    }

    /// Prints a warning to the screen and the log.
    pub fn warn(&mut self, text: &str) {
        self.line(&format!("warning: {text}"));
    }

    pub(crate) fn resumed(&mut self, state: &State) {
        let samples = grouped(state.samples);
        self.folder
            .metrics(&json!({ "samples": state.samples, "event": "resumed" }));
        self.line(&format!(
            "resuming after {samples} of {} samples",
            grouped(self.total)
        ));
    }

    /// Returns whether a stage was announced.
    pub(crate) fn has_entered(&self, stage: usize) -> bool {
        self.stage == Some(stage)
    }

    pub(crate) fn enter_stage(&mut self, number: usize, stage: &Stage, samples: u64) {
        self.stage = Some(number);
        let attack = match &stage.attack {
            Some(attack) => {
                let precision = attack.precision.map(|precision| precision.word());
                let precision = precision.map_or(String::new(), |word| format!(" in {word}"));
                format!("{}{precision}", attack.attack.describe())
            }
            None => "no attack".to_owned(),
        };
        let sizes: Vec<_> = stage
            .phases
            .iter()
            .map(|phase| phase.image_size.to_string())
            .collect();
        let text = format!(
            "stage `{}`: {} samples at {} pixels, {attack}, from sample {}",
            stage.name,
            grouped(stage.samples()),
            sizes.join(" then "),
            grouped(samples)
        );
        self.screen.line(&text);
    }

    /// Resets the counts for a new loader.
    pub(crate) fn enter_phase(&mut self) {
        (self.broken, self.all_broken) = (0, 0);
        self.interval.waited = 0.0;
    }

    /// Records an update, and logs a line when one is due.
    pub(crate) fn record(
        &mut self,
        phase: &PhaseContext,
        step: &StepMetrics,
        samples: u64,
        loader: &Loader,
    ) {
        let (stage, phase) = (phase.stage, phase.phase);
        self.report_broken(loader, step.broken);
        let before = samples - stage.batch;
        self.macs_at_start
            .get_or_insert_with(|| self.recipe.macs_left(before));
        let interval = &mut self.interval;
        interval.samples += stage.batch;
        interval.loss += step.loss * stage.batch as f64;
        interval.correct = interval
            .correct
            .zip(step.correct)
            .map(|(sum, new)| sum + new);
        interval.gradient_norm += step.gradient_norm;
        interval.updates += 1;
        let seconds = interval.begun.elapsed().as_secs_f64();
        let rate = interval.samples as f64 / seconds;
        let eta = self.eta(samples);
        let text = format!(
            "{} @{}  {rate:.0} img/s  {} left",
            stage.name,
            phase.image_size,
            duration(eta)
        );
        self.screen.progress(samples, self.total, &text);
        let due = stage.is_due(samples, self.recipe.log.every_samples);
        if !due && samples < self.total {
            return;
        }

        let interval = std::mem::replace(&mut self.interval, Interval::new());
        self.trained += seconds;
        let count = interval.samples as f64;
        let loss = interval.loss / count;
        let accuracy = interval.correct.map(|correct| correct as f64 / count);
        let norm = interval.gradient_norm / interval.updates as f64;
        let all_waited = loader.waited().as_secs_f64();
        let waited = (all_waited - interval.waited) / seconds;
        self.interval.waited = all_waited;
        let memory = self.comm.all_gather(peak_memory_mib());
        let memory = memory.into_iter().max().flatten();
        let eta = self.eta(samples);
        self.folder.metrics(&json!({
            "samples": samples,
            "stage": stage.name,
            "image_size": phase.image_size,
            "loss": loss,
            "learning_rate": step.learning_rate,
            "gradient_norm": norm,
            "train_accuracy": accuracy,
            "images_per_second": rate,
            "data_wait": waited,
            "eta_seconds": eta,
            "peak_memory_mib": memory,
            "broken_samples": step.broken,
            "interval_seconds": seconds,
            "seconds": self.started.elapsed().as_secs_f64(),
        }));
        let memory = memory.map(|mib| format!(", {mib} MiB")).unwrap_or_default();
        let accuracy = accuracy.map(|share| format!(" train accuracy {:.1} %,", 100.0 * share));
        let accuracy = accuracy.unwrap_or_default();
        self.line(&format!(
            "{:>11} {} @{}: loss {loss:.4},{accuracy} lr {:.2e}, \
             gradient {norm:.2}, {rate:.0} img/s, data wait {:.1} %{memory}, {} left",
            grouped(samples),
            stage.name,
            phase.image_size,
            step.learning_rate,
            100.0 * waited,
            duration(eta),
        ));
    }

    /// Reports each broken sample once: its name, the reason, and that it was replaced.
    fn report_broken(&mut self, loader: &Loader, all: u64) {
        if all == self.all_broken {
            return;
        }
        self.all_broken = all;
        let own = loader.broken();
        let new = self.comm.all_gather(own[self.broken..].to_vec());
        self.broken = own.len();
        for broken in new.iter().flatten() {
            self.folder.broken("broken sample", Split::Train, broken);
            self.warn(&format!("broken sample replaced: {broken}"));
        }
    }

    /// Estimates the remaining seconds from the remaining multiply-adds, since samples of different stages do not cost
    /// the same.
    fn eta(&self, samples: u64) -> f64 {
        let left = self.recipe.macs_left(samples);
        let done = self.macs_at_start.unwrap_or(left) - left;
        let seconds = self.trained + self.interval.begun.elapsed().as_secs_f64();
        left * seconds / done.max(1.0)
    }

    pub(crate) fn evaluating(&mut self, attack: &str, done: usize, of: usize) {
        self.screen
            .progress(done as u64, of as u64, &format!("evaluating {attack}"));
    }

    /// Reports an unreadable test image.
    pub(crate) fn broken_test_image(&mut self, broken: &Broken) {
        self.folder.broken("broken test image", Split::Test, broken);
        self.warn(&format!("broken test image: {broken}"));
    }

    /// Reports a failed evaluation, after which training continues.
    pub(crate) fn evaluation_failed(&mut self, stage: &Stage, error: &Error, samples: u64) {
        self.folder.metrics(&json!({
            "samples": samples,
            "stage": stage.name,
            "evaluation": { "failed": error.to_string().lines().next() },
        }));
        let samples = grouped(samples);
        self.warn(&format!(
            "evaluation after {samples} samples failed: {error}"
        ));
    }

    /// Reports an evaluation, and warns of catastrophic overfitting.
    pub(crate) fn evaluated(
        &mut self,
        stage: &Stage,
        evaluation: &Evaluation,
        found: &Accuracies,
        samples: u64,
    ) {
        let name = evaluation.attack.name();
        let mut result = json!({
            "images": found.images,
            "clean": found.clean,
            &name: found.strong,
            "training_attack": found.weak,
        });
        let mut of_norms = String::new();
        if found.norms.len() > 1 {
            result["union"] = json!(found.strong);
            let mut each = Vec::new();
            for (norm, accuracy) in &found.norms {
                result[format!("{name} {}", norm.word())] = json!(accuracy);
                each.push(format!("{} {:.1} %", norm.word(), 100.0 * accuracy));
            }
            of_norms = format!(" in all norms ({})", each.join(", "));
        }
        let mut of = String::new();
        if found.broken > 0 {
            result["broken_images"] = json!(found.broken);
            of = format!(
                " ({} of {} broken and left out)",
                found.broken,
                found.images + found.broken
            );
        }
        self.folder.metrics(&json!({
            "samples": samples,
            "stage": stage.name,
            "evaluation": result,
        }));
        let weak = match (&stage.attack, found.weak) {
            (Some(attack), Some(weak)) => {
                format!(
                    ", training attack ({}) {:.1} %",
                    attack.attack.name(),
                    100.0 * weak
                )
            }
            _ => String::new(),
        };
        self.line(&format!(
            "{:>11} {}: evaluation on {} images{of}: clean {:.1} %, {name} {:.1} %{of_norms}{weak}",
            grouped(samples),
            stage.name,
            found.images,
            100.0 * found.clean,
            100.0 * found.strong,
        ));
        if found.not_finite > 0 {
            self.warn(&format!(
                "logits are not finite for {} of {} images, which count as misclassified",
                found.not_finite, found.images
            ));
        }
        if found
            .weak
            .is_some_and(|weak| drifted_apart(weak, found.strong))
        {
            self.warn(&format!(
                "catastrophic overfitting: the model is robust to its training attack but not to {name}; \
                 more attack steps, a smaller step_size or a lower learning rate may help"
            ));
        }
        // Exclude the evaluation from the training speed and the ETA.
        self.interval.begun += found.took;
    }
}

/// Returns whether a model is much more robust to a weak attack than to a strong one.
///
/// In normal training the two accuracies differ by a few points. In catastrophic overfitting (Wong et al. 2020),
/// accuracy under the strong attack drops towards zero within a fraction of an epoch while accuracy under the weak
/// attack rises. Eight points are four standard errors at 500 images.
fn drifted_apart(weak: f64, strong: f64) -> bool {
    weak - strong > 0.08 && strong < 0.7 * weak
}

/// Returns the peak memory of this process so far, if the system reports it.
pub fn peak_memory_mib() -> Option<u64> {
    let status = crate::files::read_text(std::path::Path::new("/proc/self/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn catastrophic_overfitting_is_distinguished_from_the_usual_gap() {
        assert!(!drifted_apart(0.31, 0.28));
        assert!(!drifted_apart(0.10, 0.04), "an untrained model");
        assert!(drifted_apart(0.85, 0.02));
        assert!(drifted_apart(0.45, 0.25));
    }
}
