//! Names that become names of files: those of stages and final evaluations.

use crate::settings::Kind;

/// The kind of a name; [`crate::files::check_name`] checks it.
pub(super) const KIND: Kind = Kind::Text {
    expected: "a string",
    pattern: "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$",
};
