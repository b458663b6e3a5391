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
    /// Some images of a data set, loaded batch by batch; they are counted from 0 in their own order.
    Listed {
        /// The data set.
        dataset: &'a Dataset,
        /// How images are brought to the model's size.
        transform: EvaluationTransform,
        /// Their places in the data set.
        indices: &'a [usize],
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
            Self::Listed { indices, .. } => indices.len(),
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
            } => load(dataset, transform, indices, device),
            Self::Listed {
                dataset,
                transform,
                indices: all,
            } => {
                let indices: Vec<usize> = indices.iter().map(|index| all[*index]).collect();
                load(dataset, transform, &indices, device)
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

fn load(
    dataset: &Dataset,
    transform: &EvaluationTransform,
    indices: &[usize],
    device: &Device,
) -> Result<(Tensor<4>, Vec<u32>)> {
    let size = transform.image_size;
    let values = evaluation_batch(dataset, indices, transform)?;
    let labels = indices.iter().map(|index| dataset.label(*index));
    let shape = [indices.len(), 3, size, size];
    Ok((
        from_vec(values, shape, device),
        labels.collect::<Result<_>>()?,
    ))
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
