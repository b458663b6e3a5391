//! A recipe: one complete run in one TOML file.
//!
//! The types of its parts are declared next to the code that they configure. This module combines them and checks
//! everything that involves more than one part.

mod checks;
mod data;
mod evaluation;
mod names;
pub mod objective;
mod records;
pub mod reference;
mod stage;
mod start;
mod text;
mod training_attack;
mod whole;

pub use data::{Data, DataSource, TrainImages};
pub use evaluation::{Evaluation, FinalEvaluation, TestImages};
pub use objective::{ObjectiveConfig, ObjectiveKind};
pub use records::{Checkpoints, Log};
pub use stage::{Phase, Stage};
pub use start::{Head, Start};
pub use text::{NewText, Text};
pub use training_attack::{EvaluationAttack, TrainingAttack};
pub use whole::{Recipe, cannot_be_run};
