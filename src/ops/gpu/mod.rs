//! What is only for Burn's GPU devices: products of padded matrices, and the upload of bytes.

mod padded;
mod upload;

pub(crate) use padded::{pad, product, truncate};
pub(crate) use upload::from_bytes;
