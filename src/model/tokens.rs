//! Token reduction: which patches of an image the model sees.
//!
//! The paper uses three methods: resizing (a smaller image, done by the data pipeline), random masking and block
//! masking (implemented here). Patches are chosen once per batch, so the attack and the update see the same ones.

use std::ops::Range;

use crate::ops::KeptRows;
use crate::rng::{Rng, Stream};
use crate::settings::{settings, words};

settings! {
    /// Token reduction: the model sees only a subset of each image's patches.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Masking(table) {
        /// How the patches to keep are chosen.
        pub kind: MaskingKind { example: "\"random\"" },
        /// Fraction of patches to drop. Higher values make training cheaper.
        pub ratio: f64 { limits: above(0.0).below(1.0), example: "0.75" },
    }
}

words! {
    /// How the patches to keep are chosen.
    pub enum MaskingKind {
        /// A random subset, as in FLIP and MAE.
        Random = "random",
        /// A contiguous, nearly square rectangle of the patch grid (after BEiT).
        Block = "block",
    }
}

impl Masking {
    /// Returns the number of patches of a grid that are kept.
    ///
    /// Random masking keeps the rounded fraction. Block masking keeps the rectangle whose area is closest to it: 7 x 14
    /// of 14 x 14 at a ratio of 1/2, 7 x 7 at 3/4, the paper's counts.
    pub fn kept(&self, grid: usize) -> usize {
        match self.kind {
            MaskingKind::Random => {
                let share = (grid * grid) as f64 * (1.0 - self.ratio);
                (share.round() as usize).clamp(1, grid * grid)
            }
            MaskingKind::Block => {
                let (height, width) = self.block(grid);
                height * width
            }
        }
    }

    /// Returns the height and width of the block: of all rectangles whose area is closest to the kept fraction, the
    /// most square one that is at least as wide as high.
    fn block(&self, grid: usize) -> (usize, usize) {
        let share = (grid * grid) as f64 * (1.0 - self.ratio);
        let sizes = (1..=grid).flat_map(|height| (height..=grid).map(move |width| (height, width)));
        let distance = |&(height, width): &(usize, usize)| {
            let off = ((height * width) as f64 - share).abs();
            (off, width - height)
        };
        let nearest = sizes.min_by(|a, b| distance(a).partial_cmp(&distance(b)).expect("finite"));
        nearest.expect("a grid has at least one patch")
    }

    /// Chooses the patches to keep, for each image of a batch.
    ///
    /// `position` is the position of the first image in the run, so the choice depends only on the seed and the
    /// position in the run.
    pub fn choose(&self, seed: u64, position: u64, batch: usize, grid: usize) -> Kept {
        let kept = self.kept(grid);
        let mut indices = Vec::with_capacity(batch * kept);
        for image in 0..batch as u64 {
            let mut rng = Rng::new(
                seed,
                Stream::Masking {
                    image: position + image,
                },
            );
            match self.kind {
                MaskingKind::Random => {
                    let mut chosen = rng.permutation(grid * grid);
                    chosen.truncate(kept);
                    chosen.sort_unstable();
                    indices.extend(chosen);
                }
                MaskingKind::Block => {
                    let (mut height, mut width) = self.block(grid);
                    if rng.chance(0.5) {
                        (height, width) = (width, height);
                    }
                    let top = rng.below(grid - height + 1);
                    let left = rng.below(grid - width + 1);
                    let rows = top..top + height;
                    indices.extend(rows.flat_map(|row| {
                        (left..left + width).map(move |column| row * grid + column)
                    }));
                }
            }
        }
        Kept {
            indices,
            batch,
            kept,
        }
    }
}

/// The patches that are kept, per image.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// Patch numbers in reading order, `[batch, kept]`.
    indices: Vec<usize>,
    batch: usize,
    kept: usize,
}

impl Kept {
    /// Returns the number of patches kept in each image.
    pub fn count(&self) -> usize {
        self.kept
    }

    /// Returns the choice for a range of images of the batch.
    pub fn of_rows(&self, rows: &Range<usize>) -> Self {
        let indices = self.indices[rows.start * self.kept..rows.end * self.kept].to_vec();
        Self {
            indices,
            batch: rows.len(),
            kept: self.kept,
        }
    }

    /// Returns the choice in the form that tensor operations take.
    pub fn rows(&self) -> KeptRows<'_> {
        KeptRows {
            rows: &self.indices,
            batch: self.batch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_counts_are_the_papers() {
        let masking = |kind, ratio| Masking { kind, ratio };
        for kind in [MaskingKind::Random, MaskingKind::Block] {
            assert_eq!(masking(kind, 0.5).kept(14), 98);
            assert_eq!(masking(kind, 0.75).kept(14), 49);
        }
        assert_eq!(masking(MaskingKind::Block, 0.75).block(14), (7, 7));
    }

    #[test]
    fn a_block_is_contiguous_and_a_random_choice_has_no_patch_twice() {
        let block = Masking {
            kind: MaskingKind::Block,
            ratio: 0.5,
        }
        .choose(1, 0, 8, 4);
        for image in block.indices.chunks(8) {
            let rows: Vec<_> = image.iter().map(|patch| patch / 4).collect();
            let columns: Vec<_> = image.iter().map(|patch| patch % 4).collect();
            let extent = |of: &[usize]| of.iter().max().unwrap() - of.iter().min().unwrap() + 1;
            assert_eq!(extent(&rows) * extent(&columns), 8, "{image:?}");
        }
        let random = Masking {
            kind: MaskingKind::Random,
            ratio: 0.5,
        }
        .choose(1, 0, 8, 4);
        for image in random.indices.chunks(8) {
            assert!(image.windows(2).all(|pair| pair[0] < pair[1]), "{image:?}");
        }
    }

    #[test]
    fn the_choice_of_an_image_does_not_depend_on_its_batch() {
        let masking = Masking {
            kind: MaskingKind::Random,
            ratio: 0.75,
        };
        let together = masking.choose(5, 100, 4, 6);
        let alone = masking.choose(5, 102, 1, 6);
        assert_eq!(together.indices[2 * 9..3 * 9], alone.indices);
    }
}
