//! The vision transformer (Dosovitskiy et al. 2021), in the form that the paper trains.
//!
//! Names, shapes and order of the weights are timm's. Pre-norm blocks, biases everywhere, no
//! dropout, no layer scale.

use std::convert::Infallible;

use burn::tensor::{Device, Gradients, Tensor};

use super::init::Init;
use super::position::resample;
use super::{Kept, ModelConfig, Parameter, Pool, Position};
use crate::fused::{
    BlockSpec, PatchSpec, PathScale, Precision, WeightCache, encoder_block, from_vec, linear,
    patches, plain, to_vec,
};
use crate::rng::{Purpose, Rng};

/// Added to the variance in the norms, as in timm's transformers.
const NORM_EPS: f64 = 1e-6;

/// A vision transformer with its weights.
#[derive(Clone, Debug)]
pub struct Vit {
    /// What it is.
    pub config: ModelConfig,
    /// Number of classes.
    pub classes: usize,
    /// Pixels on a side of the images that learned positions belong to.
    pub image_size: usize,
    class_token: Option<Parameter>,
    position: Option<Parameter>,
    patch_weight: Parameter,
    patch_bias: Parameter,
    blocks: Vec<Block>,
    norm_weight: Parameter,
    norm_bias: Parameter,
    head_weight: Parameter,
    head_bias: Parameter,
}

#[derive(Clone, Debug)]
struct Block {
    /// From `norm1.weight` to `mlp.fc2.bias`.
    weights: [Parameter; 12],
    cache: WeightCache,
}

/// How one forward pass is done.
#[derive(Clone, Debug)]
pub struct Pass<'a> {
    /// Arithmetic of the matrix products.
    pub precision: Precision,
    /// The patches that are seen; all of them if absent.
    pub kept: Option<&'a Kept>,
    /// Residual branches left out at random; none in evaluation mode.
    pub drop_path: Option<DropPath>,
    /// Whether backward passes compute activations anew, block by block, instead of keeping them.
    pub recompute: bool,
}

impl Pass<'_> {
    /// Evaluation mode in f32 with every patch.
    pub fn evaluation() -> Self {
        Self {
            precision: Precision::F32,
            kept: None,
            drop_path: None,
            recompute: false,
        }
    }
}

/// Stochastic depth (Huang et al. 2016): branches left out at random for each image, more of them
/// the deeper the block, up to `rate` in the last (timm's rule).
#[derive(Clone, Debug)]
pub struct DropPath {
    /// Chance in the last block.
    pub rate: f64,
    /// Seed of the run.
    pub seed: u64,
    /// Place in the run of the batch's first image.
    pub position: u64,
}

impl DropPath {
    /// The factors of block `index` of `depth` for a batch.
    fn of_block(&self, index: usize, depth: usize, batch: usize) -> PathScale {
        let rate = self.rate as f32 * index as f32 / (depth - 1).max(1) as f32;
        let mut scale = PathScale {
            attention: Vec::new(),
            mlp: Vec::new(),
        };
        for image in 0..batch as u64 {
            let mut rng = Rng::new(
                self.seed,
                Purpose::DropPath,
                self.position + image,
                index as u64,
            );
            let mut draw = || {
                if rng.chance(rate) {
                    0.0
                } else {
                    1.0 / (1.0 - rate)
                }
            };
            scale.attention.push(draw());
            scale.mlp.push(draw());
        }
        scale
    }
}

impl Vit {
    /// A model with random weights.
    ///
    /// `image_size` is the size that learned positions are made for.
    pub fn new(
        config: &ModelConfig,
        classes: usize,
        image_size: usize,
        seed: u64,
        device: &Device,
    ) -> Self {
        let mut init = Init::new(seed);
        let start = |name: &str, shape: &[usize]| Ok::<_, Infallible>(init.values(name, shape));
        let Ok(model) = Self::with_weights(config, classes, image_size, device, start);
        model
    }

