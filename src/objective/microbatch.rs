//! Forward passes over a rank's part of a batch, at once or in microbatches to save memory.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::model::{DropPath, Kept, Model, Pass};
use crate::ops::{Numerics, join};

/// How a rank's part of a batch is passed through the model.
#[derive(Clone, Debug)]
pub struct Microbatches {
    /// Precision of updates.
    pub numerics: Numerics,
    /// Precision of the attack's passes.
    pub attack_numerics: Numerics,
    /// Whether backward passes recompute activations.
    pub recompute: bool,
    /// The patches that each image keeps; all if `None`.
    pub kept: Option<Kept>,
    /// Images per microbatch; a whole shard if `None`.
    pub size: Option<usize>,
    /// Number of equal shards of the rank's part. A microbatch never spans shards.
    pub shards: usize,
}

impl Microbatches {
    /// Returns the rows of each shard's microbatches, for `count` images.
    pub(super) fn rows(&self, count: usize) -> Vec<Vec<Range<usize>>> {
        let of_shard = count / self.shards;
        let size = self.size.unwrap_or(of_shard).min(of_shard).max(1);
        let shards = (0..self.shards).map(|shard| {
            let (begin, end) = (shard * of_shard, (shard + 1) * of_shard);
            let starts = (begin..end).step_by(size);
            starts.map(|start| start..(start + size).min(end)).collect()
        });
        shards.collect()
    }

    /// Computes the model's outputs for all images of the rank.
    ///
    /// Shapes: `images` `[images, 3, height, width]`; the result `[images, outputs]`.
    pub(super) fn forward(
        &self,
        model: &Model,
        images: Tensor<4>,
        numerics: Numerics,
        drop_path: Option<&DropPath>,
    ) -> Tensor<2> {
        let kept = self.kept.as_ref();
        self.pass(model, images, kept, numerics, drop_path.cloned())
    }

    /// Computes the model's outputs for the images in `rows`.
    ///
    /// Shapes: `images` `[rows, 3, height, width]`; the result `[rows, outputs]`.
    pub(super) fn forward_rows(
        &self,
        model: &Model,
        images: Tensor<4>,
        rows: &Range<usize>,
        numerics: Numerics,
        drop_path: Option<&DropPath>,
    ) -> Tensor<2> {
        let kept = self.kept.as_ref().map(|kept| kept.of_rows(rows));
        let drop_path = drop_path.map(|path| DropPath {
            position: path.position + rows.start as u64,
            ..path.clone()
        });
        self.pass(model, images, kept.as_ref(), numerics, drop_path)
    }

    /// Computes the outputs of the model itself on clean images, as the attack sees it: in evaluation mode.
    ///
    /// Shapes: `images` `[images, 3, height, width]`; the result `[images, outputs]`.
    pub fn own_outputs(&self, model: &Model, images: &Tensor<4>) -> Tensor<2> {
        self.in_parts(images, |images, rows| {
            self.forward_rows(model, images, rows, self.attack_numerics, None)
        })
    }

    /// Computes the outputs of a frozen model, which sees all patches.
    ///
    /// Shapes: as [`Self::own_outputs`].
    pub fn reference_outputs(&self, reference: &Model, images: &Tensor<4>) -> Tensor<2> {
        self.in_parts(images, |images, _| {
            self.pass(reference, images, None, self.numerics, None)
        })
    }

    fn in_parts(
        &self,
        images: &Tensor<4>,
        pass: impl Fn(Tensor<4>, &Range<usize>) -> Tensor<2>,
    ) -> Tensor<2> {
        let rows = self.rows(images.dims()[0]).concat();
        join(
            rows.iter()
                .map(|rows| pass(rows_of(images, rows), rows))
                .collect(),
        )
    }

    fn pass(
        &self,
        model: &Model,
        images: Tensor<4>,
        kept: Option<&Kept>,
        numerics: Numerics,
        drop_path: Option<DropPath>,
    ) -> Tensor<2> {
        let pass = Pass {
            numerics,
            kept,
            drop_path,
            recompute: self.recompute,
        };
        model.logits(images, &pass)
    }
}

/// Selects rows of a batch of images.
pub(super) fn rows_of(images: &Tensor<4>, rows: &Range<usize>) -> Tensor<4> {
    images.clone().narrow(0, rows.start, rows.len())
}
