//! The vision transformer (Dosovitskiy et al. 2021), in the form trained by the AdvXL paper.
//!
//! Names, shapes and order of the weights are timm's. Pre-norm blocks, no dropout, no layer scale.

use burn::tensor::Tensor;

use super::config::common::Stem;
use super::config::vit::{Pool, Position, VitConfig};
use super::conv::ConvLayer;
use super::parameter::Parameter;
use super::pass::{Pass, asked_for};
use super::position::{FixedPlaces, resampled, resampling};
use super::tokens::Kept;
use crate::ops::{
    BlockSpec, BlockWeights, Device, PatchSpec, PathScale, Places, Precision, WeightCache,
    encoder_block, keep, layer_norm, linear, patches, pool, to_vec, tokens, zeros,
};

/// A vision transformer with its weights.
#[derive(Clone, Debug)]
pub struct Vit {
    /// Configuration.
    pub config: VitConfig,
    /// Number of classes.
    pub classes: usize,
    /// Image size of the learned positions, in pixels per side.
    pub image_size: usize,
    class_token: Option<Parameter>,
    position: Option<Parameter>,
    /// Convolutions before the patch embedding; see [`Stem::Conv`].
    stem: Vec<ConvLayer>,
    patch_weight: Parameter,
    /// Absent if a norm follows directly, as in timm and CLIP.
    patch_bias: Option<Parameter>,
    pre_norm: Option<[Parameter; 2]>,
    blocks: Vec<Block>,
    norm: [Parameter; 2],
    pub(crate) head: [Parameter; 2],
    /// Used by models without learned positions.
    fixed: FixedPlaces,
}

#[derive(Clone, Debug)]
struct Block {
    weights: BlockWeights<Parameter>,
    cache: WeightCache,
}

impl Vit {
    /// Builds a model, requesting its weights one by one by timm's name and shape, in timm's order.
    ///
    /// Each list of values becomes the memory of its tensor.
    ///
    /// Errors: the first error of `weights`.
    ///
    /// # Panics
    /// If values do not fill their shape.
    pub fn with_weights<E>(
        config: &VitConfig,
        classes: usize,
        image_size: usize,
        device: &Device,
        mut weights: impl FnMut(&str, &[usize]) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        let VitConfig {
            patch,
            width,
            hidden,
            ..
        } = *config;
        let mut tensor = |name: &str, shape: &[usize]| asked_for(&mut weights, device, name, shape);
        let class_token = match config.class_token {
            true => Some(tensor("cls_token", &[1, 1, width])?),
            false => None,
        };
        let position = match config.position {
            Position::Learned => {
                let tokens = (image_size / patch).pow(2) + usize::from(config.class_token);
                Some(tensor("pos_embed", &[1, tokens, width])?)
            }
            Position::Sincos2d => None,
        };
        let mut stem = Vec::new();
        let (last, patch_shape) = match config.stem {
            Stem::Patch => ("patch_embed.proj".to_owned(), [width, 3, patch, patch]),
            Stem::Conv => {
                let layers = config.stem_layers();
                for (index, [inputs, outputs]) in layers.iter().copied().enumerate() {
                    let prefix = "patch_embed.proj.stem";
                    stem.push(ConvLayer::new(
                        prefix,
                        index,
                        [inputs, outputs, 2],
                        &mut tensor,
                    )?);
                }
                let last = format!("patch_embed.proj.stem.{}", 3 * layers.len());
                (last, [width, config.stem_width(), 1, 1])
            }
        };
        let patch_weight = tensor(&format!("{last}.weight"), &patch_shape)?;
        let patch_bias = match config.pre_norm {
            true => None,
            false => Some(tensor(&format!("{last}.bias"), &[width])?),
        };
        let mut pair = |name: &str| {
            Ok([
                tensor(&format!("{name}.weight"), &[width])?,
                tensor(&format!("{name}.bias"), &[width])?,
            ])
        };
        let pre_norm = match config.pre_norm {
            true => Some(pair("norm_pre")?),
            false => None,
        };
        let mut blocks = Vec::with_capacity(config.depth);
        for index in 0..config.depth {
            let mut part =
                |name: &str, shape: &[usize]| tensor(&format!("blocks.{index}.{name}"), shape);
            blocks.push(Block {
                weights: BlockWeights {
                    norm1_weight: part("norm1.weight", &[width])?,
                    norm1_bias: part("norm1.bias", &[width])?,
                    qkv_weight: part("attn.qkv.weight", &[3 * width, width])?,
                    qkv_bias: part("attn.qkv.bias", &[3 * width])?,
                    proj_weight: part("attn.proj.weight", &[width, width])?,
                    proj_bias: part("attn.proj.bias", &[width])?,
                    norm2_weight: part("norm2.weight", &[width])?,
                    norm2_bias: part("norm2.bias", &[width])?,
                    fc1_weight: part("mlp.fc1.weight", &[hidden, width])?,
                    fc1_bias: part("mlp.fc1.bias", &[hidden])?,
                    fc2_weight: part("mlp.fc2.weight", &[width, hidden])?,
                    fc2_bias: part("mlp.fc2.bias", &[width])?,
                },
                cache: WeightCache::default(),
            });
        }
        let norm = config.pool.norm();
        let norm = [
            tensor(&format!("{norm}.weight"), &[width])?,
            tensor(&format!("{norm}.bias"), &[width])?,
        ];
        Ok(Self {
            config: config.clone(),
            classes,
            image_size,
            class_token,
            position,
            stem,
            patch_weight,
            patch_bias,
            pre_norm,
            blocks,
            norm,
            head: [
                tensor("head.weight", &[classes, width])?,
                tensor("head.bias", &[classes])?,
            ],
            fixed: FixedPlaces::default(),
        })
    }

