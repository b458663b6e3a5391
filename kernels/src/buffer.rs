//! Memory that is used again: a fresh buffer costs a page fault per 4 KiB, which was measured to
//! take more time than some of the kernels that fill it.
//!
//! A [`Buffer`] goes back to a shared store when dropped. Its contents are what the last user left there:
//! valid numbers, but not zeros.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::{LazyLock, Mutex, PoisonError};

static STORE: LazyLock<Mutex<HashMap<usize, Vec<Vec<Line>>>>> = LazyLock::new(Mutex::default);

/// A line of the cache: a vector of sixteen words that begins with a buffer lies in one, not across two.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
struct Line([u32; WORDS]);

/// Words of a line.
const WORDS: usize = 16;

/// Sizes are rounded up to this many words, so that nearly equal shapes share buffers.
const GRAIN: usize = 1024;

/// Words of 32 bits from the store.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    lines: Vec<Line>,
    len: usize,
}

impl Buffer {
    /// A buffer of `len` words with arbitrary contents.
    pub(crate) fn new(len: usize) -> Self {
        let size = len.next_multiple_of(GRAIN) / WORDS;
        if size == 0 {
            return Self::default();
        }
        let mut store = STORE.lock().unwrap_or_else(PoisonError::into_inner);
        let used = store.get_mut(&size).and_then(Vec::pop);
        drop(store);
        Self { lines: used.unwrap_or_else(|| vec![Line([0; WORDS]); size]), len }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        if !lines.is_empty() {
            let mut store = STORE.lock().unwrap_or_else(PoisonError::into_inner);
            store.entry(lines.len()).or_default().push(lines);
        }
    }
}

impl Deref for Buffer {
    type Target = [u32];
    fn deref(&self) -> &[u32] {
        let words = self.lines.as_ptr().cast::<u32>();
        // SAFETY: the lines are words and nothing else, at least `len` of them (see `new`), and the result borrows
        // them.
        unsafe { std::slice::from_raw_parts(words, self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u32] {
        let words = self.lines.as_mut_ptr().cast::<u32>();
        // SAFETY: as in `deref`; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(words, self.len) }
    }
}

/// Elements whose memory comes from the store and goes back to it.
///
/// Their values are arbitrary numbers until they are written.
#[derive(Debug, Default)]
pub struct Floats(Buffer);

impl Floats {
    /// Room for `len` elements.
    pub fn new(len: usize) -> Self {
        Self(Buffer::new(len))
    }
}

impl Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        as_f32(&self.0)
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        as_f32_mut(&mut self.0)
    }
}

impl PartialEq for Floats {
    fn eq(&self, other: &Self) -> bool {
        self[..] == other[..]
    }
}

impl AsRef<[u8]> for Floats {
    fn as_ref(&self) -> &[u8] {
        let words: &[u32] = &self.0;
        // SAFETY: every word is four bytes of any value, and the result borrows the input.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
    }
}

/// Gives all memory that waits for its next use back to the system.
///
/// Kernels keep the buffers of saved activations for the next call of the same shape; after a
/// change of batch or image size the old ones are of no use.
pub fn release_buffers() {
    STORE.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// Views words as f32.
pub(crate) fn as_f32(words: &[u32]) -> &[f32] {
    // SAFETY: u32 and f32 have the same size and alignment, every bit pattern is valid for both,
    // and the result borrows the input.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
}

/// Views words as f32, to be written.
pub(crate) fn as_f32_mut(words: &mut [u32]) -> &mut [f32] {
    // SAFETY: as in `as_f32`; the borrow is unique.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
}
