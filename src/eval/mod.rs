//! Robust accuracy: the share of images that a list of attacks leaves correctly classified.
//!
//! Works on any function from images in [0, 1] to logits; [`Classifier`] builds one from a model.

pub mod accuracy;
pub mod autoattack;
pub mod bound;
pub mod calibration;
pub mod checks;
pub mod classifier;
pub mod curve;
pub mod hub;
pub(crate) mod images;
pub mod interval;
pub(crate) mod recheck;
pub mod result;
pub mod session;

pub use accuracy::{BatchReport, Evaluation, Observer, Outcome, StageOutcome};
pub use bound::{Bound, Sample};
pub use classifier::{Classifier, Setup};
pub use images::{Images, moved};
