//! ImageNet-ReaL: the validation images of ImageNet-1K with all classes that they show.
//!
//! `real.json` lists for each of the 50,000 images, in the order of their file names, the classes that annotators found;
//! images without any are left out. A prediction is right if it is one of them.
//! Source: Beyer et al. 2020 (arXiv:2006.07159), <https://github.com/google-research/reassessed-imagenet>.

use std::path::Path;

use serde::Serialize;

use super::classes::is_wnid;
use super::dataset::Dataset;
use super::subset::Subset;
use crate::error::{Context, Error, Result};
use crate::files;

/// Number of classes of ImageNet-1K.
const CLASSES: usize = 1_000;

/// The classes of each validation image.
#[derive(Debug)]
pub struct RealLabels(Vec<Vec<u32>>);

/// Accuracy with these labels.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RealAccuracy {
    /// Images with at least one class.
    pub images: usize,
    /// Images whose prediction is one of their classes.
    pub right: usize,
    /// Their share.
    pub accuracy: f64,
}

impl RealLabels {
    /// Reads `real.json`.
    ///
    /// Errors: a file that is not a list of lists of classes.
    pub fn read(path: &Path) -> Result<Self> {
        let context = || format!("`{}`", path.display());
        let hint = "use real.json of https://github.com/google-research/reassessed-imagenet";
        let sets: Vec<Vec<u32>> = serde_json::from_slice(&files::read(path)?)
            .map_err(|error| {
                Error::input(format!("not a list of lists of classes: {error}")).hint(hint)
            })
            .context(context)?;
        let wrong = sets
            .iter()
            .flatten()
            .find(|class| **class >= CLASSES as u32);
        match wrong {
            Some(class) => {
                Err(Error::input(format!("class {class}, expected 0 to 999")).hint(hint))
                    .context(context)
            }
            None => Ok(Self(sets)),
        }
    }

    /// Returns the accuracy of predictions, one per image of the subset, as labels of the data set; None where the model
    /// predicts another class or nothing.
    ///
    /// Errors: a data set without ImageNet-1K's class folders, or images that are not named as its validation images.
    pub fn accuracy(
        &self,
        dataset: &Dataset,
        subset: &Subset,
        predicted: &[Option<u32>],
    ) -> Result<RealAccuracy> {
        check(dataset)?;
        let (mut images, mut right) = (0, 0);
        for (place, predicted) in subset.places().iter().zip(predicted) {
            let id = dataset.id_of(*place)?;
            let classes = number(&id).and_then(|number| self.0.get(number));
            let classes = classes.ok_or_else(|| {
                let message = format!(
                    "image `{id}` is not among the {} of the labels",
                    self.0.len()
                );
                Error::input(message).hint("files must be named like ILSVRC2012_val_00000293.JPEG")
            })?;
            if classes.is_empty() {
                continue;
            }
            images += 1;
            right += usize::from(predicted.is_some_and(|label| classes.contains(&label)));
        }
        if images == 0 {
            return Err(Error::input(
                "none of the images has a class in these labels",
            ));
        }
        let accuracy = right as f64 / images as f64;
        Ok(RealAccuracy {
            images,
            right,
            accuracy,
        })
    }
}

/// Returns an error unless the data set has the 1,000 class folders of ImageNet-1K, whose order is that of the labels.
pub fn check(dataset: &Dataset) -> Result<()> {
    let classes = dataset.classes();
    match classes.len() == CLASSES && classes.iter().all(|name| is_wnid(name)) {
        true => Ok(()),
        false => Err(Error::input(format!(
            "ReaL labels need ImageNet-1K's 1,000 class folders, such as n01440764; the data has {} classes",
            classes.len()
        ))),
    }
}

/// Returns the index of a validation image from its name, such as `n01440764/ILSVRC2012_val_00000293.JPEG`.
fn number(id: &str) -> Option<usize> {
    let (stem, _) = id.rsplit_once('.')?;
    let (_, digits) = stem.rsplit_once("_val_")?;
    digits.parse::<usize>().ok()?.checked_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::spec::{Spec, Split};

    #[test]
    fn a_prediction_is_right_if_it_is_one_of_the_classes() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("val");
        for class in 0..CLASSES {
            let class_folder = root.join(format!("n{class:08}"));
            std::fs::create_dir_all(&class_folder).unwrap();
            let picture = image::GrayImage::from_pixel(4, 4, image::Luma([7]));
            let name = format!("ILSVRC2012_val_{:08}.png", class + 1);
            picture.save(class_folder.join(name)).unwrap();
        }
        let dataset = Dataset::open(&Spec::ClassFolders(root), Split::Test, 0);
        let dataset = dataset.unwrap();
        let subset = Subset::all(&dataset);
        let path = folder.path().join("real.json");
        let mut sets = vec![vec![0, 5], vec![7], vec![], vec![3]];
        sets.resize(CLASSES, Vec::new());
        std::fs::write(&path, format!("{sets:?}")).unwrap();
        let labels = RealLabels::read(&path).unwrap();
        let mut predicted = vec![Some(5), Some(1), Some(2)];
        predicted.resize(CLASSES, None);
        let found = labels.accuracy(&dataset, &subset, &predicted).unwrap();
        assert_eq!((found.images, found.right), (3, 1));
        std::fs::write(&path, "[[0], [1000]]").unwrap();
        let message = RealLabels::read(&path).unwrap_err().to_string();
        assert!(message.contains("class 1000"), "{message}");
        std::fs::write(&path, "[[0]]").unwrap();
        let short = RealLabels::read(&path).unwrap();
        let message = short
            .accuracy(&dataset, &subset, &predicted)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("is not among the 1 of the labels"),
            "{message}"
        );
    }

    #[test]
    fn images_are_numbered_by_their_names() {
        assert_eq!(number("n01440764/ILSVRC2012_val_00000293.JPEG"), Some(292));
        assert_eq!(number("ILSVRC2012_val_00000000.JPEG"), None);
        assert_eq!(number("cat.png"), None);
    }
}
