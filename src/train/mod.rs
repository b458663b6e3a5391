//! Training: the method of the paper, stage by stage.
//!
//! "Revisiting Adversarial Training at Scale" (Wang et al., CVPR 2024), equation 1: find the weights that minimize the
//! worst-case loss over perturbed images. A long, cheap stage (small images, weak attack) is followed by a short,
//! intensive stage (full-size images, stronger attack).
//!
//! | file                                | contents                                                           |
//! |-------------------------------------|--------------------------------------------------------------------|
//! | this file                           | the training loop and its step                                     |
//! | [`run`]                             | a run that is ready to start: checked recipe, folder and data      |
//! | [`lifecycle`]                       | everything around the steps: begin, enter, save, evaluate, explain |
//! | [`phase`]                           | one phase: batches, objective, attack strength, learning rate      |
//! | [`reduce`]                          | gradients over the ranks, replica check, non-finite steps          |
//! | [`state`]                           | weights, optimizer state, EMA: all that training changes           |
//! | [`checkpoint`], [`resume`]          | saving the state; where a run continues                            |
//! | [`start`], [`references`]           | start weights, new heads; frozen references of objectives          |
//! | [`rates`]                           | frozen parameters, layer-wise learning rates                       |
//! | [`outputs`]                         | what the model outputs in a stage                                  |
//! | [`images`], [`test_set`]            | the data sets of the stages; the test images of an evaluation      |
//! | [`classes`], [`checks`]             | checks that stages fit together                                    |
//! | [`folder`], [`monitor`]             | the run folder; log, metrics, warnings, progress                   |
//! | [`evaluation`], [`final_evaluation`] | evaluation during training; evaluation of saved models            |

pub mod checkpoint;
pub mod checks;
pub mod classes;
pub mod evaluation;
pub mod final_evaluation;
pub mod folder;
pub mod images;
pub mod lifecycle;
pub mod monitor;
pub mod outputs;
pub mod phase;
pub mod rates;
pub mod reduce;
pub mod references;
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
pub use outputs::StageOutputs;
pub use phase::PhaseContext;
pub use reduce::{StepError, StepMetrics};

pub use run::Run;
pub use state::State;

/// Trains to the end of the recipe, resuming from the newest intact checkpoint if there is one.
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
        // The next batch, if its images are already being sent to the device.
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

/// Runs one training step: equation 1 on one batch, where `batch` is this rank's part.
///
/// `images` are the images of `batch` on the device. `broken` is the number of samples that this rank's loader has
/// replaced so far. `meanwhile` is called after all gradients have been queued, while a GPU computes them and the host
/// is idle.
///
/// Source: the paper's released attacker: weights are frozen and the model is in evaluation mode during the attack, and
/// attack and update use the same loss.
/// Errors: captions without an embedding, different weights between ranks, a non-finite loss or gradient.
pub fn step(
    phase: &PhaseContext,
    state: &mut State,
    batch: &Batch,
    images: Tensor<4>,
    broken: usize,
    meanwhile: impl FnOnce(),
) -> std::result::Result<StepMetrics, StepError> {
    let now = phase.at(state.samples, batch);
    let mut objective = phase.objective(state, batch, &images)?;
    let clean = objective.uses_clean_images().then(|| images.clone());

    // Inner maximization: weights frozen, evaluation mode.
    let adversarial = now.perturb(&objective, &state.model, images);

    // Outer minimization: training mode.
    objective.observe(&adversarial);
    let views = Views { adversarial, clean };
    let drop_path = now.drop_path.as_ref();
    let own = objective.gradients(
        &state.model,
        views.clone(),
        phase.batch(),
        drop_path,
        meanwhile,
    );

    // Sum over the ranks in a fixed tree order; fails on different weights and non-finite values.
    let (gradients, metrics) = reduce(phase, state, own, &now, broken, &views.adversarial)?;
    state.apply(
        &phase.zero,
        gradients,
        &Now {
            norm: metrics.gradient_norm,
            learning_rate: now.learning_rate,
            // With several ranks, parts are gathered in f32 and rounded afterwards.
            rounded: phase.numerics.products() == Precision::Bf16
                && phase.zero.comm().world_size() == 1,
        },
    );
    state.samples += phase.stage.batch;
    Ok(metrics)
}
