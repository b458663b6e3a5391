//! Options of a forward pass: precision, masking, drop path, activation checkpointing.

use super::parameter::Parameter;
use super::tokens::Kept;
use crate::ops::{Device, Numerics};
use crate::rng::{Rng, Stream};

/// Epsilon of the normalization layers, as in timm's models. A transformer can override it with
/// [`crate::model::VitConfig::norm_eps`].
pub const NORM_EPS: f64 = 1e-6;

/// Options of one forward pass.
#[derive(Clone, Debug)]
pub struct Pass<'a> {
    /// Precision of the arithmetic.
    pub numerics: Numerics,
    /// The patches that the model sees; all patches if absent. Transformers only.
    pub kept: Option<&'a Kept>,
    /// Random dropping of residual branches; absent in evaluation mode.
    pub drop_path: Option<DropPath>,
    /// Whether to use activation checkpointing: the backward pass recomputes activations block by block instead of
    /// storing them.
    pub recompute: bool,
}

impl Pass<'_> {
    /// Returns the options for evaluation in f32 with all patches.
    pub fn evaluation() -> Self {
        Self {
            numerics: Numerics::F32,
            kept: None,
            drop_path: None,
            recompute: false,
        }
    }
}

/// Stochastic depth (Huang et al. 2016): drops residual branches at random per image, with a probability that grows
/// linearly with depth up to `rate` in the last block (timm's rule).
#[derive(Clone, Debug)]
pub struct DropPath {
    /// Drop probability in the last block.
    pub rate: f64,
    /// Seed of the run.
    pub seed: u64,
    /// Position of the batch's first image in the run.
    pub position: u64,
}

impl DropPath {
    /// Returns the factors of the `N` branches of block `index` of `depth`, one per image of a batch: 0 if the branch
    /// is dropped, else 1 / (1 - rate).
    pub(crate) fn of_block<const N: usize>(
        &self,
        index: usize,
        depth: usize,
        batch: usize,
    ) -> [Vec<f32>; N] {
        let rate = self.rate as f32 * index as f32 / (depth - 1).max(1) as f32;
        let mut factors = [(); N].map(|()| Vec::with_capacity(batch));
        for image in 0..batch as u64 {
            let (image, block) = (self.position + image, index as u64);
            let mut rng = Rng::new(self.seed, Stream::DropPath { image, block });
            for factors in &mut factors {
                let dropped = rng.chance(rate);
                factors.push(if dropped { 0.0 } else { 1.0 / (1.0 - rate) });
            }
        }
        factors
    }
}

/// Requests a weight for a model. Weight decay applies to matrices, not to biases, norms, positions, the class token or
/// layer scales.
pub(crate) fn asked_for<E>(
    weights: &mut impl FnMut(&str, &[usize]) -> Result<Vec<f32>, E>,
    device: &Device,
    name: &str,
    shape: &[usize],
) -> Result<Parameter, E> {
    let decays = shape.len() > 1 && name != "cls_token" && name != "pos_embed";
    let values = weights(name, shape)?;
    Ok(Parameter::new(name, shape, decays, values, device))
}
