//! Decodes image files strictly: a damaged file is an error and never yields gray rows.
//!
//! Supports the formats that Pillow and torchvision's ImageFolder read: JPEG, PNG, WebP, BMP, TIFF, PNM and GIF. The
//! format is detected from the first bytes, not from the file name. Everything becomes RGB bytes, as with Pillow's
//! `convert("RGB")`: gray is repeated, 16 bits are reduced to 8, CMYK is converted, and an alpha channel is dropped. A
//! JPEG that is rotated or mirrored according to its EXIF data is set upright. Of a JPEG, only the requested region is
//! turned into pixels.
//!
//! | file | what |
//! |------|------|
//! | [`jpeg`] | common JPEGs with [`advxl_jpeg`], to Pillow's bytes; rare ones, mostly CMYK, with zune-jpeg |
//! | `raster` | PNG, WebP, BMP, TIFF with the crate `image` |
//! | `pnm` `gif` | PBM, PGM, PPM; the first frame of a GIF |
//! | [`outcome`] | formats, size limit, and the result of a decoder |
//! | [`crate::image::exif`] | tags of TIFF and EXIF |
//! | [`crate::image::content`] | identifies files that are not images |
//!
//! Differs from the reference: torchvision ignores the orientation; zune-jpeg rounds differently in the inverse
//! transform and in chroma upsampling.

pub(crate) mod gif;
pub mod jpeg;
pub mod outcome;
pub(crate) mod pnm;
pub(crate) mod raster;

use image::ImageFormat;

use crate::error::Result;
use crate::image::content;
use crate::image::damage::{Fault, Reason};
use crate::image::picture::{Cutout, Picture, View};

use jpeg::decode_jpeg;
use outcome::{Format, MOST_PIXELS, Outcome};

/// Decodes the bytes of an image file.
pub fn decode(bytes: &[u8]) -> Result<Picture> {
    let examined = examine(bytes).map_err(|fault| fault.error)?;
    Ok(examined.picture)
}

/// Decodes the bytes of an image file and reports its oddities.
///
/// Errors: the kind of damage that makes it unusable.
pub fn examine(bytes: &[u8]) -> Outcome {
    examine_part(bytes, &Cutout::whole)
}

/// Like [`examine`], but only the part that `view` returns need be decoded. Whether the file is usable does not depend
/// on the part.
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

/// Reports what the bytes appear to be instead.
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
        [b'P', b'f' | b'F', b'\n', ..] => "a PFM float image",
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

#[cfg(test)]
mod tests {
    use crate::image::decode::outcome::Examined;
    use std::io::Cursor;

    use image::DynamicImage;

    use super::*;
    use crate::image::Region;
    use crate::image::picture::golden;

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
            // The decoder for rare kinds rounds differently, but only slightly on smooth images.
            let most = if name == "cmyk" { 3 } else { 0 };
            assert!(
                apart.clone().max() <= Some(most),
                "{name}: {:?}",
                apart.max()
            );
        }
    }

    #[test]
    fn a_webp_frame_larger_than_the_image_is_refused_before_it_is_allocated() {
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
        assert!(text.contains("a frame is larger than the image"), "{text}");
    }

    #[test]
    fn a_jpeg_whose_first_component_is_not_the_largest_is_refused_before_zune_jpeg_panics() {
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
        assert!(text.contains("unusual sampling factors"), "{text}");
    }

    #[test]
    fn a_region_refers_to_the_upright_size_and_rotated_images_are_decoded_whole() {
        let part = Region {
            left: 3,
            top: 2,
            width: 7,
            height: 9,
        };
        for (name, file, shape, expected) in jpegs() {
            let view = |width, height| {
                assert_eq!([height, width, 3], shape[..], "{name}");
                part.into()
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
    fn oddities_of_a_jpeg_are_reported() {
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
    fn a_jpeg_truncated_anywhere_is_an_error() {
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
                // Some damage is undetectable, such as a changed coefficient: any outcome will do.
                let _ = decode_up_to(&damaged, 1_000_000, &Cutout::whole);
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
        // The last chunk and the last checksum may be missing, since the pixels have their own checksum.
        for length in 8..png.len() - 16 {
            assert!(message(&png[..length]).contains("damaged or truncated"));
        }
    }

    /// Name, file, and the shape and pixels that Pillow returns, if it can read the file.
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

    /// Files that Pillow can read and this module cannot.
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
                    // The decoder for JPEG inside TIFF rounds differently.
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
                // More lenient than Pillow, without changing the pixels.
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
    fn oddities_of_a_file_are_reported() {
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

    /// Truncated anywhere or with any byte changed: an error, or an image with no more pixels than allowed.
    #[test]
    fn no_truncation_and_no_damaged_byte_of_any_format_makes_a_decoder_panic() {
        let mut different = Vec::new();
        for (name, file, _) in formats() {
            let whole = examine(&file).ok().map(|found| found.picture.to_bytes());
            for length in 0..file.len() {
                let cut = decode_up_to(&file[..length], 10_000, &Cutout::whole);
                let cut = cut.ok().map(|cut| cut.picture.to_bytes());
                // In plain text the last number may be missing a digit.
                if cut.is_some() && cut != whole && !name.starts_with("plain") {
                    different.push(format!("{name} cut to {length} of {}", file.len()));
                }
            }
            for place in (0..file.len()).step_by(if file.len() > 1000 { 5 } else { 1 }) {
                let mut damaged = file.clone();
                damaged[place] ^= 0x55;
                if let Ok(found) = decode_up_to(&damaged, 10_000, &Cutout::whole) {
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
        assert!(message(&file).contains("not supported: not 8 bits per sample"));
    }

    #[test]
    fn files_that_are_not_images_are_named_for_what_they_are() {
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
    fn an_image_above_the_pixel_limit_is_refused_before_it_is_decoded() {
        let file = &jpegs()[0].1;
        let error = decode_up_to(file, 100, &Cutout::whole)
            .unwrap_err()
            .error
            .to_string();
        assert!(
            error.contains("19 x 14 pixels exceed the limit of 100"),
            "{error}"
        );
        let png = encoded(DynamicImage::new_rgb8(50, 3), ImageFormat::Png);
        let error = decode_up_to(&png, 100, &Cutout::whole)
            .unwrap_err()
            .error
            .to_string();
        assert!(error.contains("50 x 3 pixels"), "{error}");
    }
}
