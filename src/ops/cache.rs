//! Weights in the form that an engine's products take, made once and used by all passes until they change.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::backend::flex::FlexTensor;

use super::words::Numerics;

/// The weights of one layer or block in the form that its engine's products take: packed, rounded, or both.
/// Clones share it.
///
/// The cache keeps the tensors it was made from alive: as long as it does, their memory is neither reused nor written
/// in place, so the same memory means the same weights.
#[derive(Clone, Default)]
pub struct WeightCache(Arc<Mutex<Option<Cached>>>);

struct Cached {
    weights: Vec<FlexTensor>,
    numerics: Numerics,
    form: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for WeightCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WeightCache")
    }
}

impl WeightCache {
    /// Drops the weights and their form.
    pub fn clear(&self) {
        *self.slot() = None;
    }

    fn slot(&self) -> MutexGuard<'_, Option<Cached>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The form of these weights, made by `make` if it is not there.
    pub(crate) fn form<F: Send + Sync + 'static>(
        &self,
        weights: Vec<FlexTensor>,
        numerics: Numerics,
        make: impl FnOnce() -> F,
    ) -> Arc<F> {
        let mut slot = self.slot();
        if let Some(cached) = slot.as_ref() {
            let is_same =
                |(a, b): (&FlexTensor, &FlexTensor)| Arc::ptr_eq(&a.data_arc(), &b.data_arc());
            if cached.numerics == numerics
                && cached.weights.iter().zip(&weights).all(is_same)
                && let Ok(form) = Arc::clone(&cached.form).downcast()
            {
                return form;
            }
        }
        // Dropped before the new one is made, so that two are never alive at once.
        *slot = None;
        let form = Arc::new(make());
        *slot = Some(Cached {
            weights,
            numerics,
            form: form.clone(),
        });
        form
    }
}
