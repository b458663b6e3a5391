//! Objectives: what a training step minimizes and its attack maximizes.
//!
//! An [`Objective`] is the loss of one batch together with everything that its gradients need: how the batch passes through
//! the model (microbatches), what the ranks exchange, and the parameters that it trains besides the model. The training loop
//! knows nothing else of losses: a further kind is one file with an implementation of [`BatchLoss`].
//!
//! | file            | what                                                                            |
//! |-----------------|---------------------------------------------------------------------------------|
//! | [`batch_loss`]  | the trait: losses of a batch, from the outputs at adversarial and clean images  |
//! | [`labels`]      | cross entropy with labels, mixed and smoothed                                   |
//! | [`contrastive`] | image embeddings against caption embeddings                                     |
//! | [`captions`]    | where caption embeddings come from: text models, files                          |
//! | [`parameters`]  | temperature and text tower, which some objectives train                         |
//! | [`microbatch`]  | forward passes over parts of a batch                                            |
//! | [`gradients`]   | [`Objective`]: gradients for images and for weights                             |

pub mod batch_loss;
pub mod captions;
pub mod contrastive;
pub mod gradients;
pub mod labels;
pub mod microbatch;
pub mod parameters;

pub use batch_loss::{BatchLoss, Views};
pub use captions::Captions;
pub use contrastive::ContrastiveLoss;
pub use gradients::{Objective, StepGradients};
pub use labels::LabelLoss;
pub use microbatch::Microbatches;
pub use parameters::ExtraParameters;