    /// A model whose weights are asked for one by one, by timm's name and shape, in timm's order.
    ///
    /// Each list of values becomes the memory of its tensor.
    ///
    /// Errors: the first that `weights` gives.
    ///
    /// # Panics
    /// When values do not fill their shape.
    pub fn with_weights<E>(
        config: &ModelConfig,
        classes: usize,
        image_size: usize,
        device: &Device,
        mut weights: impl FnMut(&str, &[usize]) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        let ModelConfig {
            patch,
            width,
            hidden,
            ..
        } = *config;
        let mut tensor = |name: &str, shape: &[usize]| {
            let decays = shape.len() > 1 && name != "cls_token" && name != "pos_embed";
            let values = weights(name, shape)?;
            Ok(Parameter::new(name, shape, decays, values, device))
        };
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
        let patch_weight = tensor("patch_embed.proj.weight", &[width, 3, patch, patch])?;
        let patch_bias = tensor("patch_embed.proj.bias", &[width])?;
        let mut blocks = Vec::with_capacity(config.depth);
        for index in 0..config.depth {
            let mut part =
                |name: &str, shape: &[usize]| tensor(&format!("blocks.{index}.{name}"), shape);
            blocks.push(Block {
                weights: [
                    part("norm1.weight", &[width])?,
                    part("norm1.bias", &[width])?,
                    part("attn.qkv.weight", &[3 * width, width])?,
                    part("attn.qkv.bias", &[3 * width])?,
                    part("attn.proj.weight", &[width, width])?,
                    part("attn.proj.bias", &[width])?,
                    part("norm2.weight", &[width])?,
                    part("norm2.bias", &[width])?,
                    part("mlp.fc1.weight", &[hidden, width])?,
                    part("mlp.fc1.bias", &[hidden])?,
                    part("mlp.fc2.weight", &[width, hidden])?,
                    part("mlp.fc2.bias", &[width])?,
                ],
                cache: WeightCache::default(),
            });
        }
        let norm = config.pool.norm();
        Ok(Self {
            config: config.clone(),
            classes,
            image_size,
            class_token,
            position,
            patch_weight,
            patch_bias,
            blocks,
            norm_weight: tensor(&format!("{norm}.weight"), &[width])?,
            norm_bias: tensor(&format!("{norm}.bias"), &[width])?,
            head_weight: tensor("head.weight", &[classes, width])?,
            head_bias: tensor("head.bias", &[classes])?,
        })
    }

    /// The same model with a new, random head for another number of classes.
    pub fn with_new_head(mut self, classes: usize, seed: u64) -> Self {
        let device = self.head_bias.value.device();
        let mut init = Init::new(seed);
        for head in [&mut self.head_weight, &mut self.head_bias] {
            let mut shape = head.shape.clone();
            shape[0] = classes;
            let values = init.values(&head.name, &shape);
            *head = Parameter::new(head.name.clone(), &shape, head.decays, values, &device);
        }
        self.classes = classes;
        self
    }

    /// The logits of a batch.
    ///
    /// Shapes: `images` `[batch, 3, height, width]` with height = width, a multiple of the patch;
    /// the result `[batch, classes]`.
    /// Units: pixels in [0, 1].
    pub fn logits(&self, images: Tensor<4>, pass: &Pass) -> Tensor<2> {
        let grid = images.dims()[2] / self.config.patch;
        let mut tokens = self.embed(images, grid, pass.kept);
        let [batch, count, width] = tokens.dims();
        let spec = BlockSpec {
            heads: self.config.heads,
            hidden: self.config.hidden,
            gelu: self.config.gelu,
            eps: NORM_EPS,
            precision: pass.precision,
            recompute: pass.recompute,
        };
        let depth = self.blocks.len();
        for (index, block) in self.blocks.iter().enumerate() {
            let path = pass
                .drop_path
                .as_ref()
                .map(|path| path.of_block(index, depth, batch));
            let weights = block.weights.each_ref().map(|weight| weight.value.clone());
            tokens = encoder_block(tokens, &weights, &spec, path.as_ref(), &block.cache);
        }
        let prefix = usize::from(self.config.class_token);
        // [batch, tokens, width] -> [batch, 1, width]
        let pooled = match self.config.pool {
            Pool::Average => tokens.narrow(1, prefix, count - prefix).mean_dim(1),
            Pool::Token => tokens.narrow(1, 0, 1),
        };
        let (weight, bias) = (self.norm_weight.value.clone(), self.norm_bias.value.clone());
        let normed = plain::layer_norm(pooled, weight, bias, NORM_EPS);
        let (weight, bias) = (self.head_weight.value.clone(), self.head_bias.value.clone());
        // [batch, 1, classes] -> [batch, classes]
        debug_assert_eq!(normed.dims(), [batch, 1, width]);
        linear(normed, weight, bias).reshape([batch, self.classes])
    }

    /// Patches to tokens, with their places, after the class token.
    ///
    /// Shapes: `images` `[batch, 3, grid * patch, grid * patch]`; the result `[batch, tokens, width]`.
    fn embed(&self, images: Tensor<4>, grid: usize, kept: Option<&Kept>) -> Tensor<3> {
        let ModelConfig { patch, width, .. } = self.config;
        let batch = images.dims()[0];
        let patches = patches(
            images,
            &PatchSpec {
                patch,
                mean: self.config.mean,
                std: self.config.std,
            },
        );
        let (class_place, places) = self.places(grid, &patches.device());
        let (patches, places) = match kept {
            None => (patches, places.unsqueeze()),
            // Patches that are left out are not even embedded.
            Some(kept) => (kept.of_tokens(patches), kept.of_positions(places)),
        };
        let (weight, bias) = (
            self.patch_weight.value.clone(),
            self.patch_bias.value.clone(),
        );
        let tokens = linear(patches, weight, bias) + places;
        match &self.class_token {
            None => tokens,
            Some(token) => {
                let token = token.shaped([1, 1, width]);
                let token = match class_place {
                    Some(place) => token + place.unsqueeze(),
                    None => token,
                };
                Tensor::cat(vec![token.expand([batch, 1, width]), tokens], 1)
            }
        }
    }

