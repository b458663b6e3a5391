//! MixUp and CutMix: each image of a batch is blended with its counterpart or receives a patch of it.
//!
//! The counterpart of image `i` is image `n - 1 - i` of the same batch. One mixing ratio applies to the whole batch; it
//! is drawn from the stream of (seed, samples seen).
//! Source: `timm/data/mixup.py`, batch mode (Zhang et al. 2018; Yun et al. 2019).
//! Differs from the reference: labels remain a pair and a weight, from which the loss makes its soft targets.

use std::ops::Range;

use super::mix::{Mix, Patch};
use crate::data::batch::Batch;
use crate::rng::{Rng, Stream};
use crate::settings::{Section, Table, settings};

settings! {
    /// MixUp and CutMix of the images and labels of a batch, as in timm's batch mode.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub struct Mixing(table) {
        /// MixUp alpha: the mixing ratio is drawn from Beta(alpha, alpha). If omitted, MixUp is off.
        pub mixup_alpha: Option<f64> { limits: above(0.0), example: "0.8" },
        /// CutMix alpha: the area ratio is drawn from Beta(alpha, alpha). If omitted, CutMix is off.
        pub cutmix_alpha: Option<f64> { limits: above(0.0), example: "1.0" },
        /// Probability that a batch is mixed.
        pub probability: f64 { limits: within(0.0, 1.0), example: "1.0" },
        /// Probability of CutMix rather than MixUp in a mixed batch. Required if both alphas are set, invalid
        /// otherwise.
        pub switch_probability: Option<f64> { limits: within(0.0, 1.0), example: "0.5" },
    }
    check { check_alphas(table) }
}

fn check_alphas(table: &Table) {
    let alphas = ["mixup_alpha", "cutmix_alpha"].map(|key| table.has(key));
    let has_switch = table.has("switch_probability");
    match alphas {
        [false, false] => {
            let message = "mixing needs `mixup_alpha`, `cutmix_alpha` or both";
            table.problem_with_hint(
                "probability",
                message,
                "to turn mixing off, remove the table",
            );
        }
        [true, true] if !has_switch => {
            table.missing(Mixing::DESCRIPTION.key("switch_probability"));
        }
        _ => {}
    }
    if alphas.contains(&false) && has_switch {
        let message = "`switch_probability` has no effect without both alphas";
        table.problem_with_hint("switch_probability", message, "remove it");
    }
}

