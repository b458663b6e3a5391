//! Data sets, and the way from their files to batches.
//!
//! A [`Dataset`] answers for one index at a time; [`loader`] makes training batches of it in the background,
//! [`evaluation_batch`] the fixed images of an evaluation. Knows no model and no normalization; pixels are in `[0, 1]`.
//!
//! | file or folder          | what                                                                              |
//! |-------------------------|-----------------------------------------------------------------------------------|
//! | [`spec`]                | names of data sets on the command line and in recipes                             |
//! | [`sources`]             | CIFAR binaries, class folders, tensor files, synthetic images                     |
//! | [`shards`]              | images and captions in tar files: index, samples                                  |
//! | [`dataset`]             | one interface to all of them                                                      |
//! | [`classes`] [`subset`]  | which of a model's classes labels mean; which images an evaluation uses           |
//! | [`augment`]             | random crops, RandAugment, MixUp, CutMix, all keyed                               |
//! | [`batch`] [`loader`]    | batches, their order, the threads that make them                                  |
//! | [`check`] [`pack`]      | a whole data set examined; decoded once for training                              |

pub mod augment;
pub mod batch;
pub mod check;
pub mod classes;
pub mod dataset;
pub mod loader;
pub mod pack;
pub mod shards;
pub mod sources;
pub mod spec;
pub mod subset;

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
