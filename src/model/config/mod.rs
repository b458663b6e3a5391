//! Model configurations: everything but the weights of a vision transformer or a ConvNeXt.

pub mod common;
pub mod convnext;
pub mod vit;

pub use convnext::ConvNextConfig;
pub use vit::{Pool, Position, VitConfig};

use serde::Serialize;
use serde::ser::SerializeMap;

use crate::error;
use crate::ops::Device;
use crate::settings::{Described, Kind, Section, Table};

use common::Stem;

/// Configuration of a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum ModelConfig {
    /// A vision transformer.
    Vit(VitConfig),
    /// A ConvNeXt.
    ConvNext(ConvNextConfig),
}

impl Described for ModelConfig {
    const KIND: Kind = Kind::Variants(&[
        ("ViT", VitConfig::DESCRIPTION),
        ("ConvNeXt", ConvNextConfig::DESCRIPTION),
    ]);

    fn print<M: SerializeMap>(&self, key: &'static str, map: &mut M) -> Result<(), M::Error> {
        map.serialize_entry(key, self)
    }
}

impl From<VitConfig> for ModelConfig {
    fn from(vit: VitConfig) -> Self {
        Self::Vit(vit)
    }
}

impl From<ConvNextConfig> for ModelConfig {
    fn from(convnext: ConvNextConfig) -> Self {
        Self::ConvNext(convnext)
    }
}

impl ModelConfig {
    /// Checks that a device supports the blocks of the model.
    pub fn check_device(&self, device: &Device) -> error::Result<()> {
        match self {
            Self::Vit(vit) => {
                let (widths, head) = ([vit.width, vit.hidden], vit.width / vit.heads.max(1));
                device.check_block("model", &widths, Some(head))
            }
            Self::ConvNext(convnext) => device.check_block("model", &convnext.widths, None),
        }
    }

    /// Returns the model of a named size.
    pub fn named(size: &str) -> Option<Self> {
        let vit = VitConfig::named(size).map(Self::Vit);
        vit.or_else(|| ConvNextConfig::named(size).map(Self::ConvNext))
    }

