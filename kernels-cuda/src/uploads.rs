//! Images that cross the bus while the GPU computes.
//!
//! They go to memory of their own, on a stream of their own. Events order the two streams: the kernel that reads the bytes waits
//! for them, and the next bytes wait for that kernel.

use std::sync::{Arc, Mutex};

use crate::events::Event;
use crate::gpu::{Fresh, Gpu};
use crate::machine::Stream;
use crate::mixing;
use crate::values::Values;

/// Sends images ahead of the work that uses them.
#[derive(Clone)]
pub struct Uploads {
    gpu: Gpu,
    /// Memory that was read, and when: used again.
    read: Arc<Mutex<Vec<Place>>>,
}

struct Place {
    memory: Fresh,
    read: Option<Event>,
}

impl Uploads {
    /// To a GPU.
    pub fn new(gpu: &Gpu) -> Self {
        Self { gpu: gpu.clone(), read: Arc::default() }
    }

    /// Starts a copy and returns once the bytes have been read. The GPU keeps computing meanwhile.
    pub fn send(&self, bytes: &[u8]) -> Upload {
        let memory = self.place(bytes.len());
        if let Some(memory) = &memory {
            // SAFETY: as large as the bytes, and whoever read it before is waited for.
            unsafe { self.gpu.send_on(Stream::Upload, bytes, memory.at()) };
        }
        let sent = Event::record(&self.gpu, Stream::Upload);
        Upload { of: self.clone(), memory, sent, len: bytes.len() }
    }

    fn place(&self, len: usize) -> Option<Fresh> {
        let mut read = self.read.lock().expect("not poisoned");
        // Images of another size come with another phase.
        read.retain(|place| place.memory.size() >= len);
        if let Some(place) = read.pop() {
            if let Some(event) = &place.read {
                event.hold_back(Stream::Upload);
            }
            return Some(place.memory);
        }
        drop(read);
        self.gpu.take_fresh(len).map_err(|error| self.gpu.note(Err(error))).ok()
    }
}

/// Images on their way.
pub struct Upload {
    of: Uploads,
    memory: Option<Fresh>,
    sent: Option<Event>,
    len: usize,
}

impl Upload {
    /// The images as numbers in `[0, 1]`, once they are there: [`images_of_bytes`](crate::mixing::images_of_bytes). The host
    /// does not wait.
    pub fn images(self) -> Values {
        let Self { of, memory, sent, len } = self;
        if let Some(sent) = &sent {
            sent.hold_back(Stream::Compute);
        }
        // SAFETY: as many bytes were sent there. After a failure the address is 0 and nothing runs.
        let images = unsafe { mixing::images_at(&of.gpu, memory.as_ref().map_or(0, Fresh::at), len) };
        if let Some(memory) = memory {
            let read = Event::record(&of.gpu, Stream::Compute);
            of.read.lock().expect("not poisoned").push(Place { memory, read });
        }
        images
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn images_arrive_whichever_stream_is_late() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tmp");
        let gpu = Gpu::soft(&folder);
        let batches = [[7u8, 0, 255, 1], [200, 3, 4, 5], [1, 2, 3, 4], [250, 251, 252, 253]];
        for late in [None, Some(Stream::Upload), Some(Stream::Compute)] {
            gpu.delay(late);
            let uploads = Uploads::new(&gpu);
            let mut next = Some(uploads.send(&batches[0]));
            let mut found = Vec::new();
            for index in 0..batches.len() {
                let images = next.take().expect("sent").images();
                next = batches.get(index + 1).map(|batch| uploads.send(batch));
                found.push(images);
            }
            for (images, batch) in found.iter().zip(&batches) {
                let right: Vec<f32> = batch.iter().map(|byte| f32::from(*byte) / 255.0).collect();
                assert_eq!(images.to_vec().unwrap(), right, "{late:?} is late");
            }
            // One place serves all, and is given back where it is too small.
            assert_eq!(uploads.read.lock().unwrap().len(), 1);
            drop(uploads.send(&[1; 4096]));
            assert!(uploads.read.lock().unwrap().is_empty());
        }
        gpu.delay(None);
    }
}
