//! Deterministic preprocessing for evaluation: resizes and crops an image to the model's input size.
//!
//! Source: torchvision's `Resize` and `CenterCrop`, timm's `transforms_imagenet_eval` and open_clip's
//! `image_transform` on Pillow images; bit-exact for images of bytes.
//! Differs from the reference: images of floats (`tensors:`) are resized in floats.

use serde::Serialize;

use super::picture::{Picture, Pixels, Region, bytes_to_planes};
use super::resize::{Crop, Filter, resize_bytes, resize_planes_part};
use crate::error::{Error, Result};
use crate::settings::words;

/// How an image of any size becomes a square of the model's input size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Preprocessing {
    /// Side of the result, in pixels.
    pub image_size: usize,
    /// Which sides are resized.
    #[serde(flatten)]
    pub resize_mode: ResizeMode,
    /// Fraction of the resized side that the crop keeps, in (0, 1]; 1 keeps all of it.
    pub crop_fraction: f64,
    /// Interpolation filter.
    pub interpolation: Filter,
}

/// Which sides of an image are resized to `image_size / crop_fraction`. Named as in open_clip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "resize_mode", rename_all = "lowercase")]
pub enum ResizeMode {
    /// The shorter side; the longer one is cropped. timm's `center`.
    Shortest,
    /// The longer side; the shorter one is padded with borders. timm's `border`.
    Longest {
        /// Color of the borders: red, green, blue.
        fill: [u8; 3],
    },
    /// Both sides, ignoring the aspect ratio.
    Squash,
    /// None: the center is cropped, or padded with black. torchvision's `CenterCrop` alone.
    Crop,
}

// Named as in open_clip, whose borders are black.
words!(for ResizeMode:
    "shortest" => Self::Shortest, "Resize the shortest side and crop the rest.";
    "longest" => Self::Longest { fill: [0; 3] }, "Resize the longest side and pad the other.";
    "squash" => Self::Squash, "Resize both sides, ignoring the aspect ratio.";
    "crop" => Self::Crop, "Crop the center without resizing; pad smaller images with black.";
);

words! {
    /// Preprocessing of ImageNet's images, as RobustBench names it.
    pub enum RobustBench {
        /// Resize the shorter side to 256 (bilinear), center crop 224.
        Res256Crop224 = "Res256Crop224",
        /// Resize the shorter side to 256 (bicubic), center crop 224.
        BicubicRes256Crop224 = "BicubicRes256Crop224",
        /// Center crop 288 without resizing.
        Crop288 = "Crop288",
        /// Resize both sides to 224 (bilinear), ignoring the aspect ratio.
        Res224 = "Res224",
    }
}

impl RobustBench {
    /// Returns the preprocessing.
    pub fn preprocessing(self) -> Preprocessing {
        let usual = Preprocessing::new(224);
        match self {
            Self::Res256Crop224 => Preprocessing {
                crop_fraction: 0.875,
                ..usual
            },
            Self::BicubicRes256Crop224 => Preprocessing {
                crop_fraction: 0.875,
                interpolation: Filter::Bicubic,
                ..usual
            },
            Self::Crop288 => Preprocessing {
                image_size: 288,
                resize_mode: ResizeMode::Crop,
                ..usual
            },
            Self::Res224 => Preprocessing {
                resize_mode: ResizeMode::Squash,
                ..usual
            },
        }
    }
}

/// Largest [`Preprocessing::image_size`]: far beyond any model, and small enough that no product of sizes overflows.
pub const MAX_IMAGE_SIZE: usize = 4096;

/// Largest side that images are resized to before cropping.
const MAX_RESIZED: usize = 1 << 20;

/// Which pixels of a resized axis are kept, and where they go.
struct Axis {
    /// First position that is kept, and how many are kept.
    first: usize,
    count: usize,
    /// Width of the border before them.
    border: usize,
}

impl Preprocessing {
    /// Resizes the shorter side to the image size with bilinear interpolation, then crops the center, as evaluations
    /// during training do.
    pub fn new(image_size: usize) -> Self {
        Self {
            image_size,
            resize_mode: ResizeMode::Shortest,
            crop_fraction: 1.0,
            interpolation: Filter::Bilinear,
        }
    }

    /// Returns the number of values in one preprocessed image.
    pub fn numbers(&self) -> usize {
        3 * self.image_size * self.image_size
    }

