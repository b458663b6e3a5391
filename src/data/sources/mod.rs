//! Sources of images other than shards: CIFAR binaries, class folders, tensor files, NumPy arrays and archives, Parquet files, and
//! images drawn in code.

pub mod cifar;
pub mod corrupted;
pub mod folder;
pub mod npy;
pub mod npz;
pub mod parquet;
pub mod synthetic;
pub mod tensors;
