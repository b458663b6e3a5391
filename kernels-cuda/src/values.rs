//! Numbers in device memory.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::events::Event;
use crate::gpu::{Gpu, Memory};
use crate::machine::{Argument, Kind, Stream};
use crate::rows;

/// A list of numbers on a GPU. Clones share the memory; what changes values in place copies them first if they are shared.
#[derive(Clone)]
pub struct Values {
    memory: Arc<Memory>,
    /// In numbers.
    offset: usize,
    len: usize,
    kind: Kind,
    /// By when they are computed, where that is known.
    ready: Option<Arc<Event>>,
    /// The same numbers in bf16, where the kernel that made them wrote these too.
    rounded: Option<Arc<Values>>,
    /// And in FP8, with the scales of rows.
    quantized: Option<Arc<[Values; 2]>>,
    /// The sum of all rows in f32, where that kernel summed them.
    row_sum: Option<Arc<Values>>,
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} on {:?}", self.len, self.kind, self.gpu())
    }
}

/// Rounds to nearest, ties to even, as the GPU does.
pub(crate) fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return 0x7fff;
    }
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

pub(crate) fn from_bf16(value: u16) -> f32 {
    f32::from_bits(u32::from(value) << 16)
}

/// A number of 4 bits of exponent and 3 of fraction.
pub(crate) fn from_e4m3(value: u8) -> f32 {
    let (exponent, fraction) = (i32::from(value >> 3 & 15), f32::from(value & 7) / 8.0);
    let size = match (value & 0x7f, exponent) {
        (0x7f, _) => f32::NAN,
        (_, 0) => fraction / 64.0,
        _ => (1.0 + fraction) * 2f32.powi(exponent - 7),
    };
    if value & 0x80 == 0 { size } else { -size }
}

impl Values {
    /// Room for numbers, not set: whoever calls this writes them all.
    pub(crate) fn new(gpu: &Gpu, len: usize, kind: Kind) -> Self {
        Self {
            memory: Arc::new(gpu.take(len * kind.bytes())),
            offset: 0,
            len,
            kind,
            ready: None,
            rounded: None,
            quantized: None,
            row_sum: None,
        }
    }

    /// Zeros.
    pub fn zeros(gpu: &Gpu, len: usize, kind: Kind) -> Self {
        let values = Self::new(gpu, len, kind);
        // SAFETY: allocated for as many.
        unsafe { gpu.clear(values.at(), values.bytes()) };
        values
    }

