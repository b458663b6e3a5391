//! Shared by the configurations of both architectures: stems, limits, normalization statistics.

use crate::settings::{Key, Limits, Table, words};

words! {
    /// First layer, which turns patches into tokens or positions.
    pub enum Stem {
        /// A single convolution whose stride equals its kernel size, as in the original models.
        Patch = "patch",
        /// Overlapping 3 x 3 convolutions with norms and GELUs in between; more robust in small models (Singh et al.
        /// 2023).
        Conv = "conv",
    }
}

/// Maximum width. The limits exceed any real model and are far below the sizes at which counts of weights and
/// multiply-adds overflow.
pub(crate) const LARGEST_WIDTH: usize = 1 << 16;

/// Maximum number of blocks; see [`LARGEST_WIDTH`].
pub(crate) const DEEPEST: usize = 1 << 12;

/// Maximum patch size in pixels; see [`LARGEST_WIDTH`].
pub(crate) const LARGEST_PATCH: usize = 1 << 12;

/// ImageNet's channel mean, which robustness benchmarks use for ImageNet models.
pub const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];

/// ImageNet's channel standard deviation; see [`IMAGENET_MEAN`].
pub const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];

/// Channel mean of OpenAI's CLIP and of most models derived from it.
pub const CLIP_MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];

/// Channel standard deviation of OpenAI's CLIP; see [`CLIP_MEAN`].
pub const CLIP_STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

/// Returns the number of weights of a linear layer.
pub(crate) fn linear(inputs: usize, outputs: usize) -> usize {
    inputs * outputs + outputs
}

/// Returns the number of patches along a side of an image.
///
/// Errors: a message and a hint.
pub fn grid(image_size: usize, patch: usize) -> Result<usize, (String, String)> {
    if image_size > 0 && image_size.is_multiple_of(patch) {
        return Ok(image_size / patch);
    }
    let below = image_size / patch * patch;
    let hint = match below {
        0 => format!("use {patch}"),
        _ => format!("use {below} or {}", below + patch),
    };
    let message = format!("image_size = {image_size} is not a multiple of the patch size {patch}");
    Err((message, hint))
}

/// Checks a channel mean.
///
/// Errors: a message and a hint.
pub fn check_mean(mean: &[f64; 3]) -> Result<(), (String, String)> {
    match mean.iter().all(|mean| mean.abs() <= 1.0) {
        true => Ok(()),
        false => Err(out_of_range("mean", mean)),
    }
}

/// Checks a channel standard deviation.
///
/// Errors: a message and a hint.
pub fn check_std(std: &[f64; 3]) -> Result<(), (String, String)> {
    if !std.iter().all(|std| *std > 0.0) {
        let message = format!("std = {std:?} must be above 0 in every channel");
        return Err((message, "ImageNet's is 0.229, 0.224, 0.225".to_owned()));
    }
    match std.iter().all(|std| *std <= 1.0) {
        true => Ok(()),
        false => Err(out_of_range("std", std)),
    }
}

/// Returns the message and hint for statistics out of range. Some programs state them for pixels from 0 to 255.
pub(crate) fn out_of_range(what: &str, found: &[f64; 3]) -> (String, String) {
    let message = format!("{what} = {found:?} is out of range for pixels in [0, 1]");
    let of_bytes = found.iter().all(|value| value.abs() <= 255.0);
    let hint = match of_bytes {
        true => {
            let [r, g, b] = found.map(|value| (value / 255.0 * 1e4).round() / 1e4);
            format!("for pixels from 0 to 255, divide it by 255, which gives {r}, {g}, {b}")
        }
        false => {
            "ImageNet's mean is 0.485, 0.456, 0.406 and its std 0.229, 0.224, 0.225".to_owned()
        }
    };
    (message, hint)
}

/// Check of a mean or a standard deviation.
type Statistics = fn(&[f64; 3]) -> Result<(), (String, String)>;

/// Reads `mean` or `std`, whose checks have specific hints.
pub(crate) fn read_statistics(
    table: &Table,
    key: &Key,
    of_size: [f64; 3],
    check: Statistics,
) -> Option<[f64; 3]> {
    if !table.has(key.name) {
        return Some(of_size);
    }
    // `check` enforces the limits of the declaration, with more specific messages.
    let key_without_limits = Key {
        limits: Limits::NONE,
        ..*key
    };
    let found = table.value(&key_without_limits)?;
    if let Err((message, hint)) = check(&found) {
        table.problem_with_hint(key.name, message, hint);
    }
    Some(found)
}
