//! Fuzz targets: every parser of bytes that come from elsewhere, with what must hold whatever the bytes are.
//!
//! A target is a function of bytes that panics when a promise is broken. libFuzzer calls it (`main.rs`, started by
//! `scripts/fuzz`), and so does a test, for each file of `corpus/` (`tests/corpus.rs`). Around each call memory is
//! held to the target's bound. `README.md` says how to fuzz and what was found.

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

/// A parser and its promises.
pub struct Target {
    /// The name, also that of its folder in `corpus/`.
    pub name: &'static str,
    /// Panics when a promise is broken.
    run: fn(&[u8]),
    /// The most memory that an input of a few kilobytes may take, in MiB.
    memory: usize,
}

/// No input of a few kilobytes takes so long, even on a busy machine.
const TIME: Duration = Duration::from_secs(20);

/// All targets. Bounds of memory are a few times what good files of the size take.
pub const TARGETS: &[Target] = &[
    Target::new("jpeg", pictures::jpeg, 64),
    Target::new("picture", pictures::other, 64),
    Target::new("tar", shards::tar, 16),
    Target::new("shard_index", shards::index, 16),
    Target::new("caption_json", shards::caption, 16),
    Target::new("safetensors", tensors::safetensors, 16),
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

/// The target of a name.
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
    /// When a promise is broken, the bounds on memory and time included.
    pub fn check(&self, data: &[u8]) {
        ALLOCATOR.reset_peak_usage();
        let (before, started) = (ALLOCATOR.current_usage(), Instant::now());
        (self.run)(data);
        let taken = ALLOCATOR.peak_usage().saturating_sub(before) >> 20;
        let (name, most, length) = (self.name, self.memory, data.len());
        assert!(
            taken <= most,
            "{name}: {length} bytes took {taken} MiB, more than {most}"
        );
        let time = started.elapsed();
        assert!(time < TIME, "{name}: {length} bytes took {time:?}");
    }
}
