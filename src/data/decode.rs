//! Image files to pictures, strictly: a damaged file is an error, never grey rows.
//!
//! JPEG, PNG and WebP, told apart by their first bytes and not by their names. Everything becomes
//! red, green and blue bytes: grey is repeated, 16 bits are rounded to 8, CMYK is converted, an
//! alpha channel is dropped as Pillow's `convert("RGB")` does. A JPEG that its EXIF data says is
//! turned or mirrored is set upright.
//! Differs from the reference: torchvision ignores the orientation; Pillow's JPEG decoder rounds
//! differently in the inverse transform and the chroma upsampling (by at most 7 of 255).

use std::io::Cursor;
use std::path::Path;

use image::{DynamicImage, ImageFormat, ImageReader};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use super::picture::Picture;
use crate::error::{Error, Result};
use crate::files;

/// Pictures above so many pixels are refused, as by Pillow: they are mistakes or attacks.
pub const MOST_PIXELS: usize = 178_956_970;

/// Reads a picture file.
///
/// Errors: what is wrong with the file, under its name.
pub fn read_picture(path: &Path) -> Result<Picture> {
    decode(&files::read(path)?).map_err(|error| error.context(format!("`{}`", path.display())))
}

/// Decodes the bytes of a picture file.
pub fn decode(bytes: &[u8]) -> Result<Picture> {
    decode_up_to(bytes, MOST_PIXELS)
}

fn decode_up_to(bytes: &[u8], most_pixels: usize) -> Result<Picture> {
    match bytes {
        [0xff, 0xd8, ..] => decode_jpeg(bytes, most_pixels),
        [0x89, b'P', b'N', b'G', ..] => decode_other(bytes, ImageFormat::Png, most_pixels),
        [
            b'R',
            b'I',
            b'F',
            b'F',
            _,
            _,
            _,
            _,
            b'W',
            b'E',
            b'B',
            b'P',
            ..,
        ] => decode_other(bytes, ImageFormat::WebP, most_pixels),
        _ => Err(not_a_picture(bytes)),
    }
}

/// Says what the bytes look like instead.
fn not_a_picture(bytes: &[u8]) -> Error {
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(512)]).to_lowercase();
    let start = start.trim_start_matches('\u{feff}').trim_start();
    let readable = "use JPEG, PNG or WebP files";
    let (what, hint) = match bytes {
        [] => ("the file is empty", "copy or download it again"),
        _ if start.starts_with("<!doctype html") || start.starts_with("<html") => (
            "this is an HTML page, not an image",
            "the download was answered with a web page; download the file again",
        ),
        _ if start.starts_with("<?xml") || start.starts_with("<svg") => {
            ("this is XML or SVG text, not an image of pixels", readable)
        }
        _ if start.starts_with("version https://git-lfs") => (
            "this is a Git LFS pointer, not the image itself",
            "run `git lfs pull`",
        ),
        [b'G', b'I', b'F', b'8', ..] => ("this is a GIF image, which is not supported", readable),
        [b'B', b'M', ..] => ("this is a BMP image, which is not supported", readable),
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => {
            ("this is a TIFF image, which is not supported", readable)
        }
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => (
            "this is an AVIF, HEIC or video file, which is not supported",
            readable,
        ),
        [0x1f, 0x8b, ..] | [b'P', b'K', 3, 4, ..] => (
            "this is a compressed archive, not an image",
            "unpack it first",
        ),
        _ if bytes.iter().all(|byte| *byte == 0) => (
            "the file holds only zeros",
            "it was not copied completely; copy it again",
        ),
        _ => ("this is no JPEG, PNG or WebP image", readable),
    };
    Error::input(what).hint(hint)
}

fn check_size(width: usize, height: usize, most_pixels: usize) -> Result<()> {
    if width.saturating_mul(height) > most_pixels {
        return Err(Error::input(format!(
            "{width} x {height} pixels are more than the {most_pixels} allowed"
        ))
        .hint("shrink the image or leave it out"));
    }
    Ok(())
}

