//! The unchanging pictures of an evaluation: resized, cut to the middle, nothing random.
//!
//! Source: torchvision's `Resize` and `CenterCrop` on Pillow images, as RobustBench and timm use
//! them; for pictures of bytes equal to them to the bit.
//! Differs from the reference: pictures of floats (`tensors:`) are resized in floats.

use rayon::prelude::*;

use super::picture::{Picture, Pixels, bytes_to_planes};
use super::resize::{Crop, Filter, resize_bytes, resize_planes};
use super::{Dataset, Part};
use crate::error::{Context, Result};
use crate::settings::Table;

/// How a picture is brought to the size of the model.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct EvaluationTransform {
    /// Side of the result in pixels.
    pub image_size: usize,
    /// Share of the resized picture's shorter side that is kept: 1 keeps all of it. In (0, 1].
    pub crop_fraction: f64,
    /// How pixels are interpolated.
    pub interpolation: Filter,
}

impl EvaluationTransform {
    /// Reads a table such as
    /// `{ image_size = 224, crop_fraction = 0.875, interpolation = "bicubic" }`.
    pub fn read(table: &Table) -> Option<Self> {
        let image_size = table.required_where("image_size", "1 to 4096 pixels", |size: &usize| {
            (1..=4096).contains(size)
        });
        let crop_fraction =
            table.required_where("crop_fraction", "above 0 and up to 1", |fraction: &f64| {
                *fraction > 0.0 && *fraction <= 1.0
            });
        let filters = [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic)];
        let interpolation = table.choice("interpolation", &filters);
        Some(Self {
            image_size: image_size?,
            crop_fraction: crop_fraction?,
            interpolation: interpolation?,
        })
    }

    /// Resizes the shorter side to `floor(image_size / crop_fraction)` and keeps the middle.
    ///
    /// Shapes: the result is `[3, image_size, image_size]`. Units: `[0, 1]`.
    /// A picture that has its size already is not touched.
    pub fn apply(&self, picture: &Picture) -> Vec<f32> {
        let shorter =
            ((self.image_size as f64 / self.crop_fraction).floor() as usize).max(self.image_size);
        let (width, height) = resized(picture.width(), picture.height(), shorter);
        match picture.pixels() {
            Pixels::Bytes(bytes) => {
                let old = (picture.width(), picture.height());
                let bytes = resize_bytes(bytes, old, (width, height), self.interpolation);
                bytes_to_planes(&self.middle(&bytes, width, height, 3))
            }
            Pixels::Planes(_) => {
                let whole = Crop::whole(picture.width(), picture.height());
                let planes = resize_planes(picture, &whole, (width, height), self.interpolation);
                planes
                    .chunks_exact(width * height)
                    .flat_map(|plane| self.middle(plane, width, height, 1))
                    .collect()
            }
        }
    }

    /// Cuts `[height, width, channels]` to the middle; halves are rounded to the even, as in Python.
    fn middle<T: Copy>(
        &self,
        values: &[T],
        width: usize,
        height: usize,
        channels: usize,
    ) -> Vec<T> {
        let margin = |size: usize| ((size - self.image_size) as f64 / 2.0).round_ties_even();
        let (left, top) = (margin(width) as usize, margin(height) as usize);
        let rows = values.chunks_exact(width * channels);
        rows.skip(top)
            .take(self.image_size)
            .flat_map(|row| &row[left * channels..][..self.image_size * channels])
            .copied()
            .collect()
    }
}

/// The shorter side becomes `shorter`, the longer is cut to whole pixels.
fn resized(width: usize, height: usize, shorter: usize) -> (usize, usize) {
    if width <= height {
        (shorter, shorter * height / width)
    } else {
        (shorter * width / height, shorter)
    }
}

/// Pictures that stores are asked for at a time.
const TOGETHER: usize = 256;

