//! The data sets of a recipe.

use crate::data::Spec;
use crate::settings::settings;

settings! {
    /// Training and test images.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Data(table) {
        /// Training images: a folder, `tensors:FILE`, `npz:FILE`, `parquet:PATTERN`, `shards:PATTERN` or `synthetic:N`.
        pub train: Spec { example: "\"data/imagenet\"" },
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
