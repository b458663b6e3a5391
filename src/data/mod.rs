//! Data sets of labelled pictures, and the way from their files to batches of `[0, 1]` floats.
//!
//! A [`Dataset`] answers for one index at a time; [`loader`] makes training batches of it in the
//! background, [`evaluation`] the unchanging pictures of an evaluation.
//! Knows no model, no normalisation and no tensor library; everything here is plain slices.
//!
//! | file                       | what                                                     |
//! |----------------------------|----------------------------------------------------------|
//! | [`cifar`] [`folder`] [`tensors`] [`synthetic`] | where pictures come from             |
//! | [`shards`] [`shard_index`] [`tar`] [`pattern`] [`recent`] | images and captions in tar files |
//! | [`store`] [`cloud`] [`unpack`] | files of this machine, gzipped ones, objects of stores |
//! | [`order`]                  | which sample comes when                                  |
//! | [`subset`] [`classes`]     | which images an evaluation uses, and which of a model's classes their labels mean |
//! | [`decode`] [`picture`] [`content`] | pictures of the formats that Pillow reads, strictly; what a file is instead |
//! | [`health`] [`check`]       | what can be wrong with a sample; a whole data set looked through |
//! | [`resize`]                 | Pillow's resampling to the bit, and the same in floats   |
//! | [`augment`] [`operations`] [`mixing`] | random changes, all keyed                     |
//! | [`loader`] [`evaluation`]  | batches                                                  |

pub mod augment;
pub mod batch;
pub mod check;
pub mod classes;
pub mod dataset;
pub mod loader;
pub mod shards;
pub mod sources;
pub mod spec;
pub mod subset;

pub use augment::mix::Mix;
pub use augment::mixing::Mixing;
pub use augment::{Augmentation, RandAugment, RandomResizedCrop};
pub use batch::{Batch, Planes};
pub use classes::{ClassMap, ModelClasses, match_classes, match_prompts};
pub use dataset::Dataset;
pub use loader::evaluation::evaluation_batch;
pub use loader::{Broken, Loader, Plan, Share};
pub use shards::{Part, Sample};
pub use spec::{Spec, Split};
pub use subset::{Selection, Subset, SubsetRecord};
