//! Names of stages and final evaluations, which are also file names.

use crate::settings::Kind;

/// The kind of a name; checked by [`crate::files::check_name`].
pub(super) const KIND: Kind = Kind::Text {
    expected: "a string",
    pattern: "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$",
};
