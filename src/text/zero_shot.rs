//! Classification by text: the names of classes, in sentences, embedded as a head for embeddings of images.

use std::path::Path;

use burn::tensor::Tensor;

use super::model::TextModel;
use crate::error::{Error, Result};
use crate::files;
use crate::loss::{LARGEST_SCALE, unit_length};
use crate::ops::{Device, from_vec, logits_by_text, to_vec};

/// Classes in words, and the sentences they are put into.
#[derive(Clone, Debug)]
pub struct ZeroShot {
    /// Names of the classes, in their order.
    pub classes: Vec<String>,
    /// Sentences with `{}` in the place of a class; the names alone if there are none.
    pub templates: Vec<String>,
}

impl ZeroShot {
    /// Reads names and, if given, templates: one a line.
    ///
    /// Errors: empty names, templates without `{}`.
    pub fn read(classes: &Path, templates: Option<&Path>) -> Result<Self> {
        let templates = match templates {
            None => Vec::new(),
            Some(path) => lines(path, "template")?,
        };
        if let Some(wrong) = templates.iter().find(|text| !text.contains("{}")) {
            let message = format!("the template `{wrong}` has no {{}} for the class");
            return Err(Error::input(message).hint("such as `a photo of a {}.`"));
        }
        Ok(Self {
            classes: lines(classes, "name")?,
            templates,
        })
    }

    /// The mean embedding of each class's sentences, of length 1.
    ///
    /// Shapes: `embed` gives rows of length 1 for sentences; the result `[classes, width]`.
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
        // A few rows each: on the host, wherever the embeddings were computed.
        let head = Tensor::cat(rows.collect::<Result<_>>()?, 0);
        Ok(moved(head, &device))
    }

    /// The same by a text model.
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

/// Logits by text: similarities of the images' embeddings and those of the classes, times the largest factor.
///
/// An embedding that is not finite has no finite similarity to any class.
///
/// Shapes: `outputs` `[batch, width]`; `head` `[classes, width]`, rows of length 1; the result `[batch, classes]`.
pub fn by_text(outputs: Tensor<2>, head: &Tensor<2>) -> Tensor<2> {
    let on_device = logits_by_text(&outputs, head, LARGEST_SCALE);
    on_device.unwrap_or_else(|| {
        unit_length(within_squares(outputs)).matmul(head.clone().transpose()) * LARGEST_SCALE
    })
}

/// Rows whose squares would overflow, scaled so that they do not; all others as they are.
fn within_squares(rows: Tensor<2>) -> Tensor<2> {
    let largest = rows.clone().without_autodiff().abs().max_dim(1);
    let fits = largest.clone().lower_equal_elem(LARGEST_SQUARED);
    let scale = largest.mask_fill(fits, 1.0);
    match rows.is_autodiff() {
        true => rows / scale.autodiff(),
        false => rows / scale,
    }
}

/// The sum of as many squares as embeddings have dimensions is still finite.
const LARGEST_SQUARED: f32 = 1e16;

fn lines(path: &Path, what: &str) -> Result<Vec<String>> {
    let text = files::read_text(path)?;
    let found: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
    if let Some(line) = found.iter().position(String::is_empty) {
        let message = format!(
            "`{}`, line {}: the {what} is empty",
            path.display(),
            line + 1
        );
        return Err(Error::input(message).hint(format!("one {what} a line")));
    }
    match found.is_empty() {
        true => Err(Error::input(format!("`{}` is empty", path.display()))
            .hint(format!("one {what} a line"))),
        false => Ok(found),
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn an_embedding_that_overflows_is_no_answer_and_a_large_one_is() {
        let device = Device::cpu();
        let head = from_vec(vec![1.0, 0.0, 0.0, 1.0], [2, 2], &device);
        let logits =
            |outputs: [f32; 2]| to_vec(by_text(from_vec(outputs.to_vec(), [1, 2], &device), &head));
        assert_eq!(logits([0.0, 3.0]), [0.0, 100.0]);
        // The squares of these overflow, which would make all logits 0 and every image the first class.
        assert_eq!(logits([0.0, 1e30]), [0.0, 100.0]);
        assert_eq!(logits([0.0, f32::MAX]), [0.0, 100.0]);
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let found = logits([1.0, bad]);
            assert!(found.iter().any(|logit| !logit.is_finite()), "{found:?}");
        }
    }
}
