//! The result of a decoder: an image and its oddities, or why the file cannot be used.

use crate::error::Result;
use crate::image::damage::{Fault, Reason};
use crate::image::picture::Picture;

/// An image, and the oddities of its file.
#[derive(Clone, Debug)]
pub struct Examined {
    /// The image.
    pub picture: Picture,
    /// Oddities that did not prevent using the image.
    pub odd: Vec<Reason>,
}

/// Supported formats. Append new ones at the end: index files store the position in this list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// JPEG.
    #[default]
    Jpeg,
    /// PNG.
    Png,
    /// WebP.
    Webp,
    /// Windows bitmaps.
    Bmp,
    /// TIFF.
    Tiff,
    /// PBM, PGM and PPM.
    Pnm,
    /// GIF.
    Gif,
}

impl Format {
    /// Lowercase file extensions of images: those that torchvision's ImageFolder accepts, their synonyms, and GIF.
    pub const EXTENSIONS: [(&str, Self); 14] = [
        ("jpg", Self::Jpeg),
        ("jpeg", Self::Jpeg),
        ("jpe", Self::Jpeg),
        ("jfif", Self::Jpeg),
        ("png", Self::Png),
        ("webp", Self::Webp),
        ("bmp", Self::Bmp),
        ("tif", Self::Tiff),
        ("tiff", Self::Tiff),
        ("ppm", Self::Pnm),
        ("pgm", Self::Pnm),
        ("pbm", Self::Pnm),
        ("pnm", Self::Pnm),
        ("gif", Self::Gif),
    ];

    /// Returns the format at a position in the enumeration.
    pub fn numbered(number: u8) -> Option<Self> {
        let mut all = Self::EXTENSIONS.iter().map(|(_, format)| *format);
        all.find(|format| *format as u8 == number)
    }

    /// Returns the format of a lowercase extension.
    pub fn of_extension(end: &str) -> Option<Self> {
        let mut known = Self::EXTENSIONS.iter();
        known.find(|(known, _)| *known == end).map(|known| known.1)
    }

    /// Returns the extensions of files that are treated as images, such as `.jpg`.
    pub fn extensions() -> Vec<String> {
        let known = Self::EXTENSIONS.iter();
        known.map(|(end, _)| format!(".{end}")).collect()
    }

    /// Detects the format from the first bytes.
    pub fn of_bytes(bytes: &[u8]) -> Option<Self> {
        Some(match bytes {
            [0xff, 0xd8, ..] => Self::Jpeg,
            [0x89, b'P', b'N', b'G', ..] => Self::Png,
            _ if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") => Self::Webp,
            // Text may begin with these letters too. In a BMP the length of a second header, below 256, follows the
            // first.
            [b'B', b'M', ..] if matches!(bytes.get(14..18), Some([12..=255, 0, 0, 0])) => Self::Bmp,
            [b'I', b'I', 42 | 43, 0, ..] | [b'M', b'M', 0, 42 | 43, ..] => Self::Tiff,
            [b'P', b'1'..=b'6', b'#' | b' ' | b'\t'..=b'\r', ..] => Self::Pnm,
            _ if bytes.starts_with(b"GIF87a") || bytes.starts_with(b"GIF89a") => Self::Gif,
            _ => return None,
        })
    }
}

pub(crate) type Outcome = std::result::Result<Examined, Fault>;

/// Images with more pixels are rejected, as by Pillow: they are mistakes or attacks.
pub const MOST_PIXELS: usize = 178_956_970;

/// Reports a file that violates its format.
pub(crate) fn damaged(format: &str, what: &str) -> Fault {
    let message = format!("the {format} data is damaged: {what}");
    Fault::new(Reason::DamagedImage, message).hint(AGAIN)
}

/// Reports a valid file of an unsupported kind.
pub(crate) fn unsupported(format: &str, what: &str) -> Fault {
    let message = format!("this kind of {format} is not supported: {what}");
    Fault::new(Reason::UnsupportedImage, message)
        .hint("convert it to a standard JPEG or PNG, or remove it")
}

/// Makes the outcome for an image that is known whole.
pub(crate) fn single(width: usize, height: usize, pixels: Vec<u8>, odd: Vec<Reason>) -> Outcome {
    let picture = Picture::bytes(width, height, pixels)?;
    Ok(Examined { picture, odd })
}

pub(crate) fn check_size(
    width: usize,
    height: usize,
    most_pixels: usize,
) -> std::result::Result<(), Fault> {
    if width == 0 || height == 0 {
        let message = format!("the image size is {width} x {height} pixels");
        return Err(Fault::new(Reason::ZeroSize, message).hint("remove the image"));
    }
    if width.saturating_mul(height) > most_pixels {
        let message = format!("{width} x {height} pixels exceed the limit of {most_pixels}");
        return Err(
            Fault::new(Reason::TooManyPixels, message).hint("shrink the image or remove it")
        );
    }
    Ok(())
}

pub(crate) const AGAIN: &str = "copy or download the file again, or remove it";

/// Rotates and mirrors an image according to its EXIF orientation.
pub(crate) fn upright(picture: Picture, orientation: Option<u16>) -> Result<Picture> {
    let orientation = match orientation {
        None | Some(1) => return Ok(picture),
        Some(orientation) => orientation,
    };
    let (width, height) = (picture.width(), picture.height());
    let bytes = picture.to_bytes();
    let turned = orientation >= 5;
    let (new_width, new_height) = if turned {
        (height, width)
    } else {
        (width, height)
    };
    let mut result = Vec::with_capacity(bytes.len());
    for y in 0..new_height {
        for x in 0..new_width {
            let (old_x, old_y) = match orientation {
                2 => (width - 1 - x, y),
                3 => (width - 1 - x, height - 1 - y),
                4 => (x, height - 1 - y),
                5 => (y, x),
                6 => (y, height - 1 - x),
                7 => (width - 1 - y, height - 1 - x),
                _ => (width - 1 - y, x),
            };
            result.extend(&bytes[(old_y * width + old_x) * 3..][..3]);
        }
    }
    Picture::bytes(new_width, new_height, result)
}
