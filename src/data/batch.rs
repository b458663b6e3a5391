//! Images of one update with their labels, as loaders make them and as devices take them.

use std::ops::Range;

use burn::tensor::Tensor;

use super::augment::mix::Mix;
use crate::ops;
use crate::ops::Device;

/// Images of one update with their labels.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// `[n, 3, size, size]`, before they are mixed.
    pub images: Planes,
    /// Rows that are mixed with each other, and how.
    pub mixed: Vec<(Range<usize>, Mix)>,
    /// `[n]`: the class of each image.
    pub first: Vec<u32>,
    /// `[n]`: the class mixed in; without mixing the same as `first`.
    pub second: Vec<u32>,
    /// `[n]`: the share of `first`; 1 without mixing.
    pub weight: Vec<f32>,
    /// `[n]`: index in the data set.
    pub samples: Vec<u64>,
    /// `[n]`: epoch in which the sample was drawn.
    pub epochs: Vec<u64>,
    /// `[n]` with [`crate::data::loader::Plan::captions`], else empty: what each image shows, in words.
    pub captions: Vec<String>,
}

/// Planes of color, one image after another.
#[derive(Clone, Debug, PartialEq)]
pub enum Planes {
    /// Of pictures that are files: a quarter of the memory, and of what goes to a GPU.
    Bytes(Vec<u8>),
    /// Of data sets of floats, in `[0, 1]`.
    Floats(Vec<f32>),
}

impl Default for Planes {
    fn default() -> Self {
        Self::Bytes(Vec::new())
    }
}

impl Planes {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Floats(floats) => floats.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes room for more values.
    pub(crate) fn reserve(&mut self, more: usize) {
        match self {
            Self::Bytes(bytes) => bytes.reserve_exact(more),
            Self::Floats(floats) => floats.reserve_exact(more),
        }
    }

    /// Adds others behind these. Of bytes and floats there come to be floats.
    pub(crate) fn extend(&mut self, others: Self) {
        match (&mut *self, others) {
            (Self::Bytes(these), Self::Bytes(others)) => these.extend(others),
            (Self::Floats(these), others) => these.extend(others.into_floats()),
            (Self::Bytes(these), others) => {
                let mut floats = Self::Bytes(std::mem::take(these)).into_floats();
                floats.extend(others.into_floats());
                *self = Self::Floats(floats);
            }
        }
    }

    /// The values in `[0, 1]`.
    pub fn to_floats(&self) -> Vec<f32> {
        match self {
            Self::Bytes(bytes) => bytes.iter().map(|byte| f32::from(*byte) / 255.0).collect(),
            Self::Floats(floats) => floats.clone(),
        }
    }

    /// The same, of floats without a copy.
    pub fn into_floats(self) -> Vec<f32> {
        match self {
            Self::Floats(floats) => floats,
            bytes => bytes.to_floats(),
        }
    }
}

/// A batch's images on their way to a device, which they reach while it computes.
#[derive(Default)]
pub struct SentImages(Option<ops::Upload>);

impl SentImages {
    /// Begins to send them, where the device takes images ahead.
    pub fn new(batch: &Batch, uploads: &ops::Uploads) -> Self {
        Self(match &batch.images {
            Planes::Bytes(bytes) => uploads.send(bytes),
            Planes::Floats(_) => None,
        })
    }

    /// [`Batch::to_device`] of the same batch.
    pub fn to_device(self, batch: &Batch, image_size: usize, device: &Device) -> Tensor<4> {
        match self.0 {
            Some(upload) => {
                let shape = [batch.first.len(), 3, image_size, image_size];
                batch.mixed_on(upload.images(shape), device)
            }
            None => batch.to_device(image_size, device),
        }
    }
}

impl Batch {
    /// The images in `[0, 1]`, mixed.
    pub fn pixels(&self, image_size: usize) -> Vec<f32> {
        let mut images = self.images.to_floats();
        let one = 3 * image_size * image_size;
        for (rows, mix) in &self.mixed {
            mix.apply(&mut images[rows.start * one..rows.end * one], image_size);
        }
        images
    }

    /// The same on a device: `[n, 3, image_size, image_size]`. To a GPU bytes go as they are, and are mixed there.
    pub fn to_device(&self, image_size: usize, device: &Device) -> Tensor<4> {
        let shape = [self.first.len(), 3, image_size, image_size];
        if device.is_cpu() {
            return ops::from_vec(self.pixels(image_size), shape, device);
        }
        let images = match &self.images {
            Planes::Bytes(bytes) => ops::from_bytes(bytes, shape, device),
            Planes::Floats(floats) => ops::from_vec(floats.clone(), shape, device),
        };
        self.mixed_on(images, device)
    }

    /// Images on a device, not yet mixed, as they are learned from.
    fn mixed_on(&self, images: Tensor<4>, device: &Device) -> Tensor<4> {
        let shape = images.dims();
        if self.mixed.is_empty() {
            return images;
        }
        if device.gpu().is_some() {
            return ops::mix_rows(images, &self.mixes());
        }
        let mut done = 0;
        let mut parts = Vec::new();
        for (rows, mix) in &self.mixed {
            if done < rows.start {
                parts.push(images.clone().narrow(0, done, rows.start - done));
            }
            parts.push(mix.of(images.clone().narrow(0, rows.start, rows.len())));
            done = rows.end;
        }
        if done < shape[0] {
            parts.push(images.narrow(0, done, shape[0] - done));
        }
        ops::join(parts)
    }

    /// How each image is mixed, and with which.
    fn mixes(&self) -> Vec<ops::RowMix> {
        let mut mixes = vec![ops::RowMix::Alone; self.first.len()];
        for (rows, mix) in &self.mixed {
            for row in rows.clone() {
                mixes[row] = mix.of_row(rows.start + rows.end - 1 - row);
            }
        }
        mixes
    }
}
