//! Robust accuracy: how many images does none of a list of attacks fool?
//!
//! Works on any function from images in [0, 1] to logits. Knows no model and no file.

pub mod accuracy;
pub mod autoattack;
pub mod checks;
pub mod curve;
pub(crate) mod images;
pub(crate) mod recheck;
pub mod result;
pub mod session;

pub use accuracy::{Done, Evaluation, Observer, Outcome, StageOutcome};
pub use images::Images;
