//! Images and labels in a safetensors file: images prepared elsewhere, used bit for bit.
//!
//! `images` is f32 `[n, 3, height, width]` in `[0, 1]`. `labels` is i64 `[n]` and may be absent; then the images have
//! no classes. The metadata key `classes` may contain the class names as a JSON list. The file has no splits: training
//! and test data are two files.
//! Not for weights, which [`crate::weights`] reads.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use crate::error::{Error, Result};
use crate::files;
use crate::image::Picture;

/// Images and labels in memory.
#[derive(Debug)]
pub struct Tensors {
    name: String,
    /// Little-endian floats, `[n, 3, height, width]`.
    images: Vec<u8>,
    width: usize,
    height: usize,
    count: usize,
    /// None if the file has no `labels`.
    labels: Option<Vec<u32>>,
    classes: Vec<String>,
}

const FORM: &str =
    "the file must contain `images` f32 [n, 3, height, width] in [0, 1] and `labels` i64 [n]";

impl Tensors {
    /// Reads and checks a file.
    ///
    /// Errors: missing images, a wrong dtype or shape, a value that is outside `[0, 1]` or not finite, a label that is
    /// negative or has no name.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = files::read(path)?;
        Self::read(path, &bytes).map_err(|error| error.context(format!("`{}`", path.display())))
    }

    fn read(path: &Path, bytes: &[u8]) -> Result<Self> {
        let broken = |error| Error::input(format!("invalid safetensors file: {error}")).hint(FORM);
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
        let images = tensor(&tensors, "images", Dtype::F32)?;
        let [n, 3, height, width] = *images.shape() else {
            return Err(wrong_shape("images", images.shape()));
        };
        if n == 0 || height == 0 || width == 0 {
            return Err(wrong_shape("images", images.shape()));
        }
        check_range(images.data(), 3 * height * width)?;
        let names = metadata.metadata().as_ref();
        let names = names.and_then(|names| names.get("classes"));
        let (labels, classes) = match tensors.names().contains(&"labels") {
            false => (None, Vec::new()),
            true => {
                let labels = tensor(&tensors, "labels", Dtype::I64)?;
                if labels.shape() != [n] {
                    let message =
                        format!("{n} images, but `labels` has shape {:?}", labels.shape());
                    return Err(Error::input(message).hint(FORM));
                }
                let (labels, classes) = read_labels(labels.data(), names)?;
                (Some(labels), classes)
            }
        };
        Ok(Self {
            name: path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            images: images.data().to_vec(),
            width,
            height,
            count: n,
            labels,
            classes,
        })
    }

    /// Returns the number of images.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Returns whether there are no images. [`Self::open`] refuses such files.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns the side of the images in pixels, if they are square.
    pub fn image_size(&self) -> Option<usize> {
        (self.width == self.height).then_some(self.width)
    }

    /// Returns the class names by label.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Returns the label of an image.
    ///
    /// Errors: a file without labels.
    pub fn label(&self, index: usize) -> Result<u32> {
        match &self.labels {
            Some(labels) => Ok(labels[index]),
            None => Err(Error::input(format!("`{}` has no `labels`", self.name)).hint(FORM)),
        }
    }

    /// Returns an image, bit for bit as stored.
    pub fn picture(&self, index: usize) -> Result<Picture> {
        let len = 4 * 3 * self.width * self.height;
        let planes = floats(&self.images[index * len..][..len]).collect();
        Picture::planes(self.width, self.height, planes)
    }

    /// Returns where an image comes from, for messages.
    pub fn name_of(&self, index: usize) -> String {
        format!("{} image {index}", self.name)
    }
}

/// Writes images and labels to a file that [`Tensors::open`] reads.
///
/// `classes` may be empty.
///
/// Shapes: `images` is `shape` = `[n, 3, height, width]`, `labels` is `[n]`. Units: `[0, 1]`.
/// Errors: lengths that do not match; a file that cannot be written.
pub fn save(
    path: &Path,
    images: &[f32],
    shape: [usize; 4],
    labels: &[i64],
    classes: &[String],
) -> Result<()> {
    let refused = |error: safetensors::SafeTensorError| {
        Error::failed(format!("cannot save images of shape {shape:?}: {error}"))
    };
    if labels.len() != shape[0] {
        return Err(Error::failed(format!(
            "{} labels for {} images",
            labels.len(),
            shape[0]
        )));
    }
    let image_bytes: Vec<u8> = images
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let label_bytes: Vec<u8> = labels
        .iter()
        .flat_map(|label| label.to_le_bytes())
        .collect();
    let tensors = [
        (
            "images",
            TensorView::new(Dtype::F32, shape.to_vec(), &image_bytes).map_err(refused)?,
        ),
        (
            "labels",
            TensorView::new(Dtype::I64, vec![labels.len()], &label_bytes).map_err(refused)?,
        ),
    ];
    let metadata = (!classes.is_empty()).then(|| {
        let names = serde_json::json!(classes).to_string();
        HashMap::from([("classes".to_string(), names)])
    });
    files::write(path, &serialize(tensors, metadata).map_err(refused)?)
}

