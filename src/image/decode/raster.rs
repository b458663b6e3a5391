//! Decodes PNG, WebP, BMP and TIFF with the crate `image`, and corrects what Pillow does differently.
//!
//! | case | Pillow, and this module |
//! |------|-------------------------|
//! | 16-bit color | the high byte |
//! | 16-bit gray | clipped at 255 |
//! | 16-bit BMP | five bits `v` become `v * 255 / 31`, without rounding |
//! | PNG with a wrong checksum or no end | decoded if the pixel data's own checksum (Adler) proves it complete |
//! | TIFF | set upright; palettes are supported |
//!
//! Tested against Pillow's bytes with the files made by `tests/golden/make_formats.py`.

use std::io::{Cursor, Read, copy, sink};

use image::error::UnsupportedErrorKind;
use image::{DynamicImage, ImageError, ImageFormat, ImageReader};

use super::outcome::{AGAIN, Examined, Outcome, check_size, damaged, unsupported, upright};
use crate::image::damage::{Fault, Reason};
use crate::image::exif::Tags;
use crate::image::picture::Picture;

type Result<T> = std::result::Result<T, Fault>;

/// Offset of the color type in a PNG header; 0 is grayscale.
const PNG_COLOR: usize = 25;
/// Offset of the bits per pixel in a BMP header.
const BMP_BITS: usize = 28;

pub(crate) fn decode(bytes: &[u8], format: ImageFormat, most_pixels: usize) -> Outcome {
    let mut odd = Vec::new();
    let (image, orientation) = match format {
        ImageFormat::Png => {
            let image = read(bytes, format, most_pixels).or_else(|fault| {
                let whole = whole_png(bytes, most_pixels).ok_or(fault)?;
                odd.push(Reason::Irregular);
                read(&whole, format, most_pixels)
            });
            (image?, None)
        }
        ImageFormat::Tiff => {
            let tags = Tags::of(bytes);
            if tags.as_ref().is_some_and(Tags::are_followed) {
                odd.push(Reason::Animated);
            }
            let orientation = tags.as_ref().and_then(Tags::orientation);
            (tiff(bytes, tags, most_pixels)?, orientation)
        }
        _ => (read(bytes, format, most_pixels)?, None),
    };
    let color = image.color();
    if color.has_alpha() {
        odd.push(Reason::Alpha);
    }
    if !color.has_color() {
        odd.push(Reason::Grey);
    }
    if color.bytes_per_pixel() / color.channel_count() > 1 {
        odd.push(Reason::SixteenBit);
    }
    // The flags in the extended header of a WebP; the second bit means animation.
    if format == ImageFormat::WebP && bytes.get(12..16) == Some(b"VP8X") && bytes[20] & 2 != 0 {
        odd.push(Reason::Animated);
    }
    if orientation.is_some_and(|orientation| orientation != 1) {
        odd.push(Reason::Rotated);
    }
    let (width, height) = (image.width() as usize, image.height() as usize);
    let clipped = format != ImageFormat::Png || bytes.get(PNG_COLOR) == Some(&0);
    let mut pixels = to_rgb(image, clipped)?;
    if format == ImageFormat::Bmp {
        truncate_few_bits(bytes, &mut pixels)?;
    }
    let picture = upright(Picture::bytes(width, height, pixels)?, orientation)?;
    Ok(Examined { picture, odd })
}

/// Returns whether the chunks of a WebP contain a frame larger than the image. The decoder allocates each frame by the
/// frame's own size, which nothing limits.
fn outgrown(mut chunks: &[u8], width: u32, height: u32) -> bool {
    while let Some((head, rest)) = chunks.split_first_chunk::<8>() {
        let [kind @ .., a, b, c, d] = head;
        let length = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
        let (content, after) = rest.split_at(length.min(rest.len()));
        let size = match (kind, content) {
            (b"VP8 ", [_, _, _, 0x9d, 1, 0x2a, a, b, c, d, ..]) => {
                let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
                (side(*a, *b), side(*c, *d))
            }
            (b"VP8L", [0x2f, a, b, c, d, ..]) => {
                let bits = u32::from_le_bytes([*a, *b, *c, *d]);
                (1 + (bits & 0x3fff), 1 + (bits >> 14 & 0x3fff))
            }
            // An animated frame holds chunks after its header.
            (b"ANMF", _) => {
                chunks = rest.get(16..).unwrap_or_default();
                continue;
            }
            _ => (0, 0),
        };
        if size.0 > width || size.1 > height {
            return true;
        }
        // Chunks start at even offsets.
        chunks = after.get(length % 2..).unwrap_or_default();
    }
    false
}

