//! Zero-shot classification: embeds sentences with the class names as a classifier head for image embeddings.

use std::path::Path;

use burn::tensor::Tensor;

use super::model::TextModel;
use crate::error::{Error, Result};
use crate::files;
use crate::loss::{LARGEST_SCALE, unit_length};
use crate::ops::{Device, from_vec, logits_by_text, to_vec};

/// Class names, and the templates they are inserted into.
#[derive(Clone, Debug)]
pub struct ZeroShot {
    /// Class names, in the order of the classes.
    pub classes: Vec<String>,
    /// Sentences with `{}` as placeholder for the class name. If empty, the names are used alone.
    pub templates: Vec<String>,
}

impl ZeroShot {
    /// Reads class names and optional templates, one per line. In templates `{c}`, as CLIP Benchmark writes it, is the same
    /// as `{}`.
    ///
    /// Errors: empty names, templates without `{}`.
    pub fn read(classes: &Path, templates: Option<&Path>) -> Result<Self> {
        let templates = match templates {
            None => Vec::new(),
            Some(path) => {
                let found = lines(path, "template")?.into_iter();
                found.map(|text| text.replace("{c}", "{}")).collect()
            }
        };
        if let Some(wrong) = templates.iter().find(|text| !text.contains("{}")) {
            let message =
                format!("template `{wrong}` is missing the placeholder `{{}}` for the class");
            return Err(Error::input(message).hint("write it like `a photo of a {}.`"));
        }
        Ok(Self {
            classes: lines(classes, "name")?,
            templates,
        })
    }

    /// Returns the mean embedding of each class's sentences, normalized.
    ///
    /// Shapes: `embed` returns a normalized row for each sentence; the result is `[classes, width]`.
    /// Source: Radford et al. 2021, section 3.1.4.
    pub fn head(&self, embed: impl Fn(&[String]) -> Result<Tensor<2>>) -> Result<Tensor<2>> {
        let mut device = Device::cpu();
        let rows = self.classes.iter().map(|class| {
            let sentences: Vec<String> = match &self.templates[..] {
                [] => vec![class.clone()],
                templates => templates
                    .iter()
                    .map(|text| text.replace("{}", class))
                    .collect(),
            };
            let embeddings = embed(&sentences)?;
            device = Device::of(&embeddings);
            let embeddings = moved(embeddings, &Device::cpu());
            Ok(unit_length(embeddings.mean_dim(0)))
        });
        // Each class has only a few rows, so average them on the host, wherever the embeddings were computed.
        let head = Tensor::cat(rows.collect::<Result<_>>()?, 0);
        Ok(moved(head, &device))
    }

    /// Returns the head embedded by a text model.
    pub fn head_of(&self, model: &TextModel) -> Result<Tensor<2>> {
        self.head(|sentences| Ok(unit_length(model.embed(sentences)?)))
    }
}

fn moved(rows: Tensor<2>, device: &Device) -> Tensor<2> {
    match Device::of(&rows) == *device {
        true => rows,
        false => from_vec(to_vec(rows.clone()), rows.dims(), device),
    }
}

/// Returns zero-shot logits: cosine similarities of image and class embeddings, times the largest logit scale.
///
/// The similarities of an embedding that is not finite are not finite either.
///
/// Shapes: `outputs` `[batch, width]`; `head` `[classes, width]`, rows normalized; the result `[batch, classes]`.
pub fn by_text(outputs: Tensor<2>, head: &Tensor<2>) -> Tensor<2> {
    let on_device = logits_by_text(&outputs, head, LARGEST_SCALE);
    on_device.unwrap_or_else(|| {
        unit_length(within_squares(outputs)).matmul(head.clone().transpose()) * LARGEST_SCALE
    })
}

/// Scales down rows whose squares would overflow. Other rows are unchanged.
fn within_squares(rows: Tensor<2>) -> Tensor<2> {
    let largest = rows.clone().without_autodiff().abs().max_dim(1);
    let fits = largest.clone().lower_equal_elem(LARGEST_SQUARED);
    let scale = largest.mask_fill(fits, 1.0);
    match rows.is_autodiff() {
        true => rows / scale.autodiff(),
        false => rows / scale,
    }
}

/// Rows with values up to this have a finite sum of squares, for any embedding width in use.
const LARGEST_SQUARED: f32 = 1e16;

fn lines(path: &Path, what: &str) -> Result<Vec<String>> {
    let text = files::read_text(path)?;
    let found: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
    if let Some(line) = found.iter().position(String::is_empty) {
        let message = format!("`{}`, line {}: empty {what}", path.display(), line + 1);
        return Err(Error::input(message).hint(format!("write one {what} per line")));
    }
    match found.is_empty() {
        true => Err(Error::input(format!("`{}` is empty", path.display()))
            .hint(format!("write one {what} per line"))),
        false => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_embeddings_give_finite_logits_and_infinite_ones_do_not() {
        let device = Device::cpu();
        let head = from_vec(vec![1.0, 0.0, 0.0, 1.0], [2, 2], &device);
        let logits =
            |outputs: [f32; 2]| to_vec(by_text(from_vec(outputs.to_vec(), [1, 2], &device), &head));
        assert_eq!(logits([0.0, 3.0]), [0.0, 100.0]);
        // The squares of these overflow. All logits would be 0, and every image would be assigned to the first class.
        assert_eq!(logits([0.0, 1e30]), [0.0, 100.0]);
        assert_eq!(logits([0.0, f32::MAX]), [0.0, 100.0]);
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let found = logits([1.0, bad]);
            assert!(found.iter().any(|logit| !logit.is_finite()), "{found:?}");
        }
    }
}
