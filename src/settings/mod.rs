//! Settings: declared once, then read, checked, printed and described from the declaration.
//!
//! Each part of a recipe declares its table beside the code that it configures, with `settings!` and, for choices
//! among words, `words!`. A [`Table`] is asked key by key; what is missing, invalid or unknown is recorded with its line
//! and a hint, and reading goes on, so that all problems of a file are reported at once. This module knows no key by name.

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
