//! Augmentation of one training image, which results in a square of the training size.
//!
//! In this order: geometry (a random resized crop, or padding and a crop at native size followed by a resize), a
//! horizontal flip with probability 1/2, then RandAugment. Every draw comes from the stream of (seed, epoch, sample),
//! so the result does not depend on the batch or the thread.
//! Not for changes that need two images ([`crate::data::augment::mixing`]) or for evaluation
//! ([`crate::image::preprocessing`]).

pub mod mix;
pub mod mixing;

use crate::data::batch::Planes;
use crate::image::operations::Operation;
use crate::image::picture::{bytes_in_planes, planes_to_bytes, to_byte};
use crate::image::resize::{Crop, Filter, resize_planes};
use crate::image::{Cutout, Picture, Region, operations};
use crate::rng::{Rng, Stream};
use crate::settings::{Table, settings};

settings! {
    /// Augmentation of single training images. Each operation is off if its key is absent; `flip` is required.
    #[derive(Clone, Debug, Default, PartialEq)]
    pub struct Augmentation(table) {
        /// Crop a random region and resize it (torchvision's `RandomResizedCrop`).
        pub random_resized_crop: Option<RandomResizedCrop> {},
        /// Padding of black pixels on each side, from which a random region of the original size is cropped.
        pub pad_crop: Option<u32> { limits: within(1.0, 1024.0), unit: "pixels", example: "4" },
        /// Flip each image horizontally with probability 1/2.
        pub flip: bool { example: "true" },
        /// Apply random color and geometric operations (RandAugment).
        pub rand_augment: Option<RandAugment> {},
    }
    check { check_crops(table) }
}

settings! {
    /// Bounds of a random resized crop. As in torchvision, ten draws are tried, then the largest central part within
    /// the aspect ratios is used.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub struct RandomResizedCrop(table) {
        /// Smallest and largest area of the crop, as a fraction of the image.
        pub area: [f64; 2] { limits: above(0.0).at_most(1.0), example: "[0.08, 1.0]" },
        /// Smallest and largest aspect ratio (width / height).
        pub ratio: [f64; 2] { limits: above(0.0), example: "[0.75, 1.3333333]" },
    }
    check {
        check_order(table, "area", area);
        check_order(table, "ratio", ratio);
    }
}

// Source: Cubuk et al. 2020; `timm/data/auto_augment.py`, the increasing set of 15 operations, each drawn with
// replacement and applied with probability 1/2.
// Differs from the reference: rotated and translated images are always interpolated linearly, while timm draws linear
// or cubic for each. The fill color is ImageNet's mean, as `create_transform` sets it.
settings! {
    /// RandAugment, as in timm's `rand-m9-mstd0.5-inc1`.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub struct RandAugment(table) {
        /// Number of operations drawn for each image. Each is applied with probability 1/2.
        pub operations: u32 { limits: within(1.0, 100.0), example: "2" },
        /// Mean magnitude of the operations.
        pub magnitude: f64 { limits: within(0.0, 10.0), example: "9.0" },
        /// Standard deviation of the magnitude.
        pub deviation: f64 { limits: at_least(0.0), example: "0.5" },
    }
}

fn check_crops(table: &Table) {
    if table.has("pad_crop") && table.has("random_resized_crop") {
        let message = "`pad_crop` has no effect with `random_resized_crop`";
        table.problem_with_hint("pad_crop", message, "keep one of the two");
    }
}

/// Checks that the smaller bound comes first.
fn check_order(table: &Table, key: &str, bounds: Option<[f64; 2]>) {
    if let Some([low, high]) = bounds
        && low > high
    {
        let message = format!("{key} = [{low}, {high}] must have the smaller number first");
        table.problem_with_hint(key, message, format!("use [{high}, {low}]"));
    }
}

impl Augmentation {
    /// Returns the part of a picture of the given size that [`Self::apply`] will read, at full scale.
    pub fn region(&self, width: usize, height: usize, keys: (u64, u64, u64)) -> Region {
        let Some(crop) = &self.random_resized_crop else {
            return Region::whole(width, height);
        };
        let crop = crop.draw(width, height, &mut draws(keys));
        Region {
            left: crop.left as usize,
            top: crop.top as usize,
            width: crop.width as usize,
            height: crop.height as usize,
        }
    }

