//! Random streams of an attack, keyed by image.

use crate::ops::Streams;
use crate::rng::{Purpose, Rng};

/// The random streams of an attack on a batch: one per image, run and iteration.
///
/// Streams depend on an image's key, never on its index in the batch, so results do not depend on batch size, threads
/// or interruptions.
#[derive(Clone, Copy, Debug)]
pub struct Draws<'a> {
    seed: u64,
    keys: &'a [u64],
    purpose: Purpose,
}

impl<'a> Draws<'a> {
    /// Creates the streams for images with the given keys.
    pub fn new(seed: u64, keys: &'a [u64], purpose: Purpose) -> Self {
        Self {
            seed,
            keys,
            purpose,
        }
    }

    /// Returns the stream of one image in one run (restart or target) at one iteration.
    pub fn stream(&self, image: usize, run: usize, iteration: usize) -> Rng {
        let sub_key = (run as u64) << 32 | iteration as u64;
        Rng::new(self.seed, self.purpose, self.keys[image], sub_key)
    }

    /// Returns the streams of all images at the start of a run, for devices that draw the numbers themselves.
    pub(crate) fn streams(&self, run: usize) -> Streams<'a> {
        Streams {
            seed: self.seed,
            purpose: self.purpose,
            keys: self.keys,
            sub_key: (run as u64) << 32,
        }
    }
}
