//! The text tower of CLIP and CLIPA: maps rows of token ids to embeddings.
//!
//! Names, shapes and order of the weights are open_clip's. CLIP's tower (Radford et al. 2021) has a causal mask and
//! pools the end token. CLIPA's (Li et al. 2023) has no mask, not even for padding, and pools the last token. f32 only.

use burn::tensor::{Gradients, Tensor};

use super::config::TextConfig;
use crate::error::{Error, Result};
use crate::model::{Parameter, parameter};
use crate::ops::{
    BlockSpec, BlockWeights, Device, Numerics, WeightCache, embed, encoder_block, layer_norm,
    project, take,
};
use crate::rng::{Rng, Stream};

/// A text tower with its weights.
#[derive(Clone, Debug)]
pub struct TextTower {
    config: TextConfig,
    token_embedding: Parameter,
    positional_embedding: Parameter,
    blocks: Vec<Block>,
    norm: [Parameter; 2],
    projection: Parameter,
}

#[derive(Clone, Debug)]
struct Block {
    weights: BlockWeights<Parameter>,
    cache: WeightCache,
}

impl TextTower {
    /// Initializes a tower with random weights from open_clip's distributions; biases are zero.
    ///
    /// Errors: invalid sizes.
    pub fn new(config: &TextConfig, seed: u64, device: &Device) -> Result<Self> {
        let mut tensors = 0;
        Self::with_weights(config, device, |name, shape| {
            tensors += 1;
            // Image models draw from the same purpose, but with a small second key, so the streams differ.
            let rng = Rng::new(seed, Stream::TextWeights { tensor: tensors });
            Ok(initial(config, name, shape, rng))
        })
    }

    /// Builds a tower from the values that `weights` returns for each of open_clip's names and shapes.
    ///
    /// Errors: invalid sizes; the first error of `weights`.
    ///
    /// # Panics
    /// If the number of values does not match the shape.
    pub fn with_weights(
        config: &TextConfig,
        device: &Device,
        mut weights: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let config = config.clone().checked()?;
        let TextConfig { width, hidden, .. } = config;
        let mut tensor = |name: &str, shape: &[usize]| {
            // Position embeddings are added, not multiplied, so they have no weight decay.
            let decays = shape.len() > 1 && name != "positional_embedding";
            let values = weights(name, shape)?;
            Ok(Parameter::new(name, shape, decays, values, device))
        };
        let token_embedding = tensor("token_embedding.weight", &[config.vocabulary, width])?;
        let positional_embedding = tensor("positional_embedding", &[config.context, width])?;
        let mut blocks = Vec::new();
        for index in 0..config.depth {
            let mut part = |name: &str, shape: &[usize]| {
                tensor(&format!("transformer.resblocks.{index}.{name}"), shape)
            };
            blocks.push(Block {
                weights: BlockWeights {
                    norm1_weight: part("ln_1.weight", &[width])?,
                    norm1_bias: part("ln_1.bias", &[width])?,
                    qkv_weight: part("attn.in_proj_weight", &[3 * width, width])?,
                    qkv_bias: part("attn.in_proj_bias", &[3 * width])?,
                    proj_weight: part("attn.out_proj.weight", &[width, width])?,
                    proj_bias: part("attn.out_proj.bias", &[width])?,
                    norm2_weight: part("ln_2.weight", &[width])?,
                    norm2_bias: part("ln_2.bias", &[width])?,
                    fc1_weight: part("mlp.c_fc.weight", &[hidden, width])?,
                    fc1_bias: part("mlp.c_fc.bias", &[hidden])?,
                    fc2_weight: part("mlp.c_proj.weight", &[width, hidden])?,
                    fc2_bias: part("mlp.c_proj.bias", &[width])?,
                },
                cache: WeightCache::default(),
            });
        }
        Ok(Self {
            token_embedding,
            positional_embedding,
            blocks,
            norm: [
                tensor("ln_final.weight", &[width])?,
                tensor("ln_final.bias", &[width])?,
            ],
            projection: tensor("text_projection", &[width, config.embedding])?,
            config,
        })
    }