/// Checks the image size, then decodes.
fn read(bytes: &[u8], format: ImageFormat, most_pixels: usize) -> Result<DynamicImage> {
    let fault = |error| fault_of(error, bytes, format);
    if let (ImageFormat::Png, Some(size)) = (format, bytes.get(16..24)) {
        let side =
            |at: usize| u32::from_be_bytes([size[at], size[at + 1], size[at + 2], size[at + 3]]);
        check_size(side(0) as usize, side(4) as usize, most_pixels)?;
    }
    let reader = || ImageReader::with_format(Cursor::new(bytes), format);
    let (width, height) = reader().into_dimensions().map_err(fault)?;
    check_size(width as usize, height as usize, most_pixels)?;
    if format == ImageFormat::WebP && outgrown(&bytes[12..], width, height) {
        let message = "the image data is damaged: a frame is larger than the image";
        return Err(Fault::new(Reason::DamagedImage, message).hint(AGAIN));
    }
    let mut reader = reader();
    // The number of pixels is checked above. Four channels of 16 bits, and the same again as work space.
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(most_pixels as u64 * 16);
    reader.limits(limits);
    reader.decode().map_err(fault)
}

fn fault_of(error: ImageError, bytes: &[u8], format: ImageFormat) -> Fault {
    let name = match format {
        ImageFormat::Png => "PNG",
        ImageFormat::WebP => "WebP",
        ImageFormat::Bmp => "BMP",
        _ => "TIFF",
    };
    if let ImageError::Unsupported(unknown) = &error {
        let what = match unknown.kind() {
            UnsupportedErrorKind::GenericFeature(what) => what.clone(),
            UnsupportedErrorKind::Color(color) => format!("pixels of type {color:?}"),
            _ => error.to_string(),
        };
        return unsupported(name, &what);
    }
    let text = error.to_string();
    let short = text.contains("unexpected end")
        || text.contains("fill whole buffer")
        || ends_early(bytes, format);
    let reason = match short {
        true => Reason::TruncatedImage,
        false => Reason::DamagedImage,
    };
    let message = format!("the image data is damaged or truncated: {text}");
    Fault::new(reason, message).hint(AGAIN)
}

/// Returns whether a file ends too early: before a PNG's last chunk, or before a WebP's length.
fn ends_early(bytes: &[u8], format: ImageFormat) -> bool {
    match (format, bytes.get(4..8)) {
        (ImageFormat::Png, _) => !bytes.windows(4).any(|four| four == b"IEND"),
        (ImageFormat::WebP, Some(length)) => {
            let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
            (bytes.len() as u64) < u64::from(length) + 8
        }
        (_, length) => length.is_none(),
    }
}

/// Converts to RGB bytes like Pillow. With `clipped`, 16-bit gray is clipped rather than reduced to its high byte.
fn to_rgb(image: DynamicImage, clipped: bool) -> Result<Vec<u8>> {
    let high = |value: &u16| (value >> 8) as u8;
    let grey = |value: &u16| match clipped {
        true => (*value).min(255) as u8,
        false => high(value),
    };
    Ok(match image {
        DynamicImage::ImageLuma16(image) => {
            let values = image.as_raw().iter();
            values.flat_map(|value| [grey(value); 3]).collect()
        }
        DynamicImage::ImageLumaA16(image) => {
            let values = image.as_raw().as_chunks().0.iter();
            values.flat_map(|[value, _]| [grey(value); 3]).collect()
        }
        DynamicImage::ImageRgb16(image) => image.as_raw().iter().map(high).collect(),
        DynamicImage::ImageRgba16(image) => {
            let pixels = image.as_raw().as_chunks().0.iter();
            pixels
                .flat_map(|[r, g, b, _]| [high(r), high(g), high(b)])
                .collect()
        }
        DynamicImage::ImageRgb32F(_) | DynamicImage::ImageRgba32F(_) => {
            return Err(unsupported("TIFF", "float pixels"));
        }
        bytes => bytes.into_rgb8().into_raw(),
    })
}

