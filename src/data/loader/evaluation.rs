//! Batches of an evaluation: fixed preprocessing, no augmentation.

use rayon::prelude::*;

use crate::data::dataset::Dataset;
use crate::data::shards::Part;
use crate::error::{Context, Error, Result};
use crate::image::Preprocessing;

/// Images that are requested from stores at a time.
pub(crate) const TOGETHER: usize = 256;

/// Returns the error that an image was resized for training.
fn packed(name: &str) -> Error {
    let message = format!("{name}: resized by `advxl data pack` for training");
    Error::input(message).hint("evaluate with the original images")
}

/// Loads and preprocesses the images of an evaluation batch.
///
/// Shapes: the result is `[indices, 3, image_size, image_size]`. Units: `[0, 1]`.
/// Errors: the first image that cannot be read, with its name, since none are skipped; an image that was resized by
/// packing.
pub fn evaluation_batch(
    dataset: &Dataset,
    indices: &[usize],
    preprocessing: &Preprocessing,
) -> Result<Vec<f32>> {
    let len = preprocessing.numbers();
    let mut images = vec![0.0; indices.len() * len];
    for (images, indices) in images
        .chunks_mut(TOGETHER * len)
        .zip(indices.chunks(TOGETHER))
    {
        for index in indices {
            dataset.ask(*index, Part::Picture);
        }
        let results: Vec<Result<()>> = images
            .par_chunks_exact_mut(len)
            .zip(indices)
            .map(|(image, index)| {
                let picture = dataset
                    .picture(*index)
                    .context(|| format!("image {index} of the evaluation"))?;
                if picture.is_packed() {
                    return Err(packed(&dataset.name_of(*index)));
                }
                image.copy_from_slice(&preprocessing.apply(&picture));
                Ok(())
            })
            .collect();
        results.into_iter().collect::<Result<()>>()?;
    }
    Ok(images)
}
