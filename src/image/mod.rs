//! Pixels of one image: decoding, resizing, and the preprocessing of evaluations.
//!
//! Not for batches and augmentation ([`crate::data`]), and no tensors.
//!
//! | file              | what                                                                    |
//! |-------------------|-------------------------------------------------------------------------|
//! | [`decode`]        | files to pixels, in the formats that Pillow reads; strict               |
//! | [`exif`]          | tags of TIFF and EXIF, orientation                                      |
//! | [`content`]       | what a file is if it is not an image                                    |
//! | [`damage`]        | why a sample cannot be used, and what is unusual about it               |
//! | [`picture`]       | the pixels of one image, or of a region of it                           |
//! | [`resize`]        | Pillow's resampling to the bit, and the same in floats                  |
//! | [`operations`]    | Pillow's operations on color and geometry, for RandAugment              |
//! | [`preprocessing`] | resize, crop and interpolation of evaluations, as torchvision does them |

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
pub use preprocessing::{MAX_IMAGE_SIZE, Preprocessing, ResizeMode};
