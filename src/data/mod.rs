//! Data sets, and the path from their files to batches.
//!
//! A [`Dataset`] returns samples by index. [`loader`] makes training batches from it in the background, and
//! [`evaluation_batch`] loads the fixed images of an evaluation. Nothing here uses a model or normalizes pixels. Pixels
//! are bytes or floats in `[0, 1]`; both reach the device as floats in `[0, 1]`.
//!
//! | file or folder          | contents                                                                          |
//! |-------------------------|-----------------------------------------------------------------------------------|
//! | [`spec`]                | names of data sets on the command line and in recipes                             |
//! | [`sources`]             | CIFAR binaries, class folders, files of tensors, NumPy and Parquet, synthetic      |
//! | [`shards`] [`wds`]      | images and captions in tar files: index, samples; CLIP Benchmark's folders         |
//! | [`dataset`]             | one interface to all of them                                                      |
//! | [`classes`] [`subset`]  | matching labels with a model's classes; choosing the images of an evaluation      |
//! | [`real`]                | all classes of ImageNet's validation images                                       |
//! | [`augment`]             | random crops, flips, RandAugment, MixUp, CutMix, all drawn from keyed streams     |
//! | [`batch`] [`loader`]    | batches, their order, the threads that make them                                  |
//! | [`check`] [`pack`]      | checking every sample of a data set; decoding it once for training                |

pub mod augment;
pub mod batch;
pub mod check;
pub mod classes;
pub mod dataset;
pub mod loader;
pub mod mixture;
pub mod pack;
pub mod real;
pub mod shards;
pub mod sources;
pub mod spec;
pub mod subset;
pub mod wds;

pub use augment::mix::Mix;
pub use augment::mixing::Mixing;
pub use augment::{Augmentation, RandAugment, RandomResizedCrop};
pub use batch::{Batch, Planes, SentImages};
pub use classes::{
    CLASSES_HINT, ClassMap, FOLDERS_HINT, ModelClasses, match_classes, match_prompts,
};
pub use dataset::Dataset;
pub use loader::evaluation::evaluation_batch;
pub use loader::{Broken, Loader, Plan, Share};
pub use shards::{Part, Sample};
pub use spec::{Spec, Split};
pub use subset::{Selection, Subset, SubsetRecord};
