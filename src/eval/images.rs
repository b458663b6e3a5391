//! The images of an evaluation and their classes.

use burn::tensor::{Device, Tensor, TensorData};

use crate::data::{Dataset, Preprocessing, evaluation_batch};
use crate::error::{Error, Result};
use crate::fused::from_vec;

/// Images to evaluate with.
pub enum Images<'a> {
    /// The first `count` images of a data set, loaded batch by batch.
    Stored {
        /// The data set.
        dataset: &'a Dataset,
        /// How images are brought to the model's size.
        preprocessing: Preprocessing,
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
                dataset,
                preprocessing,
                ..
            } => {
                let size = preprocessing.image_size;
                let values = evaluation_batch(dataset, indices, preprocessing)?;
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

/// An error unless all labels are classes of the model.
pub(super) fn check_labels(labels: &[u32], classes: usize) -> Result<()> {
    match labels.iter().find(|label| **label as usize >= classes) {
        None => Ok(()),
        Some(label) => {
            let message =
                format!("an image has class {label} and the model {classes} classes, from 0");
            Err(Error::input(message).hint("use the data set that the model was trained for"))
        }
    }
}
