//! TODO.

