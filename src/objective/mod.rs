//! Objectives: the losses that a training step minimizes and its attack maximizes.
//!
//! An [`Objective`] is the loss of one batch with everything that its gradients need: how the batch passes through the
//! model (microbatches), what the ranks exchange, and additional trainable parameters. The training loop is independent
//! of the loss: to add one, implement [`BatchLoss`] in a new file.
//!
//! | file            | contents                                                                        |
//! |-----------------|---------------------------------------------------------------------------------|
//! | [`batch_loss`]  | the trait: losses of a batch, from the outputs on adversarial and clean images  |
//! | [`labels`]      | cross entropy with labels, mixed and smoothed                                   |
//! | [`contrastive`] | contrastive loss between image and caption embeddings                           |
//! | [`captions`]    | sources of caption embeddings: text models, files                               |
//! | [`parameters`]  | temperature and text tower, which some objectives train                         |
//! | [`weighted`]    | weighted sums of terms over clean and adversarial outputs and a reference       |
//! | [`named`]       | TRADES, FARE, TeCoA, Sim-CLIP, AdvFLYP, DeACL as such sums                      |
//! | [`microbatch`]  | forward passes over parts of a batch                                            |
//! | [`gradients`]   | [`Objective`]: gradients with respect to images and weights                     |

pub mod batch_loss;
pub mod captions;
pub mod contrastive;
pub mod gradients;
pub mod labels;
pub mod microbatch;
pub mod named;
pub mod parameters;
pub mod weighted;

pub use batch_loss::{BatchLoss, Views};
pub use captions::Captions;
pub use contrastive::ContrastiveLoss;
pub use gradients::{Objective, StepGradients};
pub use labels::LabelLoss;
pub use microbatch::Microbatches;
pub use parameters::ExtraParameters;
pub use weighted::WeightedLoss;