    /// Position embeddings of the class token, `[1, width]`, and of the patches, `[grid * grid, width]`.
    fn places(&self, grid: usize, device: &Device) -> (Option<Tensor<2>>, Tensor<2>) {
        let width = self.config.width;
        let Some(position) = &self.position else {
            // The class token's place is zero in the fixed embedding.
            let places = self.config.fixed_positions(grid);
            return (None, from_vec(places, [grid * grid, width], device));
        };
        let prefix = usize::from(self.config.class_token);
        let learned = self.image_size / self.config.patch;
        let all: Tensor<2> = position.shaped([prefix + learned * learned, width]);
        let class_place = (prefix == 1).then(|| all.clone().narrow(0, 0, 1));
        (
            class_place,
            resample(all.narrow(0, prefix, learned * learned), learned, grid),
        )
    }

    /// Positions for images of a size as timm keeps them, flat `[tokens, width]`, class token first.
    pub fn position_table(&self, image_size: usize) -> Vec<f32> {
        let device = self.patch_bias.value.device();
        let (class_place, places) = self.places(image_size / self.config.patch, &device);
        let mut table = match class_place {
            Some(place) => to_vec(place),
            None if self.config.class_token => vec![0.0; self.config.width],
            None => Vec::new(),
        };
        table.extend(to_vec(places));
        table
    }

    /// All weights, in timm's order.
    pub fn parameters(&self) -> Vec<&Parameter> {
        let ends = [
            &self.norm_weight,
            &self.norm_bias,
            &self.head_weight,
            &self.head_bias,
        ];
        self.class_token
            .iter()
            .chain(&self.position)
            .chain([&self.patch_weight, &self.patch_bias])
            .chain(self.blocks.iter().flat_map(|block| &block.weights))
            .chain(ends)
            .collect()
    }

    /// All weights, in timm's order, to be changed.
    pub fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        // The packed forms hold on to the weights' memory, which could then not be written in place.
        for block in &self.blocks {
            block.cache.clear();
        }
        self.places_of_parameters()
    }

    fn places_of_parameters(&mut self) -> Vec<&mut Parameter> {
        let ends = [
            &mut self.norm_weight,
            &mut self.norm_bias,
            &mut self.head_weight,
            &mut self.head_bias,
        ];
        self.class_token
            .iter_mut()
            .chain(&mut self.position)
            .chain([&mut self.patch_weight, &mut self.patch_bias])
            .chain(self.blocks.iter_mut().flat_map(|block| &mut block.weights))
            .chain(ends)
            .collect()
    }

    /// The same weights, recorded for their gradients.
    ///
    /// The model itself is never recorded, so that attacks compute no gradients of weights.
    pub fn tracked(&self) -> Self {
        let mut model = self.clone();
        for parameter in model.places_of_parameters() {
            parameter.value = parameter.value.clone().autodiff().require_grad();
        }
        model
    }

    /// The gradients of a tracked model's weights, in the order of [`Self::parameters`].
    pub fn gradients(&self, gradients: &mut Gradients) -> Vec<Tensor<1>> {
        let of = |parameter: &Parameter| {
            let found = parameter.value.grad_remove(gradients);
            // A weight that the loss does not depend on, such as the class token of a model
            // without blocks.
            found.unwrap_or_else(|| parameter.value.clone().without_autodiff().zeros_like())
        };
        self.parameters().into_iter().map(of).collect()
    }

    /// The same model with other values, such as the average of the weights.
    ///
    /// # Panics
    /// When there is not one tensor of the right length for each parameter.
    pub fn with_values(&self, values: impl IntoIterator<Item = Tensor<1>>) -> Self {
        let mut model = self.clone();
        for block in &mut model.blocks {
            block.cache = WeightCache::default();
        }
        let parameters = model.parameters_mut();
        let values: Vec<_> = values.into_iter().collect();
        assert_eq!(
            parameters.len(),
            values.len(),
            "one tensor for each parameter"
        );
        for (parameter, value) in parameters.into_iter().zip(values) {
            assert_eq!(parameter.value.dims(), value.dims(), "{}", parameter.name);
            parameter.value = value;
        }
        model
    }
}
