//! Robust accuracy: how many images does none of a list of attacks fool?
//!
//! Works on any function from images in [0, 1] to logits. Knows no model and no file.

pub mod accuracy;
pub mod result;

pub use accuracy::{Images, Outcome, StageOutcome, evaluate};
