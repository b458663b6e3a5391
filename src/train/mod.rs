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

use burn::tensor::Tensor;

use crate::data::{Batch, SentImages};
use crate::error::Result;
use crate::objective::Views;
use crate::ops::{Precision, Uploads};
use crate::optim::Now;

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
        let uploads = Uploads::new(phase.device);
        let send = |batch: Batch| {
            let images = SentImages::new(&batch, &uploads);
            (batch, images)
        };
        // The batch after this one, if its images are on their way.
        let mut ahead = Ok(None);
        while let Some((batch, images)) = match ahead? {
            Some(sent) => Some(sent),
            None => batches.next_batch()?.map(send),
        } {
            let broken = batches.broken().len();
            let images = images.to_device(&batch, phase.image_size(), phase.device);
            ahead = Ok(None);
            let meanwhile = || {
                if uploads.are_ahead() {
                    ahead = batches.next_if_ready().map(|next| next.map(send));
                }
            };
            let metrics =
                StepError::caught(|| step(&phase, &mut state, &batch, images, broken, meanwhile))
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
/// `images` are the batch's on the device, and `broken` is the number of samples that this rank's loader has replaced so far.
/// `meanwhile` is called once all gradients are asked for: a GPU computes them, the host has nothing to do.
///
/// Source: the mechanics of the paper's released attacker: weights frozen and model in evaluation mode while attacking, the
/// same loss inside and outside.
/// Errors: captions without an embedding, ranks with different weights, a loss or gradient that is not finite.
pub fn step(
    phase: &PhaseContext,
    state: &mut State,
    batch: &Batch,
    images: Tensor<4>,
    broken: usize,
    meanwhile: impl FnOnce(),
) -> std::result::Result<StepMetrics, StepError> {
    let now = phase.at(state.samples, batch);
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
    let own = objective.gradients(
        &state.model,
        views.clone(),
        phase.batch(),
        drop_path,
        meanwhile,
    );

    // Sums over the ranks in the order of a fixed tree; refuses different weights and what is not finite.
    let (gradients, metrics) = reduce(phase, state, own, &now, broken, &views.adversarial)?;
    state.apply(
        &phase.zero,
        gradients,
        &Now {
            norm: metrics.gradient_norm,
            learning_rate: now.learning_rate,
            // Parts of several ranks are gathered in f32, and rounded whole.
            rounded: phase.numerics.products() == Precision::Bf16
                && phase.zero.comm().world_size() == 1,
        },
    );
    state.samples += phase.stage.batch;
    Ok(metrics)
}
