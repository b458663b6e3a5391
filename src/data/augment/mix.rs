//! The pixel operations of MixUp and CutMix.

use burn::tensor::Tensor;

use crate::ops::RowMix;
use crate::rng::Rng;

/// How each image is mixed with its counterpart.
#[derive(Clone, Debug, PartialEq)]
pub enum Mix {
    /// MixUp: this share of each image, the rest from its counterpart.
    Blend(f32),
    /// CutMix: this rectangle from the counterpart.
    Cut(Patch),
}

impl Mix {
    /// Mixes images in place, `[n, 3, image_size, image_size]`.
    pub(crate) fn apply(&self, images: &mut [f32], image_size: usize) {
        match self {
            Self::Blend(share) => blend(images, image_size, *share),
            Self::Cut(patch) => patch.swap(images, image_size),
        }
    }

    /// Mixes images on a device; equal to [`Self::apply`] except for rounding.
    pub(crate) fn of(&self, images: Tensor<4>) -> Tensor<4> {
        let others = images.clone().flip([0]);
        match self {
            Self::Blend(share) => images * *share + others * (1.0 - share),
            Self::Cut(patch) if patch.area() == 0 => images,
            Self::Cut(patch) => {
                let [count, channels, ..] = images.dims();
                let place = [
                    0..count,
                    0..channels,
                    patch.top..patch.bottom,
                    patch.left..patch.right,
                ];
                images.slice_assign(place.clone(), others.slice(place))
            }
        }
    }
}

impl Mix {
    /// Returns the operation for one image whose counterpart is image `with` of the batch.
    pub(crate) fn of_row(&self, with: usize) -> RowMix {
        match self {
            Self::Blend(share) => RowMix::Blend {
                with,
                share: *share,
            },
            Self::Cut(patch) => RowMix::Cut {
                with,
                left: patch.left,
                right: patch.right,
                top: patch.top,
                bottom: patch.bottom,
            },
        }
    }
}

/// Blends `share` of each image with the rest from its counterpart, in place.
pub(crate) fn blend(images: &mut [f32], image_size: usize, share: f32) {
    counterparts(images, image_size, |image, other| {
        for (one, two) in image.iter_mut().zip(other) {
            (*one, *two) = (
                *one * share + *two * (1.0 - share),
                *two * share + *one * (1.0 - share),
            );
        }
    });
}

/// Calls `change` once for each pair of counterparts. The middle image of an odd batch is its own counterpart and is
/// skipped, since mixing would not change it.
pub(crate) fn counterparts(
    images: &mut [f32],
    image_size: usize,
    mut change: impl FnMut(&mut [f32], &mut [f32]),
) {
    let len = 3 * image_size * image_size;
    let pairs = images.len() / len / 2;
    let (front, back) = images.split_at_mut(pairs * len);
    for (image, other) in front.chunks_exact_mut(len).zip(back.rchunks_exact_mut(len)) {
        change(image, other);
    }
}

/// A rectangle: from `left` to before `right`, from `top` to before `bottom`.
#[derive(Clone, Debug, PartialEq)]
pub struct Patch {
    pub(crate) left: usize,
    pub(crate) right: usize,
    pub(crate) top: usize,
    pub(crate) bottom: usize,
}

impl Patch {
    /// Draws a square of the area `1 - share` around a random point, clipped at the edges of the image.
    pub(crate) fn draw(share: f64, image_size: usize, rng: &mut Rng) -> Self {
        let half = (image_size as f64 * (1.0 - share).sqrt()) as usize / 2;
        let mut edges = || {
            let center = rng.below(image_size);
            (center.saturating_sub(half), (center + half).min(image_size))
        };
        let (top, bottom) = edges();
        let (left, right) = edges();
        Self {
            left,
            right,
            top,
            bottom,
        }
    }

    pub(crate) fn area(&self) -> usize {
        (self.right - self.left) * (self.bottom - self.top)
    }

    pub(crate) fn swap(&self, images: &mut [f32], image_size: usize) {
        counterparts(images, image_size, |image, other| {
            let rows = image
                .chunks_exact_mut(image_size)
                .zip(other.chunks_exact_mut(image_size));
            for (row, (one, two)) in rows.enumerate() {
                if (self.top..self.bottom).contains(&(row % image_size)) {
                    one[self.left..self.right].swap_with_slice(&mut two[self.left..self.right]);
                }
            }
        });
    }
}
