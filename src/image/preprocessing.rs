//! The unchanging pictures of an evaluation: resized and cut to the size of a model, nothing random.
//!
//! Source: torchvision's `Resize` and `CenterCrop`, timm's `transforms_imagenet_eval` and open_clip's
//! `image_transform` on Pillow images; for pictures of bytes equal to them to the bit.
//! Differs from the reference: pictures of floats (`tensors:`) are resized in floats.

use serde::Serialize;

use super::picture::{Picture, Pixels, Region, bytes_to_planes};
use super::resize::{Crop, Filter, resize_bytes, resize_planes_part};
use crate::error::{Error, Result};
use crate::settings::words;

/// How a picture of any size becomes a square of the size of a model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Preprocessing {
    /// Side of the result in pixels.
    pub image_size: usize,
    /// What the size of the result is for the sides of the picture.
    #[serde(flatten)]
    pub resize_mode: ResizeMode,
    /// Share of the resized picture's side that is kept: 1 keeps all of it. In (0, 1].
    pub crop_fraction: f64,
    /// How pixels are interpolated.
    pub interpolation: Filter,
}

/// Which sides of a picture are resized to `image_size / crop_fraction`. The words are open_clip's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "resize_mode", rename_all = "lowercase")]
pub enum ResizeMode {
    /// The shorter one; what is too long of the other is cut off. timm's `center`.
    Shortest,
    /// The longer one; borders fill the other up. timm's `border`.
    Longest {
        /// Red, green and blue of the borders.
        fill: [u8; 3],
    },
    /// Both, whatever becomes of the proportions.
    Squash,
}

// The words are open_clip's; its borders are black.
words!(for ResizeMode:
    "shortest" => Self::Shortest, "Resize the shortest side and crop the rest.";
    "longest" => Self::Longest { fill: [0; 3] }, "Resize the longest side and pad the other.";
    "squash" => Self::Squash, "Resize both sides, whatever the aspect ratio.";
);

/// The largest side of images and of what they are resized to before they are cut: far beyond any model, and small
/// enough that no product of sizes overflows.
pub const MAX_IMAGE_SIZE: usize = 4096;

const MAX_RESIZED: usize = 1 << 20;

/// Where the pixels of a result come from along one axis.
struct Axis {
    /// The first position of it that is kept, and how many are.
    first: usize,
    count: usize,
    /// Border before it.
    border: usize,
}

impl Preprocessing {
    /// The shorter side to the image size by bilinear interpolation, then the middle: how training evaluates.
    pub fn new(image_size: usize) -> Self {
        Self {
            image_size,
            resize_mode: ResizeMode::Shortest,
            crop_fraction: 1.0,
            interpolation: Filter::Bilinear,
        }
    }

    /// Numbers of one image.
    pub fn numbers(&self) -> usize {
        3 * self.image_size * self.image_size
    }

    /// An error where a size is out of any use.
    pub fn check(&self) -> Result<()> {
        let size = self.image_size;
        if !(1..=MAX_IMAGE_SIZE).contains(&size) {
            let message =
                format!("an image size of {size} pixels is not one from 1 to {MAX_IMAGE_SIZE}");
            return Err(Error::input(message).hint("give the size that the model was trained at"));
        }
        let fraction = self.crop_fraction;
        if !(fraction > 0.0 && fraction <= 1.0) {
            let message = format!("a crop fraction of {fraction} is not above 0 and at most 1");
            return Err(Error::input(message).hint("ImageNet's is often 0.875"));
        }
        let resized = size as f64 / fraction;
        if resized > MAX_RESIZED as f64 {
            let message = format!(
                "a crop fraction of {fraction} resizes pictures to {resized:.0} pixels before cutting {size} from \
                 them, and {MAX_RESIZED} are the most"
            );
            return Err(Error::input(message).hint("ImageNet's is often 0.875"));
        }
        Ok(())
    }

    /// What sides are resized to: as timm rounds it.
    fn resized(&self) -> usize {
        ((self.image_size as f64 / self.crop_fraction).floor() as usize).max(self.image_size)
    }

