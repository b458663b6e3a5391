//! The named sizes of ConvNeXts and the recipe keys of their configuration.

use super::common::{
    DEEPEST, IMAGENET_MEAN, IMAGENET_STD, LARGEST_PATCH, LARGEST_WIDTH, Stem, check_mean,
    check_std, grid, linear, read_statistics,
};
use crate::settings::{Kind, Section, Table, settings};

/// Kernel size of the depthwise convolution.
pub const KERNEL: usize = 7;

settings! {
    /// A ConvNeXt (Liu et al. 2022): a named size, with optional overrides.
    #[derive(Clone, Debug, PartialEq)]
    pub struct ConvNextConfig(table, base: Self) {
        /// Named model size. Sets the defaults of `patch`, `widths` and `depths`.
        pub size: String { kind: Kind::Words(&NAMES), example: "\"convnext_base\"" } [=> Some(base.size.clone())],
        /// Patch size of the stem: 4 as published, 1 for small images.
        pub patch: usize { limits: within(1.0, LARGEST_PATCH as f64), unit: "pixels", fallback: OF_SIZE, example: "4" } [or base.patch],
        /// Number of channels in each of the four stages.
        pub widths: [usize; 4] { limits: within(1.0, LARGEST_WIDTH as f64), fallback: OF_SIZE, example: "[96, 192, 384, 768]" } [or base.widths],
        /// Number of blocks in each of the four stages.
        pub depths: [usize; 4] { limits: within(1.0, DEEPEST as f64), fallback: OF_SIZE, example: "[3, 3, 9, 3]" } [or base.depths],
        /// First layer (patch embedding).
        pub stem: Stem { omit_default: true, example: "\"conv\"" } [= Stem::Patch],
        /// Mean of the red, green and blue channels, subtracted from pixels in [0, 1].
        pub mean: [f64; 3] { limits: within(-1.0, 1.0), fallback: "ImageNet's", example: "[0.5, 0.5, 0.5]" } [
            => read_statistics(table, Self::DESCRIPTION.key("mean"), base.mean, check_mean)
        ],
        /// Standard deviation of each channel. Pixels are divided by it after `mean` is subtracted.
        pub std: [f64; 3] { limits: above(0.0).at_most(1.0), fallback: "ImageNet's", example: "[0.5, 0.5, 0.5]" } [
            => read_statistics(table, Self::DESCRIPTION.key("std"), base.std, check_std)
        ],
    }
    verify check
}

/// Default of keys whose value depends on the named size.
const OF_SIZE: &str = "from `size`";

/// The named sizes: (name, width of the first stage, depths). Each stage is twice as wide as the one before.
///
/// Sources: Liu et al. 2022, section 3; atto to nano from `timm/models/convnext.py`, after Woo et al. 2023.
const SIZES: &[(&str, usize, [usize; 4])] = &[
    ("convnext_atto", 40, [2, 2, 6, 2]),
    ("convnext_femto", 48, [2, 2, 6, 2]),
    ("convnext_pico", 64, [2, 2, 6, 2]),
    ("convnext_nano", 80, [2, 2, 8, 2]),
    ("convnext_tiny", 96, [3, 3, 9, 3]),
    ("convnext_small", 96, [3, 3, 27, 3]),
    ("convnext_base", 128, [3, 3, 27, 3]),
    ("convnext_large", 192, [3, 3, 27, 3]),
];

/// The names of the sizes, as choices of the key `size`.
const NAMES: [(&str, &str); SIZES.len()] = {
    let mut names = [("", ""); SIZES.len()];
    let mut place = 0;
    while place < SIZES.len() {
        names[place].0 = SIZES[place].0;
        place += 1;
    }
    names
};

/// Reports combinations of values that are invalid.
fn check(table: &Table, model: &ConvNextConfig) {
    if model.patch == 2 {
        let message =
            "patch = 2 is a different network in timm, whose first stage then halves the image too";
        table.problem_with_hint("patch", message, "use 1 or 4");
    }
    if model.stem == Stem::Conv && ![1, 4].contains(&model.patch) {
        let message = format!("stem = `conv` requires patch = 1 or 4, got {}", model.patch);
        table.problem_with_hint("stem", message, "remove `patch` or `stem`");
    }
}