fn decode_jpeg(bytes: &[u8], most_pixels: usize) -> Result<Picture> {
    let damaged = |error: zune_jpeg::errors::DecodeErrors| {
        Error::input(format!(
            "the JPEG data is damaged or cut short: {}",
            plain(&error)
        ))
        .hint("copy or download the file again, or leave it out")
    };
    if !has_end(bytes) {
        return Err(
            Error::input("the JPEG data is cut short: there is no end marker")
                .hint("copy or download the file again, or leave it out"),
        );
    }
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(damaged)?;
    let info = decoder
        .info()
        .ok_or_else(|| Error::input("the JPEG data has no header"))?;
    let (width, height) = (usize::from(info.width), usize::from(info.height));
    check_size(width, height, most_pixels)?;
    let pixels = decoder.decode().map_err(damaged)?;
    let orientation = decoder.exif().and_then(|exif| orientation(exif));
    let colors = pixels.len() / (width * height).max(1);
    let pixels = match colors {
        // Some grey files are given back with their one channel.
        1 => pixels.iter().flat_map(|value| [*value; 3]).collect(),
        _ => pixels,
    };
    upright(Picture::bytes(width, height, pixels)?, orientation)
}

/// Whether the segments of a JPEG lead to an end marker.
///
/// The decoder in strict mode still forgives a few bytes missing at the end, which it takes for
/// padding. A search for the marker would find that of a thumbnail, hence the walk.
fn has_end(bytes: &[u8]) -> bool {
    let mut at = 2;
    loop {
        // In compressed data a marker is 0xff and neither 0, which is a value, nor a restart.
        let Some(found) = bytes
            .get(at..)
            .and_then(|rest| rest.iter().position(|b| *b == 0xff))
        else {
            return false;
        };
        at += found + 1;
        match bytes.get(at..) {
            Some([0xd9, ..]) => return true,
            Some([0x00 | 0x01 | 0xd0..=0xd8, ..]) => at += 1,
            Some([0xff, ..]) => {}
            Some([_, high, low, ..]) => at += 1 + usize::from(u16::from_be_bytes([*high, *low])),
            _ => return false,
        }
    }
}

/// The decoder's message in our form.
fn plain(error: &zune_jpeg::errors::DecodeErrors) -> String {
    let text = format!("{error:?}");
    let text = text.trim_matches(|letter: char| letter == '"' || letter.is_whitespace());
    text.trim_end_matches('.').into()
}

fn decode_other(bytes: &[u8], format: ImageFormat, most_pixels: usize) -> Result<Picture> {
    let damaged = |error: image::ImageError| {
        Error::input(format!("the image data is damaged or cut short: {error}"))
            .hint("copy or download the file again, or leave it out")
    };
    let reader = || ImageReader::with_format(Cursor::new(bytes), format);
    let (width, height) = reader().into_dimensions().map_err(damaged)?;
    check_size(width as usize, height as usize, most_pixels)?;
    let mut reader = reader();
    // The number of pixels is checked above; four channels of 16 bits and as much again for work.
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(most_pixels as u64 * 16);
    reader.limits(limits);
    let image: DynamicImage = reader.decode().map_err(damaged)?;
    Picture::bytes(width as usize, height as usize, image.to_rgb8().into_raw())
}

/// The orientation tag (0x0112) of EXIF data, 1 to 8, if there is a sound one.
fn orientation(exif: &[u8]) -> Option<u16> {
    let tiff = exif.strip_prefix(b"Exif\0\0").unwrap_or(exif);
    let little = match tiff.get(..2)? {
        b"II" => true,
        b"MM" => false,
        _ => return None,
    };
    let short = |at: usize| -> Option<u16> {
        let pair: [u8; 2] = tiff.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(if little {
            u16::from_le_bytes(pair)
        } else {
            u16::from_be_bytes(pair)
        })
    };
    let long = |at: usize| -> Option<usize> {
        let (one, two) = (
            usize::from(short(at)?),
            usize::from(short(at.checked_add(2)?)?),
        );
        Some(if little {
            one | two << 16
        } else {
            one << 16 | two
        })
    };
    let directory = long(4)?;
    let entries = usize::from(short(directory)?);
    (0..entries)
        .map(|entry| directory + 2 + 12 * entry)
        .find(|at| short(*at) == Some(0x0112))
        .and_then(|at| short(at + 8))
        .filter(|value| (1..=8).contains(value))
}