    /// Returns the names of all sizes.
    pub fn names() -> Vec<&'static str> {
        let vits = VitConfig::names().into_iter();
        vits.chain(ConvNextConfig::names()).collect()
    }

    /// Reads the recipe table `model`: a named size, with optional overrides.
    pub fn read(table: &Table) -> Option<Self> {
        let names = Self::names()
            .into_iter()
            .map(|name| (name, ""))
            .collect::<Vec<_>>();
        let size = table.word("size", &names);
        // An unknown size is already reported; a default is used to check the other keys and the image sizes too.
        match Self::named(size.unwrap_or("vit_micro"))? {
            Self::Vit(base) => VitConfig::read(table, base).map(Self::Vit),
            Self::ConvNext(base) => ConvNextConfig::read(table, base).map(Self::ConvNext),
        }
    }

    /// Returns the named size that the overrides start from.
    pub fn size(&self) -> &str {
        match self {
            Self::Vit(vit) => &vit.size,
            Self::ConvNext(convnext) => &convnext.size,
        }
    }

    /// Returns the patch size of the first layer.
    pub fn patch(&self) -> usize {
        match self {
            Self::Vit(vit) => vit.patch,
            Self::ConvNext(convnext) => convnext.patch,
        }
    }

    /// Returns the type of the first layer.
    pub fn stem(&self) -> Stem {
        match self {
            Self::Vit(vit) => vit.stem,
            Self::ConvNext(convnext) => convnext.stem,
        }
    }

    /// Returns the mean and standard deviation of each channel.
    pub fn statistics(&self) -> ([f64; 3], [f64; 3]) {
        match self {
            Self::Vit(vit) => (vit.mean, vit.std),
            Self::ConvNext(convnext) => (convnext.mean, convnext.std),
        }
    }

    /// Returns the number of patches of the first layer along a side of an image.
    ///
    /// Errors: a message and a hint.
    pub fn grid(&self, image_size: usize) -> Result<usize, (String, String)> {
        match self {
            Self::Vit(vit) => vit.grid(image_size),
            Self::ConvNext(convnext) => convnext.grid(image_size),
        }
    }

    /// Returns the number of tokens for a number of kept patches, including the class token; `None` for a ConvNeXt.
    pub fn tokens(&self, patches: usize) -> Option<u64> {
        match self {
            Self::Vit(vit) => Some((patches + usize::from(vit.class_token)) as u64),
            Self::ConvNext(_) => None,
        }
    }

    /// Returns the number of weights for a number of classes, at the image size of the learned positions.
    pub fn parameters(&self, classes: usize, image_size: usize) -> u64 {
        match self {
            Self::Vit(vit) => vit.parameters(classes, image_size),
            Self::ConvNext(convnext) => convnext.parameters(classes),
        }
    }

    /// Returns the multiply-adds of one forward pass of an image, given the number of kept patches: matrix products,
    /// convolutions and attention, as counted in the paper.
    pub fn forward_macs(&self, image_size: usize, patches: usize) -> u64 {
        match self {
            Self::Vit(vit) => vit.forward_macs(image_size, patches),
            Self::ConvNext(convnext) => convnext.forward_macs(image_size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::common::IMAGENET_MEAN;
    use crate::model::config::common::IMAGENET_STD;
    use crate::model::config::common::check_mean;
    use crate::model::config::common::check_std;

    #[test]
    fn parameters_and_multiply_adds_are_the_published_ones() {
        // Weights as counted by timm 1.0.31; multiply-adds of the transformers from the paper's table, those of the
        // ConvNeXts from Liu et al. 2022, table 1, with its one decimal.
        for (size, parameters, gmacs) in [
            ("vit_b16", 86_567_656, Some(17.56)),
            ("vit_l16", 304_326_632, Some(61.6)),
            ("vit_h14", 632_045_800, Some(167.3)),
            ("vit_g14", 1_012_611_432, Some(267.0)),
            ("vit_s32", 22_878_952, None),
            ("vit_b32", 88_224_232, None),
            ("convnext_atto", 3_695_520, None),
            ("convnext_femto", 5_217_784, None),
            ("convnext_pico", 9_045_672, None),
            ("convnext_nano", 15_593_560, None),
            ("convnext_tiny", 28_589_128, Some(4.5)),
            ("convnext_small", 50_223_688, Some(8.7)),
            ("convnext_base", 88_591_464, Some(15.4)),
            ("convnext_large", 197_767_336, Some(34.4)),
        ] {
            let mut model = ModelConfig::named(size).unwrap();
            if let ModelConfig::Vit(vit) = &mut model {
                vit.position = Position::Learned;
            }
            // Average pooling has as many norms as timm's class token pooling.
            assert_eq!(model.parameters(1000, 224), parameters, "{size}");
            let patches = model.grid(224).unwrap().pow(2);
            let found = model.forward_macs(224, patches) as f64 / 1e9;
            if let Some(gmacs) = gmacs {
                let close = (found - gmacs).abs() < (3e-3 * gmacs).max(0.05);
                assert!(close, "{size}: {found} GMAC");
            }
        }
    }

    #[test]
    fn statistics_for_pixels_from_0_to_255_are_refused_with_converted_values() {
        assert!(check_mean(&IMAGENET_MEAN).is_ok() && check_std(&IMAGENET_STD).is_ok());
        // A network for byte pixels: x / (1 / 255).
        assert!(check_mean(&[0.0; 3]).is_ok() && check_std(&[1.0 / 255.0; 3]).is_ok());
        let (message, hint) = check_mean(&[123.675, 116.28, 103.53]).unwrap_err();
        assert!(
            message.contains("mean = [123.675, 116.28, 103.53]"),
            "{message}"
        );
        assert!(hint.contains("0.485, 0.456, 0.406"), "{hint}");
        let (_, hint) = check_std(&[58.395, 57.12, 57.375]).unwrap_err();
        assert!(hint.contains("0.229, 0.224, 0.225"), "{hint}");
        assert!(check_std(&[0.2, 0.0, 0.2]).is_err() && check_std(&[f64::NAN; 3]).is_err());
        assert!(check_mean(&[f64::NAN; 3]).is_err());
        let model = |key: &str| {
            let text = format!(
                "size = \"vit_micro\"\nclass_token = true\npool = \"average\"\nposition = \"learned\"\n{key}"
            );
            crate::settings::read(&text, &[], ModelConfig::read)
        };
        assert!(model("mean = [0.5, 0.5, 0.5]").is_ok());
        for key in [
            "mean = [123.675, 116.28, 103.53]",
            "std = [58.395, 57.12, 57.375]",
        ] {
            let faults = model(key).unwrap_err();
            assert_eq!(faults.len(), 1);
            assert!(
                faults[0]
                    .hint
                    .as_ref()
                    .unwrap()
                    .contains("divide it by 255")
            );
        }
    }

    #[test]
    fn an_image_size_between_multiples_is_refused_with_its_neighbors() {
        let model = ModelConfig::named("vit_h14").unwrap();
        assert_eq!(model.grid(84), Ok(6));
        let (message, hint) = model.grid(85).unwrap_err();
        assert_eq!(
            message,
            "image_size = 85 is not a multiple of the patch size 14"
        );
        assert_eq!(hint, "use 84 or 98");
        let model = ModelConfig::named("convnext_tiny").unwrap();
        assert_eq!(model.grid(112), Ok(28));
        let (message, hint) = model.grid(28).unwrap_err();
        assert!(message.contains("at least 32"), "{message}");
        assert_eq!(hint, "use 32");
    }
}
