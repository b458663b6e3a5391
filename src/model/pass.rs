//! How a forward pass is done: arithmetic, masking, drop path, recomputation.

use super::parameter::Parameter;
use super::tokens::Kept;
use crate::ops::{Device, Numerics};
use crate::rng::{Purpose, Rng};

/// Added to the variance in the norms, as in timm's models. Transformers may have another: [`crate::model::VitConfig::norm_eps`].
pub const NORM_EPS: f64 = 1e-6;

/// How one forward pass is done.
#[derive(Clone, Debug)]
pub struct Pass<'a> {
    /// Arithmetic.
    pub numerics: Numerics,
    /// The patches that are seen; all of them if absent. Of a transformer only.
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
            numerics: Numerics::F32,
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
    /// The factors of the `N` branches of block `index` of `depth`, one for each image of a batch: 0 where the
    /// branch is left out, else 1 / (1 - rate).
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
            let mut rng = Rng::new(self.seed, Purpose::DropPath, image, block);
            for factors in &mut factors {
                let left_out = rng.chance(rate);
                factors.push(if left_out { 0.0 } else { 1.0 / (1.0 - rate) });
            }
        }
        factors
    }
}

/// A weight as a model asks for it: decay applies to matrices, not to biases, norms, positions, class token and layer
/// scales.
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
