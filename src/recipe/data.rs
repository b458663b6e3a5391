//! Where images come from.

use crate::data::Spec;
use crate::settings::settings;

settings! {
    /// Images to train and to evaluate on.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Data(table) {
        /// Training images: a folder, `tensors:FILE`, `shards:PATTERN` or `synthetic:N`.
        pub train: Spec { example: "\"data/imagenet\"" },
        /// Test images; the same place as `train` if it has both parts. Classes are matched by name.
        pub test: Spec { example: "\"data/imagenet\"" },
        /// Share of broken images that is tolerated: broken training images are replaced, broken test images are left out, and each is named. Without it the first broken training image ends the run, and evaluations with a broken test image are skipped.
        pub broken_rate: Option<f64> { limits: above(0.0).below(1.0), example: "1e-4" },
        /// Decode training JPEGs at 1/2, 1/4 or 1/8 of their scale where the crop stays at least as large as the training image. Faster; pixels differ by about a grey level. Evaluations always decode at full scale.
        pub reduced_decode: bool { omit_default: true, example: "true" } [= false],
        /// Threads that load and decode training images on each rank. Without it, all cores of the rank but one on a GPU, and 2 on a CPU. Changes no result, and may change when a run is resumed.
        pub workers: Option<u64> { limits: within(1.0, 1024.0), unit: "threads", example: "15" },
        /// Whether the test images may be among the training images.
        pub test_on_train: bool { omit_default: true, example: "true" } [= false],
    }
}
