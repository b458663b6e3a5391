//! The operations of RandAugment on bytes, each bit-exact with Pillow.
//!
//! [`crate::data::augment::RandAugment`] chooses among them.
//! Source: `timm/data/auto_augment.py` (levels), Pillow's `ImageOps`, `ImageEnhance` and `Geometry.c` (arithmetic).
//! Tested against Pillow with the cases recorded by `tests/golden/make_pictures.py`.

/// Number of operations.
pub const KINDS: usize = 15;

/// The color of pixels from outside the image: ImageNet's mean.
const FILL: [u8; 3] = [124, 116, 104];

/// An operation and its strength.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operation {
    /// Stretches each channel to 0..=255.
    AutoContrast,
    /// Equalizes the histogram of each channel.
    Equalize,
    /// Inverts each value.
    Invert,
    /// Rotates counterclockwise, by degrees.
    Rotate(f64),
    /// Keeps this many of the upper bits.
    Posterize(u32),
    /// Inverts values at or above the threshold.
    Solarize(u32),
    /// Adds to values below 128.
    SolarizeAdd(u32),
    /// Blends with grayscale: 0 is grayscale, 1 is the original.
    Color(f64),
    /// Blends with the mean gray level: 0 is uniform gray, 1 is the original.
    Contrast(f64),
    /// Blends with black: 0 is black, 1 is the original.
    Brightness(f64),
    /// Blends with the smoothed image: 0 is smoothed, 1 is the original.
    Sharpness(f64),
    /// Shifts each row by a fraction of its index.
    ShearX(f64),
    /// Shifts each column by a fraction of its index.
    ShearY(f64),
    /// Translates by a fraction of the width.
    TranslateX(f64),
    /// Translates by a fraction of the height.
    TranslateY(f64),
}

impl Operation {
    /// Returns operation number `kind`, below [`KINDS`], at a level of 0 to 10, as in timm's increasing set. `negate`
    /// flips the sign of operations that have a direction.
    pub fn at_level(kind: usize, level: f64, negate: bool) -> Self {
        let share = level / 10.0;
        let sign = if negate { -1.0 } else { 1.0 };
        let enhance = (1.0 + sign * share * 0.9).max(0.1);
        match kind {
            0 => Self::AutoContrast,
            1 => Self::Equalize,
            2 => Self::Invert,
            3 => Self::Rotate(sign * share * 30.0),
            // At level 10 timm asks for zero bits, which Pillow rejects.
            4 => Self::Posterize((4 - (share * 4.0) as u32).max(1)),
            5 => Self::Solarize(256 - ((share * 256.0) as u32).min(256)),
            6 => Self::SolarizeAdd(((share * 110.0) as u32).min(128)),
            7 => Self::Color(enhance),
            8 => Self::Contrast(enhance),
            9 => Self::Brightness(enhance),
            10 => Self::Sharpness(enhance),
            11 => Self::ShearX(sign * share * 0.3),
            12 => Self::ShearY(sign * share * 0.3),
            13 => Self::TranslateX(sign * share * 0.45),
            _ => Self::TranslateY(sign * share * 0.45),
        }
    }

    /// Applies the operation to an image in place.
    ///
    /// Shapes: `bytes` is `[height, width, 3]`.
    pub fn apply(self, bytes: &mut Vec<u8>, width: usize, height: usize) {
        match self {
            Self::AutoContrast => by_histogram(bytes, auto_contrast),
            Self::Equalize => by_histogram(bytes, equalize),
            Self::Invert => each_value(bytes, |value| 255 - value),
            Self::Posterize(bits) => {
                let mask = !(0xff_u32 >> bits.min(8)) as u8;
                each_value(bytes, |value| value & mask);
            }
            Self::Solarize(threshold) => each_value(bytes, |value| {
                if u32::from(value) < threshold {
                    value
                } else {
                    255 - value
                }
            }),
            Self::SolarizeAdd(add) => each_value(bytes, |value| match value {
                0..128 => (u32::from(value) + add).min(255) as u8,
                _ => value,
            }),
            Self::Color(factor) => {
                for pixel in bytes.chunks_exact_mut(3) {
                    let grey = grey(pixel);
                    pixel
                        .iter_mut()
                        .for_each(|value| *value = blend(grey, *value, factor));
                }
            }
            Self::Contrast(factor) => {
                let sum: u64 = bytes
                    .chunks_exact(3)
                    .map(|pixel| u64::from(grey(pixel)))
                    .sum();
                let mean = (sum as f64 / (width * height) as f64 + 0.5) as u8;
                each_value(bytes, |value| blend(mean, value, factor));
            }
            Self::Brightness(factor) => each_value(bytes, |value| blend(0, value, factor)),
            Self::Sharpness(factor) => {
                let smooth = smoothed(bytes, width, height);
                for (value, smooth) in bytes.iter_mut().zip(smooth) {
                    *value = blend(smooth, *value, factor);
                }
            }
            Self::Rotate(degrees) => {
                *bytes = moved(bytes, width, height, rotation(degrees, width, height));
            }
            Self::ShearX(by) => {
                *bytes = moved(bytes, width, height, [1.0, by, 0.0, 0.0, 1.0, 0.0]);
            }
            Self::ShearY(by) => {
                *bytes = moved(bytes, width, height, [1.0, 0.0, 0.0, by, 1.0, 0.0]);
            }
            Self::TranslateX(by) => {
                let by = by * width as f64;
                *bytes = moved(bytes, width, height, [1.0, 0.0, by, 0.0, 1.0, 0.0]);
            }
            Self::TranslateY(by) => {
                let by = by * height as f64;
                *bytes = moved(bytes, width, height, [1.0, 0.0, 0.0, 0.0, 1.0, by]);
            }
        }
    }
}

