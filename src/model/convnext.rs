//! The ConvNeXt (Liu et al. 2022), which the paper compares with transformers (table 3).
//!
//! Names, shapes and order of the weights are timm's. Activations are `[batch, side * side, channels]`. There are no
//! running statistics, so averaged weights need no recalibration.

use burn::tensor::Tensor;

use super::config::common::Stem;
use super::config::convnext::{ConvNextConfig, KERNEL};
use super::conv::{ConvLayer, convolution};
use super::parameter::Parameter;
use super::pass::{NORM_EPS, Pass, asked_for};
use crate::ops::{
    ConvNextSpec, ConvNextWeights, Device, Gelu, PatchSpec, Precision, WeightCache, convnext_block,
    layer_norm, linear, patches, pool,
};

/// A ConvNeXt with its weights.
#[derive(Clone, Debug)]
pub struct ConvNext {
    /// Configuration.
    pub config: ConvNextConfig,
    /// Number of classes.
    pub classes: usize,
    /// Overlapping convolutions of [`Stem::Conv`]; otherwise empty.
    stem: Vec<ConvLayer>,
    /// Non-overlapping convolution and norm of [`Stem::Patch`]; otherwise absent.
    patch: Option<[Parameter; 4]>,
    stages: [Stage; 4],
    norm: [Parameter; 2],
    pub(crate) head: [Parameter; 2],
}

#[derive(Clone, Debug)]
struct Stage {
    /// Norm and convolution, which halve the side; absent in the first stage.
    downsample: Option<Downsample>,
    blocks: Vec<Block>,
}

#[derive(Clone, Debug)]
struct Downsample {
    norm: [Parameter; 2],
    convolution: [Parameter; 2],
}

#[derive(Clone, Debug)]
struct Block {
    weights: ConvNextWeights<Parameter>,
    cache: WeightCache,
}

impl ConvNext {
    /// Builds a model, requesting its weights one by one by timm's name and shape, in timm's order.
    ///
    /// Errors: the first error of `weights`.
    ///
    /// # Panics
    /// If values do not fill their shape.
    pub fn with_weights<E>(
        config: &ConvNextConfig,
        classes: usize,
        device: &Device,
        mut weights: impl FnMut(&str, &[usize]) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        let mut tensor = |name: &str, shape: &[usize]| asked_for(&mut weights, device, name, shape);
        let (patch, first) = (config.patch, config.widths[0]);
        let mut stem = Vec::new();
        let mut patches = None;
        match config.stem {
            Stem::Patch => {
                patches = Some([
                    tensor("stem.0.weight", &[first, 3, patch, patch])?,
                    tensor("stem.0.bias", &[first])?,
                    tensor("stem.1.weight", &[first])?,
                    tensor("stem.1.bias", &[first])?,
                ]);
            }
            Stem::Conv => {
                for (index, (inputs, outputs, step)) in config.stem_layers().into_iter().enumerate()
                {
                    let sizes = [inputs, outputs, step];
                    stem.push(ConvLayer::new("stem.stem", index, sizes, &mut tensor)?);
                }
            }
        }
        let mut stage = |number: usize| Stage::new(config, number, &mut tensor);
        let stages = [stage(0)?, stage(1)?, stage(2)?, stage(3)?];
        let last = config.widths[3];
        Ok(Self {
            config: config.clone(),
            classes,
            stem,
            patch: patches,
            stages,
            norm: [
                tensor("head.norm.weight", &[last])?,
                tensor("head.norm.bias", &[last])?,
            ],
            head: [
                tensor("head.fc.weight", &[classes, last])?,
                tensor("head.fc.bias", &[classes])?,
            ],
        })
    }

    /// Computes the logits of a batch; see [`crate::model::Model::logits`].
    pub fn logits(&self, images: Tensor<4>, pass: &Pass) -> Tensor<2> {
        let (mut x, mut side) = self.embed(images, pass.numerics.products());
        let batch = x.dims()[0];
        let depth = self.config.depths.iter().sum();
        let spec = |width: usize| ConvNextSpec {
            hidden: 4 * width,
            kernel: KERNEL,
            gelu: Gelu::Erf,
            eps: NORM_EPS,
            precision: pass.numerics.products(),
            recompute: pass.recompute,
        };
        let mut index = 0;
        for stage in &self.stages {
            if let Some(Downsample {
                norm,
                convolution: weights,
            }) = &stage.downsample
            {
                let [weight, bias] = norm.each_ref().map(|part| part.value.clone());
                let normed = layer_norm(x, weight, bias, NORM_EPS);
                (x, side) = convolution(normed, side, weights, 2, 0, pass.numerics.products());
            }
            for block in &stage.blocks {
                let path = pass.drop_path.as_ref().map(|path| {
                    let [branch] = path.of_block(index, depth, batch);
                    branch
                });
                let spec = spec(x.dims()[2]);
                let weights = block.weights.as_ref().map(|weight| weight.value.clone());
                x = convnext_block(
                    x,
                    [side, side],
                    &weights,
                    &spec,
                    path.as_deref(),
                    &block.cache,
                );
                index += 1;
            }
        }
        let [weight, bias] = self.norm.each_ref().map(|part| part.value.clone());
        // [batch, positions, width] -> [batch, 1, width]
        let normed = layer_norm(pool(x, 0, side * side), weight, bias, NORM_EPS);
        let [weight, bias] = self.head.each_ref().map(|part| part.value.clone());
        // [batch, 1, classes] -> [batch, classes]
        linear(normed, weight, bias, Precision::F32).reshape([batch, self.classes])
    }

