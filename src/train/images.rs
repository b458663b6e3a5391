//! The data sets of a run's stages.

use std::sync::Arc;

use crate::data::{ClassMap, Dataset, FOLDERS_HINT, ModelClasses, Split, Subset, match_classes};
use crate::error::{Context, Error, Result};
use crate::recipe::{Data, Recipe, TestImages, TrainImages};

/// The data sets of a stage.
#[derive(Clone)]
pub struct StageImages {
    /// Training images.
    pub train: Arc<Dataset>,
    /// Test images.
    pub test: Arc<Dataset>,
    /// Maps the test images' labels to training classes; `None` when training without labels.
    map: Option<ClassMap>,
}

impl StageImages {
    fn open(data: &Data, seed: u64) -> Result<Self> {
        let open = |spec, split: Split| {
            let dataset = Dataset::open(spec, split, seed);
            dataset
                .map(Arc::new)
                .context(|| format!("{split} images `{spec}`"))
        };
        let train = match &data.train {
            TrainImages::One(spec) => open(spec, Split::Train)?,
            TrainImages::Mixed(sources) => {
                let sources = sources.iter();
                let sources = sources.map(|source| (&source.train, source.fraction.value()));
                Arc::new(Dataset::open_mixed(&sources.collect::<Vec<_>>(), seed)?)
            }
        };
        let test = open(&data.test, Split::Test)?;
        if train.overlaps(&test) && !data.test_on_train {
            let message = format!(
                "the test images `{}` are part of the training images",
                data.test
            );
            return Err(Error::input(message).hint(
                "set data.test to other images, or set data.test_on_train = true to evaluate on these",
            ));
        }
        Ok(Self {
            train,
            test,
            map: None,
        })
    }

    /// Matches the classes of a stage that trains on labels: both data sets need classes, and those of the test images
    /// must be among the training classes.
    fn labeled(mut self, data: &Data) -> Result<Self> {
        self.train
            .require_classes()
            .context(|| format!("train images `{}`", data.train))?;
        self.test
            .require_classes()
            .context(|| format!("test images `{}`", data.test))?;
        let trained = ModelClasses {
            count: self.train.classes().len(),
            names: self.train.classes(),
            owner: "the training images",
            advice: FOLDERS_HINT,
        };
        self.map = Some(match_classes(
            trained,
            self.test.classes(),
            &data.test.to_string(),
        )?);
        Ok(self)
    }

    /// Returns the test images of an evaluation, with labels mapped to the training classes.
    ///
    /// Errors: a list of images that does not match the data set.
    pub fn subset(&self, images: &TestImages) -> Result<Subset> {
        let subset = Subset::choose(&self.test, &images.selection())?;
        Ok(match &self.map {
            Some(map) => subset.mapped(map.clone()),
            None => subset,
        })
    }

    /// Returns the notices about the images.
    pub(super) fn notices(&self) -> impl Iterator<Item = &String> {
        let of_data = self.train.notices().iter().chain(self.test.notices());
        of_data.chain(self.map.iter().flat_map(|map| &map.notice))
    }

    /// Returns the class names.
    pub fn classes(&self) -> &[String] {
        self.train.classes()
    }
}

/// Opens the data sets of all stages. A data set used by several stages is opened once.
pub(super) fn open_images(recipe: &Recipe) -> Result<Vec<StageImages>> {
    let mut opened: Vec<(&Data, StageImages)> = Vec::new();
    let mut all: Vec<StageImages> = Vec::new();
    for stage in &recipe.stage {
        let data = recipe.data_of(stage);
        let in_stage = || format!("stage `{}`", stage.name);
        let images = match opened.iter().find(|(known, _)| *known == data) {
            Some((_, images)) => images.clone(),
            None => StageImages::open(data, recipe.seed).context(in_stage)?,
        };
        opened.push((data, images.clone()));
        // Other objectives need no classes to train, but their test images may have them.
        all.push(match stage.objective.uses_labels() {
            true => images.labeled(data).context(in_stage)?,
            false => images,
        });
    }
    Ok(all)
}

/// Returns the data sets of all stages without duplicates.
pub(super) fn distinct(all: &[StageImages]) -> Vec<&StageImages> {
    let mut found: Vec<&StageImages> = Vec::new();
    for images in all {
        if !found
            .iter()
            .any(|known| Arc::ptr_eq(&known.train, &images.train))
        {
            found.push(images);
        }
    }
    found
}