    /// Computes the logits of a batch.
    ///
    /// Shapes: `images` `[batch, 3, height, width]` with height = width, a multiple of the patch size;
    /// returns `[batch, classes]`.
    /// Units: pixels in [0, 1].
    pub fn logits(&self, images: Tensor<4>, pass: &Pass) -> Tensor<2> {
        let eps = self.config.norm_eps;
        let grid = images.dims()[2] / self.config.patch;
        let mut tokens = self.embed(images, grid, pass);
        if let Some([weight, bias]) = &self.pre_norm {
            tokens = layer_norm(tokens, weight.value.clone(), bias.value.clone(), eps);
        }
        let [batch, count, width] = tokens.dims();
        let spec = BlockSpec {
            heads: self.config.heads,
            hidden: self.config.hidden,
            gelu: self.config.gelu,
            eps,
            causal: false,
            numerics: pass.numerics,
            recompute: pass.recompute,
        };
        let depth = self.blocks.len();
        for (index, block) in self.blocks.iter().enumerate() {
            let path = pass.drop_path.as_ref().map(|path| {
                let [attention, mlp] = path.of_block(index, depth, batch);
                PathScale { attention, mlp }
            });
            let weights = block.weights.as_ref().map(|weight| weight.value.clone());
            tokens = encoder_block(tokens, &weights, &spec, path.as_ref(), &block.cache);
        }
        let prefix = usize::from(self.config.class_token);
        // [batch, tokens, width] -> [batch, 1, width]
        let pooled = match self.config.pool {
            Pool::Average => pool(tokens, prefix, count),
            Pool::Token => pool(tokens, 0, 1),
        };
        let [weight, bias] = self.norm.each_ref().map(|part| part.value.clone());
        let normed = layer_norm(pooled, weight, bias, eps);
        let [weight, bias] = self.head.each_ref().map(|part| part.value.clone());
        // [batch, 1, classes] -> [batch, classes]
        debug_assert_eq!(normed.dims(), [batch, 1, width]);
        linear(normed, weight, bias, Precision::F32).reshape([batch, self.classes])
    }

