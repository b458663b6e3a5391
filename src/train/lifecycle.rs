//! Everything around the training steps: starting, entering stages and phases, saving, evaluating, explaining failures.

use super::evaluation::evaluate;
use super::images::distinct;
use super::monitor::Monitor;
use super::phase::PhaseContext;
use super::reduce::StepError;
use super::resume::resume;
use super::run::Run;
use super::state::{NewHead, State};
use super::{checkpoint, start};
use crate::data::{Batch, Loader};
use crate::error::{Error, Kind, Result};
use crate::model::Model;
use crate::ops;
use crate::recipe::Head;
use crate::units::grouped;

impl Run {
    /// Checks memory, finds the state to continue from, binds the folder to its recipe, and prints notices and
    /// warnings.
    pub(super) fn begin(&self, monitor: &mut Monitor) -> Result<State> {
        self.comm.stop_on_signals()?;
        let near = self.check_memory()?;
        let state = resume(self, monitor)?;
        // All checks have passed: from here on, the folder belongs to this recipe.
        let recipe = self.recipe.to_toml();
        self.comm.all_ok(self.folder.begin(&recipe))?;
        let precision = ops::usable(self.recipe.precision, &self.device).1;
        let notices = precision.into_iter().chain(self.attack_notice);
        let changes = self.folder.changes().iter();
        let changes = changes.map(|change| format!("recipe changed: {change}"));
        for note in notices.map(str::to_owned).chain(changes) {
            monitor.line(&format!("note: {note}"));
        }
        if self.exchanges_on_gpus() {
            let count = self.comm.world_size();
            monitor.line(&format!("exchange: {count} GPUs over NCCL"));
        }
        let images = distinct(&self.images);
        for dataset in images
            .iter()
            .flat_map(|images| [&images.train, &images.test])
        {
            monitor.line(&format!("data: {}", dataset.summary()));
        }
        let of_images = images.iter().flat_map(|images| images.notices());
        let warnings = near.iter().chain(of_images).chain(&self.notices);
        warnings.for_each(|warning| monitor.warn(warning));
        // The run may have been killed during an evaluation, after its checkpoint.
        if self.is_evaluated(state.samples) && !self.folder.was_evaluated(state.samples, &self.comm)
        {
            evaluate(self, &state, monitor)?;
        }
        Ok(state)
    }

    /// Enters a phase, and its stage if that is new. Returns a loader of the remaining batches, or `None` if the phase
    /// is done.
    pub(super) fn enter(
        &self,
        phase: &PhaseContext,
        state: &mut State,
        monitor: &mut Monitor,
    ) -> Result<Option<Loader>> {
        if state.samples >= phase.end {
            return Ok(None);
        }
        if !monitor.has_entered(phase.number) {
            if state.stage != phase.number {
                self.enter_stage(phase.number, state)?;
            }
            monitor.enter_stage(phase.number, phase.stage, state.samples);
        }
        monitor.enter_phase();
        // Memory cached in the sizes of the previous phase.
        self.device.release_memory();
        phase.batches(state.samples).map(Some)
    }

    /// Enters a stage, with a new head if the recipe requests one.
    ///
    /// Errors: class names that cannot be embedded or do not match the stage.
    fn enter_stage(&self, stage: usize, state: &mut State) -> Result<()> {
        let zero = self.zero();
        let (outputs, seed) = (self.outputs(stage), self.recipe.seed);
        let random = |values| NewHead::Random {
            outputs,
            seed,
            values,
        };
        let head = match self.recipe.stage[stage].head {
            Head::Keep => NewHead::Keep,
            Head::New => random(None),
            Head::Text => {
                let before = self.captions[stage - 1].as_ref();
                let name = &self.recipe.stage[stage].name;
                let values = start::head_by_text(state, &zero, before, name, outputs)?;
                random(Some(Box::new(values)))
            }
        };
        let set_rates = |model: &mut Model| self.set_rates(stage, model);
        let extra = self.extra(stage);
        state.enter(self.stage_optimizer(stage), head, extra, set_rates, &zero);
        Ok(())
    }