    /// Applies the first layer; returns the activations and their side.
    fn embed(&self, images: Tensor<4>, precision: Precision) -> (Tensor<3>, usize) {
        let image_size = images.dims()[2];
        let spec = |patch: usize| PatchSpec {
            patch,
            mean: self.config.mean,
            std: self.config.std,
        };
        let Some(weights) = &self.patch else {
            return ConvLayer::all(&self.stem, patches(images, &spec(1)), image_size, precision);
        };
        let patch = self.config.patch;
        let [weight, bias, norm_weight, norm_bias] =
            weights.each_ref().map(|part| part.value.clone());
        let x = linear(patches(images, &spec(patch)), weight, bias, precision);
        (
            layer_norm(x, norm_weight, norm_bias, NORM_EPS),
            image_size / patch,
        )
    }

    /// Returns all weights, in timm's order.
    pub fn parameters(&self) -> Vec<&Parameter> {
        self.stem
            .iter()
            .flat_map(ConvLayer::parameters)
            .chain(self.patch.iter().flatten())
            .chain(self.stages.iter().flat_map(Stage::parameters))
            .chain(&self.norm)
            .chain(&self.head)
            .collect()
    }

    pub(crate) fn places_of_parameters(&mut self) -> Vec<&mut Parameter> {
        self.stem
            .iter_mut()
            .flat_map(ConvLayer::parameters_mut)
            .chain(self.patch.iter_mut().flatten())
            .chain(self.stages.iter_mut().flat_map(Stage::parameters_mut))
            .chain(&mut self.norm)
            .chain(&mut self.head)
            .collect()
    }

    /// Drops the packed weights, which clones share.
    pub(crate) fn clear_caches(&self) {
        for block in self.stages.iter().flat_map(|stage| &stage.blocks) {
            block.cache.clear();
        }
    }

    /// Replaces the caches, for a clone whose weights will differ from the original's.
    pub(crate) fn renew_caches(&mut self) {
        for block in self.stages.iter_mut().flat_map(|stage| &mut stage.blocks) {
            block.cache = WeightCache::default();
        }
    }
}

impl Stage {
    fn new<E>(
        config: &ConvNextConfig,
        number: usize,
        tensor: &mut impl FnMut(&str, &[usize]) -> Result<Parameter, E>,
    ) -> Result<Self, E> {
        let width = config.widths[number];
        let mut part =
            |name: &str, shape: &[usize]| tensor(&format!("stages.{number}.{name}"), shape);
        let downsample = match number {
            0 => None,
            _ => {
                let before = config.widths[number - 1];
                Some(Downsample {
                    norm: [
                        part("downsample.0.weight", &[before])?,
                        part("downsample.0.bias", &[before])?,
                    ],
                    convolution: [
                        part("downsample.1.weight", &[width, before, 2, 2])?,
                        part("downsample.1.bias", &[width])?,
                    ],
                })
            }
        };
        let hidden = 4 * width;
        let mut blocks = Vec::with_capacity(config.depths[number]);
        for index in 0..config.depths[number] {
            let mut part =
                |name: &str, shape: &[usize]| part(&format!("blocks.{index}.{name}"), shape);
            blocks.push(Block {
                weights: ConvNextWeights {
                    gamma: part("gamma", &[width])?,
                    conv_dw_weight: part("conv_dw.weight", &[width, 1, KERNEL, KERNEL])?,
                    conv_dw_bias: part("conv_dw.bias", &[width])?,
                    norm_weight: part("norm.weight", &[width])?,
                    norm_bias: part("norm.bias", &[width])?,
                    fc1_weight: part("mlp.fc1.weight", &[hidden, width])?,
                    fc1_bias: part("mlp.fc1.bias", &[hidden])?,
                    fc2_weight: part("mlp.fc2.weight", &[width, hidden])?,
                    fc2_bias: part("mlp.fc2.bias", &[width])?,
                },
                cache: WeightCache::default(),
            });
        }
        Ok(Self { downsample, blocks })
    }

    fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let downsample = self.downsample.iter();
        downsample
            .flat_map(|layer| layer.norm.iter().chain(&layer.convolution))
            .chain(self.blocks.iter().flat_map(|block| &block.weights))
    }

    fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        let downsample = self.downsample.iter_mut();
        downsample
            .flat_map(|layer| layer.norm.iter_mut().chain(&mut layer.convolution))
            .chain(self.blocks.iter_mut().flat_map(|block| &mut block.weights))
    }
}
