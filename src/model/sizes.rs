//! The named sizes of vision transformers and what a recipe may say of a model.

use serde::{Serialize, Serializer};

use super::position::sincos2d;
use crate::fused::Gelu;
use crate::settings::Table;

/// A vision transformer, complete but for its weights.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelConfig {
    /// The named size that the rest began with.
    pub size: String,
    /// Pixels on a side of a patch.
    pub patch: usize,
    /// Width of a token.
    pub width: usize,
    /// Number of encoder blocks.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the hidden layer of the MLP.
    pub hidden: usize,
    /// What the head sees.
    pub pool: Pool,
    /// Whether a class token goes before the patches.
    pub class_token: bool,
    /// How tokens know their place.
    pub position: Position,
    /// The image size whose patches fixed positions are counted in: then a place in the picture has
    /// the same position at any image size. Without it each size counts its own patches 0, 1, 2, as
    /// MAE and CLIPA do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position_size: Option<usize>,
    /// The activation of the MLPs: exact as in timm and the paper's released models, the tanh form of
    /// CLIPA's, or the sigmoid form of OpenAI's CLIP.
    #[serde(serialize_with = "gelu_word", skip_serializing_if = "is_erf")]
    pub gelu: Gelu,
    /// Mean of each channel, subtracted first.
    pub mean: [f64; 3],
    /// Standard deviation of each channel, divided by next.
    pub std: [f64; 3],
}

/// The words for the activations.
pub const GELUS: [(&str, Gelu); 3] = [
    ("erf", Gelu::Erf),
    ("tanh", Gelu::Tanh),
    ("quick", Gelu::Quick),
];

fn gelu_word<S: Serializer>(gelu: &Gelu, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match gelu {
        Gelu::Erf => "erf",
        Gelu::Tanh => "tanh",
        Gelu::Quick => "quick",
    })
}

fn is_erf(gelu: &Gelu) -> bool {
    *gelu == Gelu::Erf
}

/// What the head sees of the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// The mean of the patch tokens, normed after pooling (timm's `fc_norm`).
    Average,
    /// The class token, normed before (timm's `norm`).
    Token,
}

impl Pool {
    /// timm's name of the norm before the head.
    pub(super) fn norm(self) -> &'static str {
        match self {
            Self::Average => "fc_norm",
            Self::Token => "norm",
        }
    }
}

/// How tokens know their place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Position {
    /// Fixed sines and cosines of the two coordinates, made anew for each image size.
    Sincos2d,
    /// Learned, at the image size of the first phase; resampled for others.
    Learned,
}

/// The named sizes: (name, patch, width, depth, heads, hidden).
///
/// Sources: Dosovitskiy et al. 2021 table 1, Touvron et al. 2021 table 1, Zhai et al. 2022 table 2;
/// `vit_micro` is ours, for 32-pixel images.
const SIZES: &[(&str, usize, usize, usize, usize, usize)] = &[
    ("vit_micro", 4, 192, 9, 3, 768),
    ("vit_ti16", 16, 192, 12, 3, 768),
    ("vit_s16", 16, 384, 12, 6, 1536),
    ("vit_b16", 16, 768, 12, 12, 3072),
    ("vit_l16", 16, 1024, 24, 16, 4096),
    ("vit_h14", 14, 1280, 32, 16, 5120),
    ("vit_g14", 14, 1408, 40, 16, 6144),
];

/// ImageNet's channel statistics, which robustness benchmarks use for ImageNet models.
pub const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
/// See [`IMAGENET_MEAN`].
pub const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];

impl ModelConfig {
    /// The model of a named size, with a class token, average pooling and fixed positions.
    pub fn named(size: &str) -> Option<Self> {
        let found = SIZES.iter().find(|(name, ..)| *name == size)?;
        let &(name, patch, width, depth, heads, hidden) = found;
        Some(Self {
            size: name.to_owned(),
            patch,
            width,
            depth,
            heads,
            hidden,
            pool: Pool::Average,
            class_token: true,
            position: Position::Sincos2d,
            position_size: None,
            gelu: Gelu::Erf,
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
        })
    }

