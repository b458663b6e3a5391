//! Preprocessing on the command line: what a model's folder says, and what flags say instead.

use super::print::note;
use super::values::one_of;
use crate::data::Dataset;
use crate::error::Result;
use crate::image::resize::Filter;
use crate::image::{MAX_IMAGE_SIZE, Preprocessing, ResizeMode};
use crate::model::ModelConfig;
use crate::weights::StatedPreprocessing;

/// How images are brought to the size of the model. The model's folder says it; flags say otherwise.
#[derive(clap::Args)]
pub(crate) struct PreprocessingFlags {
    /// Pixels on a side; the model's own if absent.
    #[arg(long, value_name = "N", value_parser = parse_size)]
    pub(crate) image_size: Option<usize>,
    /// Share of the resized image that the center crop keeps (timm's crop_pct); as the model's folder says if absent.
    #[arg(long, value_name = "F", value_parser = parse_share)]
    crop_fraction: Option<f64>,
    /// Interpolate with this filter; as the model's folder says without it.
    #[arg(long, value_name = "NAME", value_parser = one_of::<Filter>("interpolation"))]
    interpolation: Option<Filter>,
    /// Resize in this mode; as the model's folder says without it.
    #[arg(long, value_name = "MODE", value_parser = one_of::<ResizeMode>("resize mode"))]
    resize_mode: Option<ResizeMode>,
}

pub(crate) fn parse_size(text: &str) -> std::result::Result<usize, String> {
    let size = text.parse().ok();
    size.filter(|size| (1..=MAX_IMAGE_SIZE).contains(size))
        .ok_or_else(|| format!("give a number of pixels from 1 to {MAX_IMAGE_SIZE}"))
}

fn parse_share(text: &str) -> std::result::Result<f64, String> {
    let share = text
        .parse()
        .ok()
        .filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "it must be above 0 and at most 1; ImageNet's is often 0.875".to_owned())
}

impl PreprocessingFlags {
    /// What is done to the images of a data set for a model of images of a size, and where that comes from.
    ///
    /// Images of one size that is the model's are left as they are, unless flags say otherwise: a folder's words are for
    /// photographs.
    ///
    /// Errors: the folder states what cannot be done here, and the flags do not say all of it.
    pub(crate) fn over(
        &self,
        stated: &StatedPreprocessing,
        image_size: usize,
        dataset: &Dataset,
    ) -> Result<(Preprocessing, String)> {
        let image_size = self.image_size.unwrap_or(image_size);
        let is_told = self.resize_mode.is_some()
            && self.crop_fraction.is_some()
            && self.interpolation.is_some();
        let plain = Preprocessing::new(image_size);
        let is_prepared = dataset.image_size() == Some(image_size);
        let base = match (&stated.preprocessing, is_prepared || is_told) {
            (Ok(stated), false) => *stated,
            (Ok(stated), true) => Preprocessing {
                interpolation: stated.interpolation,
                ..plain
            },
            (Err(error), false) => return Err(error.clone()),
            (Err(_), true) => plain,
        };
        let resize_mode = match (self.resize_mode, base.resize_mode) {
            // The color of borders has no flag.
            (Some(ResizeMode::Longest { .. }), stated @ ResizeMode::Longest { .. }) => stated,
            (told, stated) => told.unwrap_or(stated),
        };
        let preprocessing = Preprocessing {
            image_size,
            resize_mode,
            crop_fraction: self.crop_fraction.unwrap_or(base.crop_fraction),
            interpolation: self.interpolation.unwrap_or(base.interpolation),
        };
        preprocessing.check()?;
        let keeps_all = preprocessing.crop_fraction == 1.0;
        let text = match is_prepared && keeps_all {
            true => format!("none, all images have {image_size} x {image_size} pixels already"),
            false => {
                let source = match is_prepared || is_told {
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

    /// The flags that were given.
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

/// Writes the line that says what is done to images before a model sees them.
pub(crate) fn tell(text: &str, model: Option<&ModelConfig>) {
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