    /// Checks the sizes.
    ///
    /// Errors: image size, crop fraction or resized side out of range.
    pub fn check(&self) -> Result<()> {
        let size = self.image_size;
        if !(1..=MAX_IMAGE_SIZE).contains(&size) {
            let message =
                format!("invalid image size {size}: must be from 1 to {MAX_IMAGE_SIZE} pixels");
            return Err(Error::input(message).hint("use the size that the model was trained at"));
        }
        let fraction = self.crop_fraction;
        if !(fraction > 0.0 && fraction <= 1.0) {
            let message =
                format!("invalid crop fraction {fraction}: must be above 0 and at most 1");
            return Err(Error::input(message).hint("ImageNet models often use 0.875"));
        }
        let resized = size as f64 / fraction;
        if resized > MAX_RESIZED as f64 {
            let message = format!(
                "crop fraction {fraction} would resize images to {resized:.0} pixels before cropping to {size}; the \
                 maximum is {MAX_RESIZED}"
            );
            return Err(Error::input(message).hint("ImageNet models often use 0.875"));
        }
        Ok(())
    }

    /// Returns the side that images are resized to, rounded as in timm.
    pub(crate) fn resized(&self) -> usize {
        ((self.image_size as f64 / self.crop_fraction).floor() as usize).max(self.image_size)
    }

    /// Describes the preprocessing in words, such as ``resize the shorter side to 256 (bicubic), center crop 224``.
    pub fn describe(&self) -> String {
        let (size, resized) = (self.image_size, self.resized());
        let filter = self.interpolation.word();
        match self.resize_mode {
            ResizeMode::Shortest => {
                format!("resize the shorter side to {resized} ({filter}), center crop {size}")
            }
            ResizeMode::Squash if resized == size => {
                format!("resize to {size} x {size} ({filter}), ignoring the aspect ratio")
            }
            ResizeMode::Squash => format!(
                "resize to {resized} x {resized} ({filter}), ignoring the aspect ratio, center crop {size}"
            ),
            ResizeMode::Crop => format!("center crop {size} without resizing"),
            ResizeMode::Longest { fill: [r, g, b] } => format!(
                "resize the longer side to {resized} ({filter}), center crop or pad to {size} with color {r},{g},{b}"
            ),
        }
    }

    /// Resizes and crops an image.
    ///
    /// Shapes: the result is `[3, image_size, image_size]`. Units: `[0, 1]`.
    /// An image that already has the target size is returned unchanged, unless a crop fraction enlarges it.
    pub fn apply(&self, picture: &Picture) -> Vec<f32> {
        let size = self.image_size;
        let old = (picture.width(), picture.height());
        let new = self.new_sides(old);
        let [across, down] = [new.0, new.1].map(|resized| self.axis(resized));
        let region = Region {
            left: across.first,
            top: down.first,
            width: across.count,
            height: down.count,
        };
        let image = match picture.pixels() {
            Pixels::Bytes(bytes) => {
                let bytes = resize_bytes(bytes, old, new, &region, self.interpolation);
                bytes_to_planes(&bytes)
            }
            Pixels::Planes(_) => {
                let whole = Crop::whole(old.0, old.1);
                resize_planes_part(picture, &whole, new, &region, self.interpolation)
            }
        };
        if (region.width, region.height) == (size, size) {
            return image;
        }
        let fill = match self.resize_mode {
            ResizeMode::Longest { fill } => fill,
            ResizeMode::Shortest | ResizeMode::Squash | ResizeMode::Crop => [0; 3],
        };
        let mut bordered = Vec::with_capacity(3 * size * size);
        for color in fill {
            bordered.resize(bordered.len() + size * size, f32::from(color) / 255.0);
        }
        for (row, values) in image.chunks_exact(region.width).enumerate() {
            let (channel, row) = (row / region.height, row % region.height + down.border);
            let at = (channel * size + row) * size + across.border;
            bordered[at..at + region.width].copy_from_slice(values);
        }
        bordered
    }

    /// Returns width and height of the full resized image, truncated or rounded to whole pixels as in the references.
    fn new_sides(&self, (width, height): (usize, usize)) -> (usize, usize) {
        let side = self.resized();
        match self.resize_mode {
            ResizeMode::Squash => (side, side),
            ResizeMode::Crop => (width, height),
            // torchvision's `Resize`.
            ResizeMode::Shortest if width <= height => (side, side * height / width),
            ResizeMode::Shortest => (side * width / height, side),
            // timm's and open_clip's `ResizeKeepRatio`; at least one pixel is left on each side.
            ResizeMode::Longest { .. } => {
                let ratio = width.max(height) as f64 / side as f64;
                let shrunk =
                    |side: usize| (side as f64 / ratio).round_ties_even().max(1.0) as usize;
                (shrunk(width), shrunk(height))
            }
        }
    }

