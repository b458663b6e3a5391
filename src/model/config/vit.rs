//! The named sizes of vision transformers and what a recipe may say of a model.

use serde::{Serialize, Serializer};

use super::common::{
    DEEPEST, IMAGENET_MEAN, IMAGENET_STD, LARGEST_PATCH, LARGEST_WIDTH, Stem, grid, linear,
    read_statistics,
};
use crate::model::pass::NORM_EPS;
use crate::model::position::sincos2d;
use crate::ops::Gelu;
use crate::settings::Table;

/// A vision transformer, complete but for its weights.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VitConfig {
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
    /// How pixels become tokens.
    #[serde(skip_serializing_if = "Stem::is_patch")]
    pub stem: Stem,
    /// Whether tokens are normed before the first block, as in CLIP's image towers.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub pre_norm: bool,
    /// The activation of the MLPs: exact as in timm and the paper's released models, the tanh form of
    /// CLIPA's, or the sigmoid form of OpenAI's CLIP.
    #[serde(serialize_with = "gelu_word", skip_serializing_if = "is_erf")]
    pub gelu: Gelu,
    /// Added to the variance in the norms: 1e-6 as in timm, 1e-5 in CLIP's image towers.
    #[serde(skip_serializing_if = "is_usual_eps")]
    pub norm_eps: f64,
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

fn is_usual_eps(eps: &f64) -> bool {
    *eps == NORM_EPS
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
    pub(crate) fn norm(self) -> &'static str {
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
    ("vit_s32", 32, 384, 12, 6, 1536),
    ("vit_b16", 16, 768, 12, 12, 3072),
    ("vit_b32", 32, 768, 12, 12, 3072),
    ("vit_l16", 16, 1024, 24, 16, 4096),
    ("vit_l32", 32, 1024, 24, 16, 4096),
    ("vit_h14", 14, 1280, 32, 16, 5120),
    ("vit_g14", 14, 1408, 40, 16, 6144),
];

impl VitConfig {
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
            stem: Stem::Patch,
            pre_norm: false,
            gelu: Gelu::Erf,
            norm_eps: NORM_EPS,
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
        })
    }

    /// The known sizes.
    pub fn names() -> Vec<&'static str> {
        SIZES.iter().map(|(name, ..)| *name).collect()
    }

    /// What a recipe's table `model` changes of a size.
    pub(crate) fn read(table: &Table, base: Self) -> Option<Self> {
        let count = |key: &str, of_size: usize, largest: usize| {
            let found = table.optional_count(key, 1..=largest);
            found.unwrap_or(of_size)
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
        let before = table.faults();
        let mut model = Self {
            patch: count("patch", base.patch, LARGEST_PATCH),
            width: count("width", base.width, LARGEST_WIDTH),
            depth: count("depth", base.depth, DEEPEST),
            heads: count("heads", base.heads, LARGEST_WIDTH),
            hidden: count("hidden", base.hidden, 16 * LARGEST_WIDTH),
            ..base
        };
        // The size's own number has taken the place of one that cannot be used: what does not fit it is nobody's fault.
        let sizes_are_right = table.faults() == before;
        model = Self {
            class_token: table.required("class_token").unwrap_or(true),
            pool: pool.unwrap_or(model.pool),
            position: position.unwrap_or(model.position),
            position_size: table.optional("position_size"),
            stem: Stem::read(table).unwrap_or_default(),
            pre_norm: table.optional("pre_norm").unwrap_or(model.pre_norm),
            gelu: match table.has("gelu") {
                true => table.choice("gelu", &GELUS)?,
                false => Gelu::Erf,
            },
            norm_eps: table
                .optional_where("norm_eps", "above 0", |eps: &f64| {
                    *eps > 0.0 && eps.is_finite()
                })
                .unwrap_or(model.norm_eps),
            ..model
        };
        if sizes_are_right && !model.width.is_multiple_of(model.heads) {
            let message = format!(
                "heads = {} do not divide width = {}",
                model.heads, model.width
            );
            table.fault("heads", message, None);
        }
        if sizes_are_right && model.position == Position::Sincos2d && !model.width.is_multiple_of(4)
        {
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
        read_statistics(table, &mut model.mean, &mut model.std);
        if model.stem == Stem::Conv && !(model.patch.is_power_of_two() && model.patch > 1) {
            let message = format!(
                "stem = `conv` halves the image several times, which patches of {} pixels are not",
                model.patch
            );
            table.fault(
                "stem",
                message,
                Some("use a size with patches of 16".into()),
            );
        }
        Some(model)
    }

    /// Width of the MLP's hidden layer as a multiple of a token's width. timm and open_clip round the product down, so the
    /// multiple is a little more where it would come out below.
    pub fn mlp_ratio(&self) -> f64 {
        let (hidden, width) = (self.hidden as f64, self.width as f64);
        match (hidden / width * width) as usize == self.hidden {
            true => hidden / width,
            false => (hidden + 0.5) / width,
        }
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

    /// Inputs and outputs of the stem's convolutions of 3 x 3, each of which halves the image; one of 1 x 1 follows.
    /// See [`Stem::Conv`].
    ///
    /// Source: Singh et al. 2023 and their published code, for patches of 16 pixels.
    pub fn stem_layers(&self) -> Vec<[usize; 2]> {
        let outputs = |layer: u32| 48 << layer;
        let inputs = |layer: u32| if layer == 0 { 3 } else { outputs(layer - 1) };
        let layers = 0..self.patch.ilog2();
        layers
            .map(|layer| [inputs(layer), outputs(layer)])
            .collect()
    }

    /// Channels that leave the stem's last convolution of 3 x 3.
    pub fn stem_width(&self) -> usize {
        self.stem_layers().last().map_or(3, |layer| layer[1])
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
        let stem = match self.stem {
            Stem::Patch => linear(3 * patch * patch, width),
            Stem::Conv => {
                let layers = self.stem_layers().into_iter();
                let layer =
                    |[inputs, outputs]: [usize; 2]| linear(9 * inputs, outputs) + 2 * outputs;
                layers.map(layer).sum::<usize>() + linear(self.stem_width(), width)
            }
        };
        let norms = if self.pre_norm { 4 } else { 2 };
        let total =
            stem + class_token + position + depth * block + norms * width + linear(width, classes);
        total as u64
    }

    /// Multiply-adds of one forward pass of an image of which so many patches are kept: matrix products and
    /// attention, as the paper counts them.
    ///
    /// Source: the paper's compute column, reproduced by `tokens = patches + class token`.
    pub fn forward_macs(&self, image_size: usize, patches: usize) -> u64 {
        let wide = |count: usize| count as u128;
        let tokens = wide(patches + usize::from(self.class_token));
        let (width, depth, hidden) = (wide(self.width), wide(self.depth), wide(self.hidden));
        let block = tokens * width * (4 * width + 2 * hidden) + 2 * tokens * tokens * width;
        let embedding = match self.stem {
            Stem::Patch => tokens * width * 3 * wide(self.patch * self.patch),
            Stem::Conv => {
                // The whole image goes through the stem, whatever is kept of it then.
                let layer = |(number, [inputs, outputs]): (usize, [usize; 2])| {
                    (image_size >> (number + 1)).pow(2) * 9 * inputs * outputs
                };
                let layers: usize = self.stem_layers().into_iter().enumerate().map(layer).sum();
                let last = (image_size / self.patch).pow(2) * self.stem_width();
                wide(layers) + wide(last) * width
            }
        };
        u64::try_from(depth * block + embedding).unwrap_or(u64::MAX)
    }
}
