//! Fuzz targets: every parser of untrusted bytes, with the properties that must hold for any input.
//!
//! A target is a function of bytes that panics if a property is violated. libFuzzer calls it (`main.rs`, started by
//! `scripts/fuzz`), and so does a test, for each file of `corpus/` (`tests/corpus.rs`). Memory and time of each call
//! are limited. `README.md` lists the targets and explains how to fuzz.

use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;

mod model_files;
mod pictures;
mod recipes;
mod scratch;
mod shards;
mod tensors;
mod text;
mod words;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// A parser and its properties.
pub struct Target {
    /// The name of the target and of its folder in `corpus/`.
    pub name: &'static str,
    /// Panics if a property is violated.
    run: fn(&[u8]),
    /// Memory limit for an input of a few kilobytes, in MiB.
    memory: usize,
}

/// Time limit, which no input of a few kilobytes should reach even on a busy machine.
const TIME: Duration = Duration::from_secs(20);

/// All targets. Memory limits are a few times the need of valid files of that size.
pub const TARGETS: &[Target] = &[
    Target::new("jpeg", pictures::jpeg, 64),
    Target::new("picture", pictures::other, 64),
    Target::new("tar", shards::tar, 16),
    Target::new("shard_index", shards::index, 16),
    Target::new("caption_json", shards::caption, 16),
    Target::new("safetensors", tensors::safetensors, 16),
    // The names of a million classes.
    Target::new("npz", tensors::npz, 96),
    Target::new("pytorch", tensors::pytorch, 16),
    Target::new("cifar", tensors::cifar, 16),
    Target::new("checkpoint", tensors::checkpoint, 16),
    Target::new("recipe", recipes::recipe, 16),
    Target::new("progress", recipes::progress, 16),
    Target::new("model_config", model_files::config, 64),
    Target::new("tokenizer", text::tokenizer, 32),
    Target::new("caption", text::caption, 16),
    // The names of a million shards.
    Target::new("words", words::words, 512),
];

/// Returns the target with this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

impl Target {
    const fn new(name: &'static str, run: fn(&[u8]), memory: usize) -> Self {
        Self { name, run, memory }
    }

    /// Runs the target on an input.
    ///
    /// # Panics
    /// If a property is violated, including the limits on memory and time.
    pub fn check(&self, data: &[u8]) {
        ALLOCATOR.reset_peak_usage();
        let (before, started) = (ALLOCATOR.current_usage(), Instant::now());
        (self.run)(data);
        let taken = ALLOCATOR.peak_usage().saturating_sub(before) >> 20;
        let (name, most, length) = (self.name, self.memory, data.len());
        assert!(
            taken <= most,
            "{name}: {length} bytes took {taken} MiB, limit {most} MiB"
        );
        let time = started.elapsed();
        assert!(time < TIME, "{name}: {length} bytes took {time:?}");
    }
}