/// The images of an evaluation batch.
///
/// Shapes: `[indices, 3, image_size, image_size]`. Units: `[0, 1]`.
/// Errors: the first picture that cannot be read, named; an evaluation never leaves one out.
pub fn evaluation_batch(
    dataset: &Dataset,
    indices: &[usize],
    transform: &EvaluationTransform,
) -> Result<Vec<f32>> {
    let len = 3 * transform.image_size * transform.image_size;
    let mut images = vec![0.0; indices.len() * len];
    for (images, indices) in images
        .chunks_mut(TOGETHER * len)
        .zip(indices.chunks(TOGETHER))
    {
        for index in indices {
            dataset.ask(*index, Part::Picture);
        }
        let results: Vec<Result<()>> = images
            .par_chunks_exact_mut(len)
            .zip(indices)
            .map(|(image, index)| {
                let picture = dataset
                    .picture(*index)
                    .context(|| format!("picture {index} of the evaluation"))?;
                image.copy_from_slice(&transform.apply(&picture));
                Ok(())
            })
            .collect();
        results.into_iter().collect::<Result<()>>()?;
    }
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::picture::golden;
    use crate::data::{Spec, Split};

    fn transform(image_size: usize, crop_fraction: f64) -> EvaluationTransform {
        EvaluationTransform {
            image_size,
            crop_fraction,
            interpolation: Filter::Bilinear,
        }
    }

    #[test]
    fn pictures_of_the_right_size_are_untouched_to_the_bit() {
        let spec = Spec::Synthetic {
            count: 5,
            image_size: 32,
        };
        let dataset = Dataset::open(&spec, Split::Test, 0).unwrap();
        let images = evaluation_batch(&dataset, &[3, 0], &transform(32, 1.0)).unwrap();
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
            let (width, height) = size.split_once('x').unwrap();
            let (width, height) = (width.parse().unwrap(), height.parse().unwrap());
            let picture = Picture::bytes(width, height, golden::picture(width, height)).unwrap();
            let transform = EvaluationTransform {
                image_size: image_size.parse().unwrap(),
                crop_fraction: fraction.parse().unwrap(),
                interpolation: match interpolation {
                    "bilinear" => Filter::Bilinear,
                    _ => Filter::Bicubic,
                },
            };
            assert_eq!(shape[0], transform.image_size);
            assert_eq!(
                transform.apply(&picture),
                bytes_to_planes(&expected),
                "{name}"
            );
            cases += 1;
        }
        assert_eq!(cases, 2);
    }

    #[test]
    fn sides_are_those_of_torchvision() {
        assert_eq!(resized(500, 375, 256), (341, 256));
        assert_eq!(resized(375, 500, 256), (256, 341));
        assert_eq!(resized(3, 1000, 2), (2, 666));
        // floor(224 / 0.875) = 256.
        assert_eq!((224.0_f64 / 0.875).floor(), 256.0);
    }

    /// Columns 0 to 8 at the same size: margins of 2.5 are rounded to 2, as Python does.
    #[test]
    fn the_middle_is_cut_with_pythons_rounding() {
        let pixels: Vec<u8> = (0..9 * 4)
            .flat_map(|place| [(place % 9) as u8; 3])
            .collect();
        let picture = Picture::bytes(9, 4, pixels).unwrap();
        let image = transform(4, 1.0).apply(&picture);
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
            transform(20, 0.8).apply(&bytes),
            transform(20, 0.8).apply(&planes),
        );
        assert_eq!(from_bytes.len(), 3 * 20 * 20);
        for (one, two) in from_bytes.iter().zip(from_planes) {
            // Two roundings to bytes.
            assert!((one - two).abs() < 1.1 / 255.0);
        }
    }

    #[test]
    fn settings_are_read_as_they_are_written() {
        let read = |text: &str| crate::settings::read(text, &[], EvaluationTransform::read);
        let written = toml::to_string(&transform(224, 0.875)).unwrap();
        assert_eq!(read(&written).unwrap(), transform(224, 0.875));
        let faults = read("image_size = 224\ncrop_fraction = 0\ninterpolation = \"bicubik\"");
        let faults = faults.unwrap_err();
        assert!(
            faults[0]
                .to_string()
                .contains("crop_fraction = 0 must be above 0")
        );
        assert_eq!(faults[1].hint.as_deref(), Some("did you mean `bicubic`?"));
    }
}
