//! What a run writes while it trains: checkpoints and lines of metrics.

use crate::settings::settings;

settings! {
    /// Checkpoints, at this interval and at the end of each stage.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Checkpoints(table) {
        /// Samples between checkpoints.
        pub every_samples: u64 { limits: at_least(1.0), unit: "samples", example: "1_281_024" },
        /// How many of the latest checkpoints are kept; at least 2, in case the latest is damaged.
        pub keep: u64 { limits: at_least(2.0), unit: "checkpoints", example: "3" },
    }
}

settings! {
    /// Lines of the log and of `metrics.jsonl`.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Log(table) {
        /// Samples between lines.
        pub every_samples: u64 { limits: at_least(1.0), unit: "samples", example: "102_400" },
    }
}
