//! The learning rate as a function of the samples seen in a stage. Nothing else knows the schedule.

use serde::Serialize;

use crate::settings::Table;

/// A linear warmup to a peak, then a decay to the end of the stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Schedule {
    /// Largest learning rate.
    pub peak: f64,
    /// Samples over which the rate rises from 0 to the peak.
    pub warmup_samples: u64,
    /// What follows the warmup.
    pub decay: Decay,
    /// Learning rate at the end of the stage; only for `cosine`.
    pub end: f64,
}

/// What follows the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Half a cosine from the peak to the end.
    Cosine,
    /// The peak to the end of the stage.
    Constant,
}

impl Schedule {
    /// Reads the recipe's table `learning_rate`.
    pub fn read(table: &Table) -> Option<Self> {
        let positive = |rate: &f64| *rate > 0.0;
        let peak = table.required_where("peak", "above 0", positive);
        let warmup_samples = table.required("warmup_samples");
        let decay = table.choice(
            "decay",
            &[("cosine", Decay::Cosine), ("constant", Decay::Constant)],
        );
        let end = table.optional_where("end", "0 or more", |rate: &f64| *rate >= 0.0);
        if end.is_some_and(|end| end > 0.0) && decay == Some(Decay::Constant) {
            let hint = "leave out `end`, or use decay = \"cosine\"".to_owned();
            table.fault(
                "end",
                "end has no effect when decay = `constant`",
                Some(hint),
            );
        }
        let (peak, decay) = (peak?, decay?);
        Some(Self {
            peak,
            warmup_samples: warmup_samples?,
            decay,
            end: end.unwrap_or(0.0),
        })
    }

    /// The rate for the update after `samples` of a stage of `total` samples.
    ///
    /// The warmup counts the update's own samples in, so that the first update is not wasted on a
    /// rate of 0: pass the samples seen after the update.
    pub fn at(&self, samples: u64, total: u64) -> f64 {
        if samples < self.warmup_samples {
            return self.peak * samples as f64 / self.warmup_samples as f64;
        }
        match self.decay {
            Decay::Constant => self.peak,
            Decay::Cosine => {
                let length = total.saturating_sub(self.warmup_samples).max(1);
                let done = (samples - self.warmup_samples) as f64 / length as f64;
                let share = 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
                self.end + (self.peak - self.end) * share
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_linearly_and_falls_as_a_cosine() {
        let schedule = Schedule {
            peak: 1.0,
            warmup_samples: 100,
            decay: Decay::Cosine,
            end: 0.1,
        };
        for (samples, rate) in [
            (25, 0.25),
            (100, 1.0),
            (600, 0.55),
            (1100, 0.1),
            (1200, 0.1),
        ] {
            let found = schedule.at(samples, 1100);
            assert!((found - rate).abs() < 1e-12, "{samples}: {found}");
        }
    }

    #[test]
    fn without_warmup_the_first_rate_is_the_peak() {
        let schedule = Schedule {
            peak: 2.0,
            warmup_samples: 0,
            decay: Decay::Constant,
            end: 0.0,
        };
        assert_eq!(schedule.at(0, 10), 2.0);
        assert_eq!(schedule.at(10, 10), 2.0);
    }
}
