//! A decoded image, or the part of it that is needed, before it is resized for a batch.
//!
//! Batches are plain `f32` in `[0, 1]`. [`crate::image::decode`] reads files.

pub use advxl_jpeg::Region;

use crate::error::{Error, Result};

/// The pixels of an image.
#[derive(Clone, Debug, PartialEq)]
pub enum Pixels {
    /// RGB bytes, interleaved: `[height, width, 3]`.
    Bytes(Vec<u8>),
    /// Floats in `[0, 1]`, planar: `[3, height, width]`.
    Planes(Vec<f32>),
}

/// Given the width and height of an image, returns the part that is needed. The rest need not be decoded.
pub type View<'a> = &'a dyn Fn(usize, usize) -> Cutout;

/// A part of an image, and the scale at which it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cutout {
    /// The part, in pixels of the image at full scale.
    pub region: Region,
    /// A JPEG may be decoded at 1 / `reduction` of its scale: 1, 2, 4 or 8. Other formats, and JPEGs with an
    /// orientation tag that rotates or mirrors them, are decoded at full scale.
    pub reduction: usize,
}

impl Cutout {
    /// Returns the whole image at full scale.
    pub fn whole(width: usize, height: usize) -> Self {
        Region::whole(width, height).into()
    }
}

/// A region at full scale.
impl From<Region> for Cutout {
    fn from(region: Region) -> Self {
        Self {
            region,
            reduction: 1,
        }
    }
}

/// A decoded image with three color channels. Only a region of it may be known.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    width: usize,
    height: usize,
    known: Region,
    pixels: Pixels,
    origin: Origin,
}

/// The size of an image before it was reduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// Not reduced: as large as in its file.
    Same,
    /// Decoded at 1 / `reduction` from a file of this size.
    Decoded {
        width: usize,
        height: usize,
        reduction: usize,
    },
    /// Resized when the data set was packed for training.
    Packed,
}

impl Picture {
    /// Makes an image of bytes.
    ///
    /// Shapes: `pixels` is `[height, width, 3]`.
    /// Errors: the number of values does not match the shape, or a side is zero.
    pub fn bytes(width: usize, height: usize, pixels: Vec<u8>) -> Result<Self> {
        check_count(width, height, pixels.len())?;
        let pixels = Pixels::Bytes(pixels);
        Ok(Self {
            width,
            height,
            known: Region::whole(width, height),
            pixels,
            origin: Origin::Same,
        })
    }

    /// Makes an image of floats.
    ///
    /// Shapes: `pixels` is `[3, height, width]`. Units: `[0, 1]`.
    /// Errors: the number of values does not match the shape, or a side is zero.
    pub fn planes(width: usize, height: usize, pixels: Vec<f32>) -> Result<Self> {
        check_count(width, height, pixels.len())?;
        let pixels = Pixels::Planes(pixels);
        Ok(Self {
            width,
            height,
            known: Region::whole(width, height),
            pixels,
            origin: Origin::Same,
        })
    }

    /// Makes an image with known bytes in one region only.
    ///
    /// Shapes: `pixels` is `[known.height, known.width, 3]`.
    /// Errors: the number of values does not match the region, or the region extends past the image.
    pub fn part(width: usize, height: usize, known: Region, pixels: Vec<u8>) -> Result<Self> {
        check_count(known.width, known.height, pixels.len())?;
        if known.left + known.width > width || known.top + known.height > height {
            let message = format!("{known:?} extends past an image of {width} x {height} pixels");
            return Err(Error::failed(message));
        }
        let pixels = Pixels::Bytes(pixels);
        Ok(Self {
            width,
            height,
            known,
            pixels,
            origin: Origin::Same,
        })
    }

    /// Like [`Self::part`], for an image of the given size decoded at 1 / `reduction`. `known` counts pixels at that
    /// scale.
    pub fn reduced(
        (width, height): (usize, usize),
        reduction: usize,
        known: Region,
        pixels: Vec<u8>,
    ) -> Result<Self> {
        let [columns, rows] = [width, height].map(|side| advxl_jpeg::reduced(side, reduction));
        let mut picture = Self::part(columns, rows, known, pixels)?;
        if reduction > 1 {
            picture.origin = Origin::Decoded {
                width,
                height,
                reduction,
            };
        }
        Ok(picture)
    }

    /// Marks the image as resized by `advxl data pack`.
    pub(crate) fn packed(mut self) -> Self {
        self.origin = Origin::Packed;
        self
    }

    /// Returns whether `advxl data pack` resized the image, so that its original size is unknown.
    pub fn is_packed(&self) -> bool {
        self.origin == Origin::Packed
    }

    /// Returns the width and height in the image's file, and the factor by which the decoder reduced both.
    pub fn full_scale(&self) -> ((usize, usize), usize) {
        match self.origin {
            Origin::Decoded {
                width,
                height,
                reduction,
            } => ((width, height), reduction),
            Origin::Same | Origin::Packed => ((self.width, self.height), 1),
        }
    }

    /// Returns the width of the whole image.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns the height of the whole image.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Returns the region whose pixels are known: the whole image, unless it was made by [`Self::part`] or
    /// [`Self::reduced`].
    pub fn known(&self) -> &Region {
        &self.known
    }

    /// Returns the pixels of the known region.
    pub fn pixels(&self) -> &Pixels {
        &self.pixels
    }

    /// Returns whether the pixels are bytes rather than floats.
    pub fn is_bytes(&self) -> bool {
        matches!(self.pixels, Pixels::Bytes(_))
    }

