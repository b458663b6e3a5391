//! Settings: declared once, then read, checked, printed and documented from the declaration.
//!
//! Each part of a recipe declares its table next to the code that it configures, with `settings!` and, for a choice
//! among words, `words!`. A [`Table`] is read key by key. Missing, invalid and unknown keys are recorded with their
//! line and a hint, and reading continues, so that all problems of a file are reported at once. No key of a recipe is
//! named in this module.

mod compare;
mod declare;
mod describe;
mod explain;
mod field;
mod overrides;
mod page;
mod problem;
mod schema;
mod setting;
mod table;
mod value;
mod words;

pub use compare::{changes, flatten};
pub use describe::{
    Described, Description, Entry, Key, Kind, Limits, Section, above, at_least, within,
};
pub use explain::{explain, outline};
pub use field::Field;
pub use page::page;
pub use problem::{Invalid, Problem, nearest};
pub use schema::schema;
pub use setting::Setting;
pub use table::{Table, read};
pub use value::Value;
pub use words::Words;

pub(crate) use declare::settings;
pub(crate) use field::printed;
pub(crate) use words::words;