/// Writes images and labels to a file that [`Tensors::open`] reads, a few images at a time.
///
/// Shapes: the parts of `images` together are `shape` = `[n, 3, height, width]`; `labels` is `[n]`, or none for images
/// without labels. Errors: the first error of `images`; more images than `shape`; a file that cannot be written.
pub fn save_parts(
    path: &Path,
    images: impl Iterator<Item = Result<Vec<f32>>>,
    shape: [usize; 4],
    labels: Option<&[i64]>,
    classes: &[String],
) -> Result<()> {
    let images_len = shape.iter().product::<usize>() * 4;
    let mut header = serde_json::json!({
        "images": { "dtype": "F32", "shape": shape, "data_offsets": [0, images_len] },
    });
    if let Some(labels) = labels {
        let place = [images_len, images_len + labels.len() * 8];
        header["labels"] =
            serde_json::json!({ "dtype": "I64", "shape": [labels.len()], "data_offsets": place });
    }
    if !classes.is_empty() {
        let names = serde_json::json!(classes).to_string();
        header["__metadata__"] = serde_json::json!({ "classes": names });
    }
    let mut header = header.to_string();
    // Tensors start at a multiple of eight bytes.
    header.extend(std::iter::repeat_n(
        ' ',
        header.len().next_multiple_of(8) - header.len(),
    ));
    let start = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    let mut left = images_len;
    let images = images.map(|part| {
        let bytes: Vec<u8> = part?.iter().flat_map(|value| value.to_le_bytes()).collect();
        left = left
            .checked_sub(bytes.len())
            .ok_or_else(|| Error::failed(format!("more images than fit into shape {shape:?}")))?;
        Ok(bytes)
    });
    let labels = labels
        .unwrap_or_default()
        .iter()
        .flat_map(|label| label.to_le_bytes())
        .collect();
    let parts = std::iter::once(Ok(start)).chain(images);
    files::write_parts(path, parts.chain(std::iter::once(Ok(labels))))
}

fn tensor<'data>(
    tensors: &SafeTensors<'data>,
    name: &str,
    dtype: Dtype,
) -> Result<TensorView<'data>> {
    let tensor = tensors.tensor(name).map_err(|_| {
        let mut found: Vec<String> = tensors
            .names()
            .iter()
            .map(|name| format!("`{name}`"))
            .collect();
        found.sort();
        found.truncate(8);
        let found = match found.is_empty() {
            true => "nothing".into(),
            false => found.join(", "),
        };
        Error::input(format!("missing tensor `{name}`; found {found}")).hint(FORM)
    })?;
    if tensor.dtype() != dtype {
        let message = format!("`{name}` has dtype {}, expected {dtype}", tensor.dtype());
        let hint = match name {
            "images" => "save `images.float()`, with bytes divided by 255",
            _ => "save `labels.long()`",
        };
        return Err(Error::input(message).hint(hint));
    }
    Ok(tensor)
}

fn wrong_shape(name: &str, shape: &[usize]) -> Error {
    let hint = match shape {
        [_, _, _, 3] => "move the channels to the front: `images.permute(0, 3, 1, 2)`",
        _ => FORM,
    };
    Error::input(format!(
        "`{name}` has shape {shape:?}, expected [n, 3, height, width]"
    ))
    .hint(hint)
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    let fours = bytes.chunks_exact(4);
    fours.map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
}

fn check_range(images: &[u8], image_len: usize) -> Result<()> {
    let wrong = |value: &f32| !(0.0..=1.0).contains(value);
    let Some((place, value)) = floats(images).enumerate().find(|(_, value)| wrong(value)) else {
        return Ok(());
    };
    let greatest = floats(images).fold(0.0, f32::max);
    let hint = if !value.is_finite() {
        "the images contain values that are not finite; regenerate them"
    } else if greatest > 16.0 {
        "divide the images by 255"
    } else if value < 0.0 {
        "undo the normalization: the model normalizes its inputs itself"
    } else {
        "clip the images to [0, 1]"
    };
    let image = place / image_len;
    Err(Error::input(format!(
        "image {image} has a value of {value}, which is not in [0, 1]"
    ))
    .hint(hint))
}

