//! Image files to pictures, strictly: a damaged file is an error, never grey rows.
//!
//! What Pillow and torchvision's ImageFolder read: JPEG, PNG, WebP, BMP, TIFF, PNM and GIF, told apart by their first
//! bytes and not by their names. Everything becomes red, green and blue bytes, as by Pillow's `convert("RGB")`: grey is
//! repeated, 16 bits become 8, CMYK is converted, an alpha channel is dropped. A JPEG that its EXIF data says is
//! turned or mirrored is set upright. Of a JPEG only the region that is asked for becomes pixels.
//!
//! | file | what |
//! |------|------|
//! | [`super::jpeg`] | the common JPEGs, to Pillow's bytes; the rare ones, CMYK above all, go to zune-jpeg |
//! | `raster` | PNG, WebP, BMP, TIFF by the crate `image` |
//! | `pnm` `gif` | PBM, PGM, PPM; the first picture of a GIF |
//! | `tags` | tags of TIFF and EXIF |
//! | [`super::content`] | what a file is instead |
//!
//! Differs from the reference: torchvision ignores the orientation; zune-jpeg rounds differently in
//! the inverse transform and the chroma upsampling.

mod gif;
mod pnm;
mod raster;
mod tags;

use image::ImageFormat;
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use super::content;
use super::health::{Fault, Reason};
use super::jpeg::{Damage, Jpeg, find_ff};
use super::picture::{Picture, Region, View};
use crate::error::Result;
use tags::Tags;

/// A picture, and what was odd about its file.
#[derive(Clone, Debug)]
pub struct Examined {
    /// The picture.
    pub picture: Picture,
    /// Oddities, none of which kept it from being used.
    pub odd: Vec<Reason>,
}

/// The formats that are read. Index files hold the place of a format here, so new ones go to the end.
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
    /// What names of pictures end in, in lower case: what torchvision's ImageFolder takes, other names of the same, and GIF.
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

    /// The format at a place of the enumeration.
    pub fn numbered(number: u8) -> Option<Self> {
        let mut all = Self::EXTENSIONS.iter().map(|(_, format)| *format);
        all.find(|format| *format as u8 == number)
    }

    /// By the end of a name, in lower case.
    pub fn of_extension(end: &str) -> Option<Self> {
        let mut known = Self::EXTENSIONS.iter();
        known.find(|(known, _)| *known == end).map(|known| known.1)
    }

    /// The extensions of files that are taken for pictures, such as `.jpg`.
    pub fn extensions() -> Vec<String> {
        let known = Self::EXTENSIONS.iter();
        known.map(|(end, _)| format!(".{end}")).collect()
    }

    /// By the first bytes.
    pub fn of_bytes(bytes: &[u8]) -> Option<Self> {
        Some(match bytes {
            [0xff, 0xd8, ..] => Self::Jpeg,
            [0x89, b'P', b'N', b'G', ..] => Self::Png,
            _ if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") => Self::Webp,
            // Words begin with these letters too; behind a header is the length of another, below 256.
            [b'B', b'M', ..] if matches!(bytes.get(14..18), Some([12..=255, 0, 0, 0])) => Self::Bmp,
            [b'I', b'I', 42 | 43, 0, ..] | [b'M', b'M', 0, 42 | 43, ..] => Self::Tiff,
            [b'P', b'1'..=b'6', b'#' | b' ' | b'\t'..=b'\r', ..] => Self::Pnm,
            _ if bytes.starts_with(b"GIF87a") || bytes.starts_with(b"GIF89a") => Self::Gif,
            _ => return None,
        })
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
        Some(Format::Png) => raster::decode(bytes, ImageFormat::Png, most_pixels),
        Some(Format::Webp) => raster::decode(bytes, ImageFormat::WebP, most_pixels),
        Some(Format::Bmp) => raster::decode(bytes, ImageFormat::Bmp, most_pixels),
        Some(Format::Tiff) => raster::decode(bytes, ImageFormat::Tiff, most_pixels),
        Some(Format::Pnm) => pnm::decode(bytes, most_pixels),
        Some(Format::Gif) => gif::decode(bytes, most_pixels),
        None => Err(not_a_picture(bytes)),
    }
}

