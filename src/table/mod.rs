//! Tables of results over models, data sets and evaluations, as papers print them.
//!
//! A [`Protocol`] lists data sets and evaluations; with models and the user's paths it becomes [`Cell`]s, each one
//! `advxl eval` command with a folder of its own. [`Results`] reads their `result.json` and
//! [`Table`] prints them. Nothing here
//! runs a model.

pub mod cells;
pub mod protocol;
pub mod render;

pub use cells::{Cell, Inputs, Plan};
pub use protocol::{Protocol, TableModel};
pub use render::{Results, Table};
