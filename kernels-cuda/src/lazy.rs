//! Values on the GPU as host bytes that are copied when they are first read: the storage of a Burn tensor.
//!
//! Operations of this crate take the values out again ([`values_of`]) and never copy. Any other reader of the bytes
//! gets a copy on the host, is right, and is counted ([`Traffic::unplanned`](crate::Traffic)).

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::panic::resume_unwind;
use std::sync::OnceLock;

use burn_std::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};

use crate::error::{Error, Result};
use crate::values::Values;

/// Bytes of values on the GPU, in their format.
pub fn lazy_bytes(values: Values) -> Bytes {
    let len = values.bytes();
    let lazy = Lazy { len, values: Some(values), host: OnceLock::new() };
    // SAFETY: the allocation is as long as the values, and all are set once it is read.
    unsafe { Bytes::from_controller(Box::new(lazy), len) }
}

/// The values behind bytes, unless these are the host's or were written to on the host.
pub fn values_of(bytes: &Bytes) -> Option<Values> {
    // The controller is private to `Bytes`, so it answers through the one method that reads nothing.
    ASKED.set(Some(None));
    bytes.property();
    ASKED.take().flatten()
}

/// Ends the present work with a failure of the GPU, which [`caught`] gives back.
///
/// For code that has no way to return an error, such as a read of a tensor. Unlike a panic it prints nothing.
pub fn fail(error: Error) -> ! {
    resume_unwind(Box::new(error))
}

/// Runs work; a failure of the GPU inside it is an error.
///
/// # Errors
///
/// That failure.
pub fn caught<T>(work: impl FnOnce() -> T) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).map_err(|panic| match panic.downcast::<Error>() {
        Ok(error) => *error,
        Err(panic) => resume_unwind(panic),
    })
}

thread_local! {
    /// Where a controller leaves its values when [`values_of`] asks: `Some` while it does.
    static ASKED: RefCell<Option<Option<Values>>> = const { RefCell::new(None) };
}

/// Values on the GPU, their copy on the host, or both.
struct Lazy {
    /// In bytes.
    len: usize,
    /// None once the host's copy was written to.
    values: Option<Values>,
    host: OnceLock<Vec<u128>>,
}

impl Lazy {
    /// The copy on the host. In numbers of 16 bytes, since tensors may be read by vector instructions.
    fn host(&self) -> &[u128] {
        self.host.get_or_init(|| {
            let values = self.values.as_ref().expect("values are dropped only after a copy was made");
            let mut copy = vec![0u128; self.len.div_ceil(16)];
            values.gpu().count_unplanned(self.len);
            // SAFETY: plain memory of at least as many bytes.
            let bytes = unsafe { std::slice::from_raw_parts_mut(copy.as_mut_ptr().cast(), self.len) };
            if let Err(error) = values.read(bytes) {
                fail(error);
            }
            copy
        })
    }
}

impl AllocationController for Lazy {
    fn alloc_align(&self) -> usize {
        align_of::<u128>()
    }

    fn property(&self) -> AllocationProperty {
        ASKED.with_borrow_mut(|asked| {
            if let Some(answer) = asked {
                *answer = self.values.clone();
            }
        });
        AllocationProperty::Device
    }

    unsafe fn memory_mut(&mut self, policy: AccessPolicy) -> std::result::Result<&mut [MaybeUninit<u8>], AccessError> {
        self.memory(policy)?;
        // From here on the host's copy is the right one.
        self.values = None;
        let host = self.host.get_mut().expect("just read");
        // SAFETY: plain memory of at least as many bytes, borrowed for as long as `self`.
        Ok(unsafe { std::slice::from_raw_parts_mut(host.as_mut_ptr().cast(), self.len) })
    }

    fn memory(&self, policy: AccessPolicy) -> std::result::Result<&[MaybeUninit<u8>], AccessError> {
        if !policy.copy_allowed() && self.host.get().is_none() {
            return Err(AccessError::WouldCopy);
        }
        let host = self.host();
        // SAFETY: as above.
        Ok(unsafe { std::slice::from_raw_parts(host.as_ptr().cast(), self.len) })
    }

    fn capacity(&self) -> usize {
        self.len
    }

    fn duplicate(&self) -> Option<Box<dyn AllocationController>> {
        let values = self.values.clone()?;
        Some(Box::new(Self { len: self.len, values: Some(values), host: OnceLock::new() }))
    }
}
