//! How a recipe lets processes share its batches.

use serde::Serialize;

use crate::settings::Table;

/// The recipe's table `parallel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Parallel {
    /// Equal parts of every batch, which are dealt to the processes: these may be as many as divide it. Images are mixed within
    /// a part.
    pub shards: u64,
    /// In which order gradients are added up.
    pub reduce: Reduce,
}

/// In which order gradients are added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduce {
    /// Shard by shard, then pairwise: the same bits for every number of processes.
    #[default]
    Exact,
    /// All images of a process at once: the same but for rounding.
    Fast,
}

impl Default for Parallel {
    fn default() -> Self {
        Self {
            shards: 1,
            reduce: Reduce::Exact,
        }
    }
}

impl Parallel {
    /// Reads a table such as `{ shards = 8, reduce = "exact" }`.
    pub fn read(table: &Table) -> Option<Self> {
        let shards = table.count("shards", 1..=1u64 << 16);
        let reduce = table.choice(
            "reduce",
            &[("exact", Reduce::Exact), ("fast", Reduce::Fast)],
        );
        if let (Some(shards), Some(Reduce::Exact)) = (shards, reduce)
            && !shards.is_power_of_two()
        {
            let message = format!("shards = {shards} cannot be added up pairwise");
            let near = shards.next_power_of_two();
            let hint = format!("use {} or {near}, or reduce = \"fast\"", near / 2);
            table.fault("shards", message, Some(hint));
        }
        Some(Self {
            shards: shards?,
            reduce: reduce?,
        })
    }

    /// Whether it is what recipes without the table have.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Shards of a process among so many that are passed one by one and added up pairwise.
    pub fn local_shards(&self, processes: usize) -> usize {
        match self.reduce {
            Reduce::Exact => self.shards as usize / processes,
            Reduce::Fast => 1,
        }
    }
}
