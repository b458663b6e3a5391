//! Image files to pictures, strictly: a damaged file is an error, never grey rows.
//!
//! JPEG, PNG and WebP, told apart by their first bytes and not by their names. Everything becomes
//! red, green and blue bytes: grey is repeated, 16 bits are rounded to 8, CMYK is converted, an
//! alpha channel is dropped as Pillow's `convert("RGB")` does. A JPEG that its EXIF data says is
//! turned or mirrored is set upright. Of a JPEG only the region that is asked for becomes pixels.
//! [`super::jpeg`] decodes the common JPEGs to Pillow's bytes; the rare ones, CMYK above all, go to zune-jpeg.
//! Differs from the reference: torchvision ignores the orientation; zune-jpeg rounds differently in
//! the inverse transform and the chroma upsampling.

use std::io::Cursor;

use image::{DynamicImage, ImageFormat, ImageReader};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use super::health::{Fault, Reason};
use super::jpeg::{Damage, Jpeg, find_ff};
use super::picture::{Picture, Region, View};
use crate::error::Result;

/// A picture, and what was odd about its file.
#[derive(Clone, Debug)]
pub struct Examined {
    /// The picture.
    pub picture: Picture,
    /// Oddities, none of which kept it from being used.
    pub odd: Vec<Reason>,
}

/// The formats that are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `.jpg`, `.jpeg`.
    #[default]
    Jpeg,
    /// `.png`.
    Png,
    /// `.webp`.
    Webp,
}

const EXTENSIONS: [(&str, Format); 4] = [
    ("jpg", Format::Jpeg),
    ("jpeg", Format::Jpeg),
    ("png", Format::Png),
    ("webp", Format::Webp),
];

impl Format {
    /// By the end of a name, in lower case.
    pub fn of_extension(end: &str) -> Option<Self> {
        let known = EXTENSIONS.iter().find(|(known, _)| *known == end);
        known.map(|(_, format)| *format)
    }

    /// The extensions of files that are taken for pictures, such as `.jpg`.
    pub fn extensions() -> Vec<String> {
        EXTENSIONS
            .iter()
            .map(|(end, _)| format!(".{end}"))
            .collect()
    }

    /// By the first bytes.
    pub fn of_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.starts_with(&[0xff, 0xd8]) {
            Some(Format::Jpeg)
        } else if bytes.starts_with(b"\x89PNG") {
            Some(Format::Png)
        } else if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
            Some(Format::Webp)
        } else {
            None
        }
    }
}

type Outcome = std::result::Result<Examined, Fault>;

/// Pictures above so many pixels are refused, as by Pillow: they are mistakes or attacks.
pub const MOST_PIXELS: usize = 178_956_970;

/// Decodes the bytes of a picture file.
pub fn decode(bytes: &[u8]) -> Result<Picture> {
    let examined = examine(bytes).map_err(|fault| fault.error)?;
    Ok(examined.picture)
}

/// Decodes the bytes of a picture file and says what was odd.
///
/// Errors: whatever makes it unusable, by kind.
pub fn examine(bytes: &[u8]) -> Outcome {
    examine_part(bytes, &Region::whole)
}

/// As [`examine`], but only what `view` asks for need be known of the picture. Whether it can be used does not
/// depend on that.
pub fn examine_part(bytes: &[u8], view: View) -> Outcome {
    decode_up_to(bytes, MOST_PIXELS, view)
}

pub(crate) fn decode_up_to(bytes: &[u8], most_pixels: usize, view: View) -> Outcome {
    match Format::of_bytes(bytes) {
        Some(Format::Jpeg) => decode_jpeg(bytes, most_pixels, view),
        Some(Format::Png) => decode_other(bytes, ImageFormat::Png, most_pixels),
        Some(Format::Webp) => decode_other(bytes, ImageFormat::WebP, most_pixels),
        None => Err(not_a_picture(bytes)),
    }
}

