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
        /// Whether the test images may be among the training images.
        pub test_on_train: bool { omit_default: true, example: "true" } [= false],
    }
}
