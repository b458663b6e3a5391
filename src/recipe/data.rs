//! The data sets of a recipe.

use std::fmt;

use serde::ser::SerializeMap;

use crate::data::Spec;
use crate::settings::{Described, Field, Key, Kind, Table, settings};
use crate::units::Fraction;

settings! {
    /// Training and test images.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Data(table) {
        /// Training images, from one source or from several.
        pub train: TrainImages {},
        /// Test images; may be the same data set as `train` if it has both splits. Classes are matched by name.
        pub test: Spec { example: "\"data/imagenet\"" },
        /// Maximum fraction of broken images. Broken training images are replaced, broken test images are left out, and
        /// each is reported. If omitted, the first broken training image ends the run, and evaluations with a broken
        /// test image are skipped.
        pub broken_rate: Option<f64> { limits: above(0.0).below(1.0), example: "1e-4" },
        /// Decode training JPEGs at 1/2, 1/4 or 1/8 scale if the crop stays at least as large as the training image.
        /// Faster; pixels differ by about one gray level. Evaluations always decode at full scale.
        pub reduced_decode: bool { omit_default: true, example: "true" } [= false],
        /// Number of data loader threads per rank. If omitted, all but one of the rank's cores on a GPU, and 2 on a
        /// CPU. Does not affect results, and may be changed when a run is resumed.
        pub workers: Option<u64> { limits: within(1.0, 1024.0), unit: "threads", example: "15" },
        /// Allow test images that are also training images.
        pub test_on_train: bool { omit_default: true, example: "true" } [= false],
    }
}

settings! {
    /// A source of training images and its fraction, such as generated images next to real ones.
    #[derive(Clone, Debug, PartialEq)]
    pub struct DataSource(table) {
        /// Training images, named as for `data.train`.
        pub train: Spec { example: "\"npz:edm_1m.npz\"" },
        /// Fraction of the training samples, a multiple of 0.001. All fractions add up to 1.
        pub fraction: Fraction { limits: above(0.0).below(1.0), example: "\"0.7\"" },
    }
}

/// The training images of a stage.
#[derive(Clone, Debug, PartialEq)]
pub enum TrainImages {
    /// `train = "..."`: one data set.
    One(Spec),
    /// `sources = [{ train, fraction }, ...]`: several, mixed in each batch.
    Mixed(Vec<DataSource>),
}

const TRAIN: Key = Key {
    example: "\"data/imagenet\"",
    fallback: "exactly one of `train` and `sources`",
    ..Key::of::<Spec>(
        "train",
        "Training images: a folder, `tensors:FILE`, `npz:FILE`, `parquet:PATTERN`, `shards:PATTERN` or `synthetic:N`.",
    )
};

const SOURCES: Key = Key {
    fallback: "exactly one of `train` and `sources`",
    ..Key::of::<Vec<DataSource>>(
        "sources",
        "Several sources of training images, mixed in fixed fractions. The first names the classes; the others have the \
         same, or numbers.",
    )
};

impl Described for TrainImages {
    const KIND: Kind = Kind::OneOf(&[TRAIN, SOURCES]);

    fn print<M: SerializeMap>(&self, _: &'static str, map: &mut M) -> Result<(), M::Error> {
        match self {
            Self::One(spec) => Described::print(spec, TRAIN.name, map),
            Self::Mixed(sources) => map.serialize_entry(SOURCES.name, sources),
        }
    }
}

impl Field for TrainImages {
    fn read(table: &Table, _: &Key) -> Option<Self> {
        match (table.has(TRAIN.name), table.has(SOURCES.name)) {
            (_, false) => table.value(&TRAIN).map(Self::One),
            (false, true) => table.children(&SOURCES, DataSource::read).map(Self::Mixed),
            (true, true) => {
                table.problem(SOURCES.name, "set exactly one of `train` or `sources`");
                None
            }
        }
    }
}

impl TrainImages {
    /// Returns the data sets.
    pub fn specs(&self) -> Vec<&Spec> {
        match self {
            Self::One(spec) => vec![spec],
            Self::Mixed(sources) => sources.iter().map(|source| &source.train).collect(),
        }
    }
}

impl fmt::Display for TrainImages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(spec) => spec.fmt(f),
            Self::Mixed(sources) => {
                let parts = sources.iter();
                let parts = parts.map(|source| format!("{} of {}", source.fraction, source.train));
                f.write_str(&parts.collect::<Vec<_>>().join(" and "))
            }
        }
    }
}