/// Says what the bytes look like instead.
fn not_a_picture(bytes: &[u8]) -> Fault {
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(512)]).to_lowercase();
    let start = start.trim_start_matches('\u{feff}').trim_start();
    let readable = "use JPEG, PNG or WebP files";
    let unknown = |what| (Reason::UnknownFormat, what, readable);
    let no_image = |what, hint| (Reason::NotAnImage, what, hint);
    let (reason, what, hint) = match bytes {
        [] => (
            Reason::EmptyMember,
            "the file is empty",
            "copy or download it again",
        ),
        _ if start.starts_with("<!doctype html") || start.starts_with("<html") => no_image(
            "this is an HTML page, not an image",
            "the download was answered with a web page; download the file again",
        ),
        _ if start.starts_with("<?xml") || start.starts_with("<svg") => {
            unknown("this is XML or SVG text, not an image of pixels")
        }
        _ if start.starts_with("version https://git-lfs") => no_image(
            "this is a Git LFS pointer, not the image itself",
            "run `git lfs pull`",
        ),
        [b'G', b'I', b'F', b'8', ..] => unknown("this is a GIF image, which is not supported"),
        [b'B', b'M', ..] => unknown("this is a BMP image, which is not supported"),
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => {
            unknown("this is a TIFF image, which is not supported")
        }
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => {
            unknown("this is an AVIF, HEIC or video file, which is not supported")
        }
        [0x1f, 0x8b, ..] | [b'P', b'K', 3, 4, ..] => no_image(
            "this is a compressed archive, not an image",
            "unpack it first",
        ),
        _ if bytes.iter().all(|byte| *byte == 0) => no_image(
            "the file holds only zeros",
            "it was not copied completely; copy it again",
        ),
        _ => no_image("this is no JPEG, PNG or WebP image", readable),
    };
    Fault::new(reason, what).hint(hint)
}

fn check_size(width: usize, height: usize, most_pixels: usize) -> std::result::Result<(), Fault> {
    if width == 0 || height == 0 {
        let message = format!("the picture is {width} x {height} pixels large");
        return Err(Fault::new(Reason::ZeroSize, message).hint("leave it out"));
    }
    if width.saturating_mul(height) > most_pixels {
        let message = format!("{width} x {height} pixels are more than the {most_pixels} allowed");
        return Err(
            Fault::new(Reason::TooManyPixels, message).hint("shrink the image or leave it out")
        );
    }
    Ok(())
}

const AGAIN: &str = "copy or download the file again, or leave it out";

fn decode_jpeg(bytes: &[u8], most_pixels: usize, view: View) -> Outcome {
    let fault = |damage| match damage {
        Damage::Truncated => cut_short(),
        Damage::Damaged(what) => {
            let message = format!("the JPEG data is damaged: {what}");
            Fault::new(Reason::DamagedImage, message).hint(AGAIN)
        }
    };
    let Some(jpeg) = Jpeg::open(bytes).map_err(fault)? else {
        return decode_rare_jpeg(bytes, most_pixels);
    };
    let (width, height) = (jpeg.width(), jpeg.height());
    check_size(width, height, most_pixels)?;
    let orientation = jpeg.exif().and_then(orientation);
    let turned = orientation.is_some_and(|orientation| orientation != 1);
    let mut odd = Vec::new();
    if jpeg.is_grey() {
        odd.push(Reason::Grey);
    }
    if turned {
        odd.push(Reason::Rotated);
    }
    // What is asked for is a region of the upright picture; turning is rare enough to decode all.
    let region = match turned {
        true => Region::whole(width, height),
        false => view(width, height),
    };
    let pixels = jpeg.decode(&region).map_err(fault)?;
    let picture = Picture::part(width, height, region, pixels)?;
    let picture = upright(picture, orientation)?;
    Ok(Examined { picture, odd })
}