/// Turns and mirrors a picture as its orientation asks.
fn upright(picture: Picture, orientation: Option<u16>) -> Result<Picture> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::picture::golden;

    /// Name, file, shape and pixels.
    type Jpeg = (String, Vec<u8>, Vec<usize>, Vec<u8>);

    fn jpegs() -> Vec<Jpeg> {
        let recorded = golden::load("jpeg.safetensors");
        let find = |name: &str| recorded.iter().find(|(found, _, _)| found == name).unwrap();
        let names = recorded
            .iter()
            .filter_map(|(name, _, _)| name.strip_suffix(" file"));
        names
            .map(|name| {
                let (_, _, file) = find(&format!("{name} file"));
                let (_, shape, pixels) = find(&format!("{name} pixels"));
                (name.into(), file.clone(), shape.clone(), pixels.clone())
            })
            .collect()
    }

    fn message(bytes: &[u8]) -> String {
        let error = decode(bytes).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    /// Pillow's decoder rounds differently; on smooth pictures by little.
    #[test]
    fn every_kind_of_jpeg_is_decoded_and_set_upright_as_by_pillow() {
        let jpegs = jpegs();
        assert_eq!(jpegs.len(), 12);
        for (name, file, shape, expected) in jpegs {
            let picture = decode(&file).unwrap();
            assert_eq!([picture.height(), picture.width(), 3], shape[..], "{name}");
            let bytes = picture.to_bytes();
            let apart = bytes.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b));
            let most = if name == "subsampled" { 12 } else { 3 };
            assert!(
                apart.clone().max() <= Some(most),
                "{name}: {:?}",
                apart.max()
            );
        }
    }

    #[test]
    fn a_jpeg_cut_short_anywhere_is_an_error() {
        for (name, file, _, _) in jpegs() {
            for length in 2..file.len() {
                assert!(
                    decode(&file[..length]).is_err(),
                    "{name} cut to {length} of {}",
                    file.len()
                );
            }
        }
    }

    #[test]
    fn no_damaged_byte_makes_the_decoder_panic() {
        for (_, file, _, _) in jpegs() {
            for place in 2..file.len() {
                let mut damaged = file.clone();
                damaged[place] ^= 0x55;
                // Some damage cannot be seen, such as another coefficient: any answer will do.
                let _ = decode_up_to(&damaged, 1_000_000);
            }
        }
    }

    fn encoded(image: DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn png_and_webp_of_every_kind_become_rgb_bytes() {
        let rgb = image::RgbImage::from_fn(3, 2, |x, y| image::Rgb([x as u8 * 9, y as u8 * 9, 7]));
        let rgb = DynamicImage::ImageRgb8(rgb);
        let expected = rgb.to_rgb8().into_raw();
        let kinds = [rgb.clone(), rgb.to_rgba8().into(), rgb.to_rgb16().into()];
        for image in kinds {
            let picture = decode(&encoded(image, ImageFormat::Png)).unwrap();
            assert_eq!((picture.width(), picture.height()), (3, 2));
            assert_eq!(picture.to_bytes(), expected);
        }
        let webp = encoded(rgb.clone(), ImageFormat::WebP);
        assert_eq!(decode(&webp).unwrap().to_bytes(), expected);
        let grey =
            DynamicImage::ImageLuma16(image::ImageBuffer::from_pixel(1, 1, image::Luma([0x8080])));
        assert_eq!(
            decode(&encoded(grey, ImageFormat::Png)).unwrap().to_bytes(),
            [128; 3]
        );

        let png = encoded(rgb, ImageFormat::Png);
        for length in 8..png.len() - 12 {
            assert!(message(&png[..length]).contains("damaged or cut short"));
        }
    }

    #[test]
    fn what_is_no_picture_is_called_by_its_name() {
        assert!(message(b"").contains("the file is empty"));
        assert!(message(b"<!DOCTYPE html><html>").contains("this is an HTML page, not an image"));
        assert!(message(b"\n <HTML lang=en>").contains("HTML page"));
        assert!(message(b"version https://git-lfs.github.com/spec/v1").contains("git lfs pull"));
        assert!(message(b"GIF89a").contains("GIF"));
        assert!(message(b"PK\x03\x04").contains("archive"));
        assert!(message(&[0; 100]).contains("only zeros"));
        assert!(message(b"hello").contains("no JPEG, PNG or WebP"));
    }

    #[test]
    fn a_picture_above_the_pixel_cap_is_refused_before_it_is_decoded() {
        let file = &jpegs()[0].1;
        let error = decode_up_to(file, 100).unwrap_err().to_string();
        assert!(
            error.contains("19 x 14 pixels are more than the 100 allowed"),
            "{error}"
        );
        let png = encoded(DynamicImage::new_rgb8(50, 3), ImageFormat::Png);
        let error = decode_up_to(&png, 100).unwrap_err().to_string();
        assert!(error.contains("50 x 3 pixels"), "{error}");
    }

    #[test]
    fn damaged_exif_data_is_no_orientation() {
        assert_eq!(orientation(b""), None);
        assert_eq!(orientation(b"II*\0\xff\xff\xff\xff"), None);
        let sound = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0";
        assert_eq!(orientation(sound), Some(6));
        assert_eq!(orientation(&sound[..18]), None);
    }
}
