//! How a recipe shares its batches among processes.

use crate::settings::{Table, settings, words};

settings! {
    /// How the batches of a run are split over processes.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Parallel(table) {
        /// Number of equal parts (shards) that each batch is split into; a power of two with reduce = `exact`. Any
        /// number of processes that divides it can run the recipe. MixUp and CutMix mix images within a shard only.
        pub shards: u64 { limits: within(1.0, 65536.0), example: "8" },
        /// Order in which gradients are summed.
        pub reduce: Reduce { example: "\"exact\"" },
    }
    check { check_shards(table, shards, reduce) }
}

words! {
    /// Order in which gradients are summed.
    pub enum Reduce {
        /// Shard by shard, then pairwise: bitwise identical for any number of processes.
        Exact = "exact",
        /// All images of a process at once: faster, but equal only up to rounding.
        Fast = "fast",
    }
}

impl Default for Parallel {
    fn default() -> Self {
        Self {
            shards: 1,
            reduce: Reduce::Exact,
        }
    }
}

/// Shards are summed pairwise, so their number is a power of two.
fn check_shards(table: &Table, shards: Option<u64>, reduce: Option<Reduce>) {
    if let (Some(shards), Some(Reduce::Exact)) = (shards, reduce)
        && !shards.is_power_of_two()
    {
        let message =
            format!("shards = {shards} is not a power of two, which reduce = `exact` needs");
        let near = shards.next_power_of_two();
        let hint = format!("use {} or {near}, or reduce = \"fast\"", near / 2);
        table.problem_with_hint("shards", message, hint);
    }
}

impl Parallel {
    /// The number of shards that each of `processes` passes one by one and adds pairwise.
    pub fn local_shards(&self, processes: usize) -> usize {
        match self.reduce {
            Reduce::Exact => self.shards as usize / processes,
            Reduce::Fast => 1,
        }
    }
}
