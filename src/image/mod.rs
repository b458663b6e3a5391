//! Pixels of one image: decoding, resizing, and preprocessing for evaluation.
//!
//! Batches and augmentation are in [`crate::data`]. Nothing here uses tensors.
//!
//! | file              | what                                                                    |
//! |-------------------|-------------------------------------------------------------------------|
//! | [`decode`]        | strict decoders for the formats that Pillow reads                       |
//! | [`exif`]          | TIFF and EXIF tags, orientation                                         |
//! | [`content`]       | identifies files that are not images                                    |
//! | [`damage`]        | why a sample is unusable, and what is unusual about it                  |
//! | [`picture`]       | the pixels of an image or of a region of it                             |
//! | [`resize`]        | Pillow's resampling, bit-exact, and the same in floats                  |
//! | [`operations`]    | Pillow's color and geometry operations, for RandAugment                 |
//! | [`preprocessing`] | resize, crop and interpolation for evaluation, as in torchvision        |

pub mod content;
pub mod damage;
pub mod decode;
pub mod exif;
pub mod operations;
pub mod picture;
pub mod preprocessing;
pub mod resize;

pub use damage::{Fault, Health, Reason};
pub use decode::outcome::Examined;
pub use picture::{Cutout, Picture, Region, View};
pub use preprocessing::{MAX_IMAGE_SIZE, Preprocessing, ResizeMode, RobustBench};