/// Says what the bytes look like instead.
fn not_a_picture(bytes: &[u8]) -> Fault {
    let readable = "use JPEG, PNG, WebP, BMP, TIFF, PNM or GIF files";
    if bytes.is_empty() {
        let again = "copy or download it again";
        return Fault::new(Reason::EmptyMember, "the file is empty").hint(again);
    }
    if let Some(found) = content::of(bytes) {
        let message = format!("this is {}, not an image", found.what);
        return Fault::new(Reason::NotAnImage, message).hint(found.hint);
    }
    let format = match bytes {
        _ if content::begins_with(bytes, "<?xml") || content::begins_with(bytes, "<svg") => {
            "XML or SVG text"
        }
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => "an AVIF, HEIC or video file",
        [0xff, 0x0a, ..] | [0, 0, 0, 12, b'J', b'X', b'L', ..] => "a JPEG XL image",
        [0, 0, 0, 12, b'j', b'P', ..] => "a JPEG 2000 image",
        [b'P', b'7', b'\n', ..] => "a PAM image",
        [b'P', b'f' | b'F', b'\n', ..] => "a PFM image of floats",
        [0, 0, 1 | 2, 0, ..] => "a Windows icon or cursor",
        [b'8', b'B', b'P', b'S', ..] => "a Photoshop file",
        _ => {
            let message = "this is not an image of a known format";
            return Fault::new(Reason::NotAnImage, message).hint(readable);
        }
    };
    let message = format!("this is {format}, which is not supported");
    Fault::new(Reason::UnknownFormat, message).hint(readable)
}

/// A picture whose file cannot be right.
fn damaged(format: &str, what: &str) -> Fault {
    let message = format!("the {format} data is damaged: {what}");
    Fault::new(Reason::DamagedImage, message).hint(AGAIN)
}

/// A sound picture of a kind that is not read.
fn unsupported(format: &str, what: &str) -> Fault {
    let message = format!("this kind of {format} is not supported: {what}");
    Fault::new(Reason::UnsupportedImage, message)
        .hint("convert it to an ordinary JPEG or PNG, or leave it out")
}

