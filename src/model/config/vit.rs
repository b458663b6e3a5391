//! The named sizes of vision transformers and the recipe keys of their configuration.

use super::common::{
    DEEPEST, IMAGENET_MEAN, IMAGENET_STD, LARGEST_PATCH, LARGEST_WIDTH, Stem, check_mean,
    check_std, grid, linear, read_statistics,
};
use crate::model::pass::NORM_EPS;
use crate::model::position::sincos2d;
use crate::ops::Gelu;
use crate::settings::{Kind, Section, Table, settings, words};

settings! {
    /// A vision transformer: a named size, with optional overrides.
    #[derive(Clone, Debug, PartialEq)]
    pub struct VitConfig(table, base: Self) {
        /// Named model size. Sets the defaults of `patch`, `width`, `depth`, `heads` and `hidden`.
        pub size: String { kind: Kind::Words(&NAMES), example: "\"vit_b16\"" } [=> Some(base.size.clone())],
        /// Patch size: the side of a square patch.
        pub patch: usize { limits: within(1.0, LARGEST_PATCH as f64), unit: "pixels", fallback: OF_SIZE, example: "16" } [or base.patch],
        /// Embedding dimension of the tokens.
        pub width: usize { limits: within(1.0, LARGEST_WIDTH as f64), fallback: OF_SIZE, example: "768" } [or base.width],
        /// Number of encoder blocks.
        pub depth: usize { limits: within(1.0, DEEPEST as f64), fallback: OF_SIZE, example: "12" } [or base.depth],
        /// Number of attention heads; must divide `width`.
        pub heads: usize { limits: within(1.0, LARGEST_WIDTH as f64), fallback: OF_SIZE, example: "12" } [or base.heads],
        /// Hidden dimension of the MLPs.
        pub hidden: usize { limits: within(1.0, 16.0 * LARGEST_WIDTH as f64), fallback: OF_SIZE, example: "3072" } [or base.hidden],
        /// How tokens are pooled before the head.
        pub pool: Pool { example: "\"average\"" } [else base.pool],
        /// Prepend a class token. Patches attend to it even with pool = `average`.
        pub class_token: bool { example: "true" } [else base.class_token],
        /// Type of position embedding.
        pub position: Position { example: "\"sincos2d\"" } [else base.position],
        /// Reference image size of `sincos2d`: positions are scaled to its patch grid, so that a location in the image
        /// has the same position at every image size. If omitted, positions count the patches of the actual image size,
        /// as in MAE and CLIPA.
        pub position_size: Option<usize> { unit: "pixels", example: "224" },
        /// First layer (patch embedding).
        pub stem: Stem { omit_default: true, example: "\"conv\"" } [= Stem::Patch],
        /// Normalize tokens before the first block and omit the bias of the patch embedding, as in CLIP's image towers.
        pub pre_norm: bool { omit_default: true, example: "true" } [= false],
        /// Activation function of the MLPs.
        pub gelu: Gelu { omit_default: true, example: "\"tanh\"" } [= Gelu::Erf],
        /// Epsilon of the normalization layers. timm uses 1e-6, CLIP's image towers 1e-5.
        pub norm_eps: f64 { omit_default: true, limits: above(0.0), example: "1e-5" } [= NORM_EPS],
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

words! {
    /// How tokens are pooled before the head.
    pub enum Pool {
        /// Mean of the patch tokens, normalized after pooling (timm's `fc_norm`).
        Average = "average",
        /// Class token, normalized before pooling (timm's `norm`).
        Token = "token",
    }
}

impl Pool {
    /// Returns timm's name of the norm before the head.
    pub(crate) fn norm(self) -> &'static str {
        match self {
            Self::Average => "fc_norm",
            Self::Token => "norm",
        }
    }
}

words! {
    /// Type of position embedding.
    pub enum Position {
        /// Fixed 2D sine-cosine embedding, computed for each image size.
        Sincos2d = "sincos2d",
        /// Trainable embedding, created at the image size of the first phase and resampled for others.
        Learned = "learned",
    }
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
fn check(table: &Table, model: &VitConfig) {
    // An invalid value was replaced by that of the named size, which need not fit the others.
    let are_valid = table.are_valid(&["patch", "width", "depth", "heads", "hidden"]);
    let (width, heads) = (model.width, model.heads);
    if are_valid && !width.is_multiple_of(heads) {
        table.problem(
            "heads",
            format!("heads = {heads} must divide width = {width}"),
        );
    }
    if are_valid && model.position == Position::Sincos2d && !width.is_multiple_of(4) {
        let message = format!("width = {width} must be a multiple of 4 for position = `sincos2d`");
        table.problem("width", message);
    }
    if let Some(size) = model.position_size {
        if let Err((message, hint)) = model.grid(size) {
            let message = message.replace("image_size", "position_size");
            table.problem_with_hint("position_size", message, hint);
        }
        if model.position == Position::Learned {
            let message = "position_size has no effect when position = `learned`";
            table.problem("position_size", message);
        }
    }
    if model.pool == Pool::Token && !model.class_token {
        let hint = "set class_token = true, or pool = \"average\"";
        table.problem_with_hint("pool", "pool = `token` requires a class token", hint);
    }
    if model.stem == Stem::Conv && !(model.patch.is_power_of_two() && model.patch > 1) {
        let message = format!(
            "stem = `conv` halves the image repeatedly: patch must be a power of 2 above 1, got {}",
            model.patch
        );
        table.problem_with_hint("stem", message, "use a size with patch = 16");
    }
}

impl VitConfig {
    /// Returns the model of a named size, with a class token, average pooling and fixed positions.
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

    /// Returns the names of all sizes.
    pub fn names() -> Vec<&'static str> {
        SIZES.iter().map(|(name, ..)| *name).collect()
    }

    /// Returns the hidden dimension of the MLPs as a multiple of the width. timm and open_clip round the product down,
    /// so the multiple is slightly larger where the product would otherwise be too small.
    pub fn mlp_ratio(&self) -> f64 {
        let (hidden, width) = (self.hidden as f64, self.width as f64);
        match (hidden / width * width) as usize == self.hidden {
            true => hidden / width,
            false => (hidden + 0.5) / width,
        }
    }

    /// Returns the number of patches along a side of an image; see [`grid`].
    pub fn grid(&self, image_size: usize) -> Result<usize, (String, String)> {
        grid(image_size, self.patch)
    }

    /// Returns the fixed positions of the patches of a grid, flat `[grid * grid, width]`.
    pub fn fixed_positions(&self, grid: usize) -> Vec<f32> {
        let reference = self.position_size.map_or(grid, |size| size / self.patch);
        sincos2d(grid, reference, self.width)
    }

    /// Returns the inputs and outputs of the stem's 3 x 3 convolutions. Each halves the image; a 1 x 1 convolution
    /// follows. See [`Stem::Conv`].
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

    /// Returns the output channels of the stem's last 3 x 3 convolution.
    pub fn stem_width(&self) -> usize {
        self.stem_layers().last().map_or(3, |layer| layer[1])
    }

    /// Returns the number of weights for a number of classes, at the image size of the learned positions.
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

    /// Returns the multiply-adds of one forward pass of an image, given the number of kept patches: matrix products and
    /// attention, as counted in the paper.
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
                // The whole image passes through the stem, even if only some patches are kept after it.
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