    /// Returns [`Self::region`] with the largest reduction that leaves the crop at least `image_size` pixels on each
    /// side.
    ///
    /// The padding of `pad_crop` is in full-scale pixels, so its pictures are never reduced.
    pub fn cutout(
        &self,
        (width, height): (usize, usize),
        image_size: usize,
        keys: (u64, u64, u64),
    ) -> Cutout {
        let region = self.region(width, height, keys);
        let shortest = region.width.min(region.height);
        let fits = |reduction: &usize| shortest >= image_size * reduction;
        let reduction = match self.pad_crop {
            Some(_) => None,
            None => [8, 4, 2].into_iter().find(fits),
        };
        Cutout {
            region,
            reduction: reduction.unwrap_or(1),
        }
    }

    /// Makes a training image from a picture that contains at least [`Self::region`].
    ///
    /// A picture of bytes results in bytes: as with Pillow, resized values are rounded.
    ///
    /// Shapes: the result is `[3, image_size, image_size]`.
    pub fn apply(&self, picture: &Picture, image_size: usize, keys: (u64, u64, u64)) -> Planes {
        let mut rng = draws(keys);
        let mut planes = self.geometry(picture, image_size, &mut rng);
        if self.flip && rng.chance(0.5) {
            planes
                .chunks_exact_mut(image_size)
                .for_each(|row| row.reverse());
        }
        match &self.rand_augment {
            Some(rand_augment) => {
                let mut bytes = planes_to_bytes(&planes);
                rand_augment.apply(&mut bytes, image_size, &mut rng);
                Planes::Bytes(bytes_in_planes(&bytes))
            }
            None if picture.is_bytes() => Planes::Bytes(planes.into_iter().map(to_byte).collect()),
            None => Planes::Floats(planes),
        }
    }

    fn geometry(&self, picture: &Picture, image_size: usize, rng: &mut Rng) -> Vec<f32> {
        let size = (image_size, image_size);
        if let Some(crop) = &self.random_resized_crop {
            let ((width, height), reduction) = picture.full_scale();
            let crop = crop.draw(width, height, rng).reduced(reduction);
            return resize_planes(picture, &crop, size, Filter::Bilinear);
        }
        let ((width, height), reduction) = picture.full_scale();
        let square = Crop::central_square(width, height).reduced(reduction);
        let Some(padding) = self.pad_crop else {
            return resize_planes(picture, &square, size, Filter::Bilinear);
        };
        let moved = pad_crop(picture, padding as usize, rng);
        if (picture.width(), picture.height()) == size {
            return moved;
        }
        match Picture::planes(picture.width(), picture.height(), moved) {
            Ok(moved) => resize_planes(&moved, &square, size, Filter::Bilinear),
            Err(error) => unreachable!("a moved picture keeps its size: {error}"),
        }
    }
}

/// Returns the random stream of (seed, epoch, sample). The crop is drawn first.
fn draws((seed, epoch, sample): (u64, u64, u64)) -> Rng {
    Rng::new(seed, Stream::Augment { epoch, sample })
}

/// Shifts a picture by up to `padding` pixels in each direction and fills the edges with black.
fn pad_crop(picture: &Picture, padding: usize, rng: &mut Rng) -> Vec<f32> {
    let mut draw = || rng.below(2 * padding + 1) as isize - padding as isize;
    let (across, down) = (draw(), draw());
    let (width, height) = (picture.width(), picture.height());
    let planes = picture.to_planes();
    let mut moved = vec![0.0; planes.len()];
    // The columns that remain inside, in the new picture and in the old.
    let columns = width.saturating_sub(across.unsigned_abs());
    let (new_x, old_x) = ((-across).max(0) as usize, across.max(0) as usize);
    if columns == 0 {
        return moved;
    }
    for (old, new) in planes
        .chunks_exact(width * height)
        .zip(moved.chunks_exact_mut(width * height))
    {
        for (y, row) in new.chunks_exact_mut(width).enumerate() {
            let Some(y) = y.checked_add_signed(down).filter(|y| *y < height) else {
                continue;
            };
            row[new_x..][..columns].copy_from_slice(&old[y * width + old_x..][..columns]);
        }
    }
    moved
}

