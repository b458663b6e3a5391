//! Random numbers of an attack, keyed by image.

use crate::rng::Purpose;

/// The random numbers of an attack on a batch: a stream for each image, run and iteration.
///
/// By an image's key and never by its place in the batch, so that batch size, threads and a restart change nothing.
#[derive(Clone, Copy, Debug)]
pub struct Draws<'a> {
    pub(crate) seed: u64,
    pub(crate) keys: &'a [u64],
    pub(crate) purpose: Purpose,
}
