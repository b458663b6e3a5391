//! Checks that work fits into memory before it starts.

use super::device::device;
use crate::error::Result;
use crate::image::Preprocessing;
use crate::plan::{Work, batch_memory};
use crate::weights::Loaded;
use crate::{distributed, memory};

/// Returns an error if a batch of images, with or without `more` f32 values kept for output, does not fit into memory.
pub(crate) fn check_memory(
    loaded: &Loaded,
    preprocessing: &Preprocessing,
    batch: usize,
    work: Work,
    more: usize,
) -> Result<()> {
    let (config, classes) = (loaded.model.config(), loaded.model.classes());
    let size = preprocessing.image_size;
    let of_batch = batch_memory(&config, classes, size, batch, work);
    // The model is already in memory.
    let needed = of_batch - 4.0 * config.parameters(classes, loaded.image_size) as f64;
    let what = format!("a batch of {batch} images of {size} pixels");
    require_memory(&what, needed, "use a smaller --batch or --image-size")?;
    let what = format!("keeping the outputs of all images of {size} pixels");
    require_memory(
        &what,
        needed + 4.0 * more as f64,
        "use fewer images with --n",
    )
}

/// Returns an error if `needed` bytes are not available to this rank on the CPU. GPU memory is not checked.
pub(crate) fn require_memory(what: &str, needed: f64, hint: &str) -> Result<()> {
    if !device()?.is_cpu() {
        return Ok(());
    }
    memory::require(what, needed, distributed::available_memory(), hint)
}