impl RandomResizedCrop {
    /// Draws a random part of a picture, with integer edges.
    fn draw(&self, width: usize, height: usize, rng: &mut Rng) -> Crop {
        let between =
            |[low, high]: [f64; 2], rng: &mut Rng| low + (high - low) * f64::from(rng.uniform());
        let (wide, high) = (width as f64, height as f64);
        let log_ratio = self.ratio.map(f64::ln);
        for _ in 0..10 {
            let area = wide * high * between(self.area, rng);
            let ratio = between(log_ratio, rng).exp();
            let crop_width = (area * ratio).sqrt().round_ties_even();
            let crop_height = (area / ratio).sqrt().round_ties_even();
            let fits = |side: f64, whole: f64| side >= 1.0 && side <= whole;
            if fits(crop_width, wide) && fits(crop_height, high) {
                return Crop {
                    top: rng.below(height - crop_height as usize + 1) as f64,
                    left: rng.below(width - crop_width as usize + 1) as f64,
                    width: crop_width,
                    height: crop_height,
                };
            }
        }
        let [least, most] = self.ratio;
        let ratio = (wide / high).clamp(least, most);
        let crop_width = (high * ratio).round_ties_even().clamp(1.0, wide);
        let crop_height = (wide / ratio).round_ties_even().clamp(1.0, high);
        Crop {
            left: ((wide - crop_width) / 2.0).floor(),
            top: ((high - crop_height) / 2.0).floor(),
            width: crop_width,
            height: crop_height,
        }
    }
}