    /// Saves models and a checkpoint at the configured interval, at the end of a stage, and before a stop.
    ///
    /// Errors: a stop was requested; everything has been saved.
    pub(super) fn save_if_due(
        &self,
        phase: &PhaseContext,
        state: &State,
        stop: bool,
    ) -> Result<()> {
        if stop || self.is_saved(phase, state) {
            self.save(phase, state)?;
        }
        match stop {
            true => Err(stopped(state)),
            false => Ok(()),
        }
    }

    fn is_saved(&self, phase: &PhaseContext, state: &State) -> bool {
        let every = self.recipe.checkpoint.every_samples;
        phase.ends_stage(state.samples) || phase.stage.is_due(state.samples, every)
    }

    fn save(&self, phase: &PhaseContext, state: &State) -> Result<()> {
        // Models first: a checkpoint implies that everything up to it is complete.
        let classes = self.images[state.stage].classes();
        self.folder.save_models(phase, state, classes)?;
        let keep = self.recipe.checkpoint.keep as usize;
        let provenance = self.provenance(state.stage);
        checkpoint::save(
            &self.folder.checkpoints(),
            keep,
            state,
            &provenance,
            &phase.zero,
        )
    }

    /// Evaluates at the configured interval and at the end of a stage. The checkpoint is saved first, so that an
    /// evaluation cannot lose training progress.
    ///
    /// Errors: a stop was requested, or a store does not respond; everything has been saved.
    pub(super) fn evaluate_if_due(
        &self,
        phase: &PhaseContext,
        state: &State,
        monitor: &mut Monitor,
    ) -> Result<()> {
        if !self.is_evaluated(state.samples) {
            return Ok(());
        }
        let Err(error) = evaluate(self, state, monitor) else {
            return Ok(());
        };
        if !self.is_saved(phase, state) {
            self.save(phase, state)?;
        }
        Err(match self.comm.any_stop_requested() {
            true => stopped(state),
            false => error,
        })
    }

    /// Returns whether the recipe evaluates the run after `samples`.
    fn is_evaluated(&self, samples: u64) -> bool {
        match (&self.recipe.evaluation, self.recipe.update_at(samples)) {
            (Some(evaluation), Some((stage, _, is_last))) => {
                is_last || stage.is_due(samples, evaluation.every_samples)
            }
            _ => false,
        }
    }

    /// Returns the error of a failed step. A diverged step also leaves a bundle that reproduces it.
    pub(super) fn explain(
        &self,
        error: StepError,
        phase: &PhaseContext,
        state: &State,
        batch: &Batch,
    ) -> Error {
        let diverged = match error {
            StepError::Failed(error) => return error,
            StepError::Gpu(error) => return self.explain_gpu(&error, phase),
            StepError::Diverged(diverged) => diverged,
        };
        let provenance = self.provenance(state.stage);
        let saved = self
            .folder
            .save_crash(phase, state, &provenance, batch, &diverged);
        match self.comm.all_ok(saved) {
            Ok(error) => error.everywhere(),
            Err(error) => error,
        }
    }

    /// Returns the error of a GPU failure in a step: what was computed and, if memory ran out, how much was planned.
    fn explain_gpu(&self, error: &advxl_cuda::Error, phase: &PhaseContext) -> Error {
        let (stage, size) = (&phase.stage.name, phase.image_size());
        let doing = format!(
            "stage `{stage}`, a step of {} images at {size} pixels",
            phase.batch()
        );
        if error.kind() != advxl_cuda::ErrorKind::Memory {
            return Error::of_gpu(error).context(doing);
        }
        let planned = self.plan().memory.total() as f64 / f64::from(1 << 30);
        let message = format!("{} (planned: {planned:.1} GiB)", error.message());
        Error::failed(message)
            .hint("use a smaller batch or chunk, or recompute = true, and run the same command again; it resumes from the last checkpoint")
            .context(doing)
    }
}

fn stopped(state: &State) -> Error {
    let samples = grouped(state.samples);
    let message = format!("stopped by signal after {samples} samples; checkpoint saved");
    let error = Error::new(Kind::TryAgain, message);
    error
        .hint("run the same command again to resume")
        .everywhere()
}
