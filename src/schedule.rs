//! The learning rate as a function of the samples seen in a stage. Nothing else knows the schedule.

use crate::settings::{Table, settings, words};

settings! {
    /// Linear warmup to a peak, then a decay to the end of the stage.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Schedule(table) {
        /// Highest learning rate, reached at the end of the warmup.
        pub peak: f64 { limits: above(0.0), example: "5e-4" },
        /// Samples over which the rate rises linearly from 0 to the peak; at most those of the stage.
        pub warmup_samples: u64 { unit: "samples", example: "10_240" },
        /// Course of the rate after the warmup.
        pub decay: Decay { example: "\"cosine\"" },
        /// Learning rate at the end of the stage, with decay = `cosine`.
        pub end: f64 { limits: at_least(0.0), example: "1e-6" } [= 0.0],
    }
    check { check_end(table, decay, end) }
}

words! {
    /// What follows the warmup.
    pub enum Decay {
        /// Half a cosine from the peak to `end`.
        Cosine = "cosine",
        /// The peak until the stage ends.
        Constant = "constant",
    }
}

fn check_end(table: &Table, decay: Option<Decay>, end: Option<f64>) {
    if end.is_some_and(|end| end > 0.0) && decay == Some(Decay::Constant) {
        let message = "end has no effect when decay = `constant`";
        table.problem_with_hint("end", message, "leave out `end`, or use decay = \"cosine\"");
    }
}

impl Schedule {
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