/// Returns the labels and the class names, which are numbers if the file has no names.
fn read_labels(bytes: &[u8], names: Option<&String>) -> Result<(Vec<u32>, Vec<String>)> {
    let names: Option<Vec<String>> = names
        .map(|text| serde_json::from_str(text))
        .transpose()
        .map_err(|error| {
            Error::input(format!(
                "the metadata key `classes` is not a JSON list of names: {error}"
            ))
        })?;
    // Without names, every class up to the largest label gets a number as its name, so the label is limited.
    let most = names.as_ref().map_or(1_000_000, Vec::len) as i64;
    let mut labels = Vec::with_capacity(bytes.len() / 8);
    for (image, eight) in bytes.chunks_exact(8).enumerate() {
        let label = eight
            .iter()
            .rev()
            .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte)) as i64;
        if !(0..most).contains(&label) {
            let of_names = match &names {
                Some(names) => format!(": the file has {} class names", names.len()),
                None => String::new(),
            };
            return Err(Error::input(format!(
                "image {image} has label {label}, expected 0 to {}{of_names}",
                most - 1
            ))
            .hint("labels start at 0"));
        }
        labels.push(label as u32);
    }
    let classes = names.unwrap_or_else(|| {
        let count = labels.iter().max().map_or(0, |label| label + 1);
        (0..count).map(|label| label.to_string()).collect()
    });
    Ok((labels, classes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(images: &[f32], shape: [usize; 4], labels: &[i64], classes: &[&str]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let classes: Vec<String> = classes.iter().map(|name| (*name).into()).collect();
        save(&path, images, shape, labels, &classes).unwrap();
        let error = Tensors::open(&path).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        assert!(error.contains("a.safetensors"), "{error}");
        error
    }

    #[test]
    fn saved_images_and_labels_are_read_back_to_the_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let images: Vec<f32> = (0..2 * 3 * 2 * 5).map(|i| i as f32 / 59.0).collect();
        let classes = ["cat".to_string(), "dog".to_string(), "eel".to_string()];
        save(&path, &images, [2, 3, 2, 5], &[2, 0], &classes).unwrap();
        let tensors = Tensors::open(&path).unwrap();
        assert_eq!(tensors.len(), 2);
        assert_eq!(
            (tensors.label(0).unwrap(), tensors.label(1).unwrap()),
            (2, 0)
        );
        assert_eq!(tensors.classes(), classes);
        assert_eq!(tensors.image_size(), None);
        let picture = tensors.picture(1).unwrap();
        assert_eq!((picture.width(), picture.height()), (5, 2));
        assert_eq!(picture.to_planes(), images[30..]);
        assert_eq!(tensors.name_of(1), "a.safetensors image 1");
    }

    #[test]
    fn classes_without_names_are_numbered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        save(&path, &[0.5; 6], [2, 3, 1, 1], &[3, 0], &[]).unwrap();
        assert_eq!(
            Tensors::open(&path).unwrap().classes(),
            ["0", "1", "2", "3"]
        );
    }

    #[test]
    fn values_out_of_range_are_refused_with_the_likely_cause() {
        let bytes = message(&[0.0, 255.0, 3.0], [1, 3, 1, 1], &[0], &[]);
        assert!(
            bytes.contains("image 0 has a value of 255") && bytes.contains("divide the images")
        );
        let normalized = message(&[0.0, -1.5, 1.0], [1, 3, 1, 1], &[0], &[]);
        assert!(
            normalized.contains("undo the normalization"),
            "{normalized}"
        );
        let nan = message(&[0.0, f32::NAN, 1.0], [1, 3, 1, 1], &[0], &[]);
        assert!(nan.contains("values that are not finite"), "{nan}");
    }

    #[test]
    fn wrong_shapes_labels_and_files_are_refused() {
        let last = message(&[0.0; 12], [1, 2, 2, 3], &[0], &[]);
        assert!(last.contains("permute(0, 3, 1, 2)"), "{last}");
        let label = message(&[0.0; 3], [1, 3, 1, 1], &[-1], &[]);
        assert!(label.contains("image 0 has label -1"), "{label}");
        let unnamed = message(&[0.0; 3], [1, 3, 1, 1], &[2], &["a", "b"]);
        assert!(unnamed.contains("label 2, expected 0 to 1"), "{unnamed}");

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.safetensors");
        files::write(&path, b"<!DOCTYPE html>").unwrap();
        let error = Tensors::open(&path).unwrap_err().to_string();
        assert!(error.contains("invalid safetensors file"), "{error}");

        let one = [1; 8];
        let view = TensorView::new(Dtype::I64, vec![1], &one).unwrap();
        files::write(&path, &serialize([("images", view)], None).unwrap()).unwrap();
        let error = Tensors::open(&path).unwrap_err().to_string();
        assert!(
            error.contains("`images` has dtype I64, expected F32"),
            "{error}"
        );
        let view = TensorView::new(Dtype::I64, vec![1], &one).unwrap();
        files::write(&path, &serialize([("targets", view)], None).unwrap()).unwrap();
        let error = Tensors::open(&path).unwrap_err().to_string();
        assert!(
            error.contains("missing tensor `images`; found `targets`"),
            "{error}"
        );
    }
}