impl RandAugment {
    fn apply(&self, bytes: &mut Vec<u8>, image_size: usize, rng: &mut Rng) {
        for _ in 0..self.operations {
            let kind = rng.below(operations::KINDS);
            if !rng.chance(0.5) {
                continue;
            }
            let level = self.magnitude + self.deviation * f64::from(rng.normal());
            let negate = rng.chance(0.5);
            let operation = Operation::at_level(kind, level.clamp(0.0, 10.0), negate);
            operation.apply(bytes, image_size, image_size);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradient(width: usize, height: usize) -> Picture {
        let pixels = (0..height).flat_map(|y| {
            (0..width).flat_map(move |x| [(x * 7) as u8, (y * 5) as u8, ((x + y) * 3) as u8])
        });
        Picture::bytes(width, height, pixels.collect()).unwrap()
    }

    const KEYS: (u64, u64, u64) = (0, 1, 2);

    #[test]
    fn without_augmentation_a_picture_of_the_right_size_is_unchanged() {
        let picture = gradient(32, 32);
        let image = Augmentation::default()
            .apply(&picture, 32, KEYS)
            .into_floats();
        assert_eq!(image, picture.to_planes());
    }

    #[test]
    fn the_result_is_a_function_of_seed_epoch_and_sample() {
        let augmentation = Augmentation {
            random_resized_crop: Some(RandomResizedCrop {
                area: [0.2, 1.0],
                ratio: [0.75, 4.0 / 3.0],
            }),
            flip: true,
            rand_augment: Some(RandAugment {
                operations: 2,
                magnitude: 9.0,
                deviation: 0.5,
            }),
            ..Augmentation::default()
        };
        let picture = gradient(40, 30);
        let base = augmentation.apply(&picture, 24, KEYS);
        assert_eq!(base.len(), 3 * 24 * 24);
        assert_eq!(base, augmentation.apply(&picture, 24, KEYS));
        for keys in [(1, 1, 2), (0, 2, 2), (0, 1, 3)] {
            assert_ne!(base, augmentation.apply(&picture, 24, keys));
        }
    }

    #[test]
    fn a_picture_of_which_only_the_crop_is_known_gives_the_same_bits() {
        let augmentation = Augmentation {
            random_resized_crop: Some(RandomResizedCrop {
                area: [0.1, 1.0],
                ratio: [0.5, 2.0],
            }),
            flip: true,
            ..Augmentation::default()
        };
        let (width, height) = (61, 47);
        let whole = gradient(width, height);
        let bytes = whole.to_bytes();
        for sample in 0..50 {
            let keys = (0, 3, sample);
            let region = augmentation.region(width, height, keys);
            let lines = bytes.chunks_exact(3 * width);
            let lines = lines.skip(region.top).take(region.height);
            let lines = lines.flat_map(|line| &line[3 * region.left..][..3 * region.width]);
            let pixels = lines.copied().collect();
            let part = Picture::part(width, height, region, pixels).unwrap();
            // Smaller and larger than the crop.
            for size in [12, 40] {
                let expected = augmentation.apply(&whole, size, keys);
                assert!(augmentation.apply(&part, size, keys) == expected);
            }
        }
    }

    /// Returns the mean of each square, as in a JPEG decoded at reduced scale.
    fn squares(picture: &Picture, reduction: usize) -> Picture {
        let (width, height, bytes) = (picture.width(), picture.height(), picture.to_bytes());
        let [columns, rows] = [width, height].map(|side| side / reduction);
        let area = (reduction * reduction) as u32;
        let mean = |place: usize| {
            let (x, y, c) = (place / 3 % columns, place / 3 / columns, place % 3);
            let at = |i: usize| {
                let (x, y) = (x * reduction + i % reduction, y * reduction + i / reduction);
                u32::from(bytes[(y * width + x) * 3 + c])
            };
            ((0..reduction * reduction).map(at).sum::<u32>() / area) as u8
        };
        let pixels = (0..3 * columns * rows).map(mean).collect();
        let known = Region::whole(columns, rows);
        Picture::reduced((width, height), reduction, known, pixels).unwrap()
    }

    #[test]
    fn a_reduced_picture_gives_the_same_crop_except_for_sharpness() {
        let slope = (0..120 * 160).flat_map(|i| [(i % 160) as u8, (i / 160 * 2) as u8, 99]);
        let picture = Picture::bytes(160, 120, slope.collect()).unwrap();
        let augmentation = Augmentation {
            random_resized_crop: Some(RandomResizedCrop {
                area: [0.3, 1.0],
                ratio: [0.75, 4.0 / 3.0],
            }),
            flip: true,
            ..Augmentation::default()
        };
        let mut reductions = std::collections::BTreeSet::new();
        for sample in 0..200 {
            let keys = (0, 0, sample);
            let cutout = augmentation.cutout((160, 120), 24, keys);
            let (region, reduction) = (cutout.region, cutout.reduction);
            assert_eq!(region, augmentation.region(160, 120, keys));
            assert!(region.width.min(region.height) >= 24 * reduction);
            assert!(reduction == 4 || region.width.min(region.height) < 48 * reduction);
            reductions.insert(reduction);
            let whole = augmentation.apply(&picture, 24, keys).into_floats();
            let reduced = squares(&picture, reduction);
            let reduced = augmentation.apply(&reduced, 24, keys).into_floats();
            let apart = whole.iter().zip(&reduced).map(|(a, b)| (a - b).abs());
            assert!(apart.fold(0.0, f32::max) <= 3.0 / 255.0, "{cutout:?}");
        }
        assert_eq!(reductions.into_iter().collect::<Vec<_>>(), [2, 4]);
        let padded = Augmentation {
            pad_crop: Some(4),
            ..Augmentation::default()
        };
        assert_eq!(padded.cutout((160, 120), 8, KEYS).reduction, 1);
    }

    #[test]
    fn pad_crop_moves_the_picture_and_fills_with_black() {
        let picture = Picture::bytes(3, 3, vec![255; 27]).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for sample in 0..200 {
            let mut rng = Rng::new(0, Stream::Augment { epoch: 0, sample });
            let moved = pad_crop(&picture, 1, &mut rng);
            let plane: Vec<u8> = moved[..9].iter().map(|value| *value as u8).collect();
            assert_eq!(moved[..9], moved[18..]);
            seen.insert(plane);
        }
        // Nine places: a side of the white square is 2 or 3 pixels long.
        assert_eq!(seen.len(), 9);
        assert!(seen.contains(&vec![0, 0, 0, 0, 1, 1, 0, 1, 1]));
        assert!(seen.contains(&vec![1, 1, 0, 1, 1, 0, 0, 0, 0]));
    }

    #[test]
    fn half_of_the_pictures_are_flipped() {
        let picture = gradient(8, 8);
        let augmentation = Augmentation {
            flip: true,
            ..Augmentation::default()
        };
        let planes = picture.to_planes();
        let mut mirrored = planes.clone();
        mirrored.chunks_exact_mut(8).for_each(|row| row.reverse());
        let count = (0..1000)
            .filter(|sample| {
                let image = augmentation
                    .apply(&picture, 8, (0, 0, *sample))
                    .into_floats();
                assert!(image == planes || image == mirrored);
                image == mirrored
            })
            .count();
        // Standard deviation 16.
        assert!((430..570).contains(&count), "{count}");
    }

    #[test]
    fn random_crops_stay_within_their_bounds() {
        let crop = RandomResizedCrop {
            area: [0.25, 1.0],
            ratio: [0.75, 4.0 / 3.0],
        };
        let mut mean_area = 0.0;
        for sample in 0..500 {
            let crop = crop.draw(
                100,
                80,
                &mut Rng::new(0, Stream::Augment { epoch: 0, sample }),
            );
            assert!(crop.left >= 0.0 && crop.left + crop.width <= 100.0);
            assert!(crop.top >= 0.0 && crop.top + crop.height <= 80.0);
            let area = crop.width * crop.height / 8000.0;
            let ratio = crop.width / crop.height;
            assert!((0.24..=1.0).contains(&area), "{area}");
            assert!((0.73..1.36).contains(&ratio), "{ratio}");
            mean_area += area / 500.0;
        }
        // Uniform in 0.25..1 except for draws that did not fit.
        assert!((0.5..0.66).contains(&mean_area), "{mean_area}");
    }

    /// A panorama has no part with this ratio and area, so the central, roughly square part is used.
    #[test]
    fn a_panorama_is_cropped_to_its_center() {
        let crop = RandomResizedCrop {
            area: [0.9, 1.0],
            ratio: [0.75, 1.0],
        };
        let crop = crop.draw(
            1000,
            10,
            &mut Rng::new(
                0,
                Stream::Augment {
                    epoch: 0,
                    sample: 0,
                },
            ),
        );
        assert_eq!((crop.left, crop.width, crop.height), (495.0, 10.0, 10.0));
    }

    #[test]
    fn the_settings_of_a_resolved_recipe_are_read_back() {
        let augmentation = Augmentation {
            random_resized_crop: Some(RandomResizedCrop {
                area: [0.25, 1.0],
                ratio: [0.75, 1.5],
            }),
            flip: true,
            rand_augment: Some(RandAugment {
                operations: 2,
                magnitude: 9.0,
                deviation: 0.5,
            }),
            pad_crop: None,
        };
        let text = toml::to_string(&augmentation).unwrap();
        let read = crate::settings::read(&text, &[], Augmentation::read).unwrap();
        assert_eq!(read, augmentation);
    }

    #[test]
    fn all_faults_of_the_settings_are_reported() {
        let text = "pad_crop = 4\nrandom_resized_crop = { area = [0.5, 2.0] }\n\
                    rand_augment = { operations = 0, magnitude = 11, deviation = 0.5 }\nflop = true";
        let faults = crate::settings::read(text, &[], Augmentation::read).unwrap_err();
        let text: String = faults.iter().map(|fault| format!("{fault}\n")).collect();
        for part in [
            "`pad_crop` has no effect with",
            "area = [0.5, 2.0] must be",
            "`ratio` is missing",
            "operations = 0 must be 1 to 100",
            "magnitude = 11 must be 0 to 10",
            "`flip` is missing",
            "unknown key `flop`",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
