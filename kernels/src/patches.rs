//! Images to rows of patches, with the pixels normalized on the way; and the gradient's way back.
//!
//! Every pixel belongs to one patch, so both directions only move values and scale them.

use rayon::prelude::*;

/// Square images of three channels, and the patches they are cut into.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Patches {
    /// Images.
    pub batch: usize,
    /// Pixels on a side of an image; a multiple of `patch`.
    pub size: usize,
    /// Pixels on a side of a patch.
    pub patch: usize,
    /// Taken off each channel.
    pub mean: [f32; 3],
    /// Then multiplies it.
    pub factor: [f32; 3],
}

impl Patches {
    /// `patches = (images - mean) * factor`, cut up.
    ///
    /// Shapes: `images` `[batch, 3, size, size]`, `patches` `[batch, (size / patch)^2, 3, patch, patch]`.
    ///
    /// # Panics
    ///
    /// If a slice has a length that does not match the sizes.
    pub fn cut(&self, images: &[f32], patches: &mut [f32]) {
        self.check(images.len(), patches.len());
        let image = (3 * self.size * self.size).max(1);
        images.par_chunks(image).zip(patches.par_chunks_mut(image)).for_each(|(from, to)| {
            self.for_each_line(|channel, pixels, values| {
                let (mean, factor) = (self.mean[channel], self.factor[channel]);
                for (to, from) in to[values..][..self.patch].iter_mut().zip(&from[pixels..]) {
                    *to = (from - mean) * factor;
                }
            });
        });
    }

    /// The gradient of the images from that of the patches.
    ///
    /// # Panics
    ///
    /// If a slice has a length that does not match the sizes.
    pub fn gradient(&self, patches: &[f32], images: &mut [f32]) {
        self.check(images.len(), patches.len());
        let image = (3 * self.size * self.size).max(1);
        patches.par_chunks(image).zip(images.par_chunks_mut(image)).for_each(|(from, to)| {
            self.for_each_line(|channel, pixels, values| {
                let factor = self.factor[channel];
                for (to, from) in to[pixels..][..self.patch].iter_mut().zip(&from[values..]) {
                    *to = from * factor;
                }
            });
        });
    }

    /// Calls `f` with the channel of every line of every patch of an image, where it starts in the image
    /// and where among the patches.
    fn for_each_line(&self, mut f: impl FnMut(usize, usize, usize)) {
        let (size, patch) = (self.size, self.patch);
        let grid = size / patch;
        for channel in 0..3 {
            for y in 0..size {
                for column in 0..grid {
                    let pixels = (channel * size + y) * size + column * patch;
                    let number = y / patch * grid + column;
                    let values = ((number * 3 + channel) * patch + y % patch) * patch;
                    f(channel, pixels, values);
                }
            }
        }
    }

    fn check(&self, images: usize, patches: usize) {
        let right = self.batch * 3 * self.size * self.size;
        assert!(self.patch > 0 && self.size.is_multiple_of(self.patch), "{self:?} are not whole patches");
        assert!(
            (images, patches) == (right, right),
            "images and patches have {images} and {patches} elements, {self:?} needs {right}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_holds_its_pixels_and_the_gradient_finds_them_again() {
        let patches = Patches { batch: 2, size: 4, patch: 2, mean: [0.0, 1.0, 2.0], factor: [1.0, 2.0, 4.0] };
        let images: Vec<f32> = (0..96).map(|i| i as f32).collect();
        let mut cut = vec![0.0; 96];
        patches.cut(&images, &mut cut);
        // Second image, patch at the lower left, second channel: pixels (2, 0), (2, 1), (3, 0), (3, 1).
        let right = [72.0, 73.0, 76.0, 77.0].map(|pixel: f32| (pixel - 1.0) * 2.0);
        assert_eq!(cut[48 + 2 * 12 + 4..][..4], right);
        // Linear up to the mean, so the gradient of a sum weighted by the patches is known from them.
        let mut gradient = vec![0.0; 96];
        patches.gradient(&cut, &mut gradient);
        let of = |i: usize| (images[i] - patches.mean[i / 16 % 3]) * patches.factor[i / 16 % 3].powi(2);
        assert_eq!(gradient, (0..96).map(of).collect::<Vec<_>>());
    }
}
