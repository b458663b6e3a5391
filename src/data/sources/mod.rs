//! Sources of images other than shards: CIFAR binaries, class folders, tensor files, and images drawn in code.

pub mod cifar;
pub mod folder;
pub mod synthetic;
pub mod tensors;