    /// Embeds the patches, adds position embeddings and prepends the class token.
    ///
    /// Shapes: `images` `[batch, 3, grid * patch, grid * patch]`; returns `[batch, tokens, width]`.
    fn embed(&self, images: Tensor<4>, grid: usize, pass: &Pass) -> Tensor<3> {
        let VitConfig { patch, width, .. } = self.config;
        let image_size = images.dims()[2];
        let spec = PatchSpec {
            // With a stem, each pixel is a position.
            patch: if self.stem.is_empty() { patch } else { 1 },
            mean: self.config.mean,
            std: self.config.std,
        };
        let patches = patches(images, &spec);
        let (patches, _) =
            ConvLayer::all(&self.stem, patches, image_size, pass.numerics.products());
        // Masked patches are dropped before the embedding.
        let kept = pass.kept.map(Kept::rows);
        let patches = match &kept {
            None => patches,
            Some(kept) => keep(patches, kept),
        };
        let weight = self.patch_weight.value.clone();
        let bias = match &self.patch_bias {
            Some(bias) => bias.value.clone(),
            None => zeros([width], &Device::of(&weight)),
        };
        let embedded = linear(patches, weight, bias, pass.numerics);
        let class = self.class_token.as_ref().map(|token| &token.value);
        let places = Places {
            kept,
            ..self.places(grid)
        };
        tokens(embedded, class, &places, pass.numerics)
    }

    /// Returns the position embeddings for a grid of patches.
    fn places(&self, grid: usize) -> Places<'static> {
        let device = Device::of(&self.patch_weight.value);
        let Some(position) = &self.position else {
            return Places {
                table: self
                    .fixed
                    .table(grid, &device, || self.config.fixed_positions(grid)),
                // In the fixed embedding the class token's position is zero.
                has_class_row: false,
                resampling: None,
                kept: None,
            };
        };
        let learned = self.image_size / self.config.patch;
        Places {
            table: position.value.clone(),
            has_class_row: self.config.class_token,
            resampling: (learned != grid).then(|| resampling(learned, grid, &device)),
            kept: None,
        }
    }

    /// Returns the positions for an image size as timm stores them, flat `[tokens, width]`, class token first.
    pub fn position_table(&self, image_size: usize) -> Vec<f32> {
        let (grid, width) = (image_size / self.config.patch, self.config.width);
        let places = self.places(grid);
        let first = usize::from(places.has_class_row) * width;
        let mut rows = to_vec(places.table);
        let of_patches = rows.split_off(first);
        let of_class = match self.config.class_token {
            true if first == 0 => vec![0.0; width],
            _ => rows,
        };
        let of_patches = match places.resampling {
            None => of_patches,
            Some(_) => resampled(&of_patches, self.image_size / self.config.patch, grid),
        };
        [of_class, of_patches].concat()
    }

    /// Resamples learned positions to another image size, which becomes that of the model.
    pub(crate) fn resample_positions(&mut self, image_size: usize) {
        if self.position.is_some() && image_size != self.image_size {
            let (values, width) = (self.position_table(image_size), self.config.width);
            let device = Device::of(&self.patch_weight.value);
            let shape = [1, values.len() / width, width];
            self.position = Some(Parameter::new("pos_embed", &shape, false, values, &device));
        }
        self.image_size = image_size;
    }

    /// Returns all weights, in timm's order.
    pub fn parameters(&self) -> Vec<&Parameter> {
        self.class_token
            .iter()
            .chain(&self.position)
            .chain(self.stem.iter().flat_map(ConvLayer::parameters))
            .chain([&self.patch_weight])
            .chain(&self.patch_bias)
            .chain(self.pre_norm.iter().flatten())
            .chain(self.blocks.iter().flat_map(|block| &block.weights))
            .chain(&self.norm)
            .chain(&self.head)
            .collect()
    }

    pub(crate) fn places_of_parameters(&mut self) -> Vec<&mut Parameter> {
        self.class_token
            .iter_mut()
            .chain(&mut self.position)
            .chain(self.stem.iter_mut().flat_map(ConvLayer::parameters_mut))
            .chain([&mut self.patch_weight])
            .chain(&mut self.patch_bias)
            .chain(self.pre_norm.iter_mut().flatten())
            .chain(self.blocks.iter_mut().flat_map(|block| &mut block.weights))
            .chain(&mut self.norm)
            .chain(&mut self.head)
            .collect()
    }

    /// Drops the packed weights, which clones share.
    pub(crate) fn clear_caches(&self) {
        for block in &self.blocks {
            block.cache.clear();
        }
    }

    /// Replaces the caches, for a clone whose weights will differ from the original's.
    pub(crate) fn renew_caches(&mut self) {
        for block in &mut self.blocks {
            block.cache = WeightCache::default();
        }
    }
}
