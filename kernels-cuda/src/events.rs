//! Points in the order of a stream, for which work of the other stream can wait.

use crate::error::Result;
use crate::gpu::Gpu;
use crate::machine::{EventId, Stream};

/// All work of a stream up to a point.
pub(crate) struct Event {
    gpu: Gpu,
    id: EventId,
}

impl Event {
    /// The work of a stream so far; none if something failed before.
    pub(crate) fn record(gpu: &Gpu, stream: Stream) -> Option<Self> {
        gpu.check().ok()?;
        match gpu.machine().record(stream) {
            Ok(id) => Some(Self { gpu: gpu.clone(), id }),
            Err(error) => {
                gpu.note(Err(error));
                None
            }
        }
    }

    /// Later work of a stream waits for it. The host does not.
    pub(crate) fn hold_back(&self, stream: Stream) {
        // SAFETY: recorded above, destroyed below.
        self.gpu.note(unsafe { self.gpu.machine().follow(stream, self.id) });
    }

    /// Whether the work is done.
    pub(crate) fn is_done(&self) -> Result<bool> {
        // SAFETY: recorded above, destroyed below.
        unsafe { self.gpu.machine().is_done(self.id) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: recorded above, destroyed once.
        unsafe { self.gpu.machine().destroy(self.id) };
    }
}
