//! Decodes JPEG files: common kinds with [`advxl_jpeg`], rare ones with zune-jpeg.

use advxl_jpeg::{Damage, Jpeg, find_ff};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use super::outcome::{AGAIN, Examined, Outcome, check_size, unsupported, upright};
use crate::image::damage::{Fault, Reason};
use crate::image::exif::Tags;
use crate::image::picture::{Cutout, Picture, Region, View};

pub(crate) fn decode_jpeg(bytes: &[u8], most_pixels: usize, view: View) -> Outcome {
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
    // The region refers to the upright image. Rotated files are rare, so they are decoded whole.
    let Cutout { region, reduction } = match turned {
        true => Cutout::whole(width, height),
        false => view(width, height),
    };
    let region = reduced_region(&region, reduction);
    let pixels = jpeg.decode_reduced(&region, reduction).map_err(fault)?;
    if jpeg.is_irregular() {
        odd.push(Reason::Irregular);
    }
    let picture = Picture::reduced((width, height), reduction, region, pixels)?;
    let picture = upright(picture, orientation)?;
    Ok(Examined { picture, odd })
}

/// Returns the pixels at 1 / `reduction` that a region touches.
fn reduced_region(region: &Region, reduction: usize) -> Region {
    let (left, top) = (region.left / reduction, region.top / reduction);
    Region {
        left,
        top,
        width: region.columns().end.div_ceil(reduction) - left,
        height: region.rows().end.div_ceil(reduction) - top,
    }
}

pub(crate) fn cut_short() -> Fault {
    let message = "the JPEG data is truncated: missing end marker";
    Fault::new(Reason::TruncatedImage, message).hint(AGAIN)
}

/// Decodes a JPEG of a kind that [`advxl_jpeg`] does not support.
pub(crate) fn decode_rare_jpeg(bytes: &[u8], most_pixels: usize) -> Outcome {
    let damaged = |error: zune_jpeg::errors::DecodeErrors| {
        let error = plain(&error);
        let message = format!("the JPEG data is damaged or truncated: {error}");
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

/// The header of the first frame of a rare JPEG.
pub(crate) struct RareFrame {
    marker: u8,
    bits: usize,
    width: usize,
    height: usize,
    /// Whether the first component's sampling factors are multiples of all others.
    first_is_largest: bool,
}

impl RareFrame {
    /// Parses bits, height, width and number of components, then the id, sampling factors and table of each component.
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

    /// Returns an error if zune-jpeg does not support the file either, since it would report the file as damaged.
    fn check(&self) -> std::result::Result<(), Fault> {
        let what = match self.marker {
            0xc9.. => {
                let fault = unsupported("JPEG", "arithmetic coding");
                return Err(
                    fault.hint("convert it losslessly: `jpegtran -copy all -outfile NEW OLD`")
                );
            }
            0xc3 | 0xc5..=0xc7 => "lossless or hierarchical coding",
            _ if self.bits != 8 => "not 8 bits per sample",
            // zune-jpeg panics on some of these.
            _ if !self.first_is_largest => "unusual sampling factors",
            _ => return Ok(()),
        };
        Err(unsupported("JPEG", what))
    }
}

/// Walks the segments of a JPEG to its end marker and returns the first frame, if any. Returns `None` if the end marker
/// is missing.
///
/// Even in strict mode zune-jpeg accepts a few missing bytes at the end, which it treats as padding. A plain search for
/// the marker could find a thumbnail's, hence the walk.
pub(crate) fn walk(bytes: &[u8]) -> Option<Option<RareFrame>> {
    let short = |at: usize| {
        let pair = bytes.get(at..at + 2)?;
        Some(usize::from(u16::from_be_bytes([pair[0], pair[1]])))
    };
    let mut frame = None;
    let mut at = 2;
    loop {
        // In compressed data, 0xff starts a marker unless 0 (a stuffed byte) or a restart number follows.
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

/// Formats zune-jpeg's message like ours.
pub(crate) fn plain(error: &zune_jpeg::errors::DecodeErrors) -> String {
    let text = format!("{error:?}");
    let text = text.trim_matches(|letter: char| letter == '"' || letter.is_whitespace());
    text.trim_end_matches('.').into()
}

/// Returns the orientation in EXIF data.
pub(crate) fn orientation(exif: &[u8]) -> Option<u16> {
    Tags::of(exif)?.orientation()
}