    /// Returns the known region as floats in `[0, 1]`, `[3, height, width]`. A byte `b` becomes `b / 255`.
    pub fn to_planes(&self) -> Vec<f32> {
        match &self.pixels {
            Pixels::Planes(planes) => planes.clone(),
            Pixels::Bytes(bytes) => bytes_to_planes(bytes),
        }
    }

    /// Returns the known region as bytes, `[height, width, 3]`, rounded to nearest.
    pub fn to_bytes(&self) -> Vec<u8> {
        match &self.pixels {
            Pixels::Bytes(bytes) => bytes.clone(),
            Pixels::Planes(planes) => planes_to_bytes(planes),
        }
    }
}

/// Converts `[height, width, 3]` bytes to `[3, height, width]` floats in `[0, 1]`.
pub fn bytes_to_planes(bytes: &[u8]) -> Vec<f32> {
    in_planes(bytes, |byte| f32::from(byte) / 255.0)
}

/// Converts `[height, width, 3]` bytes to `[3, height, width]`.
pub fn bytes_in_planes(bytes: &[u8]) -> Vec<u8> {
    in_planes(bytes, |byte| byte)
}

fn in_planes<T: Copy + Default>(bytes: &[u8], value_of: impl Fn(u8) -> T) -> Vec<T> {
    let area = bytes.len() / 3;
    let mut planes = vec![T::default(); bytes.len()];
    for channel in 0..3 {
        let plane = &mut planes[channel * area..][..area];
        for (value, pixel) in plane.iter_mut().zip(bytes.chunks_exact(3)) {
            *value = value_of(pixel[channel]);
        }
    }
    planes
}

/// Converts `[3, height, width]` floats in `[0, 1]` to `[height, width, 3]` bytes, rounded to nearest.
pub fn planes_to_bytes(planes: &[f32]) -> Vec<u8> {
    let area = planes.len() / 3;
    let mut bytes = vec![0; planes.len()];
    for channel in 0..3 {
        let plane = &planes[channel * area..][..area];
        for (pixel, value) in bytes.chunks_exact_mut(3).zip(plane) {
            pixel[channel] = to_byte(*value);
        }
    }
    bytes
}

/// Converts a value in `[0, 1]` to the nearest byte, and other values to 0 or 255. Unlike `round`, this vectorizes.
pub fn to_byte(value: f32) -> u8 {
    (value * 255.0 + 0.5) as u8
}

fn check_count(width: usize, height: usize, found: usize) -> Result<()> {
    if width == 0 || height == 0 || found != width * height * 3 {
        return Err(Error::failed(format!(
            "an image of {width} x {height} pixels needs {} values, got {found}",
            width * height * 3
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_the_round_trip_through_floats() {
        let bytes: Vec<u8> = (0..=255).chain(0..=255).chain(0..=255).collect();
        let picture = Picture::bytes(16, 16, bytes.clone()).unwrap();
        let planes = Picture::planes(16, 16, picture.to_planes()).unwrap();
        assert_eq!(planes.to_bytes(), bytes);
    }

    #[test]
    fn planes_hold_one_color_after_the_other() {
        let picture = Picture::bytes(2, 1, vec![255, 0, 51, 0, 255, 102]).unwrap();
        assert_eq!(picture.to_planes(), [1.0, 0.0, 0.0, 1.0, 0.2, 0.4]);
    }

    #[test]
    fn a_wrong_number_of_values_or_a_region_past_the_image_is_refused() {
        assert!(Picture::bytes(2, 2, vec![0; 11]).is_err());
        assert!(Picture::planes(0, 2, vec![]).is_err());
        let region = |left, top| Region {
            left,
            top,
            ..Region::whole(2, 3)
        };
        assert!(Picture::part(4, 4, region(2, 1), vec![0; 18]).is_ok());
        assert!(Picture::part(4, 4, region(2, 1), vec![0; 15]).is_err());
        assert!(Picture::part(4, 4, region(3, 1), vec![0; 18]).is_err());
        assert!(Picture::part(4, 4, region(2, 2), vec![0; 18]).is_err());
    }
}

/// Test images and the results recorded by `tests/golden/make_pictures.py`.
#[cfg(test)]
pub mod golden {
    use std::path::Path;

    use safetensors::tensor::SafeTensors;

    /// Draws the same image as the script: gradients, edges and noise.
    pub fn picture(width: usize, height: usize) -> Vec<u8> {
        let mut state: u64 = 12345;
        let mut bytes = Vec::new();
        for y in 0..height {
            for x in 0..width {
                for c in 0..3 {
                    state = (state * 1_103_515_245 + 12345) % (1 << 31);
                    bytes.push(match (x / 5 + y / 5) % 3 {
                        0 => (x * 5 + y * 3 + c * 40) as u8,
                        1 if (x / 4 + y / 3 + c) % 3 == 0 => 255,
                        1 => 0,
                        _ => (state >> 16) as u8,
                    });
                }
            }
        }
        bytes
    }

    /// Loads name, shape and bytes of every tensor of a file in `tests/golden`.
    pub fn load(file: &str) -> Vec<(String, Vec<usize>, Vec<u8>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let bytes = crate::files::read(&folder.join(file)).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = tensors.tensors().into_iter();
        tensors
            .map(|(name, tensor)| (name, tensor.shape().to_vec(), tensor.data().to_vec()))
            .collect()
    }
}
