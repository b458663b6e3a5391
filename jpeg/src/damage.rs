//! Why a file cannot be decoded.

/// What is wrong with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// It ends too early.
    Truncated,
    /// Something in it cannot be right.
    Damaged(&'static str),
    /// Nothing is wrong, but it is not decoded here or elsewhere.
    Unsupported(&'static str),
}
