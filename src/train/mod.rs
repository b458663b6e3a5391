//! Training: the method of the paper, stage by stage.
//!
//! "Revisiting Adversarial Training at Scale" (Wang et al., CVPR 2024), equation 1: find the weights that minimize the loss
//! at the worst images near the given ones. A long, cheap stage (small images, weak attack) comes before a short, intensive
//! one (full images, stronger attack).
//!
//! | file                     | what                                                                         |
//! |--------------------------|------------------------------------------------------------------------------|
//! | this one                 | the training loop and its step                                               |
//! | [`run`]                  | a run that is ready to go: recipe, folder, data, checked against each other  |
//! | [`lifecycle`]            | around the steps: begin, enter, save, evaluate, explain failures             |
//! | [`phase`]                | one phase: its batches, objective, attack strength and learning rate         |
//! | [`reduce`]               | gradients over the ranks, the replica check, non-finite steps                |
//! | [`state`]                | weights, optimizer state, average: all that training changes                 |
//! | [`checkpoint`] [`resume`] | the state in a file; where a run continues                                  |
//! | [`start`]                | initial weights, new heads                                                   |
//! | [`images`] [`test_set`]  | the images of the stages, and those of an evaluation                         |
//! | [`classes`] [`checks`]   | whether stages fit together                                                  |
//! | [`folder`] [`monitor`]   | the run's folder; log, metrics, warnings, progress                           |
//! | [`evaluation`] [`final_evaluation`] | while training, and of the models it saved                        |

pub mod checkpoint;
pub mod checks;
pub mod classes;
pub mod evaluation;
pub mod final_evaluation;
pub mod folder;
pub mod images;
pub mod lifecycle;
pub mod monitor;
pub mod phase;
pub mod reduce;
pub mod resume;
pub mod run;
pub mod start;
pub mod state;
pub mod test_set;

use crate::data::Batch;
use crate::error::Result;
use crate::objective::Views;

use reduce::reduce;

pub use final_evaluation::evaluate_finally;
pub use folder::RunFolder;
pub use images::StageImages;
pub use monitor::Monitor;
pub use phase::PhaseContext;
pub use reduce::{StepError, StepMetrics};

pub use run::Run;
pub use state::State;

/// Trains to the end of the recipe, from the newest intact checkpoint if there is one.
pub fn train(run: &Run, monitor: &mut Monitor) -> Result<State> {
    let mut state = run.begin(monitor)?;
    for phase in run.phases() {
        let Some(mut batches) = run.enter(&phase, &mut state, monitor)? else {
            continue;
        };
        while let Some(batch) = batches.next_batch()? {
            let broken = batches.broken().len();
            let metrics = StepError::caught(|| step(&phase, &mut state, &batch, broken))
                .map_err(|error| run.explain(error, &phase, &state, &batch))?;
            monitor.record(&phase, &metrics, state.samples, &batches);
            run.save_if_due(&phase, &state, metrics.stop)?;
            run.evaluate_if_due(&phase, &state, monitor)?;
        }
    }
    Ok(state)
}

/// One training step: equation 1 on one batch, of which `batch` is this rank's part.
///
/// `broken` is the number of samples that this rank's loader has replaced so far.
///
/// Source: the mechanics of the paper's released attacker: weights frozen and model in evaluation mode while attacking, the
/// same loss inside and outside.
/// Errors: captions without an embedding, ranks with different weights, a loss or gradient that is not finite.
pub fn step(
    phase: &PhaseContext,
    state: &mut State,
    batch: &Batch,
    broken: usize,
) -> std::result::Result<StepMetrics, StepError> {
    let now = phase.at(state.samples, batch);
    let images = batch.to_device(phase.image_size(), phase.device);
    let objective = phase.objective(state, batch)?;
    let clean = objective.uses_clean_images().then(|| images.clone());

    // Inner maximization: weights frozen, evaluation mode.
    let gradient = |images| objective.input_gradient(&state.model, images);
    let adversarial = match &now.attack {
        Some(attack) => attack.climb(images, &gradient, &now.draws()),
        None => images,
    };

    // Outer minimization: training mode.
    let views = Views { adversarial, clean };
    let drop_path = now.drop_path.as_ref();
    let own = objective.gradients(&state.model, views.clone(), phase.batch(), drop_path);

    // Sums over the ranks in the order of a fixed tree; refuses different weights and what is not finite.
    let (gradients, metrics) = reduce(phase, state, own, &now, broken, &views.adversarial)?;
    state.apply(
        &phase.zero,
        gradients,
        metrics.gradient_norm,
        now.learning_rate,
    );
    state.samples += phase.stage.batch;
    Ok(metrics)
}
