//! The learning-rate schedule, as a function of the samples seen in a stage.

use crate::settings::{Table, settings, words};

settings! {
    /// Linear warmup to a peak, then decay until the end of the stage.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Schedule(table) {
        /// Peak learning rate, reached at the end of the warmup.
        pub peak: f64 { limits: above(0.0), example: "5e-4" },
        /// Length of the linear warmup from 0 to `peak`; at most the length of the stage.
        pub warmup_samples: u64 { unit: "samples", example: "10_240" },
        /// Shape of the decay after the warmup.
        pub decay: Decay { example: "\"cosine\"" },
        /// Learning rate at the end of the stage. Only with decay = `cosine`.
        pub end: f64 { limits: at_least(0.0), example: "1e-6" } [= 0.0],
    }
    check { check_end(table, decay, end) }
}

words! {
    /// Shape of the decay after the warmup.
    pub enum Decay {
        /// Half a cosine from `peak` to `end`.
        Cosine = "cosine",
        /// Constant at `peak` until the stage ends.
        Constant = "constant",
    }
}

fn check_end(table: &Table, decay: Option<Decay>, end: Option<f64>) {
    if end.is_some_and(|end| end > 0.0) && decay == Some(Decay::Constant) {
        let message = "end has no effect with decay = `constant`";
        table.problem_with_hint("end", message, "omit `end`, or use decay = \"cosine\"");
    }
}

impl Schedule {
    /// Returns the learning rate of an update in a stage of `total` samples.
    ///
    /// `samples` is the number of samples seen after the update: it includes the update's own, so that the first update
    /// is not wasted on a learning rate of 0.
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
    fn the_learning_rate_warms_up_linearly_and_decays_as_a_cosine() {
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
    fn without_warmup_the_learning_rate_starts_at_the_peak() {
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
