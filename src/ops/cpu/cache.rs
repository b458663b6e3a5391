//! Weights packed once and used by all passes until they change.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use advxl_kernels::{PackedBlock, PackedConvNext, Precision};
use burn::backend::flex::FlexTensor;

/// The weights of one block as the kernels want them, packed once and used by all passes until
/// the weights change. Clones share it.
///
/// The cache keeps the buffers it packed alive: as long as it does, their memory is neither
/// reused nor written in place, so equal addresses mean equal weights.
pub struct WeightCache<Packed = PackedBlock>(Arc<Mutex<Option<Cached<Packed>>>>);

/// The cache of a ConvNeXt block.
pub type ConvNextCache = WeightCache<PackedConvNext>;

struct Cached<Packed> {
    weights: Vec<FlexTensor>,
    precision: Precision,
    packed: Arc<Packed>,
}

impl<Packed> Default for WeightCache<Packed> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<Packed> Clone for WeightCache<Packed> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<Packed> fmt::Debug for WeightCache<Packed> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WeightCache")
    }
}

impl<Packed> WeightCache<Packed> {
    /// Drops the weights and their packed form.
    pub fn clear(&self) {
        *self.slot() = None;
    }

    fn slot(&self) -> MutexGuard<'_, Option<Cached<Packed>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The packed form of these weights, made by `pack` if it is not there.
    pub(crate) fn packed(
        &self,
        weights: Vec<FlexTensor>,
        precision: Precision,
        pack: impl FnOnce() -> Packed,
    ) -> Arc<Packed> {
        let mut slot = self.slot();
        if let Some(cached) = slot.as_ref() {
            let same =
                |(a, b): (&FlexTensor, &FlexTensor)| a.bytes().as_ptr() == b.bytes().as_ptr();
            if cached.precision == precision && cached.weights.iter().zip(&weights).all(same) {
                return Arc::clone(&cached.packed);
            }
        }
        // Dropped before packing, so that two packed copies are never alive at once.
        *slot = None;
        let packed = Arc::new(pack());
        *slot = Some(Cached {
            weights,
            precision,
            packed: Arc::clone(&packed),
        });
        packed
    }
}
