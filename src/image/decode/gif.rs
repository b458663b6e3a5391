//! Decodes the first frame of a GIF like Pillow's `convert("RGB")`.
//!
//! Where the frame does not cover its screen, pixels have the transparent color, or color 0 if there is none.
//! Transparency is dropped. The crate `image` would blend with transparent black there, so this uses the indices of the
//! crate `gif`.
//!
//! Source: Pillow's `GifImagePlugin.py`.

use std::io::Cursor;
use std::num::NonZeroU64;

use gif::{ColorOutput, DecodeOptions, DecodingError, MemoryLimit};

use super::outcome::{Outcome, check_size, damaged, single, unsupported};
use crate::image::damage::{Fault, Reason};

/// Decodes the first frame of a GIF.
pub(crate) fn decode(bytes: &[u8], most_pixels: usize) -> Outcome {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    let limit = NonZeroU64::new(most_pixels as u64).unwrap_or(NonZeroU64::MIN);
    options.set_memory_limit(MemoryLimit::Bytes(limit));
    let mut decoder = options.read_info(Cursor::new(bytes)).map_err(fault)?;
    let screen = (usize::from(decoder.width()), usize::from(decoder.height()));
    let frame = decoder.next_frame_info().map_err(fault)?;
    let frame = frame.ok_or_else(|| damaged("GIF", "no image in the file"))?;
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let (columns, rows) = (usize::from(frame.width), usize::from(frame.height));
    let behind = frame.transparent;
    check_size(columns, rows, most_pixels)?;
    let (width, height) = (screen.0.max(left + columns), screen.1.max(top + rows));
    check_size(width, height, most_pixels)?;
    let mut indices = vec![0; columns * rows];
    decoder.read_into_buffer(&mut indices).map_err(fault)?;
    let colors = colors(decoder.palette().map_err(fault)?);
    let mut pixels = colors[usize::from(behind.unwrap_or(0))].repeat(width * height);
    for (y, line) in indices.chunks_exact(columns).enumerate() {
        let line = line.iter().flat_map(|index| colors[usize::from(*index)]);
        let place = 3 * ((top + y) * width + left);
        let places = pixels[place..][..3 * columns].iter_mut();
        places.zip(line).for_each(|(place, value)| *place = value);
    }
    let mut odd = Vec::new();
    if behind.is_some() {
        odd.push(Reason::Alpha);
    }
    if matches!(decoder.next_frame_info(), Ok(Some(_))) {
        odd.push(Reason::Animated);
    }
    single(width, height, pixels, odd)
}

/// Returns the color of each index. Indices beyond the table are black, or gray if the whole table is a gray ramp, as
/// in Pillow.
fn colors(table: &[u8]) -> [[u8; 3]; 256] {
    let grey = |index: usize| [index as u8; 3];
    let table = table.as_chunks().0;
    let is_grey = (0..).zip(table).all(|(index, color)| *color == grey(index));
    std::array::from_fn(|index| match table.get(index) {
        Some(color) => *color,
        None if is_grey => grey(index),
        None => [0; 3],
    })
}

fn fault(error: DecodingError) -> Fault {
    let text = error.to_string().to_lowercase();
    if text.contains("end of file") {
        let message = "the GIF data is truncated";
        return Fault::new(Reason::TruncatedImage, message)
            .hint(crate::image::decode::outcome::AGAIN);
    }
    match text.contains("no color table") {
        true => unsupported("GIF", "no color table"),
        false => damaged("GIF", &text),
    }
}
