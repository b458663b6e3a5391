//! Preprocessing on the command line: the settings of the model's folder, which flags override.

use super::print::note;
use super::values::one_of;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::image::resize::Filter;
use crate::image::{MAX_IMAGE_SIZE, Preprocessing, ResizeMode, RobustBench};
use crate::model::ModelConfig;
use crate::weights::StatedPreprocessing;

/// Flags that override the preprocessing stated by the model's folder.
#[derive(clap::Args)]
pub(crate) struct PreprocessingFlags {
    /// Image size in pixels [default: the model's]
    #[arg(long, value_name = "N", value_parser = parse_size)]
    pub(crate) image_size: Option<usize>,
    /// Share of the resized image that the center crop keeps (timm's crop_pct) [default: from the model's folder]
    #[arg(long, value_name = "F", value_parser = parse_share)]
    crop_fraction: Option<f64>,
    /// Interpolation filter for resizing [default: from the model's folder]
    #[arg(long, value_name = "NAME", value_parser = one_of::<Filter>("interpolation"))]
    interpolation: Option<Filter>,
    /// Resize mode [default: from the model's folder]
    #[arg(long, value_name = "MODE", value_parser = one_of::<ResizeMode>("resize mode"))]
    resize_mode: Option<ResizeMode>,
    /// Preprocessing by its name in RobustBench, in place of the flags above
    #[arg(
        long,
        value_name = "NAME",
        value_parser = one_of::<RobustBench>("preprocessing"),
        conflicts_with_all = ["image_size", "crop_fraction", "interpolation", "resize_mode"]
    )]
    preprocessing: Option<RobustBench>,
}

pub(crate) fn parse_size(text: &str) -> std::result::Result<usize, String> {
    let size = text.parse().ok();
    size.filter(|size| (1..=MAX_IMAGE_SIZE).contains(size))
        .ok_or_else(|| format!("expected a number of pixels from 1 to {MAX_IMAGE_SIZE}"))
}

fn parse_share(text: &str) -> std::result::Result<f64, String> {
    let share = text
        .parse()
        .ok()
        .filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| {
        "expected a number above 0 and at most 1, often 0.875 for ImageNet".to_owned()
    })
}

impl PreprocessingFlags {
    /// Returns the preprocessing of a data set for a model of the given image size, and a description with its sources.
    ///
    /// Images that all have the model's size stay unchanged unless flags override this: the folder's settings are for
    /// photographs.
    ///
    /// Errors: the folder states an unsupported preprocessing, and the flags do not override all of it.
    pub(crate) fn over(
        &self,
        stated: &StatedPreprocessing,
        image_size: usize,
        dataset: &Dataset,
    ) -> Result<(Preprocessing, String)> {
        if let Some(named) = self.preprocessing {
            let preprocessing = named.preprocessing();
            let text = format!("{} (from --preprocessing)", preprocessing.describe());
            return Ok((preprocessing, text));
        }
        let image_size = self.image_size.unwrap_or(image_size);
        let is_overridden = self.resize_mode.is_some()
            && self.crop_fraction.is_some()
            && self.interpolation.is_some();
        let plain = Preprocessing::new(image_size);
        let is_prepared = dataset.image_size() == Some(image_size);
        let base = match (&stated.preprocessing, is_prepared || is_overridden) {
            (Ok(stated), false) => *stated,
            (Ok(stated), true) => Preprocessing {
                interpolation: stated.interpolation,
                ..plain
            },
            (Err(error), false) => return Err(error.clone()),
            (Err(_), true) => plain,
        };
        let resize_mode = match (self.resize_mode, base.resize_mode) {
            // No flag sets the fill color.
            (Some(ResizeMode::Longest { .. }), stated @ ResizeMode::Longest { .. }) => stated,
            (flag, stated) => flag.unwrap_or(stated),
        };
        if resize_mode == ResizeMode::Crop && self.crop_fraction.is_some() {
            return Err(
                Error::input("--crop-fraction has no effect with --resize-mode crop")
                    .hint("set the size of the crop with --image-size"),
            );
        }
        let preprocessing = Preprocessing {
            image_size,
            resize_mode,
            crop_fraction: match resize_mode {
                ResizeMode::Crop => 1.0,
                _ => self.crop_fraction.unwrap_or(base.crop_fraction),
            },
            interpolation: self.interpolation.unwrap_or(base.interpolation),
        };
        preprocessing.check()?;
        let keeps_all = preprocessing.crop_fraction == 1.0;
        let text = match is_prepared && keeps_all {
            true => format!("none, all images are already {image_size} x {image_size} pixels"),
            false => {
                let source = match is_prepared || is_overridden {
                    true => None,
                    false => Some(stated.source),
                };
                let flags = self.given();
                let sources: Vec<&str> = source.into_iter().chain(flags).collect();
                format!("{} (from {})", preprocessing.describe(), sources.join(", "))
            }
        };
        Ok((preprocessing, text))
    }

    /// Returns the names of the given flags.
    fn given(&self) -> impl Iterator<Item = &'static str> {
        let flags = [
            (self.image_size.is_some(), "--image-size"),
            (self.crop_fraction.is_some(), "--crop-fraction"),
            (self.interpolation.is_some(), "--interpolation"),
            (self.resize_mode.is_some(), "--resize-mode"),
        ];
        flags
            .into_iter()
            .filter_map(|(given, flag)| given.then_some(flag))
    }
}

/// Prints the preprocessing, and the normalization of the model.
pub(crate) fn announce(text: &str, model: Option<&ModelConfig>) {
    let statistics = model.map(ModelConfig::statistics);
    let statistics = statistics.map(|(mean, std)| {
        let list = |values: [f64; 3]| values.map(|value| value.to_string()).join(", ");
        format!("; mean {}; std {}", list(mean), list(std))
    });
    note(&format!(
        "preprocessing: {text}{}",
        statistics.unwrap_or_default()
    ));
}