    /// In words, such as ``resize the shorter side to 256 (bicubic), center crop 224``.
    pub fn describe(&self) -> String {
        let (size, resized) = (self.image_size, self.resized());
        let filter = self.interpolation.word();
        match self.resize_mode {
            ResizeMode::Shortest => {
                format!("resize the shorter side to {resized} ({filter}), center crop {size}")
            }
            ResizeMode::Squash if resized == size => {
                format!("resize to {size} x {size} ({filter}), whatever the proportions")
            }
            ResizeMode::Squash => format!(
                "resize to {resized} x {resized} ({filter}), whatever the proportions, center crop {size}"
            ),
            ResizeMode::Longest { fill: [r, g, b] } => format!(
                "resize the longer side to {resized} ({filter}), center crop or pad to {size} with color {r},{g},{b}"
            ),
        }
    }

    /// Resizes and cuts a picture.
    ///
    /// Shapes: the result is `[3, image_size, image_size]`. Units: `[0, 1]`.
    /// A picture that has its size already is not touched, unless a crop fraction enlarges it.
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
            ResizeMode::Shortest | ResizeMode::Squash => [0; 3],
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

    /// Width and height of the whole resized picture, cut or rounded to whole pixels as the references do it.
    fn new_sides(&self, (width, height): (usize, usize)) -> (usize, usize) {
        let side = self.resized();
        match self.resize_mode {
            ResizeMode::Squash => (side, side),
            // torchvision's `Resize`.
            ResizeMode::Shortest if width <= height => (side, side * height / width),
            ResizeMode::Shortest => (side * width / height, side),
            // timm's and open_clip's `ResizeKeepRatio`; of a line of pixels at least one is left.
            ResizeMode::Longest { .. } => {
                let ratio = width.max(height) as f64 / side as f64;
                let shrunk =
                    |side: usize| (side as f64 / ratio).round_ties_even().max(1.0) as usize;
                (shrunk(width), shrunk(height))
            }
        }
    }

    /// The middle of an axis; halves are rounded to the even, as in Python, and borders are the smaller before it.
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
    fn pictures_of_the_right_size_are_untouched_to_the_bit() {
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

    /// A picture of golden's of a size such as `41x29`.
    fn drawn(size: &str) -> Picture {
        let (width, height) = size.split_once('x').unwrap();
        let (width, height) = (width.parse().unwrap(), height.parse().unwrap());
        Picture::bytes(width, height, golden::picture(width, height)).unwrap()
    }

    /// `tests/golden/make_preprocessing.py` asked timm, and open_clip's rules by timm's classes.
    #[test]
    fn bytes_equal_those_of_timms_and_open_clips_transforms() {
        let cases = golden::load("preprocessing.safetensors");
        for (name, shape, expected) in &cases {
            let parts: Vec<&str> = name.split(' ').collect();
            let [mode, fill, interpolation, size, image_size, fraction] = parts[..] else {
                panic!("{name} is no case")
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
    fn sides_are_those_of_torchvision() {
        let sides = |side, old| preprocessing(side, 1.0).new_sides(old);
        assert_eq!(sides(256, (500, 375)), (341, 256));
        assert_eq!(sides(256, (375, 500)), (256, 341));
        assert_eq!(sides(2, (3, 1000)), (2, 666));
        assert_eq!(preprocessing(224, 0.875).resized(), 256);
    }

    /// 220 x 530 pixels become 112 x 269; of the 78.5 rows too many on each side torchvision cuts 78 off above.
    #[test]
    fn an_odd_remainder_is_cut_as_torchvision_cuts_it() {
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

    /// The whole resized pictures would have 1.7e13 and 3.3e12 bytes.
    #[test]
    fn extreme_proportions_and_crops_take_no_more_memory_than_the_result() {
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
    fn sizes_of_no_use_are_refused() {
        for (size, fraction, part) in [
            (0, 1.0, "an image size of 0 pixels"),
            (80_000_000, 1.0, "an image size of 80000000 pixels"),
            (224, 0.0, "a crop fraction of 0 is not above 0"),
            (224, 1.5, "a crop fraction of 1.5 is not"),
            (224, f64::NAN, "a crop fraction of NaN"),
            (224, 0.0001, "resizes pictures to 2240000 pixels"),
            (224, 1e-320, "resizes pictures to inf"),
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

    /// Columns 0 to 8 at the same size: margins of 2.5 are rounded to 2, as Python does.
    #[test]
    fn the_middle_is_cut_with_pythons_rounding() {
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
    fn floats_and_bytes_give_the_same_picture_up_to_rounding() {
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
