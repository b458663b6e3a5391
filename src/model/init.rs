//! Initial weights, drawn from keyed streams: the same seed gives the same model on every machine.

use crate::rng::{Rng, Stream};

/// Draws one tensor after another.
pub(crate) struct Init {
    seed: u64,
    /// 0 for a full model, above 0 for a new head only.
    draw: u64,
    tensors: u64,
}

impl Init {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            seed,
            draw: 0,
            tensors: 0,
        }
    }

    /// Initializes only a head, with different values than those of any full model.
    pub(crate) fn of_head(seed: u64, draw: u64) -> Self {
        Self {
            seed,
            draw: draw + 1,
            tensors: 0,
        }
    }

    /// Returns the initial values of a weight, given its timm name: transformers are initialized as in MAE and CLIPA,
    /// ConvNeXts as by their authors.
    pub(crate) fn values(&mut self, name: &str, shape: &[usize]) -> Vec<f32> {
        let count = shape.iter().product();
        match (name, shape) {
            ("cls_token" | "pos_embed" | "head.weight" | "head.fc.weight", _) => {
                self.truncated_normal(0.02, count)
            }
            // Every ConvNeXt block starts close to the identity (Touvron et al. 2021, CaiT).
            (_, [_]) if name.ends_with("gamma") => vec![1e-6; count],
            // The scale of a norm.
            (_, [_]) if name.ends_with("weight") => vec![1.0; count],
            (_, [_]) => vec![0.0; count],
            _ if name.starts_with("stages.") || name.starts_with("stem.") => {
                self.truncated_normal(0.02, count)
            }
            _ => {
                // Queries, keys and values are three square matrices in one tensor.
                let matrices = if name.ends_with("qkv.weight") { 3 } else { 1 };
                self.xavier(count / shape[0], shape[0] / matrices, count)
            }
        }
    }

    fn next(&mut self) -> Rng {
        self.tensors += 1;
        Rng::new(
            self.seed,
            Stream::Weights {
                tensor: self.tensors,
                draw: self.draw,
            },
        )
    }

    /// Xavier uniform initialization (Glorot and Bengio 2010), as MAE and CLIPA use for transformers.
    fn xavier(&mut self, inputs: usize, outputs: usize, count: usize) -> Vec<f32> {
        let limit = (6.0 / (inputs + outputs) as f64).sqrt() as f32;
        let mut rng = self.next();
        (0..count).map(|_| rng.between(-limit, limit)).collect()
    }

    /// Normal distribution truncated at two standard deviations.
    fn truncated_normal(&mut self, std: f32, count: usize) -> Vec<f32> {
        let mut rng = self.next();
        let mut draw = || loop {
            let value = rng.normal();
            if value.abs() <= 2.0 {
                return value * std;
            }
        };
        (0..count).map(|_| draw()).collect()
    }
}