    /// Centers the crop or the border on an axis. Halves of a crop's margin are rounded to even, as in Python; an odd
    /// border is smaller before the image.
    fn axis(&self, resized: usize) -> Axis {
        let size = self.image_size;
        match resized.checked_sub(size) {
            Some(rest) => Axis {
                first: (rest as f64 / 2.0).round_ties_even() as usize,
                count: size,
                border: 0,
            },
            None => Axis {
                first: 0,
                count: resized,
                border: (size - resized) / 2,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::dataset::Dataset;
    use crate::data::loader::evaluation::evaluation_batch;
    use crate::data::spec::{Spec, Split};
    use crate::image::picture::golden;
    use crate::settings::Words;

    fn preprocessing(image_size: usize, crop_fraction: f64) -> Preprocessing {
        Preprocessing {
            crop_fraction,
            ..Preprocessing::new(image_size)
        }
    }

    fn choice<T: Copy>(words: &[(&str, T)], word: &str) -> T {
        let found = words.iter().find(|(known, _)| *known == word);
        found.expect("a known word").1
    }

    #[test]
    fn images_of_the_right_size_are_untouched_to_the_bit() {
        let spec = Spec::Synthetic {
            count: 5,
            image_size: 32,
        };
        let dataset = Dataset::open(&spec, Split::Test, 0).unwrap();
        let images = evaluation_batch(&dataset, &[3, 0], &preprocessing(32, 1.0)).unwrap();
        assert_eq!(images[..3072], dataset.picture(3).unwrap().to_planes());
        assert_eq!(images[3072..], dataset.picture(0).unwrap().to_planes());
    }

    #[test]
    fn bytes_equal_torchvisions_resize_and_center_crop() {
        let mut cases = 0;
        for (name, shape, expected) in golden::load("resize.safetensors") {
            let parts: Vec<&str> = name.split(' ').collect();
            let ["torchvision", interpolation, size, image_size, fraction] = parts[..] else {
                continue;
            };
            let found = Preprocessing {
                interpolation: choice(&Filter::pairs(), interpolation),
                ..preprocessing(image_size.parse().unwrap(), fraction.parse().unwrap())
            };
            assert_eq!(shape[0], found.image_size);
            assert_eq!(
                found.apply(&drawn(size)),
                bytes_to_planes(&expected),
                "{name}"
            );
            cases += 1;
        }
        assert_eq!(cases, 2);
    }

    /// The golden picture at a size such as `41x29`.
    fn drawn(size: &str) -> Picture {
        let (width, height) = size.split_once('x').unwrap();
        let (width, height) = (width.parse().unwrap(), height.parse().unwrap());
        Picture::bytes(width, height, golden::picture(width, height)).unwrap()
    }

    /// Recorded by `tests/golden/make_preprocessing.py` from timm; open_clip's rules through timm's classes.
    #[test]
    fn bytes_equal_timms_and_open_clips_transforms() {
        let cases = golden::load("preprocessing.safetensors");
        for (name, shape, expected) in &cases {
            let parts: Vec<&str> = name.split(' ').collect();
            let [mode, fill, interpolation, size, image_size, fraction] = parts[..] else {
                panic!("unexpected case `{name}`")
            };
            let fill: Vec<u8> = fill
                .split(',')
                .map(|color| color.parse().unwrap())
                .collect();
            let found = Preprocessing {
                resize_mode: match choice(&ResizeMode::pairs(), mode) {
                    ResizeMode::Longest { .. } => ResizeMode::Longest {
                        fill: fill.try_into().unwrap(),
                    },
                    other => other,
                },
                interpolation: choice(&Filter::pairs(), interpolation),
                ..preprocessing(image_size.parse().unwrap(), fraction.parse().unwrap())
            };
            assert_eq!(shape[0], found.image_size);
            assert_eq!(
                found.apply(&drawn(size)),
                bytes_to_planes(expected),
                "{name}"
            );
        }
        assert!(cases.len() > 30, "{}", cases.len());
    }

    #[test]
    fn sides_equal_torchvisions() {
        let sides = |side, old| preprocessing(side, 1.0).new_sides(old);
        assert_eq!(sides(256, (500, 375)), (341, 256));
        assert_eq!(sides(256, (375, 500)), (256, 341));
        assert_eq!(sides(2, (3, 1000)), (2, 666));
        assert_eq!(preprocessing(224, 0.875).resized(), 256);
    }

    /// 220 x 530 pixels become 112 x 269. Of the 78.5 excess rows on each side, torchvision crops 78 at the top.
    #[test]
    fn an_odd_margin_is_cropped_as_in_torchvision() {
        let row_of = |(width, height): (usize, usize)| {
            let found = preprocessing(112, 1.0);
            let (_, rows) = found.new_sides((width, height));
            found.axis(rows).first
        };
        assert_eq!(row_of((220, 530)), 78);
        // 112 x 271: 79.5 is rounded to 80.
        assert_eq!(row_of((220, 533)), 80);
        let whole = golden::picture(220, 530);
        let picture = Picture::bytes(220, 530, whole.clone()).unwrap();
        let all = Region::whole(112, 269);
        let resized = resize_bytes(&whole, (220, 530), (112, 269), &all, Filter::Bilinear);
        let middle = &resized[78 * 112 * 3..(78 + 112) * 112 * 3];
        assert_eq!(
            preprocessing(112, 1.0).apply(&picture),
            bytes_to_planes(middle)
        );
    }

    /// The full resized images would take 1.7e13 and 3.3e12 bytes.
    #[test]
    fn extreme_aspect_ratios_and_crops_take_no_more_memory_than_the_result() {
        let line = Picture::bytes(1, 65_000, golden::picture(1, 65_000)).unwrap();
        assert_eq!(preprocessing(224, 0.1).apply(&line).len(), 3 * 224 * 224);
        let longest = Preprocessing {
            resize_mode: ResizeMode::Longest { fill: [255, 0, 0] },
            ..preprocessing(4, 1.0)
        };
        let image = longest.apply(&line);
        assert_eq!(image.len(), 3 * 4 * 4);
        assert_eq!((image[0], image[16]), (1.0, 0.0));
        let tiny = preprocessing(16, 16.0 / (1 << 20) as f64);
        tiny.check().unwrap();
        assert_eq!(tiny.apply(&drawn("41x29")).len(), 3 * 16 * 16);
    }

    #[test]
    fn invalid_sizes_are_refused() {
        for (size, fraction, part) in [
            (
                0,
                1.0,
                "invalid image size 0: must be from 1 to 4096 pixels",
            ),
            (
                80_000_000,
                1.0,
                "invalid image size 80000000: must be from 1 to 4096 pixels",
            ),
            (224, 0.0, "invalid crop fraction 0: must be above 0"),
            (224, 1.5, "invalid crop fraction 1.5"),
            (224, f64::NAN, "invalid crop fraction NaN"),
            (224, 0.0001, "would resize images to 2240000 pixels"),
            (224, 1e-320, "would resize images to inf"),
        ] {
            let error = preprocessing(size, fraction).check().unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn preprocessing_reads_like_a_sentence_and_is_recorded_key_by_key() {
        let mut found = preprocessing(224, 0.875);
        let text = "resize the shorter side to 256 (bilinear), center crop 224";
        assert_eq!(found.describe(), text);
        found.resize_mode = ResizeMode::Longest { fill: [1, 2, 3] };
        let text =
            "resize the longer side to 256 (bilinear), center crop or pad to 224 with color 1,2,3";
        assert_eq!(found.describe(), text);
        let recorded = serde_json::json!({
            "image_size": 224, "resize_mode": "longest", "fill": [1, 2, 3],
            "crop_fraction": 0.875, "interpolation": "bilinear",
        });
        assert_eq!(serde_json::json!(found), recorded);
    }

    /// Columns 0 to 8 at their own size: a margin of 2.5 is rounded to 2, as in Python.
    #[test]
    fn the_center_crop_uses_pythons_rounding() {
        let pixels: Vec<u8> = (0..9 * 4)
            .flat_map(|place| [(place % 9) as u8; 3])
            .collect();
        let picture = Picture::bytes(9, 4, pixels).unwrap();
        let image = preprocessing(4, 1.0).apply(&picture);
        let first: Vec<u8> = image[..4]
            .iter()
            .map(|value| (value * 255.0) as u8)
            .collect();
        assert_eq!(first, [2, 3, 4, 5]);
    }

    #[test]
    fn floats_and_bytes_give_the_same_image_up_to_rounding() {
        let spec = Spec::Synthetic {
            count: 1,
            image_size: 48,
        };
        let dataset = Dataset::open(&spec, Split::Test, 0).unwrap();
        let bytes = dataset.picture(0).unwrap();
        let planes = Picture::planes(48, 48, bytes.to_planes()).unwrap();
        let (from_bytes, from_planes) = (
            preprocessing(20, 0.8).apply(&bytes),
            preprocessing(20, 0.8).apply(&planes),
        );
        assert_eq!(from_bytes.len(), 3 * 20 * 20);
        for (one, two) in from_bytes.iter().zip(from_planes) {
            // Two roundings to bytes.
            assert!((one - two).abs() < 1.1 / 255.0);
        }
    }
}