fn cut_short() -> Fault {
    let message = "the JPEG data is cut short: there is no end marker";
    Fault::new(Reason::TruncatedImage, message).hint(AGAIN)
}

/// Decodes a JPEG of a kind that [`super::jpeg`] does not know.
fn decode_rare_jpeg(bytes: &[u8], most_pixels: usize) -> Outcome {
    let damaged = |error: zune_jpeg::errors::DecodeErrors| {
        let error = plain(&error);
        let message = format!("the JPEG data is damaged or cut short: {error}");
        Fault::new(Reason::DamagedImage, message).hint(AGAIN)
    };
    let frame = walk(bytes).ok_or_else(cut_short)?;
    if let Some(frame) = frame {
        check_size(frame.width, frame.height, most_pixels)?;
        // zune-jpeg panics on some of these.
        if !frame.first_is_largest {
            let message = "JPEGs with such sampling factors are not supported";
            return Err(Fault::new(Reason::UnknownFormat, message)
                .hint("save the picture again with another program, or leave it out"));
        }
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
        .ok_or_else(|| Fault::new(Reason::DamagedImage, "the JPEG data has no header"))?;
    let (width, height) = (usize::from(info.width), usize::from(info.height));
    check_size(width, height, most_pixels)?;
    let pixels = decoder.decode().map_err(damaged)?;
    let orientation = decoder.exif().and_then(|exif| orientation(exif));
    let mut odd = Vec::new();
    if let Some(ColorSpace::CMYK | ColorSpace::YCCK) = decoder.input_colorspace() {
        odd.push(Reason::Cmyk);
    }
    if orientation.is_some_and(|orientation| orientation != 1) {
        odd.push(Reason::Rotated);
    }
    let picture = upright(Picture::bytes(width, height, pixels)?, orientation)?;
    Ok(Examined { picture, odd })
}

/// What is known of a JPEG's frame without decoding.
#[derive(Clone, Copy)]
struct Frame {
    width: usize,
    height: usize,
    /// Whether the sampling factors of the first component are multiples of all others'.
    first_is_largest: bool,
}

impl Frame {
    /// From bits, height, width, number of components; of each its name, sampling factors and table.
    fn read(header: &[u8]) -> Option<Self> {
        let [_, h1, h0, w1, w0, _, components @ ..] = header else {
            return None;
        };
        let mut factors = components
            .chunks_exact(3)
            .map(|component| (component[1] >> 4, component[1] & 15));
        let (across, down) = factors.next()?;
        let fits = |all: u8, one: u8| all.checked_rem(one) == Some(0);
        Some(Self {
            width: usize::from(u16::from_be_bytes([*w1, *w0])),
            height: usize::from(u16::from_be_bytes([*h1, *h0])),
            first_is_largest: factors.all(|factor| fits(across, factor.0) && fits(down, factor.1)),
        })
    }
}

/// Follows the segments of a JPEG to its end marker: none if there is no such, else the first frame, if there is one.
///
/// The decoder in strict mode still forgives a few bytes missing at the end, which it takes for
/// padding. A search for the marker would find that of a thumbnail, hence the walk.
fn walk(bytes: &[u8]) -> Option<Option<Frame>> {
    let short = |at: usize| {
        let pair = bytes.get(at..at + 2)?;
        Some(usize::from(u16::from_be_bytes([pair[0], pair[1]])))
    };
    let mut frame = None;
    let mut at = 2;
    loop {
        // In compressed data a marker is 0xff and neither 0, which is a value, nor a restart.
        at += find_ff(bytes.get(at..)?)? + 1;
        match *bytes.get(at)? {
            0xd9 => return Some(frame),
            0x00 | 0x01 | 0xd0..=0xd8 => at += 1,
            0xff => {}
            marker => {
                let length = short(at + 1)?;
                // 0xc4, 0xc8, 0xcc are tables.
                if matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc) {
                    let header = bytes.get(at + 3..at + 1 + length).unwrap_or_default();
                    frame = frame.or(Frame::read(header));
                }
                at += 1 + length;
            }
        }
    }
}