    /// A copy of the host's numbers.
    pub fn send(gpu: &Gpu, values: &[f32]) -> Self {
        let sent = Self::new(gpu, values.len(), Kind::F32);
        // SAFETY: floats are four bytes each without padding; the memory is allocated for as many.
        unsafe {
            let bytes = std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values));
            gpu.send(bytes, sent.at());
        }
        sent
    }

    /// Bytes for kernels that take tables, in numbers of four bytes.
    pub(crate) fn send_bytes(gpu: &Gpu, bytes: &[u8]) -> Self {
        let sent = Self::new(gpu, bytes.len().div_ceil(4), Kind::F32);
        // SAFETY: allocated for as many.
        unsafe { gpu.send(bytes, sent.at()) };
        sent
    }

    /// A copy of f32 numbers that another library has on the same GPU.
    ///
    /// # Safety
    ///
    /// `len` numbers lie at `address` in the memory of this GPU, written by work that is done, and stay until [`Gpu::wait`]
    /// returns.
    pub unsafe fn copy_of(gpu: &Gpu, address: u64, len: usize) -> Self {
        let values = Self::new(gpu, len, Kind::F32);
        // SAFETY: allocated for as many, and new memory overlaps nobody's.
        unsafe { gpu.copy(address, values.at(), values.bytes()) };
        values
    }

    /// Where they are in the GPU's memory, for another library of this process. They are written once [`Gpu::wait`] returned,
    /// and stay as long as a clone of them lives.
    pub fn address(&self) -> u64 {
        self.at()
    }

    /// A copy on the host, after all work.
    ///
    /// # Errors
    ///
    /// The first failure since the GPU was opened.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let mut bytes = vec![0; self.bytes()];
        // SAFETY: the values are as many bytes.
        unsafe { self.gpu().fetch(self.at(), &mut bytes) }?;
        Ok(match self.kind {
            Kind::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Kind::Bf16 => bytes.as_chunks().0.iter().map(|bytes| from_bf16(u16::from_le_bytes(*bytes))).collect(),
            Kind::E4m3 => bytes.into_iter().map(from_e4m3).collect(),
        })
    }

    /// Copies the values to the host, in their format, after all work.
    ///
    /// # Errors
    ///
    /// The first failure since the GPU was opened.
    ///
    /// # Panics
    ///
    /// If `to` has not their length in bytes.
    pub fn read(&self, to: &mut [u8]) -> Result<()> {
        assert!(to.len() == self.bytes(), "{} bytes for {self:?}", to.len());
        // SAFETY: the values are as many bytes.
        unsafe { self.gpu().fetch(self.at(), to) }
    }

    /// A copy of raw bytes on the host, after all work.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.bytes()];
        // SAFETY: the values are as many bytes.
        unsafe { self.gpu().fetch(self.at(), &mut bytes) }.map(|()| bytes)
    }

    /// Some of the numbers, in the same memory.
    ///
    /// # Panics
    ///
    /// If the range is not within them, or does not start at a multiple of eight, where the kernels read.
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} numbers", self.len);
        assert!(range.start.is_multiple_of(8), "a part starts at {}, which is not a multiple of 8", range.start);
        let rounded = self.rounded.as_ref().map(|rounded| Arc::new(rounded.part(range.clone())));
        let whole = range == (0..self.len);
        let (quantized, row_sum) = (self.quantized.clone().filter(|_| whole), self.row_sum.clone().filter(|_| whole));
        Self { offset: self.offset + range.start, len: range.len(), rounded, quantized, row_sum, ..self.clone() }
    }

    /// Some of the numbers: in the same memory where kernels can read them there, else a copy.
    ///
    /// # Panics
    ///
    /// If the range is not within them.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} numbers", self.len);
        if range.start.is_multiple_of(8) {
            return self.part(range);
        }
        let copy = Self::new(self.gpu(), range.len(), self.kind);
        let from = self.at() + (range.start * self.kind.bytes()) as u64;
        // SAFETY: the range is within the values, and the copy is new and as long.
        unsafe { self.gpu().copy(from, copy.at(), copy.bytes()) };
        copy
    }

    /// The same numbers in another format.
    pub fn cast(&self, kind: Kind) -> Self {
        if kind == self.kind {
            return self.clone();
        }
        match &self.rounded {
            Some(rounded) if rounded.kind == kind => Self::clone(rounded),
            _ => rows::scaled(self, None, kind),
        }
    }

    /// With their bf16 form, which [`cast`](Self::cast) then finds.
    pub(crate) fn with_rounded(self, rounded: Self) -> Self {
        assert!((rounded.len, rounded.kind) == (self.len, Kind::Bf16), "{rounded:?} for {self:?}");
        Self { rounded: Some(Arc::new(rounded)), ..self }
    }

    /// With their numbers in FP8 and the scales of rows, which [`quantized`](Self::quantized) then finds.
    pub(crate) fn with_quantized(self, numbers: Self, scales: Self) -> Self {
        assert!((numbers.len, numbers.kind) == (self.len, Kind::E4m3), "{numbers:?} for {self:?}");
        Self { quantized: Some(Arc::new([numbers, scales])), ..self }
    }

    /// In FP8 with the scales of rows, where the kernel that made them wrote these too.
    pub(crate) fn quantized(&self) -> Option<&[Self; 2]> {
        self.quantized.as_deref()
    }

    /// With the sum of all rows, which [`row_sum`](Self::row_sum) then finds.
    pub(crate) fn with_row_sum(self, sum: Self) -> Self {
        Self { row_sum: Some(Arc::new(sum)), ..self }
    }

    /// The sum of all rows of this width in f32, where the kernel that made them summed them.
    pub(crate) fn row_sum(&self, width: usize) -> Option<&Self> {
        self.row_sum.as_deref().filter(|sum| sum.len == width)
    }

    /// The values in memory of their own, for a kernel that changes them.
    pub(crate) fn own(&mut self) -> &Self {
        if Arc::get_mut(&mut self.memory).is_none() {
            let copy = Self::new(self.gpu(), self.len, self.kind);
            // SAFETY: both are allocated for as many bytes, and the copy is new.
            unsafe { self.gpu().copy(self.at(), copy.at(), self.bytes()) };
            *self = copy;
        }
        self.ready = None;
        self.rounded = None;
        self.quantized = None;
        self.row_sum = None;
        self
    }

    /// Marks values as ready once the work so far is done: an exchange of them waits for that, and not for what is computed
    /// after them. Values without a mark, and those that were changed since, are ready once all work is.
    ///
    /// To be called where gradients are made, such as once a block. Without [`Collectives`](crate::Collectives) on their GPU
    /// it does nothing.
    pub fn mark(values: &mut [Self]) {
        let Some(gpu) = values.first().map(|first| first.gpu().clone()).filter(Gpu::has_exchanges) else { return };
        // What is in the caller's hands has all its work queued, so the event is behind it.
        let ready = Event::record(&gpu, Stream::Compute).map(Arc::new);
        for values in values.iter_mut().filter(|values| values.gpu().is(&gpu)) {
            values.ready.clone_from(&ready);
        }
    }

    /// The event of the mark.
    pub(crate) fn ready(&self) -> Option<&Arc<Event>> {
        self.ready.as_ref()
    }

    /// How many numbers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Their format.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where they are.
    pub fn gpu(&self) -> &Gpu {
        self.memory.gpu()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.len * self.kind.bytes()
    }

    pub(crate) fn at(&self) -> u64 {
        self.memory.at() + (self.offset * self.kind.bytes()) as u64
    }
}

impl From<&Values> for Argument {
    fn from(values: &Values) -> Self {
        Self(values.at())
    }
}

impl From<Option<&Values>> for Argument {
    fn from(values: Option<&Values>) -> Self {
        Self(values.map_or(0, Values::at))
    }
}