fn each_value(bytes: &mut [u8], change: impl Fn(u8) -> u8) {
    bytes.iter_mut().for_each(|value| *value = change(*value));
}

/// Maps each value through a table made from the histogram of its channel.
fn by_histogram(bytes: &mut [u8], table: fn(&[u32; 256]) -> Option<[u8; 256]>) {
    for channel in 0..3 {
        let mut histogram = [0; 256];
        for pixel in bytes.chunks_exact(3) {
            histogram[usize::from(pixel[channel])] += 1;
        }
        let Some(table) = table(&histogram) else {
            continue;
        };
        for pixel in bytes.chunks_exact_mut(3) {
            pixel[channel] = table[usize::from(pixel[channel])];
        }
    }
}

fn auto_contrast(histogram: &[u32; 256]) -> Option<[u8; 256]> {
    let low = histogram.iter().position(|count| *count > 0)?;
    let high = histogram.iter().rposition(|count| *count > 0)?;
    if high <= low {
        return None;
    }
    let scale = 255.0 / (high - low) as f64;
    let offset = -(low as f64) * scale;
    Some(std::array::from_fn(|value| {
        (value as f64 * scale + offset) as u8
    }))
}

fn equalize(histogram: &[u32; 256]) -> Option<[u8; 256]> {
    let last = histogram.iter().rev().find(|count| **count > 0)?;
    let step = (histogram.iter().sum::<u32>() - last) / 255;
    if step == 0 {
        return None;
    }
    let mut below = step / 2;
    Some(std::array::from_fn(|value| {
        let new = below / step;
        below += histogram[value];
        new.min(255) as u8
    }))
}

/// Converts a pixel to gray as Pillow's mode `L` does.
fn grey(pixel: &[u8]) -> u8 {
    let [red, green, blue] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
    ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16) as u8
}

/// Interpolates from `base` (factor 0) to `value` (factor 1), extrapolates beyond, and truncates.
fn blend(base: u8, value: u8, factor: f64) -> u8 {
    let (base, value) = (f32::from(base), f32::from(value));
    (base + factor as f32 * (value - base)) as u8
}

/// Averages 3 x 3 pixels, with the center counted five times. Border pixels are unchanged.
fn smoothed(bytes: &[u8], width: usize, height: usize) -> Vec<u8> {
    let mut smooth = bytes.to_vec();
    let stride = 3 * width;
    for y in 1..height.saturating_sub(1) {
        for place in y * stride + 3..(y + 1) * stride - 3 {
            let sum: u32 = [place - stride, place, place + stride]
                .iter()
                .flat_map(|row| [row - 3, *row, row + 3])
                .map(|neighbor| u32::from(bytes[neighbor]))
                .sum();
            let sum = sum + 4 * u32::from(bytes[place]);
            smooth[place] = ((2 * sum + 13) / 26) as u8;
        }
    }
    smooth
}

/// Maps a position in the new image to one in the old: `x = a x' + b y' + c`, `y = d x' + e y' + f`.
type Affine = [f64; 6];

/// Rotates about the center, with coefficients rounded as in Pillow.
fn rotation(degrees: f64, width: usize, height: usize) -> Affine {
    let angle = -degrees.to_radians();
    let rounded = |value: f64| (value * 1e15).round_ties_even() / 1e15;
    let (sin, cos) = (rounded(angle.sin()), rounded(angle.cos()));
    let (x, y) = (width as f64 / 2.0, height as f64 / 2.0);
    [
        cos,
        sin,
        cos * -x + sin * -y + x,
        -sin,
        cos,
        -sin * -x + cos * -y + y,
    ]
}