/// The decoder's message in our form.
fn plain(error: &zune_jpeg::errors::DecodeErrors) -> String {
    let text = format!("{error:?}");
    let text = text.trim_matches(|letter: char| letter == '"' || letter.is_whitespace());
    text.trim_end_matches('.').into()
}

fn decode_other(bytes: &[u8], format: ImageFormat, most_pixels: usize) -> Outcome {
    let damaged = |error: image::ImageError| {
        let message = format!("the image data is damaged or cut short: {error}");
        let short = format!("{error}").contains("unexpected end") || ends_early(bytes, format);
        let reason = match short {
            true => Reason::TruncatedImage,
            false => Reason::DamagedImage,
        };
        Fault::new(reason, message).hint(AGAIN)
    };
    if let (ImageFormat::Png, Some(size)) = (format, bytes.get(16..24)) {
        let side =
            |at: usize| u32::from_be_bytes([size[at], size[at + 1], size[at + 2], size[at + 3]]);
        check_size(side(0) as usize, side(4) as usize, most_pixels)?;
    }
    let reader = || ImageReader::with_format(Cursor::new(bytes), format);
    let (width, height) = reader().into_dimensions().map_err(damaged)?;
    check_size(width as usize, height as usize, most_pixels)?;
    if format == ImageFormat::WebP && outgrown(&bytes[12..], width, height) {
        let message = "the image data is damaged: a frame is larger than the picture";
        return Err(Fault::new(Reason::DamagedImage, message).hint(AGAIN));
    }
    let mut reader = reader();
    // The number of pixels is checked above; four channels of 16 bits and as much again for work.
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(most_pixels as u64 * 16);
    reader.limits(limits);
    let image: DynamicImage = reader.decode().map_err(damaged)?;
    let color = image.color();
    let mut odd = Vec::new();
    if color.has_alpha() {
        odd.push(Reason::Alpha);
    }
    if !color.has_color() {
        odd.push(Reason::Grey);
    }
    if color.bytes_per_pixel() / color.channel_count() > 1 {
        odd.push(Reason::SixteenBit);
    }
    // The extended header of a WebP: flags, of which the second bit means animation.
    if format == ImageFormat::WebP && bytes.get(12..16) == Some(b"VP8X") && bytes[20] & 2 != 0 {
        odd.push(Reason::Animated);
    }
    let pixels = image.into_rgb8().into_raw();
    let picture = Picture::bytes(width as usize, height as usize, pixels)?;
    Ok(Examined { picture, odd })
}

/// Whether the chunks of a WebP hold a frame larger than the picture: the decoder makes room for a frame by its own size,
/// which nothing limits.
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
        // Chunks begin at even places.
        chunks = after.get(length % 2..).unwrap_or_default();
    }
    false
}

