//! The text tower of CLIP and of CLIPA: rows of token ids to embeddings.
//!
//! Names, shapes and order of the weights are open_clip's. CLIP's tower (Radford et al. 2021) masks what comes after a
//! token and takes the end token; CLIPA's (Li et al. 2023) masks nothing, not even padding, and takes the last one.
//! f32 only.

use burn::tensor::{Gradients, Tensor};

use super::config::TextConfig;
use crate::error::{Error, Result};
use crate::model::{Parameter, parameter};
use crate::ops::{
    BlockSpec, BlockWeights, Device, Numerics, WeightCache, embed, encoder_block, layer_norm,
    project, take,
};
use crate::rng::{Purpose, Rng};

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
    /// A tower with random weights, of open_clip's distributions; biases begin at zero.
    ///
    /// Errors: sizes that no tower can have.
    pub fn new(config: &TextConfig, seed: u64, device: &Device) -> Result<Self> {
        let mut tensors = 0;
        Self::with_weights(config, device, |name, shape| {
            tensors += 1;
            // Image models begin with other numbers of the same purpose, whose second key is small.
            let rng = Rng::new(seed, Purpose::Init, tensors, u64::MAX);
            Ok(initial(config, name, shape, rng))
        })
    }

    /// A tower whose weights are asked for one by one, by open_clip's name and shape.
    ///
    /// Errors: sizes that no tower can have; the first that `weights` gives.
    ///
    /// # Panics
    /// When values do not fill their shape.
    pub fn with_weights(
        config: &TextConfig,
        device: &Device,
        mut weights: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let config = config.clone().checked()?;
        let TextConfig { width, hidden, .. } = config;
        let mut tensor = |name: &str, shape: &[usize]| {
            // Positions are no matrix that a product is taken with.
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

    /// What it is.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// The embeddings of rows of token ids, not normalised.
    ///
    /// With a causal mask, nothing after the last token that is pooled is computed: no result depends on it.
    ///
    /// Shapes: `ids` `[n * context]`, n at least 1; the result `[n, embedding]`.
    /// Errors: other lengths, ids outside the vocabulary.
    pub fn encode(&self, ids: &[u32]) -> Result<Tensor<2>> {
        let TextConfig {
            context,
            vocabulary,
            width,
            ..
        } = self.config;
        if ids.is_empty() || !ids.len().is_multiple_of(context) {
            let message = format!(
                "{} ids are not rows of {context}, the tower's context",
                ids.len()
            );
            return Err(Error::input(message).hint("fill short rows up with zeros"));
        }
        if let Some(at) = ids.iter().position(|id| *id as usize >= vocabulary) {
            let (row, id) = (at / context, ids[at]);
            let message =
                format!("row {row} has the id {id}, and the vocabulary {vocabulary} tokens");
            return Err(Error::input(message).hint("the tokenizer belongs to another model"));
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
        // The norm is one of each token, so that only those that are pooled need it.
        let pooled = take(tokens, &places);
        let [weight, bias] = self.norm.each_ref().map(|part| part.value.clone());
        let normed = layer_norm(pooled, weight, bias, self.config.eps);
        Ok(project(
            normed.reshape([count, width]),
            &self.projection.value,
        ))
    }

    /// How many tokens of a row its embedding depends on: with a causal mask those up to the one that is pooled.
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

    /// All weights, in open_clip's order.
    pub fn parameters(&self) -> Vec<&Parameter> {
        [&self.token_embedding, &self.positional_embedding]
            .into_iter()
            .chain(self.blocks.iter().flat_map(|block| &block.weights))
            .chain(&self.norm)
            .chain([&self.projection])
            .collect()
    }

    /// All weights, in open_clip's order, to be changed.
    pub fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        // The packed forms hold on to the weights' memory, which could then not be written in place.
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

    /// The same weights, recorded for their gradients.
    pub fn tracked(&self) -> Self {
        let mut tower = self.clone();
        parameter::track(tower.places_of_parameters());
        tower
    }

    /// The gradients of a tracked tower's weights, in the order of [`Self::parameters`].
    pub fn gradients(&self, gradients: &mut Gradients) -> Vec<Tensor<1>> {
        parameter::gradients_of(self.parameters(), gradients)
    }

    /// The same tower with other values.
    ///
    /// # Panics
    /// When there is not one tensor of the right length for each parameter.
    pub fn with_values(&self, values: impl IntoIterator<Item = Tensor<1>>) -> Self {
        let mut tower = self.clone();
        for block in &mut tower.blocks {
            block.cache = WeightCache::default();
        }
        parameter::replace(tower.places_of_parameters(), values);
        tower
    }
}

/// The values that training begins with (open_clip's `init_parameters`).
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
