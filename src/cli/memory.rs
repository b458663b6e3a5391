//! Refuses work that does not fit into memory.

use super::device::device;
use crate::error::Result;
use crate::image::Preprocessing;
use crate::plan::{Work, batch_memory};
use crate::weights::Loaded;
use crate::{distributed, memory};

/// An error where a batch of images, or `more` numbers kept besides, do not fit into memory.
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
    // The model is in memory already.
    let needed = of_batch - 4.0 * config.parameters(classes, loaded.image_size) as f64;
    let what = format!("a batch of {batch} images of {size} pixels");
    require_memory(&what, needed, "give a smaller --batch or --image-size")?;
    let what = format!("keeping what is to be written of all images of {size} pixels");
    require_memory(
        &what,
        needed + 4.0 * more as f64,
        "take fewer images with --n",
    )
}

/// An error if `needed` bytes are not available to this rank on the CPU; the free memory of GPUs is not known.
pub(crate) fn require_memory(what: &str, needed: f64, hint: &str) -> Result<()> {
    if !device()?.is_cpu() {
        return Ok(());
    }
    memory::require(what, needed, distributed::available_memory(), hint)
}
