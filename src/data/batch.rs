//! The images and labels of one update, from the loader to the device.

use std::ops::Range;

use burn::tensor::Tensor;

use super::augment::mix::Mix;
use crate::ops;
use crate::ops::Device;

/// The images and labels of one update.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// `[n, 3, size, size]`, before mixing.
    pub images: Planes,
    /// Ranges of rows whose images are mixed with each other, and how.
    pub mixed: Vec<(Range<usize>, Mix)>,
    /// `[n]`: class of each image.
    pub first: Vec<u32>,
    /// `[n]`: class that is mixed in; the same as `first` without mixing.
    pub second: Vec<u32>,
    /// `[n]`: share of `first`; 1 without mixing.
    pub weight: Vec<f32>,
    /// `[n]`: index in the data set.
    pub samples: Vec<u64>,
    /// `[n]`: epoch in which the sample was drawn.
    pub epochs: Vec<u64>,
    /// `[n]` with [`crate::data::loader::Plan::captions`], else empty: caption of each image.
    pub captions: Vec<String>,
}

/// Color planes, one image after another.
#[derive(Clone, Debug, PartialEq)]
pub enum Planes {
    /// Images of 8 bits per channel. They take a quarter of the memory and of the transfer to a GPU.
    Bytes(Vec<u8>),
    /// Images of float data sets, in `[0, 1]`.
    Floats(Vec<f32>),
}

impl Default for Planes {
    fn default() -> Self {
        Self::Bytes(Vec::new())
    }
}

impl Planes {
    /// Returns the number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Floats(floats) => floats.len(),
        }
    }

    /// Returns whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reserves memory for more values.
    pub(crate) fn reserve(&mut self, more: usize) {
        match self {
            Self::Bytes(bytes) => bytes.reserve_exact(more),
            Self::Floats(floats) => floats.reserve_exact(more),
        }
    }

    /// Appends other planes. Appending floats to bytes or bytes to floats gives floats.
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

    /// Returns the values in `[0, 1]`.
    pub fn to_floats(&self) -> Vec<f32> {
        match self {
            Self::Bytes(bytes) => bytes.iter().map(|byte| f32::from(*byte) / 255.0).collect(),
            Self::Floats(floats) => floats.clone(),
        }
    }

    /// Returns the values in `[0, 1]`; floats are not copied.
    pub fn into_floats(self) -> Vec<f32> {
        match self {
            Self::Floats(floats) => floats,
            bytes => bytes.to_floats(),
        }
    }
}

/// The images of a batch during their upload to a device, which overlaps with computation.
#[derive(Default)]
pub struct SentImages(Option<ops::Upload>);

impl SentImages {
    /// Starts the upload if the device supports uploading images ahead of time.
    pub fn new(batch: &Batch, uploads: &ops::Uploads) -> Self {
        Self(match &batch.images {
            Planes::Bytes(bytes) => uploads.send(bytes),
            Planes::Floats(_) => None,
        })
    }

    /// Returns what [`Batch::to_device`] returns for the same batch.
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
    /// Returns the mixed images in `[0, 1]`.
    pub fn pixels(&self, image_size: usize) -> Vec<f32> {
        let mut images = self.images.to_floats();
        let one = 3 * image_size * image_size;
        for (rows, mix) in &self.mixed {
            mix.apply(&mut images[rows.start * one..rows.end * one], image_size);
        }
        images
    }

    /// Returns the mixed images in `[0, 1]` on a device.
    ///
    /// A GPU receives the unmixed bytes, and converts and mixes them.
    ///
    /// Shapes: the result is `[n, 3, image_size, image_size]`.
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

    /// Mixes images that are on a device.
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

    /// Returns for each row how it is mixed and with which row.
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
