//! One decoded picture, or the part of it that is needed, before it has the size of the training batch.
//!
//! Not for batches, which are plain `f32` in `[0, 1]`, nor for files, which [`crate::image::decode`] reads.

pub use advxl_jpeg::Region;

use crate::error::{Error, Result};

/// The pixels of a picture.
#[derive(Clone, Debug, PartialEq)]
pub enum Pixels {
    /// Bytes, red green blue, pixel after pixel: `[height, width, 3]`.
    Bytes(Vec<u8>),
    /// Floats in `[0, 1]`, plane after plane: `[3, height, width]`.
    Planes(Vec<f32>),
}

/// Which part of a picture of some width and height is needed: what lies outside need not be decoded.
pub type View<'a> = &'a dyn Fn(usize, usize) -> Cutout;

/// A part of a picture, and the scale that is enough for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cutout {
    /// The part, in pixels of the picture at full scale.
    pub region: Region,
    /// A JPEG may be decoded at 1 / `reduction` of its scale: 1, 2, 4 or 8. Other formats, and JPEGs that must be turned
    /// upright, are decoded at full scale.
    pub reduction: usize,
}

impl Cutout {
    /// All of a picture, at full scale.
    pub fn whole(width: usize, height: usize) -> Self {
        Region::whole(width, height).into()
    }
}

/// At full scale.
impl From<Region> for Cutout {
    fn from(region: Region) -> Self {
        Self {
            region,
            reduction: 1,
        }
    }
}

/// A decoded picture with three colour channels, of which perhaps only a region is known.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    width: usize,
    height: usize,
    known: Region,
    pixels: Pixels,
    origin: Origin,
}

/// What a picture was before it was made smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It is as large as its file says.
    Same,
    /// A file of these sides was decoded at 1 / `reduction`.
    Decoded {
        width: usize,
        height: usize,
        reduction: usize,
    },
    /// It was resized when a data set was packed for training.
    Packed,
}

impl Picture {
    /// A picture of bytes.
    ///
    /// Shapes: `pixels` is `[height, width, 3]`.
    /// Errors: when the number of values is not that of the shape, or a side is zero.
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

    /// A picture of floats.
    ///
    /// Shapes: `pixels` is `[3, height, width]`. Units: `[0, 1]`.
    /// Errors: when the number of values is not that of the shape, or a side is zero.
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

    /// The bytes of a region of a picture.
    ///
    /// Shapes: `pixels` is `[known.height, known.width, 3]`.
    /// Errors: when the number of values is not that of the region, or the region leaves the picture.
    pub fn part(width: usize, height: usize, known: Region, pixels: Vec<u8>) -> Result<Self> {
        check_count(known.width, known.height, pixels.len())?;
        if known.left + known.width > width || known.top + known.height > height {
            let message = format!("{known:?} leaves a picture of {width} x {height} pixels");
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

    /// As [`Self::part`], of a picture of other sides decoded at 1 / `reduction`: `known` counts pixels of that scale.
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

    /// The same picture, marked as resized by `advxl data pack`.
    pub(crate) fn packed(mut self) -> Self {
        self.origin = Origin::Packed;
        self
    }

    /// Whether it was resized by `advxl data pack`, so that its file's own size is lost.
    pub fn is_packed(&self) -> bool {
        self.origin == Origin::Packed
    }

    /// Columns and rows of the file that it was decoded from, and by how much the decoder reduced both.
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

    /// Columns of the whole picture.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows of the whole picture.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The region whose values are there; all of the picture unless it came from [`Self::part`].
    pub fn known(&self) -> &Region {
        &self.known
    }

    /// The values of the known region.
    pub fn pixels(&self) -> &Pixels {
        &self.pixels
    }

    /// Whether it is made of bytes, and not of floats.
    pub fn is_bytes(&self) -> bool {
        matches!(self.pixels, Pixels::Bytes(_))
    }

    /// The known region as floats in `[0, 1]`, `[3, height, width]`; a byte `b` becomes `b / 255`.
    pub fn to_planes(&self) -> Vec<f32> {
        match &self.pixels {
            Pixels::Planes(planes) => planes.clone(),
            Pixels::Bytes(bytes) => bytes_to_planes(bytes),
        }
    }

    /// The known region as bytes, `[height, width, 3]`, rounded to the nearest.
    pub fn to_bytes(&self) -> Vec<u8> {
        match &self.pixels {
            Pixels::Bytes(bytes) => bytes.clone(),
            Pixels::Planes(planes) => planes_to_bytes(planes),
        }
    }
}

/// `[height, width, 3]` bytes to `[3, height, width]` floats in `[0, 1]`.
pub fn bytes_to_planes(bytes: &[u8]) -> Vec<f32> {
    in_planes(bytes, |byte| f32::from(byte) / 255.0)
}

/// `[height, width, 3]` bytes to `[3, height, width]`.
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

/// `[3, height, width]` floats in `[0, 1]` to `[height, width, 3]` bytes, rounded to the nearest.
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

/// A value in `[0, 1]` as the nearest byte; others as 0 or 255. Several at a time, which `round` is not.
pub fn to_byte(value: f32) -> u8 {
    (value * 255.0 + 0.5) as u8
}

fn check_count(width: usize, height: usize, found: usize) -> Result<()> {
    if width == 0 || height == 0 || found != width * height * 3 {
        return Err(Error::failed(format!(
            "a picture of {width} x {height} pixels needs {} values, not {found}",
            width * height * 3
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_the_way_to_floats_and_back() {
        let bytes: Vec<u8> = (0..=255).chain(0..=255).chain(0..=255).collect();
        let picture = Picture::bytes(16, 16, bytes.clone()).unwrap();
        let planes = Picture::planes(16, 16, picture.to_planes()).unwrap();
        assert_eq!(planes.to_bytes(), bytes);
    }

    #[test]
    fn planes_hold_one_colour_after_the_other() {
        let picture = Picture::bytes(2, 1, vec![255, 0, 51, 0, 255, 102]).unwrap();
        assert_eq!(picture.to_planes(), [1.0, 0.0, 0.0, 1.0, 0.2, 0.4]);
    }

    #[test]
    fn a_wrong_number_of_values_is_refused() {
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

/// The pictures and recorded results of `tests/golden/make_pictures.py`.
#[cfg(test)]
pub mod golden {
    use std::path::Path;

    use safetensors::tensor::SafeTensors;

    /// The picture that the script draws: slopes, edges and noise.
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

    /// Name, shape and bytes of every tensor of a file in `tests/golden`.
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
