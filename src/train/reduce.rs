//! Reduction of a step's gradients over all ranks, and the checks that must pass before the step is applied.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::phase::{Now, PhaseContext};
use super::state::State;
use crate::distributed::zero::check_replicas;
use crate::error::Error;
use crate::objective::StepGradients;
use crate::ops::to_vec;

/// The metrics of one step, over all ranks.
pub struct StepMetrics {
    /// Mean loss on the adversarial images.
    pub loss: f64,
    /// Norm of the gradient over all weights, before clipping.
    pub gradient_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Number of adversarial images classified correctly, if the objective has correct answers.
    pub correct: Option<u64>,
    /// Number of samples that the phase's loaders have replaced so far.
    pub broken: u64,
    /// Whether a rank was asked to stop.
    pub stop: bool,
}

/// A step that must not be applied, with the data to diagnose it.
pub struct Diverged {
    /// Mean loss.
    pub loss: f64,
    /// Norm of the gradient.
    pub gradient_norm: f64,
    /// The gradient, in the order of the parameters.
    pub gradients: Vec<Tensor<1>>,
    /// The adversarial images of the step, flattened.
    pub adversarial: Vec<f32>,
}

/// Why a step failed.
pub enum StepError {
    /// The loss or gradient is not finite.
    Diverged(Box<Diverged>),
    /// An NVIDIA GPU failed.
    Gpu(advxl_cuda::Error),
    /// Anything else.
    Failed(Error),
}

impl StepError {
    /// Runs a step and returns a GPU failure as an error.
    pub(super) fn caught<T>(step: impl FnOnce() -> Result<T, Self>) -> Result<T, Self> {
        advxl_cuda::caught(step).unwrap_or_else(|error| Err(Self::Gpu(error)))
    }
}

impl From<Error> for StepError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// What the ranks exchange at a step.
#[derive(Serialize, Deserialize)]
struct Report {
    checksum: u64,
    losses: Vec<f64>,
    squares: Vec<f64>,
    correct: Option<u64>,
    broken: u64,
    stop: bool,
}

/// Sums gradients over the ranks. Returns this rank's parts of the sums and the step's metrics.
///
/// Errors: weights differ between ranks, or the loss or gradient is not finite.
pub(super) fn reduce(
    phase: &PhaseContext,
    state: &State,
    own: StepGradients,
    now: &Now,
    broken: usize,
    adversarial: &Tensor<4>,
) -> Result<(Vec<Tensor<1>>, StepMetrics), StepError> {
    let (zero, comm) = (&phase.zero, phase.zero.comm());
    // After the passes, so that weights corrupted before or during them are detected.
    let weights = state.parameters().into_iter().map(|part| &part.value);
    let checksum = zero.checksum(weights);
    let lengths = state.lengths();
    let gradients = zero.reduce_scatter(own.gradients);
    let reports = comm.all_gather(Report {
        checksum,
        losses: own.losses,
        squares: zero.squares(&gradients, &lengths),
        correct: own.correct,
        broken: broken as u64,
        stop: comm.stop_requested(),
    });
    let checksums: Vec<u64> = reports.iter().map(|report| report.checksum).collect();
    check_replicas(&checksums)?;
    let sum = |of: fn(&Report) -> &Vec<f64>| reports.iter().flat_map(of).sum::<f64>();
    let loss = sum(|report| &report.losses) / phase.batch() as f64;
    let gradient_norm = sum(|report| &report.squares).sqrt();
    if !loss.is_finite() || !gradient_norm.is_finite() {
        return Err(StepError::Diverged(Box::new(Diverged {
            loss,
            gradient_norm,
            gradients: zero.all_gather(&gradients, &lengths),
            adversarial: to_vec(adversarial.clone()),
        })));
    }
    let metrics = StepMetrics {
        loss,
        gradient_norm,
        learning_rate: now.learning_rate,
        correct: reports.iter().map(|report| report.correct).sum(),
        broken: reports.iter().map(|report| report.broken).sum(),
        stop: reports.iter().any(|report| report.stop),
    };
    Ok((gradients, metrics))
}
