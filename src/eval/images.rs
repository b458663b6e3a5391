//! The images of an evaluation and their classes.

use burn::tensor::{Device, Tensor, TensorData};

use crate::data::{Dataset, EvaluationTransform, evaluation_batch};
use crate::error::{Error, Result};
use crate::fused::from_vec;

/// Images to evaluate with.
pub enum Images<'a> {
    /// The first `count` images of a data set, loaded batch by batch.
    Stored {
        /// The data set.
        dataset: &'a Dataset,
        /// How images are brought to the model's size.
        transform: EvaluationTransform,
        /// How many.
        count: usize,
    },
    /// Images at hand, in [0, 1], `[n, 3, height, width]`.
    Given {
        /// The images.
        images: &'a Tensor<4>,
        /// Their classes.
        labels: &'a [u32],
    },
}

impl Images<'_> {
    /// How many images.
    pub fn count(&self) -> usize {
        match self {
            Self::Stored { count, .. } => *count,
            Self::Given { labels, .. } => labels.len(),
        }
    }

    /// The images of given indices and their labels.
    ///
    /// Shapes: the images `[indices, 3, height, width]`.
    pub fn batch(&self, indices: &[usize], device: &Device) -> Result<(Tensor<4>, Vec<u32>)> {
        match self {
            Self::Stored {
                dataset, transform, ..
            } => {
                let size = transform.image_size;
                let values = evaluation_batch(dataset, indices, transform)?;
                let labels = indices.iter().map(|index| dataset.label(*index));
                let labels = labels.collect::<Result<_>>()?;
                Ok((
                    from_vec(values, [indices.len(), 3, size, size], device),
                    labels,
                ))
            }
            Self::Given { images, labels } => {
                let rows: Vec<i64> = indices.iter().map(|index| *index as i64).collect();
                let rows =
                    Tensor::from_data(TensorData::new(rows, [indices.len()]), &images.device());
                let labels = indices.iter().map(|index| labels[*index]).collect();
                Ok(((*images).clone().select(0, rows).to_device(device), labels))
            }
        }
    }
}

/// An error unless the model has classes to tell apart and all labels are among them.
pub(super) fn check_labels(labels: &[u32], classes: usize) -> Result<()> {
    if classes < 2 {
        let (message, hint) = match classes {
            1 => (
                "the model has 1 class: its accuracy is meaningless",
                "evaluate at least 2 classes; turn a single logit z for two classes into the pair 0 and z",
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
            let message =
                format!("an image has class {label} and the model {classes} classes, from 0");
            Err(Error::input(message).hint("use the data set that the model was trained for"))
        }
    }
}

/// An error unless the pixels of some images are those of images.
pub(super) fn check_images(indices: &[usize], pixels: &[f32]) -> Result<()> {
    let outside = |pixel: &f32| !(0.0..=1.0).contains(pixel);
    let Some(place) = pixels.iter().position(outside) else {
        return Ok(());
    };
    let index = indices[place / (pixels.len() / indices.len())];
    let message = format!(
        "image {index} has a pixel of {}, outside [0, 1]",
        pixels[place]
    );
    Err(Error::input(message).hint("attacks perturb pixels in [0, 1]: normalize inside the model"))
}