    /// The known sizes.
    pub fn names() -> Vec<&'static str> {
        SIZES.iter().map(|(name, ..)| *name).collect()
    }

    /// Reads the recipe's table `model`: a size, and what differs from it.
    pub fn read(table: &Table) -> Option<Self> {
        let sizes: Vec<_> = SIZES.iter().map(|size| (size.0, size.0)).collect();
        let size = table.choice("size", &sizes);
        // Faults of the other keys are found whatever the size is.
        let base = Self::named(size.unwrap_or("vit_micro"))?;
        let count = |key: &str, of_size: usize| {
            table
                .optional_where(key, "at least 1", |n: &usize| *n > 0)
                .unwrap_or(of_size)
        };
        let pool = table.choice(
            "pool",
            &[("average", Pool::Average), ("token", Pool::Token)],
        );
        let positions = [
            ("sincos2d", Position::Sincos2d),
            ("learned", Position::Learned),
        ];
        let position = table.choice("position", &positions);
        let model = Self {
            patch: count("patch", base.patch),
            width: count("width", base.width),
            depth: count("depth", base.depth),
            heads: count("heads", base.heads),
            hidden: count("hidden", base.hidden),
            class_token: table.required("class_token").unwrap_or(true),
            mean: table.optional("mean").unwrap_or(base.mean),
            std: table.optional("std").unwrap_or(base.std),
            pool: pool.unwrap_or(base.pool),
            position: position.unwrap_or(base.position),
            position_size: table.optional("position_size"),
            gelu: match table.has("gelu") {
                true => table.choice("gelu", &GELUS)?,
                false => Gelu::Erf,
            },
            ..base
        };
        if !model.width.is_multiple_of(model.heads) {
            let message = format!(
                "heads = {} do not divide width = {}",
                model.heads, model.width
            );
            table.fault("heads", message, None);
        }
        if model.position == Position::Sincos2d && !model.width.is_multiple_of(4) {
            let message = format!(
                "width = {} must be a multiple of 4 for position = `sincos2d`",
                model.width
            );
            table.fault("width", message, None);
        }
        if let Some(size) = model.position_size {
            if let Err((message, hint)) = model.grid(size) {
                let message = message.replace("image_size", "position_size");
                table.fault("position_size", message, Some(hint));
            }
            if model.position == Position::Learned {
                let message = "position_size has no effect when position = `learned`";
                table.fault("position_size", message, None);
            }
        }
        if model.pool == Pool::Token && !model.class_token {
            let hint = "set class_token = true, or pool = \"average\"".to_owned();
            table.fault("pool", "pool = `token` needs the class token", Some(hint));
        }
        if model.std.iter().any(|std| *std <= 0.0) {
            table.fault("std", "std must be above 0 in every channel", None);
        }
        size.and(Some(model))
    }

    /// Patches along a side of an image; see [`grid`].
    pub fn grid(&self, image_size: usize) -> Result<usize, (String, String)> {
        grid(image_size, self.patch)
    }

    /// Fixed positions of the patches of a grid, flat `[grid * grid, width]`.
    pub fn fixed_positions(&self, grid: usize) -> Vec<f32> {
        let reference = self.position_size.map_or(grid, |size| size / self.patch);
        sincos2d(grid, reference, self.width)
    }

    /// Number of weights for a number of classes, at the image size of learned positions.
    pub fn parameters(&self, classes: usize, image_size: usize) -> u64 {
        let Self {
            patch,
            width,
            depth,
            hidden,
            ..
        } = *self;
        let linear = |inputs: usize, outputs: usize| inputs * outputs + outputs;
        let block = 4 * width
            + linear(width, 3 * width)
            + linear(width, width)
            + linear(width, hidden)
            + linear(hidden, width);
        let class_token = if self.class_token { width } else { 0 };
        let position = match self.position {
            Position::Sincos2d => 0,
            Position::Learned => (image_size / patch).pow(2) * width + class_token,
        };
        let total = linear(3 * patch * patch, width)
            + class_token
            + position
            + depth * block
            + 2 * width
            + linear(width, classes);
        total as u64
    }

    /// Multiply-adds of one forward pass: matrix products and attention, as the paper counts them.
    ///
    /// Source: the paper's compute column, reproduced by `tokens = patches + class token`.
    pub fn forward_macs(&self, tokens: u64) -> u64 {
        let (width, depth, hidden) = (self.width as u64, self.depth as u64, self.hidden as u64);
        let block = tokens * width * (4 * width + 2 * hidden) + 2 * tokens * tokens * width;
        let embedding = tokens * width * 3 * (self.patch * self.patch) as u64;
        depth * block + embedding
    }
}

/// Patches along a side of an image; else what is wrong and a hint.
pub fn grid(image_size: usize, patch: usize) -> Result<usize, (String, String)> {
    if image_size > 0 && image_size.is_multiple_of(patch) {
        return Ok(image_size / patch);
    }
    let below = image_size / patch * patch;
    let hint = match below {
        0 => format!("use {patch}"),
        _ => format!("use {below} or {}", below + patch),
    };
    let message =
        format!("image_size = {image_size} is not a whole number of {patch}-pixel patches");
    Err((message, hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_and_multiply_adds_are_those_of_the_papers_table() {
        for (size, millions, gmacs) in [
            ("vit_b16", 86.6, 17.56),
            ("vit_l16", 304.3, 61.6),
            ("vit_h14", 632.0, 167.3),
            ("vit_g14", 1012.6, 267.0),
        ] {
            let model = ModelConfig {
                position: Position::Learned,
                ..ModelConfig::named(size).unwrap()
            };
            let found = model.parameters(1000, 224) as f64 / 1e6;
            assert!(
                (found - millions).abs() / millions < 1e-3,
                "{size}: {found} M"
            );
            let tokens = (224 / model.patch as u64).pow(2) + 1;
            let found = model.forward_macs(tokens) as f64 / 1e9;
            assert!((found - gmacs).abs() / gmacs < 3e-3, "{size}: {found} GMAC");
        }
    }

    #[test]
    fn an_image_size_between_patches_is_refused_with_its_neighbours() {
        let model = ModelConfig::named("vit_h14").unwrap();
        assert_eq!(model.grid(84), Ok(6));
        let (message, hint) = model.grid(85).unwrap_err();
        assert_eq!(
            message,
            "image_size = 85 is not a whole number of 14-pixel patches"
        );
        assert_eq!(hint, "use 84 or 98");
    }
}
