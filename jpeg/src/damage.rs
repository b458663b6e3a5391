//! Why a file cannot be decoded.

/// The problem with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// The file ends too early.
    Truncated,
    /// The file violates the format.
    Damaged(&'static str),
    /// The file is valid but not supported, and another decoder would not help.
    Unsupported(&'static str),
}