impl ConvNextConfig {
    /// Returns the model of a named size.
    pub fn named(size: &str) -> Option<Self> {
        let &(name, width, depths) = SIZES.iter().find(|(name, ..)| *name == size)?;
        Some(Self {
            size: name.to_owned(),
            patch: 4,
            widths: [1, 2, 4, 8].map(|times| times * width),
            depths,
            stem: Stem::Patch,
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
        })
    }

    /// Returns the names of all sizes.
    pub fn names() -> impl Iterator<Item = &'static str> {
        SIZES.iter().map(|(name, ..)| *name)
    }

    /// Returns the number of positions along a side after the stem. Each later stage has half as many, rounded down as
    /// in PyTorch.
    ///
    /// Errors: a message and a hint.
    pub fn grid(&self, image_size: usize) -> Result<usize, (String, String)> {
        let least = 8 * self.patch;
        if image_size < least {
            let message = format!(
                "image_size = {image_size} is too small, the last stage needs at least {least} pixels"
            );
            return Err((message, format!("use {least}")));
        }
        grid(image_size, self.patch)
    }

    /// Returns the stem's 3 x 3 convolutions, each as (inputs, outputs, stride); see [`Stem::Conv`].
    ///
    /// Source: Singh et al. 2023 and their published code for patches of 4 pixels: two layers up to `small`, three
    /// for the larger sizes.
    pub fn stem_layers(&self) -> Vec<(usize, usize, usize)> {
        let width = self.widths[0];
        let outputs = match width < 128 {
            true => vec![width / 2, width],
            false => vec![width / 2, width / 2 * 3 / 2, width],
        };
        let inputs = std::iter::once(3).chain(outputs.clone());
        let steps = (0..).map(|layer| if self.patch >> layer > 1 { 2 } else { 1 });
        let layers = inputs.zip(outputs).zip(steps);
        layers
            .map(|((inputs, outputs), step)| (inputs, outputs, step))
            .collect()
    }

    /// Returns the number of weights for a number of classes.
    pub fn parameters(&self, classes: usize) -> u64 {
        let mut total = match self.stem {
            Stem::Patch => linear(3 * self.patch * self.patch, self.widths[0]) + 2 * self.widths[0],
            Stem::Conv => {
                let layers = self.stem_layers().into_iter();
                let layer = |(inputs, outputs, _)| linear(9 * inputs, outputs) + 2 * outputs;
                layers.map(layer).sum()
            }
        };
        for (stage, (width, depth)) in self.widths.iter().zip(self.depths).enumerate() {
            if stage > 0 {
                let before = self.widths[stage - 1];
                total += 2 * before + linear(4 * before, *width);
            }
            let block = linear(KERNEL * KERNEL, *width)
                + 3 * width
                + linear(*width, 4 * width)
                + linear(4 * width, *width);
            total += depth * block;
        }
        (total + 2 * self.widths[3] + linear(self.widths[3], classes)) as u64
    }

    /// Returns the multiply-adds of one forward pass: matrix products and convolutions.
    pub fn forward_macs(&self, image_size: usize) -> u64 {
        let wide = |count: usize| count as u128;
        let mut side = image_size / self.patch;
        let mut total = match self.stem {
            Stem::Patch => wide(side * side * 3 * self.patch * self.patch) * wide(self.widths[0]),
            Stem::Conv => {
                let mut side = image_size;
                let layer = |(inputs, outputs, step): (usize, usize, usize)| {
                    side = side.div_ceil(step);
                    wide(side * side * 9) * wide(inputs * outputs)
                };
                self.stem_layers().into_iter().map(layer).sum()
            }
        };
        for (stage, (width, depth)) in self.widths.iter().zip(self.depths).enumerate() {
            if stage > 0 {
                side /= 2;
                total += wide(side * side * 4) * wide(self.widths[stage - 1] * width);
            }
            let position = KERNEL * KERNEL * width + 8 * width * width;
            total += wide(depth) * wide(side * side) * wide(position);
        }
        u64::try_from(total).unwrap_or(u64::MAX)
    }
}