/// Transforms an image with bilinear interpolation, truncating to bytes.
fn moved(bytes: &[u8], width: usize, height: usize, [a, b, c, d, e, f]: Affine) -> Vec<u8> {
    let mut result = Vec::with_capacity(bytes.len());
    let inside = |place: f64, size: usize| place >= 0.0 && place < size as f64;
    for y in 0..height {
        for x in 0..width {
            let (new_x, new_y) = (x as f64 + 0.5, y as f64 + 0.5);
            let old_x = a * new_x + b * new_y + c;
            let old_y = d * new_x + e * new_y + f;
            if inside(old_x, width) && inside(old_y, height) {
                result.extend(interpolated(bytes, width, height, old_x - 0.5, old_y - 0.5));
            } else {
                result.extend(FILL);
            }
        }
    }
    result
}

fn interpolated(bytes: &[u8], width: usize, height: usize, x: f64, y: f64) -> [u8; 3] {
    let (share_x, share_y) = (x - x.floor(), y - y.floor());
    let clipped = |place: f64, size: usize| place.clamp(0.0, (size - 1) as f64) as usize;
    let (left, right) = (clipped(x.floor(), width), clipped(x.floor() + 1.0, width));
    let (upper, lower) = (clipped(y.floor(), height), clipped(y.floor() + 1.0, height));
    std::array::from_fn(|channel| {
        let at = |x: usize, y: usize| f64::from(bytes[(y * width + x) * 3 + channel]);
        let along = |y: usize| at(left, y) + (at(right, y) - at(left, y)) * share_x;
        (along(upper) + (along(lower) - along(upper)) * share_y) as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::picture::golden;

    /// A low-contrast image, so that AutoContrast and Equalize change it.
    fn source() -> Vec<u8> {
        let picture = golden::picture(21, 17);
        picture.iter().map(|value| 40 + value / 2).collect()
    }

    fn named(name: &str) -> Operation {
        let (kind, strength) = name.split_once(' ').unwrap_or((name, "0"));
        let strength: f64 = strength.parse().unwrap();
        match kind {
            "AutoContrast" => Operation::AutoContrast,
            "Equalize" => Operation::Equalize,
            "Invert" => Operation::Invert,
            "Rotate" => Operation::Rotate(strength),
            "Posterize" => Operation::Posterize(strength as u32),
            "Solarize" => Operation::Solarize(strength as u32),
            "SolarizeAdd" => Operation::SolarizeAdd(strength as u32),
            "Color" => Operation::Color(strength),
            "Contrast" => Operation::Contrast(strength),
            "Brightness" => Operation::Brightness(strength),
            "Sharpness" => Operation::Sharpness(strength),
            "ShearX" => Operation::ShearX(strength),
            "ShearY" => Operation::ShearY(strength),
            "TranslateX" => Operation::TranslateX(strength),
            "TranslateY" => Operation::TranslateY(strength),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn every_operation_equals_pillows_to_the_bit() {
        let mut kinds = std::collections::BTreeSet::new();
        for (name, _, expected) in golden::load("operations.safetensors") {
            let mut bytes = source();
            named(&name).apply(&mut bytes, 21, 17);
            let differing = bytes.iter().zip(&expected).filter(|(a, b)| a != b).count();
            assert_eq!(
                differing,
                0,
                "{name}: {differing} of {} bytes differ",
                bytes.len()
            );
            kinds.insert(name.split(' ').next().unwrap().to_owned());
        }
        assert_eq!(kinds.len(), KINDS);
    }

    #[test]
    fn levels_map_to_strengths_as_in_timm() {
        let at = Operation::at_level;
        assert_eq!(at(3, 9.0, true), Operation::Rotate(-27.0));
        assert_eq!(at(4, 9.0, false), Operation::Posterize(1));
        assert_eq!(at(4, 10.0, false), Operation::Posterize(1));
        assert_eq!(at(5, 9.0, false), Operation::Solarize(26));
        assert_eq!(at(6, 9.0, false), Operation::SolarizeAdd(99));
        assert_eq!(at(9, 5.0, false), Operation::Brightness(1.45));
        assert_eq!(at(9, 10.0, true), Operation::Brightness(0.1));
        assert_eq!(at(13, 10.0, true), Operation::TranslateX(-0.45));
    }

    #[test]
    fn flat_and_tiny_images_keep_their_size() {
        for kind in 0..KINDS {
            for (width, height) in [(1, 1), (2, 1), (1, 3), (4, 4)] {
                let mut bytes = vec![77; width * height * 3];
                Operation::at_level(kind, 10.0, kind % 2 == 0).apply(&mut bytes, width, height);
                assert_eq!(bytes.len(), width * height * 3);
            }
        }
    }
}
