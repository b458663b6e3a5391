//! Image files. A decoded region must equal the same region of the whole image.

use advxl::fuzzing;
use advxl::image::Examined;
use advxl::image::decode::outcome::Format;
use advxl::image::picture::Pixels;
use advxl::image::{Cutout, Region};

use crate::scratch::number;

/// Larger images take longer and find nothing else.
const MOST_PIXELS: usize = 1 << 18;

/// Decodes JPEG files, with either decoder.
pub fn jpeg(data: &[u8]) {
    if Format::of_bytes(data) == Some(Format::Jpeg) {
        decoded(data);
    }
}

/// Decodes PNG, WebP and all other files.
pub fn other(data: &[u8]) {
    if Format::of_bytes(data) != Some(Format::Jpeg) {
        decoded(data);
    }
}

fn decoded(data: &[u8]) {
    let whole = fuzzing::examine(data, MOST_PIXELS, &Cutout::whole);
    let part = fuzzing::examine(data, MOST_PIXELS, &|width, height| {
        region(number(data), width, height).into()
    });
    match (whole, part) {
        (Ok(whole), Ok(part)) => {
            assert!(
                whole.odd == part.odd,
                "the oddities of a region differ from the whole image's"
            );
            assert_eq!(
                pixels(&whole),
                (0, 0, whole.picture.width(), whole.picture.height())
            );
            same(&whole, &part);
        }
        (Err(whole), Err(part)) => assert!(
            whole.reason == part.reason,
            "a region is refused for a different reason than the whole image"
        ),
        (whole, part) => panic!(
            "whole: {:?}, region: {:?}",
            whole.map(|_| ()).map_err(|fault| fault.error),
            part.map(|_| ()).map_err(|fault| fault.error)
        ),
    }
}

fn region(number: u64, width: usize, height: usize) -> Region {
    let draw = |shift: u32, most: usize| (number >> shift) as usize % 0xffff % most.max(1);
    let (left, top) = (draw(0, width), draw(16, height));
    Region {
        left,
        top,
        width: 1 + draw(32, width - left),
        height: 1 + draw(48, height - top),
    }
}

/// Returns the decoded region (left, top, width, height), after checking the number of its pixels.
fn pixels(examined: &Examined) -> (usize, usize, usize, usize) {
    let known = examined.picture.known();
    let Pixels::Bytes(bytes) = examined.picture.pixels() else {
        panic!("a decoded image must hold bytes, not floats");
    };
    assert_eq!(bytes.len(), 3 * known.width * known.height);
    (known.left, known.top, known.width, known.height)
}

fn same(whole: &Examined, part: &Examined) {
    let size = |of: &Examined| (of.picture.width(), of.picture.height());
    assert_eq!(size(whole), size(part));
    let (Pixels::Bytes(all), Pixels::Bytes(some)) = (whole.picture.pixels(), part.picture.pixels())
    else {
        panic!("a decoded image must hold bytes, not floats");
    };
    let (left, top, width, _) = pixels(part);
    for (y, row) in some.chunks_exact(3 * width).enumerate() {
        let at = 3 * ((top + y) * whole.picture.width() + left);
        assert!(
            row == &all[at..at + 3 * width],
            "row {y} of a region differs"
        );
    }
}
