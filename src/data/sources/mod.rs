//! Where images come from, other than shards: CIFAR binaries, class folders, tensor files, images drawn in code.

pub mod cifar;
pub mod folder;
pub mod synthetic;
pub mod tensors;
