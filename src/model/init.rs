//! Initial weights, drawn from keyed streams: the same seed gives the same model anywhere.

use crate::rng::{Purpose, Rng};

/// Draws one tensor after another.
pub(crate) struct Init {
    seed: u64,
    /// 0 for a whole model, above for a head alone.
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

    /// For a head alone; other numbers than any model begins with.
    pub(crate) fn of_head(seed: u64, draw: u64) -> Self {
        Self {
            seed,
            draw: draw + 1,
            tensors: 0,
        }
    }

    /// The initial values of a weight, by timm's name of it: for transformers as MAE and CLIPA start them, for
    /// ConvNeXts as their authors do.
    pub(crate) fn values(&mut self, name: &str, shape: &[usize]) -> Vec<f32> {
        let count = shape.iter().product();
        match (name, shape) {
            ("cls_token" | "pos_embed" | "head.weight" | "head.fc.weight", _) => {
                self.truncated_normal(0.02, count)
            }
            // Every block of a ConvNeXt begins as the identity (Touvron et al. 2021, CaiT).
            (_, [_]) if name.ends_with("gamma") => vec![1e-6; count],
            // The factors of a norm.
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
        Rng::new(self.seed, Purpose::Init, self.tensors, self.draw)
    }

    /// Xavier's uniform distribution (Glorot and Bengio 2010), as MAE and CLIPA start their
    /// transformers.
    fn xavier(&mut self, inputs: usize, outputs: usize, count: usize) -> Vec<f32> {
        let limit = (6.0 / (inputs + outputs) as f64).sqrt() as f32;
        let mut rng = self.next();
        (0..count).map(|_| rng.between(-limit, limit)).collect()
    }

    /// A normal distribution cut off at two standard deviations.
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
