//! Intervals of checkpoints and logged metrics.

use crate::settings::settings;

settings! {
    /// Checkpoints, saved at this interval and at the end of each stage.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Checkpoints(table) {
        /// Samples between checkpoints.
        pub every_samples: u64 { limits: at_least(1.0), unit: "samples", example: "1_281_024" },
        /// Number of recent checkpoints to keep. At least 2, in case the latest is damaged.
        pub keep: u64 { limits: at_least(2.0), unit: "checkpoints", example: "3" },
    }
}

settings! {
    /// Logging of training metrics to the screen, `log.txt` and `metrics.jsonl`.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Log(table) {
        /// Samples between log lines.
        pub every_samples: u64 { limits: at_least(1.0), unit: "samples", example: "102_400" },
    }
}