impl Mixing {
    /// Records how some rows of a batch are mixed, and sets their second labels and weights.
    ///
    /// `samples_seen` is the position of the run at the first of the rows.
    pub fn apply(
        &self,
        batch: &mut Batch,
        rows: Range<usize>,
        image_size: usize,
        seed: u64,
        samples_seen: u64,
    ) {
        let mut rng = Rng::new(
            seed,
            Stream::Mix {
                position: samples_seen,
            },
        );
        if !rng.chance(self.probability as f32) {
            return;
        }
        let cut = match (self.mixup_alpha, self.cutmix_alpha) {
            (Some(_), Some(_)) => rng.chance(self.switch_probability.unwrap_or(0.5) as f32),
            (None, Some(_)) => true,
            _ => false,
        };
        let Some(alpha) = (if cut {
            self.cutmix_alpha
        } else {
            self.mixup_alpha
        }) else {
            return;
        };
        let share = rng.beta(alpha);
        let (mix, weight) = if cut {
            let patch = Patch::draw(share, image_size, &mut rng);
            let area = patch.area() as f32 / (image_size * image_size) as f32;
            (Mix::Cut(patch), 1.0 - area)
        } else {
            (Mix::Blend(share as f32), share as f32)
        };
        let second = &mut batch.second[rows.clone()];
        for (second, first) in second
            .iter_mut()
            .zip(batch.first[rows.clone()].iter().rev())
        {
            *second = *first;
        }
        batch.weight[rows.clone()].fill(weight);
        batch.mixed.push((rows, mix));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::batch::Planes;

    fn batch(n: usize, size: usize) -> Batch {
        let len = 3 * size * size;
        Batch {
            images: Planes::Floats(
                (0..n)
                    .flat_map(|image| std::iter::repeat_n(image as f32 / n as f32, len))
                    .collect(),
            ),
            mixed: Vec::new(),
            first: (0..n as u32).collect(),
            second: (0..n as u32).collect(),
            weight: vec![1.0; n],
            samples: (0..n as u64).collect(),
            epochs: vec![0; n],
            captions: Vec::new(),
        }
    }

    fn mixing(mixup_alpha: Option<f64>, cutmix_alpha: Option<f64>) -> Mixing {
        Mixing {
            mixup_alpha,
            cutmix_alpha,
            probability: 1.0,
            switch_probability: mixup_alpha.and(cutmix_alpha).map(|_| 0.5),
        }
    }

    /// Each image has one value, so after mixing its mean must be the weighted mean of the values of its two labels.
    #[test]
    fn the_weight_is_the_share_of_the_first_label_in_the_image() {
        for (mixing, n) in [
            (mixing(Some(0.8), None), 4),
            (mixing(None, Some(1.0)), 4),
            (mixing(Some(0.8), Some(1.0)), 5),
        ] {
            for position in 0..40 {
                let mut batch = batch(n, 8);
                mixing.apply(&mut batch, 0..n, 8, 0, position);
                for image in 0..n {
                    let pixels = batch.pixels(8);
                    let values = &pixels[image * 192..][..192];
                    let mean = values.iter().sum::<f32>() / 192.0;
                    let of = |label: u32| label as f32 / n as f32;
                    let weight = batch.weight[image];
                    let expected =
                        weight * of(batch.first[image]) + (1.0 - weight) * of(batch.second[image]);
                    assert!(
                        (mean - expected).abs() < 1e-5,
                        "{mixing:?} {position} {image}"
                    );
                    assert_eq!(batch.second[image], n as u32 - 1 - batch.first[image]);
                }
            }
        }
    }

    #[test]
    fn mixing_is_a_function_of_the_samples_seen() {
        let mixed = |position| {
            let mut batch = batch(4, 8);
            mixing(Some(0.8), Some(1.0)).apply(&mut batch, 0..4, 8, 0, position);
            batch
        };
        assert_eq!(mixed(64), mixed(64));
        assert_ne!(mixed(64), mixed(128));
    }

    #[test]
    fn at_probability_zero_nothing_changes() {
        let mut changed = batch(4, 8);
        let never = Mixing {
            probability: 0.0,
            ..mixing(Some(0.8), Some(1.0))
        };
        never.apply(&mut changed, 0..4, 8, 0, 3);
        assert_eq!(changed, batch(4, 8));
    }

    #[test]
    fn cutmix_is_chosen_with_the_switch_probability() {
        let cut = (0..400)
            .filter(|position| {
                let mut batch = batch(2, 8);
                mixing(Some(0.8), Some(1.0)).apply(&mut batch, 0..2, 8, 0, *position);
                // After CutMix there are only the original values.
                batch
                    .pixels(8)
                    .iter()
                    .all(|value| [0.0, 0.5].contains(value))
            })
            .count();
        // Standard deviation 10. MixUp with a share of 1 looks like CutMix, so the upper bound is a little higher.
        assert!((160..250).contains(&cut), "{cut}");
    }

    #[test]
    fn settings_without_effect_are_refused() {
        let read = |text| crate::settings::read(text, &[], Mixing::read);
        let found = read("mixup_alpha = 0.8\nprobability = 0.5").unwrap();
        assert_eq!(found.mixup_alpha, Some(0.8));
        let written = toml::to_string(&mixing(Some(0.8), Some(1.0))).unwrap();
        assert_eq!(read(&written).unwrap(), mixing(Some(0.8), Some(1.0)));
        for (text, part) in [
            (
                "probability = 1.0",
                "needs `mixup_alpha`, `cutmix_alpha` or both",
            ),
            (
                "cutmix_alpha = 1.0\nprobability = 1.0\nswitch_probability = 0.5",
                "has no effect",
            ),
            (
                "mixup_alpha = 0\nprobability = 1.0",
                "mixup_alpha = 0 must be above 0",
            ),
            (
                "mixup_alpha = 1\ncutmix_alpha = 1\nprobability = 2",
                "`switch_probability` is missing",
            ),
        ] {
            let faults = read(text).unwrap_err();
            let message: String = faults.iter().map(|fault| format!("{fault}\n")).collect();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
