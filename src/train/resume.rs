//! Resuming a run from its newest intact checkpoint.

use super::checkpoint;
use super::checkpoint::{Counters, Intact, Provenance};
use super::classes::difference;
use super::monitor::Monitor;
use super::run::Run;
use super::state::State;
use crate::error::{Context, Error, Result};

/// Returns the state of the newest intact checkpoint of a run, or the initial state if there is none. Collective.
///
/// Errors: there are checkpoints but none can be read, or the newest belongs to another model or other data.
pub(super) fn resume(run: &Run, monitor: &mut Monitor) -> Result<State> {
    let comm = &run.comm;
    // Rank 0 reads and broadcasts.
    let found = match comm.is_main() {
        true => newest(run, monitor),
        false => Ok(None),
    };
    let found = comm.all_ok(found)?;
    let counters = comm.broadcast(found.as_ref().map(|found| found.counters));
    let Some(counters) = counters else {
        return comm.all_ok(run.initial_state());
    };
    let algorithms = found
        .as_ref()
        .map(|found| found.checkpoint.provenance().algorithms);
    adopt(
        run,
        comm.broadcast(algorithms).flatten().as_deref(),
        monitor,
    );
    let (mut state, bytes) = match found {
        Some(found) => (found.state, Some(found.checkpoint.into_bytes())),
        None => (run.blank_state(counters.stage), None),
    };
    checkpoint::fill(&mut state, counters, bytes.as_deref(), &run.zero())?;
    monitor.resumed(&state);
    Ok(state)
}

/// Makes an NVIDIA GPU use the checkpoint's algorithms for matrix products, or warns that it cannot.
fn adopt(run: &Run, algorithms: Option<&str>, monitor: &mut Monitor) {
    let Some(gpu) = run.device.gpu() else {
        return;
    };
    if algorithms.is_none_or(|algorithms| !gpu.adopt_algorithms(algorithms)) {
        let before = match algorithms.and_then(|text| text.lines().next()) {
            Some(name) => format!("on `{name}`"),
            None => "on another kind of device".to_owned(),
        };
        monitor.warn(&format!(
            "the checkpoint was computed {before}; results continue with different rounding"
        ));
    }
}

/// An intact checkpoint of the run.
struct Resumable {
    checkpoint: Intact,
    counters: Counters,
    /// A state of its stage, with values to be filled in.
    state: State,
}

/// Returns the newest intact checkpoint, if there are checkpoints. Does not change the folder.
///
/// Errors: it belongs to another model or other images, or none is intact.
fn newest(run: &Run, monitor: &mut Monitor) -> Result<Option<Resumable>> {
    let folder = run.folder.checkpoints();
    if !folder.is_dir() {
        return Ok(None);
    }
    let saved = checkpoint::list(&folder)?;
    for path in saved.iter().rev() {
        match checkpoint::read(path)? {
            Ok(intact) => {
                let of_it = || format!("the checkpoint `{}`", path.display());
                return of_run(intact, run).map(Some).context(of_it);
            }
            Err(damage) => monitor.warn(&format!("{damage}; trying the previous checkpoint")),
        }
    }
    if saved.is_empty() {
        return Ok(None);
    }
    let message = format!(
        "none of the {} checkpoints in `{}` is intact",
        saved.len(),
        folder.display()
    );
    Err(Error::input(message).hint("move the folder away to start over, or restore a copy"))
}

/// Matches a checkpoint to the run.
///
/// Errors: the run's recipe has another model or other stages, or its images are different.
fn of_run(checkpoint: Intact, run: &Run) -> Result<Resumable> {
    let counters = checkpoint.counters()?;
    let stages = run.recipe.stage.len();
    if counters.stage >= stages {
        let stage = counters.stage + 1;
        let message = format!("it is at stage {stage}, but the recipe has only {stages}");
        return Err(of_another(run, message));
    }
    let state = run.blank_state(counters.stage);
    check_images(&checkpoint.provenance(), counters.stage, run)?;
    match checkpoint.difference(&state) {
        None => Ok(Resumable {
            checkpoint,
            counters,
            state,
        }),
        Some(difference) => Err(of_another(run, difference)),
    }
}

/// Returns the error of an intact checkpoint that does not match the recipe, with the recipe keys that changed.
fn of_another(run: &Run, difference: String) -> Error {
    let mut message = format!("it does not match this recipe: {difference}");
    let changes = run.folder.changes();
    if !changes.is_empty() {
        message += &format!("\n\n  {}\n", changes.join("\n  "));
    }
    let folder = run.folder.path().display();
    Error::input(message).hint(format!(
        "`{folder}` was not changed, and its own recipe can still resume it; choose another folder with --out"
    ))
}

/// Checks that a checkpoint was trained on the images of its stage, unless the user accepted changes.
fn check_images(found: &Provenance, stage: usize, run: &Run) -> Result<()> {
    let images = &run.images[stage];
    if run.folder.changes_accepted() {
        return Ok(());
    }
    let spec = &run.recipe.data_of(&run.recipe.stage[stage]).train;
    let refuse = |message: String| {
        Err(Error::input(message).hint("restore the images, or add --accept-changes"))
    };
    if let (Some(known), true) = (&found.classes, run.has_logits(stage))
        && let Some(difference) = difference(
            ("the trained model", known),
            ("the images", images.classes()),
        )
    {
        return refuse(format!(
            "it was trained on other classes than those of `{spec}`: {difference}"
        ));
    }
    match found.data == images.train.fingerprint() {
        true => Ok(()),
        false => refuse(format!(
            "it was trained on other images than those now in `{spec}`"
        )),
    }
}