    /// Returns the configuration.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// Returns the embeddings of rows of token ids, not normalized.
    ///
    /// With a causal mask, tokens after the last pooled one are not computed, since no result depends on them.
    ///
    /// Shapes: `ids` `[n * context]`, n at least 1; the result `[n, embedding]`.
    /// Errors: a length that is not a multiple of the context; ids outside the vocabulary.
    pub fn encode(&self, ids: &[u32]) -> Result<Tensor<2>> {
        let TextConfig {
            context,
            vocabulary,
            width,
            ..
        } = self.config;
        if ids.is_empty() || !ids.len().is_multiple_of(context) {
            let message = format!(
                "got {} ids, expected a multiple of {context}, the tower's context",
                ids.len()
            );
            return Err(Error::input(message).hint("pad short rows with zeros"));
        }
        if let Some(at) = ids.iter().position(|id| *id as usize >= vocabulary) {
            let (row, id) = (at / context, ids[at]);
            let message =
                format!("row {row} has id {id}, but the vocabulary has only {vocabulary} tokens");
            return Err(Error::input(message).hint("use the tokenizer that belongs to this model"));
        }
        let rows = ids.chunks_exact(context);
        let places: Vec<usize> = rows
            .clone()
            .map(|row| self.config.pool.place(row))
            .collect();
        let lengths = rows.clone().map(|row| self.length(row));
        let length = lengths.max().expect("at least one row");
        let count = places.len();
        let used: Vec<u32> = rows.flat_map(|row| &row[..length]).copied().collect();
        let table = self.token_embedding.value.clone();
        let positions = &self.positional_embedding.value;
        let tokens = self.blocks(embed(&used, table, positions, [count, length, width]));
        // The norm acts on each token separately, so only pooled tokens need it.
        let pooled = take(tokens, &places);
        let [weight, bias] = self.norm.each_ref().map(|part| part.value.clone());
        let normed = layer_norm(pooled, weight, bias, self.config.eps);
        Ok(project(
            normed.reshape([count, width]),
            &self.projection.value,
        ))
    }

    /// Returns how many tokens of a row its embedding depends on: with a causal mask, those up to the pooled one.
    pub fn length(&self, row: &[u32]) -> usize {
        match self.config.causal {
            true => 1 + self.config.pool.place(row),
            false => row.len(),
        }
    }

    fn blocks(&self, mut tokens: Tensor<3>) -> Tensor<3> {
        let spec = BlockSpec {
            heads: self.config.heads,
            hidden: self.config.hidden,
            gelu: self.config.gelu,
            eps: self.config.eps,
            causal: self.config.causal,
            numerics: Numerics::F32,
            recompute: false,
        };
        for block in &self.blocks {
            let weights = block.weights.as_ref().map(|weight| weight.value.clone());
            tokens = encoder_block(tokens, &weights, &spec, None, &block.cache);
        }
        tokens
    }

    /// Returns all weights, in open_clip's order.
    pub fn parameters(&self) -> Vec<&Parameter> {
        [&self.token_embedding, &self.positional_embedding]
            .into_iter()
            .chain(self.blocks.iter().flat_map(|block| &block.weights))
            .chain(&self.norm)
            .chain([&self.projection])
            .collect()
    }

    /// Returns all weights mutably, in open_clip's order.
    pub fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        // The packed copies share the weights' memory, which would prevent writing in place.
        self.blocks.iter().for_each(|block| block.cache.clear());
        self.places_of_parameters()
    }

    fn places_of_parameters(&mut self) -> Vec<&mut Parameter> {
        [&mut self.token_embedding, &mut self.positional_embedding]
            .into_iter()
            .chain(self.blocks.iter_mut().flat_map(|block| &mut block.weights))
            .chain(&mut self.norm)
            .chain([&mut self.projection])
            .collect()
    }

    /// Returns a tower with the same weights, tracked for gradients.
    pub fn tracked(&self) -> Self {
        let mut tower = self.clone();
        parameter::track(tower.places_of_parameters());
        tower
    }

    /// Returns the gradients of a tracked tower's weights, in the order of [`Self::parameters`].
    pub fn gradients(&self, gradients: &mut Gradients) -> Vec<Tensor<1>> {
        parameter::gradients_of(self.parameters(), gradients)
    }

    /// Returns the same tower with other values.
    ///
    /// # Panics
    /// If there is not exactly one tensor of the right length for each parameter.
    pub fn with_values(&self, values: impl IntoIterator<Item = Tensor<1>>) -> Self {
        let mut tower = self.clone();
        for block in &mut tower.blocks {
            block.cache = WeightCache::default();
        }
        parameter::replace(tower.places_of_parameters(), values);
        tower
    }
}

/// Returns the initial values of a parameter (open_clip's `init_parameters`).
fn initial(config: &TextConfig, name: &str, shape: &[usize], mut rng: Rng) -> Vec<f32> {
    let count = shape.iter().product();
    let width = (config.width as f32).powf(-0.5);
    let residual = width * (2.0 * config.depth as f32).powf(-0.5);
    let deviation = match name {
        "token_embedding.weight" => 0.02,
        "positional_embedding" => 0.01,
        "text_projection" => width,
        _ if shape.len() == 1 => {
            let factor = name.ends_with(".weight");
            return vec![if factor { 1.0 } else { 0.0 }; count];
        }
        _ if name.ends_with("in_proj_weight") => width,
        _ if name.ends_with("c_fc.weight") => width * 0.5f32.sqrt(),
        _ => residual,
    };
    (0..count).map(|_| rng.normal() * deviation).collect()
}