/// A picture that is known whole.
fn single(width: usize, height: usize, pixels: Vec<u8>, odd: Vec<Reason>) -> Outcome {
    let picture = Picture::bytes(width, height, pixels)?;
    Ok(Examined { picture, odd })
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
        Damage::Unsupported(what) => unsupported("JPEG", what),
    };
    let Some(mut jpeg) = Jpeg::open(bytes).map_err(fault)? else {
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
    if jpeg.is_irregular() {
        odd.push(Reason::Irregular);
    }
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
    if let Some(frame) = walk(bytes).ok_or_else(cut_short)? {
        check_size(frame.width, frame.height, most_pixels)?;
        frame.check()?;
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

/// What the first frame of a JPEG of a rare kind says.
struct RareFrame {
    marker: u8,
    bits: usize,
    width: usize,
    height: usize,
    /// Whether the sampling factors of the first component are multiples of all others'.
    first_is_largest: bool,
}

impl RareFrame {
    /// From bits, height, width, number of components; of each its name, sampling factors and table.
    fn read(marker: u8, header: &[u8]) -> Option<Self> {
        let [bits, h1, h0, w1, w0, _, components @ ..] = header else {
            return None;
        };
        let mut factors = components
            .chunks_exact(3)
            .map(|component| (component[1] >> 4, component[1] & 15));
        let (across, down) = factors.next()?;
        let fits = |all: u8, one: u8| all.checked_rem(one) == Some(0);
        Some(Self {
            marker,
            bits: usize::from(*bits),
            width: usize::from(u16::from_be_bytes([*w1, *w0])),
            height: usize::from(u16::from_be_bytes([*h1, *h0])),
            first_is_largest: factors.all(|factor| fits(across, factor.0) && fits(down, factor.1)),
        })
    }

    /// An error if zune-jpeg does not know the kind either, since it would call the file damaged.
    fn check(&self) -> std::result::Result<(), Fault> {
        let what = match self.marker {
            0xc9.. => {
                let fault = unsupported("JPEG", "arithmetic coding");
                return Err(
                    fault.hint("convert it without loss: `jpegtran -copy all -outfile NEW OLD`")
                );
            }
            0xc3 | 0xc5..=0xc7 => "lossless or hierarchical coding",
            _ if self.bits != 8 => "it has not 8 bits a sample",
            // zune-jpeg panics on some of these.
            _ if !self.first_is_largest => "its sampling factors",
            _ => return Ok(()),
        };
        Err(unsupported("JPEG", what))
    }
}

/// Follows the segments of a JPEG to its end marker: none if there is no such, else its first frame, if there is one.
///
/// The decoder in strict mode still forgives a few bytes missing at the end, which it takes for
/// padding. A search for the marker would find that of a thumbnail, hence the walk.
fn walk(bytes: &[u8]) -> Option<Option<RareFrame>> {
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
                    frame = frame.or(RareFrame::read(marker, header));
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

/// The orientation that EXIF data asks for.
fn orientation(exif: &[u8]) -> Option<u16> {
    Tags::of(exif)?.orientation()
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
    use std::io::Cursor;

    use image::DynamicImage;

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
            [255; 3],
            "Pillow clips"
        );

        let png = encoded(rgb, ImageFormat::Png);
        // The last chunk and the last checksum may be missing, for the pixels have a checksum of their own.
        for length in 8..png.len() - 16 {
            assert!(message(&png[..length]).contains("damaged or cut short"));
        }
    }

    /// Name, file, and shape and pixels that Pillow gives, if it does.
    type Recorded = (String, Vec<u8>, Option<(Vec<usize>, Vec<u8>)>);

    /// The files of `make_formats.py`.
    fn formats() -> Vec<Recorded> {
        let recorded = golden::load("formats.safetensors");
        let pixels = |name: &str| {
            let found = recorded
                .iter()
                .find(|(found, ..)| *found == format!("{name} pixels"));
            found.map(|(_, shape, pixels)| (shape.clone(), pixels.clone()))
        };
        let files = recorded.iter().filter_map(|(name, _, file)| {
            let name = name.strip_suffix(" file")?;
            Some((name.to_owned(), file.clone(), pixels(name)))
        });
        files.collect()
    }

    /// What Pillow reads and this module does not.
    const NOT_SUPPORTED: [&str; 13] = [
        "gif without colors",
        "jpeg progressive of 5 coefficients",
        "jpeg progressive without the last bit",
        "pfm",
        "tiff float",
        "tiff grey 4",
        "tiff grey alpha",
        "tiff group 3",
        "tiff int",
        "tiff lab",
        "tiff lzma",
        "tiff palette 4",
        "tiff premultiplied",
    ];

    #[test]
    fn every_format_has_pillows_bytes() {
        let formats = formats();
        assert!(formats.len() > 130, "{}", formats.len());
        let mut wrong = Vec::new();
        for (name, file, expected) in formats {
            let supported = !NOT_SUPPORTED.contains(&name.as_str()) && name != "tiff zstd";
            match (examine(&file), expected) {
                (Ok(found), Some((shape, pixels))) if supported => {
                    let picture = found.picture;
                    let bytes = picture.to_bytes();
                    let apart = bytes.iter().zip(&pixels).map(|(a, b)| a.abs_diff(*b));
                    // The decoder of JPEG within TIFF rounds differently.
                    let most = if name.contains("tiff") && name.ends_with("jpeg") {
                        1
                    } else {
                        0
                    };
                    if [picture.height(), picture.width(), 3] != shape[..]
                        || apart.clone().max() > Some(most)
                    {
                        let count = apart.clone().filter(|apart| *apart > 0).count();
                        wrong.push(format!(
                            "{name}: {count} values differ by {:?}",
                            apart.max()
                        ));
                    }
                }
                (Err(fault), Some(_)) if !supported => {
                    let kinds = [Reason::UnsupportedImage, Reason::UnknownFormat];
                    let text = fault.error.to_string();
                    if !kinds.contains(&fault.reason) || !text.contains("not supported") {
                        wrong.push(format!("{name}: {:?}: {text}", fault.reason));
                    }
                }
                (Err(_), None) => {}
                // More forgiving than Pillow, without harm to the pixels.
                (Ok(_), None)
                    if [
                        "bmp rle8 that leaves pixels out",
                        "png with a wrong text checksum",
                        "png with an odd checksum of the pixels",
                    ]
                    .contains(&name.as_str()) => {}
                (Ok(_), expected) => {
                    wrong.push(format!("{name}: read; Pillow: {}", expected.is_some()))
                }
                (Err(fault), _) => {
                    wrong.push(format!("{name}: {:?}: {}", fault.reason, fault.error))
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn what_is_odd_about_a_file_is_told() {
        let formats = formats();
        let odd = |name: &str| {
            let (_, file, _) = formats.iter().find(|(found, ..)| found == name).unwrap();
            examine(file).unwrap().odd
        };
        for name in [
            "png without end",
            "png with a wrong data checksum",
            "jpeg with bytes between segments",
            "jpeg without codes",
        ] {
            assert_eq!(odd(name), [Reason::Irregular], "{name}");
        }
        let progressive = odd("jpeg progressive of 20 coefficients");
        assert_eq!(progressive, [Reason::Grey, Reason::Irregular]);
        assert_eq!(odd("gif animated"), [Reason::Animated]);
        assert_eq!(odd("tiff of two pages"), [Reason::Animated]);
        assert_eq!(odd("tiff orientation 6"), [Reason::Rotated]);
        assert_eq!(odd("pgm 16"), [Reason::Grey, Reason::SixteenBit]);
        assert_eq!(odd("png rgb 16"), [Reason::SixteenBit]);
    }

    /// Cut anywhere and with any byte changed: an error or a picture, and none of more pixels than allowed.
    #[test]
    fn no_cut_and_no_damaged_byte_of_any_format_makes_a_decoder_panic() {
        let mut different = Vec::new();
        for (name, file, _) in formats() {
            let whole = examine(&file).ok().map(|found| found.picture.to_bytes());
            for length in 0..file.len() {
                let cut = decode_up_to(&file[..length], 10_000, &Region::whole);
                let cut = cut.ok().map(|cut| cut.picture.to_bytes());
                // Of the last number of a text a digit may be missing.
                if cut.is_some() && cut != whole && !name.starts_with("plain") {
                    different.push(format!("{name} cut to {length} of {}", file.len()));
                }
            }
            for place in (0..file.len()).step_by(if file.len() > 1000 { 5 } else { 1 }) {
                let mut damaged = file.clone();
                damaged[place] ^= 0x55;
                if let Ok(found) = decode_up_to(&damaged, 10_000, &Region::whole) {
                    assert!(
                        found.picture.width() * found.picture.height() <= 10_000,
                        "{name}"
                    );
                }
            }
        }
        assert!(different.is_empty(), "{}", different.join("\n"));
    }

    #[test]
    fn arithmetic_coding_is_not_supported_and_not_damage() {
        let baseline = jpegs().into_iter().find(|(name, ..)| name == "baseline");
        let mut file = baseline.unwrap().1;
        let place = file
            .windows(2)
            .position(|pair| pair == [0xff, 0xc0])
            .unwrap();
        file[place + 1] = 0xc9;
        let text = message(&file);
        assert!(text.contains("not supported: arithmetic coding"), "{text}");
        assert!(text.contains("jpegtran -copy all"), "{text}");
        assert_eq!(examine(&file).unwrap_err().reason, Reason::UnsupportedImage);
        file[place + 1] = 0xc3;
        assert!(message(&file).contains("not supported: lossless"));
        (file[place + 1], file[place + 4]) = (0xc1, 12);
        assert!(message(&file).contains("not supported: it has not 8 bits"));
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
        assert!(message(b"hello").contains("not an image of a known format"));
        assert!(message(b"hello").contains("use JPEG, PNG, WebP, BMP, TIFF, PNM or GIF"));
        assert!(message(b"\0\0\0\x1cftypavif").contains("an AVIF, HEIC or video file"));
        assert!(message(b"BMW and others").contains("not an image of a known format"));
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
}
