//! Decodes binary and plain PBM, PGM and PPM to the same bytes as Pillow.
//!
//! Values are scaled by their maximum and rounded half to even, as in Python. Gray of more than 8 bits is converted
//! like Pillow's mode `I`: scaled to 16 bits, then clipped at 255. PAM and PFM, which torchvision does not list, are
//! not supported.
//!
//! Source: netpbm's manual; Pillow's `PpmImagePlugin.py`.

use super::outcome::{Examined, Outcome, check_size, damaged};
use crate::image::damage::{Fault, Reason};
use crate::image::picture::Picture;

/// The comment that marks an image as resized for training by `advxl data pack`.
const PACKED: &[u8] = b"# resized by advxl data pack\n";

/// Encodes bytes as a binary PPM.
///
/// Shapes: `pixels` is `[height, width, 3]`. `is_resized` marks an image that no longer has its original size.
pub(crate) fn encode(width: usize, height: usize, pixels: &[u8], is_resized: bool) -> Vec<u8> {
    let comment = if is_resized { PACKED } else { b"" };
    let size = format!("{width} {height}\n255\n");
    [b"P6\n", comment, size.as_bytes(), pixels].concat()
}

/// Decodes an image whose first bytes are `P1` to `P6`.
pub(crate) fn decode(bytes: &[u8], most_pixels: usize) -> Outcome {
    let mut header = Tokens(&bytes[2..]);
    let mut number = |what| {
        let number = header.next();
        number.ok_or_else(|| damaged("PNM", &format!("its {what} is not a number")))
    };
    let kind = bytes[1] - b'0';
    let (width, height) = (number("width")?, number("height")?);
    let maximum = match kind {
        1 | 4 => 1,
        _ => number("maximum")?,
    };
    check_size(width, height, most_pixels)?;
    if !(1..=65535).contains(&maximum) {
        return Err(damaged(
            "PNM",
            &format!("its maximum is {maximum}, expected 1 to 65535"),
        ));
    }
    let channels = if matches!(kind, 3 | 6) { 3 } else { 1 };
    let count = width * height * channels;
    let rest = header.0;
    let mut above = false;
    let mut byte = |value: u32| {
        above |= value as usize > maximum;
        match channels {
            1 if maximum > 255 => scaled(value, maximum, 65535).min(255) as u8,
            _ => scaled(value, maximum, 255) as u8,
        }
    };
    // Memory is bounded by the data present, not by the size in the header.
    let values: Vec<u8> = match kind {
        1 => bits_in_text(rest).take(count).map(&mut byte).collect(),
        2 | 3 => {
            let numbers = Tokens(rest).take(count);
            numbers.map(|number| byte(number as u32)).collect()
        }
        4 => packed_bits(rest, width)
            .take(count)
            .map(&mut byte)
            .collect(),
        _ if maximum > 255 => {
            let pairs = rest.as_chunks().0.iter().take(count);
            pairs
                .map(|two| byte(u16::from_be_bytes(*two).into()))
                .collect()
        }
        _ if maximum == 255 => rest[..count.min(rest.len())].to_vec(),
        _ => rest
            .iter()
            .take(count)
            .map(|value| byte((*value).into()))
            .collect(),
    };
    if values.len() < count {
        let found = values.len();
        let message = format!("the PNM data is truncated: {found} of {count} values");
        return Err(
            Fault::new(Reason::TruncatedImage, message).hint(crate::image::decode::outcome::AGAIN)
        );
    }
    // Pillow rejects this in plain files only, and clips binary values.
    if above && kind <= 3 {
        return Err(damaged("PNM", "a value exceeds the maximum"));
    }
    let pixels = match channels {
        1 => values.iter().flat_map(|value| [*value; 3]).collect(),
        _ => values,
    };
    let mut odd = Vec::new();
    if channels == 1 {
        odd.push(Reason::Grey);
    }
    if maximum > 255 {
        odd.push(Reason::SixteenBit);
    }
    let picture = Picture::bytes(width, height, pixels)?;
    let is_packed = bytes[3..].starts_with(PACKED);
    let picture = if is_packed { picture.packed() } else { picture };
    Ok(Examined { picture, odd })
}

/// Returns `value / maximum * full`, rounded half to even.
fn scaled(value: u32, maximum: usize, full: u32) -> u32 {
    let share = f64::from(value) / maximum as f64;
    ((share * f64::from(full)).round_ties_even() as u32).min(full)
}

/// Iterates over numbers separated by white space and comments. Binary data starts one byte after the last number.
struct Tokens<'a>(&'a [u8]);

impl Iterator for Tokens<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let mut digits = Vec::new();
        while let Some((byte, rest)) = self.0.split_first() {
            self.0 = rest;
            match byte {
                b'#' => self.0 = after_line(rest),
                _ if is_space(*byte) && digits.is_empty() => {}
                _ if is_space(*byte) => break,
                // No number in a valid image is this long.
                _ if digits.len() == 10 => return None,
                _ => digits.push(*byte),
            }
        }
        std::str::from_utf8(&digits).ok()?.parse().ok()
    }
}

/// Iterates over the values of a plain bitmap, which need no separators. 0 is white.
fn bits_in_text(mut text: &[u8]) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        while let Some((byte, rest)) = text.split_first() {
            text = rest;
            match byte {
                b'0' => return Some(1),
                b'1' => return Some(0),
                b'#' => text = after_line(rest),
                _ if is_space(*byte) => {}
                _ => return None,
            }
        }
        None
    })
}

/// Iterates over the values of a binary bitmap, whose rows start at byte boundaries. 0 is white.
fn packed_bits(bytes: &[u8], width: usize) -> impl Iterator<Item = u32> {
    let lines = bytes.chunks_exact(width.div_ceil(8));
    lines.flat_map(move |line| (0..width).map(|x| u32::from(line[x / 8] >> (7 - x % 8) & 1 ^ 1)))
}

fn after_line(text: &[u8]) -> &[u8] {
    let end = text.iter().position(|byte| matches!(byte, b'\r' | b'\n'));
    end.map_or(&[], |end| &text[end + 1..])
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}
