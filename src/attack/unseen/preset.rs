//! The published settings of each corruption.
//!
//! Source: the authors' code, github.com/centerforaisafety/adversarial-corruptions: `models/*/*_config.py` (epsilon),
//! `models.sh` (steps and step sizes), `attacks/attack_params_*_default.conf` (the corruptions' constants).

use super::corruption::{Corruption, Strength};
use super::elastic::Elastic;
use super::gabor::Gabor;
use super::glitch::Glitch;
use super::jpeg::Jpeg;
use super::kaleidoscope::{Kaleidoscope, KaleidoscopeSizes};
use super::pixel::Pixel;
use super::renderer::{Extent, Renderer};
use super::snow::{Snow, SnowSizes};
use super::wood::Wood;
use crate::rng::Rng;
use crate::settings::words;

/// Longest shorter side of an image that takes the settings for CIFAR-10. Our choice: the authors have settings for 32 and
/// 224 pixels only.
const LARGEST_SMALL: usize = 64;

words! {
    /// Data set whose published settings are used.
    pub enum Preset {
        /// Settings for images of 32 pixels.
        Cifar10 = "cifar10",
        /// Settings for images of 224 pixels.
        Imagenet = "imagenet",
    }
}

impl Preset {
    /// Returns the settings for images of this size: those for CIFAR-10 up to 64 pixels, else those for ImageNet.
    pub fn of(image_size: usize) -> Self {
        match image_size {
            ..=LARGEST_SMALL => Self::Cifar10,
            _ => Self::Imagenet,
        }
    }

    /// Returns epsilon for each strength, the number of steps and the step size, as written there.
    fn numbers(self, corruption: Corruption) -> ([&'static str; 3], u64, f64) {
        use Corruption::*;
        match (self, corruption) {
            (Self::Imagenet, Gabor) => (["0.02", "0.04", "0.06"], 100, 0.000_312_5),
            (Self::Imagenet, Snow) => (["10", "15", "25"], 100, 0.1),
            (Self::Imagenet, Pixel) => (["3", "5", "10"], 100, 1.0),
            (Self::Imagenet, Jpeg) => (["1/255", "3/255", "6/255"], 80, 0.0024),
            (Self::Imagenet, Kaleidoscope) => (["0.05", "0.1", "0.15"], 90, 0.005),
            (Self::Imagenet, Glitch) => (["0.03", "0.05", "0.07"], 90, 0.005),
            (Self::Imagenet, Wood) => (["0.03", "0.05", "0.1"], 80, 0.005),
            (Self::Imagenet, Elastic) => (["0.1", "0.25", "0.5"], 100, 0.003),
            (Self::Cifar10, Gabor) => (["0.02", "0.03", "0.04"], 80, 0.0025),
            (Self::Cifar10, Snow) => (["3", "4", "5"], 20, 0.2),
            (Self::Cifar10, Pixel) => (["1", "5", "10"], 60, 1.0),
            (Self::Cifar10, Jpeg) => (["1/255", "3/255", "6/255"], 50, 0.0024),
            (Self::Cifar10, Kaleidoscope) => (["0.05", "0.1", "0.15"], 30, 0.005),
            (Self::Cifar10, Glitch) => (["0.03", "0.05", "0.1"], 60, 0.0025),
            (Self::Cifar10, Wood) => (["0.03", "0.05", "0.1"], 70, 0.000_625),
            (Self::Cifar10, Elastic) => (["0.1", "0.25", "0.5"], 30, 0.006),
        }
    }

    /// Returns epsilon.
    pub(super) fn epsilon(self, corruption: Corruption, strength: Strength) -> &'static str {
        let (epsilons, ..) = self.numbers(corruption);
        epsilons[strength as usize]
    }

    /// Returns the number of steps and the step size.
    pub(super) fn steps(self, corruption: Corruption) -> (u64, f64) {
        let (_, steps, size) = self.numbers(corruption);
        (steps, size)
    }

    /// Creates a corruption of one image, with its random draws: points, shapes, kernels.
    pub fn renderer(
        self,
        corruption: Corruption,
        extent: Extent,
        rng: &mut Rng,
    ) -> Box<dyn Renderer> {
        let is_small = self == Self::Cifar10;
        let by_size = |small: usize, large: usize| if is_small { small } else { large };
        match corruption {
            Corruption::Gabor => Box::new(Gabor::draw(extent, by_size(3, 5), rng)),
            Corruption::Snow => {
                let sizes = SnowSizes {
                    flake: by_size(3, 15),
                    spacing: by_size(10, 15),
                    blur: by_size(1, 3),
                };
                Box::new(Snow::draw(extent, sizes, rng))
            }
            Corruption::Pixel => Box::new(Pixel {
                extent,
                size: by_size(4, 16),
            }),
            Corruption::Jpeg => Box::new(Jpeg { extent }),
            Corruption::Kaleidoscope => {
                let sizes = KaleidoscopeSizes {
                    shapes: by_size(5, 40),
                    size: by_size(4, 15),
                    transparency: if is_small { 0.2 } else { 0.1 },
                };
                Box::new(Kaleidoscope::draw(extent, sizes, rng))
            }
            Corruption::Glitch => Box::new(Glitch {
                extent,
                bars: by_size(16, 56),
            }),
            Corruption::Wood => {
                let rings = if is_small { 5.0 } else { 4.0 };
                Box::new(Wood::new(extent, by_size(16, 32), rings))
            }
            Corruption::Elastic => Box::new(Elastic::new(extent, by_size(2, 32))),
        }
    }
}