/// Whether a file ends before its format says: a PNG's last chunk, a WebP's length.
fn ends_early(bytes: &[u8], format: ImageFormat) -> bool {
    match (format, bytes.get(4..8)) {
        (ImageFormat::Png, _) => !bytes.windows(4).any(|four| four == b"IEND"),
        (_, Some(length)) => {
            let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
            (bytes.len() as u64) < u64::from(length) + 8
        }
        _ => true,
    }
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

    #[test]
    fn every_kind_of_jpeg_is_decoded_and_set_upright_as_by_pillow() {
        let jpegs = jpegs();
        assert_eq!(jpegs.len(), 12);
        for (name, file, shape, expected) in jpegs {
            let picture = decode(&file).unwrap();
            assert_eq!([picture.height(), picture.width(), 3], shape[..], "{name}");
            let bytes = picture.to_bytes();
            let apart = bytes.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b));
            // The decoder of rare kinds rounds differently; on smooth pictures by little.
            let most = if name == "cmyk" { 3 } else { 0 };
            assert!(
                apart.clone().max() <= Some(most),
                "{name}: {:?}",
                apart.max()
            );
        }
    }

    #[test]
    fn a_webp_frame_larger_than_the_picture_is_refused_before_it_is_given_memory() {
        let chunk = |kind: &[u8], content: &[u8]| {
            [kind, &(content.len() as u32).to_le_bytes(), content].concat()
        };
        // An animation of 7 x 1 pixels with a lossy frame of 7,465 x 11,565.
        let frame = [&[0; 3][..], b"\x9d\x01\x2a\x29\x1d\x2d\x2d", &[0; 9]].concat();
        let frame = [&[0; 16][..], &chunk(b"VP8 ", &frame)].concat();
        let canvas = chunk(b"VP8X", &[2, 0, 0, 0, 6, 0, 0, 0, 0, 0]);
        let content = [
            b"WEBP",
            &canvas[..],
            &chunk(b"ANIM", &[0; 6]),
            &chunk(b"ANMF", &frame),
        ];
        let bytes = chunk(b"RIFF", &content.concat());
        let text = message(&bytes);
        assert!(
            text.contains("a frame is larger than the picture"),
            "{text}"
        );
    }

    #[test]
    fn a_jpeg_whose_first_component_is_not_the_largest_is_not_given_to_a_decoder_that_panics() {
        let (_, mut file, ..) = jpegs()
            .into_iter()
            .find(|(name, ..)| name == "cmyk")
            .unwrap();
        assert!(decode(&file).is_ok());
        let frame = file
            .windows(2)
            .position(|pair| pair == [0xff, 0xc0])
            .unwrap();
        // The factors of the second component.
        file[frame + 14] = 0x22;
        let text = message(&file);
        assert!(text.contains("sampling factors"), "{text}");
    }

    #[test]
    fn a_region_is_asked_for_by_the_upright_size_and_rotated_pictures_are_known_whole() {
        let part = Region {
            left: 3,
            top: 2,
            width: 7,
            height: 9,
        };
        for (name, file, shape, expected) in jpegs() {
            let view = |width, height| {
                assert_eq!([height, width, 3], shape[..], "{name}");
                part
            };
            let Examined { picture, odd } = examine_part(&file, &view).unwrap();
            let known = *picture.known();
            assert_eq!([picture.height(), picture.width(), 3], shape[..], "{name}");
            let some = known == part;
            let all = known == Region::whole(shape[1], shape[0]);
            assert!(
                if odd.contains(&Reason::Rotated) || name == "cmyk" {
                    all
                } else {
                    some
                },
                "{name}"
            );
            if name != "cmyk" {
                let lines = expected
                    .chunks_exact(3 * shape[1])
                    .skip(known.top)
                    .take(known.height);
                let lines = lines.flat_map(|line| &line[3 * known.left..][..3 * known.width]);
                assert!(picture.to_bytes().iter().eq(lines), "{name}");
            }
        }
    }

    #[test]
    fn what_is_odd_about_a_jpeg_is_told() {
        for (name, file, _, _) in jpegs() {
            let expected = match name.split(' ').next().unwrap() {
                "cmyk" => vec![Reason::Cmyk],
                "grey" => vec![Reason::Grey],
                "orientation" => vec![Reason::Rotated],
                _ => vec![],
            };
            assert_eq!(examine(&file).unwrap().odd, expected, "{name}");
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
                let _ = decode_up_to(&damaged, 1_000_000, &Region::whole);
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
        let error = decode_up_to(file, 100, &Region::whole)
            .unwrap_err()
            .error
            .to_string();
        assert!(
            error.contains("19 x 14 pixels are more than the 100 allowed"),
            "{error}"
        );
        let png = encoded(DynamicImage::new_rgb8(50, 3), ImageFormat::Png);
        let error = decode_up_to(&png, 100, &Region::whole)
            .unwrap_err()
            .error
            .to_string();
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
