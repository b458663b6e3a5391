//! Which source a training sample comes from, where several are mixed in fixed fractions.
//!
//! A function of the seed and the position in the run, like the order of the samples: each block of [`BLOCK`] positions
//! has exactly its share of every source, in random order.

use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::rng::{Rng, Stream};

/// Positions in a block. Fractions are rounded to one over it.
pub const BLOCK: usize = 1000;

/// The fractions of several sources.
#[derive(Debug)]
pub struct Mixture {
    seed: u64,
    /// Positions of each source in a block.
    counts: Vec<usize>,
    /// The most recent block.
    block: Mutex<Option<(u64, Vec<Share>)>>,
}

/// A position of a block: its source, and the number of earlier positions of the block with that source.
#[derive(Clone, Copy, Debug)]
struct Share {
    source: u32,
    before: u32,
}

impl Mixture {
    /// Creates a mixture.
    ///
    /// Errors: fractions that do not add up to 1, or that are not multiples of 1/1000.
    pub fn new(seed: u64, fractions: &[f64]) -> Result<Self> {
        let sum: f64 = fractions.iter().sum();
        if (sum - 1.0).abs() > 1e-9 {
            return Err(Error::input(format!(
                "the fractions of data.sources add up to {sum}, not 1"
            )));
        }
        let mut counts = Vec::new();
        for fraction in fractions {
            let count = (fraction * BLOCK as f64).round();
            if (count / BLOCK as f64 - fraction).abs() > 1e-9 || count < 1.0 {
                let message = format!("fraction = {fraction} is not a multiple of 1/{BLOCK}");
                return Err(Error::input(message).hint("round it to three digits"));
            }
            counts.push(count as usize);
        }
        Ok(Self {
            seed,
            counts,
            block: Mutex::default(),
        })
    }

    /// Returns the source of a position of the run, and the number of earlier positions with that source.
    pub fn at(&self, position: u64) -> (usize, u64) {
        let (block, place) = (position / BLOCK as u64, (position % BLOCK as u64) as usize);
        let mut kept = self.block.lock().unwrap_or_else(PoisonError::into_inner);
        let shares = match &*kept {
            Some((known, shares)) if *known == block => shares,
            _ => &kept.insert((block, self.shares(block))).1,
        };
        let Share { source, before } = shares[place];
        let source = source as usize;
        (
            source,
            block * self.counts[source] as u64 + u64::from(before),
        )
    }

    /// Returns the percentage of each source.
    pub fn percentages(&self) -> impl Iterator<Item = f64> {
        let of_block = 100.0 / BLOCK as f64;
        self.counts
            .iter()
            .map(move |count| *count as f64 * of_block)
    }

    fn shares(&self, block: u64) -> Vec<Share> {
        let sources = self.counts.iter().zip(0u32..);
        let sources = sources.flat_map(|(count, source)| std::iter::repeat_n(source, *count));
        let sources: Vec<u32> = sources.collect();
        let mut rng = Rng::new(self.seed, Stream::Mixture { block });
        let mut before = vec![0; self.counts.len()];
        let share = |place: usize| {
            let source = sources[place];
            let count = &mut before[source as usize];
            *count += 1;
            Share {
                source,
                before: *count - 1,
            }
        };
        rng.permutation(BLOCK).into_iter().map(share).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_has_the_shares_and_every_source_is_counted_through() {
        let mixture = Mixture::new(3, &[0.3, 0.7]).unwrap();
        let mut next = [0, 0];
        for position in 0..3 * BLOCK as u64 {
            let (source, number) = mixture.at(position);
            assert_eq!(number, next[source]);
            next[source] += 1;
            if (position + 1) % BLOCK as u64 == 0 {
                let blocks = (position + 1) / BLOCK as u64;
                assert_eq!(next, [300 * blocks, 700 * blocks]);
            }
        }
        // Sources alternate rather than follow each other.
        let first: Vec<usize> = (0..100).map(|position| mixture.at(position).0).collect();
        let ones = first.iter().sum::<usize>();
        assert!((50..90).contains(&ones), "{ones}");
    }

    #[test]
    fn fractions_that_do_not_add_up_or_are_too_fine_are_refused() {
        let message = |fractions: &[f64]| Mixture::new(0, fractions).unwrap_err().to_string();
        assert!(message(&[0.3, 0.6]).contains("add up to 0.8999999999999999, not 1"));
        assert!(message(&[1.0 / 3.0, 2.0 / 3.0]).contains("is not a multiple of 1/1000"));
    }
}
