//! The images of an evaluation and their labels.

use burn::tensor::Tensor;

use crate::data::{Dataset, Subset, evaluation_batch};
use crate::error::{Error, Result};
use crate::image::Preprocessing;
use crate::ops::{Device, from_vec, select, to_vec};

/// Images to evaluate with.
pub enum Images<'a> {
    /// Images of a data set, loaded batch by batch.
    Stored {
        /// The data set.
        dataset: &'a Dataset,
        /// The selected images, and the mapping from their labels to the model's classes.
        subset: &'a Subset,
        /// Preprocessing to the model's image size.
        preprocessing: Preprocessing,
    },
    /// A tensor of images in [0, 1], `[n, 3, height, width]`.
    Given {
        /// The images.
        images: &'a Tensor<4>,
        /// Their labels.
        labels: &'a [u32],
    },
    /// Images read batch by batch through a callback.
    Read {
        /// Channels, height and width.
        shape: [usize; 3],
        /// Their labels.
        labels: &'a [u32],
        /// Reads the images at the given indices, in [0, 1], `[indices, 3, height, width]`.
        read: &'a dyn Fn(&[usize]) -> Result<Tensor<4>>,
    },
}

impl Images<'_> {
    /// Returns the number of images.
    pub fn count(&self) -> usize {
        match self {
            Self::Stored { subset, .. } => subset.len(),
            Self::Given { labels, .. } | Self::Read { labels, .. } => labels.len(),
        }
    }

    /// Returns the number of values in an image.
    pub(crate) fn numbers(&self) -> usize {
        match self {
            Self::Stored { preprocessing, .. } => preprocessing.numbers(),
            Self::Given { images, .. } => images.dims()[1..].iter().product(),
            Self::Read { shape, .. } => shape.iter().product(),
        }
    }

    /// Returns the key of an image's random streams: its index in the data set, so that the streams are the same in
    /// every subset.
    pub fn key(&self, index: usize) -> u64 {
        match self {
            Self::Stored { subset, .. } => subset.place(index) as u64,
            Self::Given { .. } | Self::Read { .. } => index as u64,
        }
    }

    /// Returns the images at the given indices and their labels.
    ///
    /// Shapes: the images `[indices, 3, height, width]`.
    /// Errors: an image cannot be read or has no label.
    pub fn batch(&self, indices: &[usize], device: &Device) -> Result<(Tensor<4>, Vec<u32>)> {
        let labels = self.labels(indices)?;
        Ok((self.pictures(indices, device)?, labels))
    }

    /// Returns the labels of the images at the given indices, in the numbering of the model's classes.
    pub fn labels(&self, indices: &[usize]) -> Result<Vec<u32>> {
        match self {
            Self::Stored {
                dataset, subset, ..
            } => {
                let labels = indices.iter().map(|index| subset.label(dataset, *index));
                labels.collect()
            }
            Self::Given { labels, .. } | Self::Read { labels, .. } => {
                Ok(indices.iter().map(|index| labels[*index]).collect())
            }
        }
    }

    /// Returns the images at the given indices. Labels are not required.
    ///
    /// Shapes: `[indices, 3, height, width]`.
    pub fn pictures(&self, indices: &[usize], device: &Device) -> Result<Tensor<4>> {
        match self {
            Self::Stored {
                dataset,
                subset,
                preprocessing,
            } => {
                let size = preprocessing.image_size;
                let places: Vec<usize> = indices.iter().map(|index| subset.place(*index)).collect();
                let values = evaluation_batch(dataset, &places, preprocessing)?;
                Ok(from_vec(values, [indices.len(), 3, size, size], device))
            }
            Self::Given { images, .. } => {
                let chosen = select((*images).clone(), indices);
                Ok(moved(chosen, device))
            }
            Self::Read { read, .. } => Ok(moved(read(indices)?, device)),
        }
    }
}

/// Moves images to a device.
pub fn moved(images: Tensor<4>, device: &Device) -> Tensor<4> {
    match Device::of(&images) == *device {
        true => images,
        false => from_vec(to_vec(images.clone()), images.dims(), device),
    }
}

/// Checks that the model has at least two classes and that all labels are in range.
pub(crate) fn check_labels(labels: &[u32], classes: usize) -> Result<()> {
    if classes < 2 {
        let (message, hint) = match classes {
            1 => (
                "the model has 1 class: its accuracy is meaningless",
                "evaluate at least 2 classes; turn the single logit z of a binary model into the pair (0, z)",
            ),
            _ => (
                "the model has no classes",
                "evaluate a model with a classification head",
            ),
        };
        return Err(Error::input(message).hint(hint));
    }
    match labels.iter().find(|label| **label as usize >= classes) {
        None => Ok(()),
        Some(label) => {
            let message = format!(
                "label {label} is out of range: the model has {classes} classes, numbered from 0"
            );
            Err(Error::input(message).hint("use the data set that the model was trained on"))
        }
    }
}

/// Checks that all pixels are in [0, 1].
pub(crate) fn check_images(indices: &[usize], pixels: &[f32]) -> Result<()> {
    let outside = |pixel: &f32| !(0.0..=1.0).contains(pixel);
    let Some(place) = pixels.iter().position(outside) else {
        return Ok(());
    };
    let index = indices[place / (pixels.len() / indices.len())];
    let message = format!(
        "image {index} has a pixel value of {}, outside [0, 1]",
        pixels[place]
    );
    Err(Error::input(message).hint("attacks perturb pixels in [0, 1]: normalize inside the model"))
}
