//! Random streams of an attack, keyed by image.

use crate::ops::Streams;
use crate::rng::{AttackKind, Rng, Stream};

/// The random streams of an attack on a batch: one per image, run and iteration.
///
/// Streams depend on an image's key, never on its index in the batch, so results do not depend on batch size, threads
/// or interruptions.
#[derive(Clone, Copy, Debug)]
pub struct Draws<'a> {
    seed: u64,
    keys: &'a [u64],
    kind: AttackKind,
}

impl<'a> Draws<'a> {
    /// Creates the streams for images with the given keys.
    pub fn new(seed: u64, keys: &'a [u64], kind: AttackKind) -> Self {
        Self { seed, keys, kind }
    }

    /// Returns the stream of one image in one run (restart or target) at one iteration.
    pub fn stream(&self, image: usize, run: usize, iteration: usize) -> Rng {
        Rng::new(self.seed, self.of_key(self.keys[image], run, iteration))
    }

    /// Returns the streams of all images at the start of a run, for devices that draw the numbers themselves.
    pub(crate) fn streams(&self, run: usize) -> Streams<'a> {
        // The device adds the key of each image.
        let (purpose, _, sub_key) = self.of_key(0, run, 0).keys();
        Streams {
            seed: self.seed,
            purpose,
            keys: self.keys,
            sub_key,
        }
    }

    fn of_key(&self, image: u64, run: usize, iteration: usize) -> Stream {
        Stream::Attack {
            kind: self.kind,
            image,
            run: run as u32,
            iteration: iteration as u32,
        }
    }
}
