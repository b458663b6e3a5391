//! Estimates the CPU cores that data loading needs to keep a GPU busy.
//!
//! The rate per core was measured on one machine with ImageNet images (docs/guides/data.md), unless the user passes a
//! rate measured with `advxl data bench`. Only the names of shards are read.

use std::path::Path;

use serde::Serialize;

use super::link::Devices;
use super::phase::PhasePlan;
use crate::data::{Augmentation, Spec};
use crate::files;
use crate::recipe::{Recipe, Stage};

/// Factor by which loading is planned to exceed the GPU's demand, since its threads share cores with the system.
const HEADROOM: f64 = 1.05;
/// Cores for the host side of the training loop.
const HOST: u64 = 1;

/// The kind of images that the loader reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageSource {
    /// JPEG photographs of about 500 x 375 pixels.
    Jpeg,
    /// JPEG with `data.reduced_decode`.
    ReducedJpeg,
    /// Shards of `advxl data pack --shorter-side`.
    Packed,
    /// CIFAR, tensors and synthetic images, which need no decoding.
    Memory,
}

// Fitted to the medians in docs/guides/data.md: microseconds to read and decode an image, and microseconds per pixel of
// the training image to crop, resize and flip.
const JPEG: (f64, f64) = (1500.0, 0.020);
const REDUCED_JPEG: (f64, f64) = (1270.0, 0.020);
const PACKED: (f64, f64) = (15.0, 0.0155);
const MEMORY: (f64, f64) = (5.0, 0.0115);
/// Microseconds per pixel and operation of RandAugment.
const OPERATION: f64 = 0.008;
/// Above this image size few crops are large enough (twice the size) for a reduced decode.
const REDUCIBLE: u64 = 160;

impl ImageSource {
    /// Returns the source for a data set, by its name: packed shards are called `NAME-146px.tar`.
    fn of(spec: &Spec, reduced_decode: bool) -> Self {
        match spec {
            Spec::Tensors(_) | Spec::Npz(_) | Spec::Npy { .. } | Spec::Synthetic { .. } => {
                Self::Memory
            }
            Spec::Folder(path) if is_cifar(path) => Self::Memory,
            Spec::Shards(pattern) if is_packed(pattern) => Self::Packed,
            _ if reduced_decode => Self::ReducedJpeg,
            _ => Self::Jpeg,
        }
    }

    /// Returns the name shown in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "JPEG",
            Self::ReducedJpeg => "reduced JPEG",
            Self::Packed => "packed",
            Self::Memory => "memory",
        }
    }

    /// Returns the images per second that one core loads at an image size and augmentation.
    fn per_core(self, image_size: u64, augmentation: &Augmentation) -> f64 {
        let (decode, pixel) = match self {
            Self::ReducedJpeg if image_size <= REDUCIBLE => REDUCED_JPEG,
            Self::Jpeg | Self::ReducedJpeg => JPEG,
            Self::Packed => PACKED,
            Self::Memory => MEMORY,
        };
        let operations = augmentation.rand_augment.as_ref();
        let operations = operations.map_or(0.0, |one| f64::from(one.operations));
        let pixels = (image_size * image_size) as f64;
        1e6 / (decode + pixels * (pixel + operations * OPERATION))
    }
}

/// Returns whether shards are packed, by their names.
fn is_packed(pattern: &str) -> bool {
    let ends = |name: &str| name.ends_with("px.tar");
    match Path::new(pattern) {
        folder if folder.is_dir() => {
            let found = files::list(folder).unwrap_or_default();
            found.iter().any(|path| path.to_str().is_some_and(ends))
        }
        _ => pattern.split([',', ' ']).any(ends),
    }
}

fn is_cifar(path: &Path) -> bool {
    crate::data::sources::cifar::is_cifar(path)
}

/// Data loading of one phase on one GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoadingPlan {
    /// Name of the stage.
    pub stage: String,
    /// Image size in pixels.
    pub image_size: u64,
    /// Images per second that the GPU consumes.
    pub images_per_second: f64,
    /// Kind of images.
    pub source: ImageSource,
    /// Images per second that one core loads.
    pub per_core: f64,
    /// Cores per GPU, including the one for the training loop.
    pub cores: u64,
    /// Cheaper sources with the cores that they need, fewest last.
    pub remedies: Vec<(ImageSource, u64)>,
}

impl LoadingPlan {
    /// Plans the loading of every phase. `measured` is the rate per core from `advxl data bench`, used for all phases.
    pub fn all(
        recipe: &Recipe,
        phases: &[PhasePlan],
        devices: &Devices,
        measured: Option<f64>,
    ) -> Vec<Self> {
        let stages = recipe.stage.iter();
        let stages = stages.flat_map(|stage| stage.phases.iter().map(move |_| stage));
        let all = stages.zip(phases);
        all.map(|(stage, phase)| Self::new(recipe, stage, phase, devices, measured))
            .collect()
    }

    fn new(
        recipe: &Recipe,
        stage: &Stage,
        phase: &PhasePlan,
        devices: &Devices,
        measured: Option<f64>,
    ) -> Self {
        let data = recipe.data_of(stage);
        let source = ImageSource::of(data.train.specs()[0], data.reduced_decode);
        let images_per_second = stage.batch as f64 / (devices.count as f64 * phase.update.total());
        let rate = |source: ImageSource| source.per_core(phase.image_size, &stage.augmentation);
        let cores = |per_core: f64| HOST + (HEADROOM * images_per_second / per_core).ceil() as u64;
        let per_core = measured.unwrap_or_else(|| rate(source));
        let cheaper = match source {
            ImageSource::Jpeg => &[ImageSource::ReducedJpeg, ImageSource::Packed][..],
            ImageSource::ReducedJpeg => &[ImageSource::Packed],
            ImageSource::Packed | ImageSource::Memory => &[],
        };
        // Scales the rates of other sources by the ratio of the measured to the modeled rate.
        let scale = per_core / rate(source);
        let remedies = cheaper
            .iter()
            .map(|source| (*source, cores(scale * rate(*source))));
        let needed = cores(per_core);
        Self {
            stage: stage.name.clone(),
            image_size: phase.image_size,
            images_per_second,
            source,
            per_core,
            remedies: remedies.filter(|(_, fewer)| *fewer < needed).collect(),
            cores: needed,
        }
    }
}
