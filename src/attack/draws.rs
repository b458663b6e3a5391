//! Random numbers of an attack, keyed by image.

use crate::ops::Streams;
use crate::rng::{Purpose, Rng};

/// The random numbers of an attack on a batch: a stream for each image, run and iteration.
///
/// By an image's key and never by its place in the batch, so that batch size, threads and a restart change nothing.
#[derive(Clone, Copy, Debug)]
pub struct Draws<'a> {
    seed: u64,
    keys: &'a [u64],
    purpose: Purpose,
}

impl<'a> Draws<'a> {
    /// Numbers for images with the given keys.
    pub fn new(seed: u64, keys: &'a [u64], purpose: Purpose) -> Self {
        Self {
            seed,
            keys,
            purpose,
        }
    }

    /// The stream of one image of the batch in one run (restart or target) at one iteration.
    pub fn stream(&self, image: usize, run: usize, iteration: usize) -> Rng {
        let sub_key = (run as u64) << 32 | iteration as u64;
        Rng::new(self.seed, self.purpose, self.keys[image], sub_key)
    }

    /// The streams of all images in a run at its start, for a device that draws by itself.
    pub(crate) fn streams(&self, run: usize) -> Streams<'a> {
        Streams {
            seed: self.seed,
            purpose: self.purpose,
            keys: self.keys,
            sub_key: (run as u64) << 32,
        }
    }
}