/// Returns the PNG with corrected checksums of its data chunks and with an end chunk, if the data's own checksum proves
/// it complete. Other chunks are unchanged: nothing else could prove a palette correct.
fn whole_png(bytes: &[u8], most_pixels: usize) -> Option<Vec<u8>> {
    let (start, mut rest) = bytes.split_at_checked(8)?;
    let (mut whole, mut data, mut ended) = (start.to_vec(), Vec::new(), false);
    while let Some((length, behind)) = rest.split_first_chunk() {
        let length = u32::from_be_bytes(*length) as usize;
        let Some(chunk) = behind.get(..length.checked_add(4)?) else {
            break;
        };
        whole.extend(&rest[..4]);
        whole.extend(chunk);
        let behind = &behind[chunk.len()..];
        match chunk.strip_prefix(b"IDAT") {
            Some(part) => {
                data.extend_from_slice(part);
                let mut checksum = flate2::Crc::new();
                checksum.update(chunk);
                whole.extend(checksum.sum().to_be_bytes());
            }
            None => whole.extend(behind.get(..4)?),
        }
        ended |= chunk.starts_with(b"IEND");
        rest = behind.get(4..).unwrap_or_default();
    }
    if !ended {
        whole.extend(b"\0\0\0\0IEND\xae\x42\x60\x82");
    }
    // Four channels of 16 bits, and one byte per line.
    let most = most_pixels as u64 * 9;
    let mut pixels = flate2::read::ZlibDecoder::new(&data[..]).take(most);
    copy(&mut pixels, &mut sink()).ok()?;
    (pixels.limit() > 0).then_some(whole)
}

const PHOTOMETRIC: u16 = 262;
const BITS: u16 = 258;
const COLOR_MAP: u16 = 320;
const EXTRA_SAMPLES: u16 = 338;

/// Decodes a TIFF. Palette images, which the crate does not support, are decoded as grayscale and then looked up.
fn tiff(bytes: &[u8], tags: Option<Tags>, most_pixels: usize) -> Result<DynamicImage> {
    let value = |tag| tags.as_ref().and_then(|tags| tags.value(tag));
    if value(EXTRA_SAMPLES) == Some(1) {
        return Err(unsupported("TIFF", "premultiplied alpha"));
    }
    let palette = (value(PHOTOMETRIC), value(BITS)) == (Some(3), Some(8));
    let Some(tags) = tags.filter(|_| palette) else {
        return read(bytes, ImageFormat::Tiff, most_pixels);
    };
    let colors = tags.values(COLOR_MAP, 3 * 256);
    let colors = colors.ok_or_else(|| damaged("TIFF", "missing palette"))?;
    let grey = tags.with(PHOTOMETRIC, 1).unwrap_or_default();
    let indices = read(&grey, ImageFormat::Tiff, most_pixels)?.into_luma8();
    let color = |index: usize, channel: usize| (colors[256 * channel + index] >> 8) as u8;
    let image = image::RgbImage::from_fn(indices.width(), indices.height(), |x, y| {
        let index = usize::from(indices.get_pixel(x, y).0[0]);
        image::Rgb([0, 1, 2].map(|channel| color(index, channel)))
    });
    Ok(image.into())
}

/// Truncates the values of a 16-bit BMP as Pillow does; the crate rounds them.
fn truncate_few_bits(bytes: &[u8], pixels: &mut [u8]) -> Result<()> {
    let long = |at: usize| {
        let four = bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes([four[0], four[1], four[2], four[3]]))
    };
    // The oldest header is shorter and does not support 16 bits.
    if long(14) == Some(12) || bytes.get(BMP_BITS..BMP_BITS + 2) != Some(&[16, 0]) {
        return Ok(());
    }
    let by_masks = long(30) == Some(3);
    let green = match [long(54), long(58), long(62)] {
        _ if !by_masks => 31,
        [Some(0x7c00), Some(0x3e0), Some(0x1f)] => 31,
        [Some(0xf800), Some(0x7e0), Some(0x1f)] => 63,
        _ => return Err(unsupported("BMP", "unusual color masks")),
    };
    let truncated = |value: u8, most: u32| {
        let bits = (u32::from(value) * most + 127) / 255;
        (bits * 255 / most) as u8
    };
    for [red, g, blue] in pixels.as_chunks_mut().0 {
        (*red, *g, *blue) = (
            truncated(*red, 31),
            truncated(*g, green),
            truncated(*blue, 31),
        );
    }
    Ok(())
}
