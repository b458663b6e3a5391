//! `result.json`: what an evaluation found and everything needed to do it again.

use serde_json::{Value, json};

use super::Outcome;
use crate::attack::Pgd;

/// What was evaluated, and how.
pub struct Subject<'a> {
    /// Path of the model.
    pub model: &'a str,
    /// Hash of its weights.
    pub model_hash: &'a str,
    /// The data set as named.
    pub data: &'a str,
    /// Hash of the data set.
    pub data_hash: &'a str,
    /// Pixels on a side.
    pub image_size: usize,
    /// Seed of random starts.
    pub seed: u64,
    /// Arithmetic.
    pub precision: &'a str,
    /// The attacks after clean accuracy.
    pub attacks: &'a [Pgd],
}

/// The content of `result.json`.
pub fn to_json(outcome: &Outcome, subject: &Subject) -> Value {
    let stages = outcome.stages.iter().enumerate().map(|(index, stage)| {
        let settings = index.checked_sub(1).map(|index| &subject.attacks[index]);
        let (low, high) = wilson(stage.robust_count, outcome.robust.len());
        json!({
            "attack": stage.attack,
            "settings": settings,
            "robust_accuracy": outcome.accuracy_after(index),
            "interval_95": [low, high],
            "robust_count": stage.robust_count,
            "forward": stage.forward,
            "backward": stage.backward,
            "seconds": stage.seconds,
        })
    });
    json!({
        "program": format!("advxl {}", env!("CARGO_PKG_VERSION")),
        "model": subject.model,
        "model_hash": subject.model_hash,
        "data": subject.data,
        "data_hash": subject.data_hash,
        "images": outcome.robust.len(),
        "image_size": subject.image_size,
        "seed": subject.seed,
        "precision": subject.precision,
        "stages": stages.collect::<Vec<_>>(),
        "robust": outcome.robust,
        "broken_by": outcome.broken_by,
        "distance": outcome.distance,
    })
}

/// The 95 % interval of a share (Wilson 1927).
pub fn wilson(count: usize, of: usize) -> (f64, f64) {
    if of == 0 {
        return (0.0, 1.0);
    }
    let (z, n) = (1.959964, of as f64);
    let share = count as f64 / n;
    let centre = share + z * z / (2.0 * n);
    let spread = z * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + z * z / n;
    (
        ((centre - spread) / scale).max(0.0),
        ((centre + spread) / scale).min(1.0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_wilsons() {
        // Agresti and Coull 1998: 2 of 10 gives 0.057 to 0.510.
        let (low, high) = wilson(2, 10);
        assert!(
            (low - 0.0567).abs() < 5e-4 && (high - 0.5098).abs() < 5e-4,
            "{low} {high}"
        );
        assert_eq!(wilson(0, 0), (0.0, 1.0));
    }
}
