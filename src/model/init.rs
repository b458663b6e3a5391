//! Initial weights, drawn from keyed streams: the same seed gives the same model anywhere.

use crate::rng::{Purpose, Rng};

/// Draws one tensor after another.
pub(super) struct Init {
    seed: u64,
    tensors: u64,
}

impl Init {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, tensors: 0 }
    }

    fn next(&mut self) -> Rng {
        self.tensors += 1;
        Rng::new(self.seed, Purpose::Init, self.tensors, 0)
    }

    /// Xavier's uniform distribution (Glorot and Bengio 2010), as MAE and CLIPA start their
    /// transformers.
    pub(super) fn xavier(&mut self, inputs: usize, outputs: usize, count: usize) -> Vec<f32> {
        let limit = (6.0 / (inputs + outputs) as f64).sqrt() as f32;
        let mut rng = self.next();
        (0..count).map(|_| rng.between(-limit, limit)).collect()
    }

    /// A normal distribution cut off at two standard deviations.
    pub(super) fn truncated_normal(&mut self, std: f32, count: usize) -> Vec<f32> {
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
