//! TODO.

pub mod cifar;
pub mod folder;
pub mod synthetic;
pub mod tensors;
