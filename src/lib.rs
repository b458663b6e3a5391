//! Train and evaluate adversarially robust vision models.
//!
//! Implements "Revisiting Adversarial Training at Scale" (Wang et al., CVPR 2024). The modules are listed in order of
//! dependence: each uses only modules above it, which `tests/layers.rs` enforces.

pub mod error;
pub mod files;
pub mod json;
pub mod memory;
pub mod output;
pub mod rng;
pub mod screen;
pub mod settings;
pub mod units;

pub mod ops;

pub mod distributed;

pub mod loss;
pub mod optim;
pub mod schedule;

pub mod image;

pub mod figure;

pub mod storage;

pub mod data;

pub mod model;

pub mod text;

pub mod attack;

pub mod eval;

pub mod table;

pub mod weights;

pub mod recipe;

pub mod plan;

pub mod objective;

pub mod train;

pub mod bench;
pub mod demo;

#[doc(hidden)]
pub mod fuzzing;

#[cfg(feature = "cli")]
pub mod cli;
