//! Arguments shared by several commands.

use std::path::PathBuf;

use super::model::parse_classes;
use super::values::one_of;
use crate::error::Result;
use crate::ops::Precision;
use crate::recipe::Recipe;

/// A recipe file and its overrides.
#[derive(clap::Args)]
pub(crate) struct RecipeFile {
    /// Recipe, a TOML file
    #[arg(value_name = "RECIPE")]
    pub(crate) recipe: PathBuf,
    /// Override a key, such as stage.finetune.attack.steps=2, or remove it with KEY=none; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

impl RecipeFile {
    /// Loads the recipe with its overrides.
    pub(crate) fn load(&self) -> Result<Recipe> {
        Recipe::load(&self.recipe, &self.overrides)
    }
}

/// Test images, and the settings of running a model on them.
#[derive(clap::Args)]
pub(crate) struct TestRun {
    /// Test images: a folder, tensors:FILE, npz:FILE, parquet:PATTERN or synthetic:N
    #[arg(long, value_name = "SPEC")]
    pub(crate) data: String,
    /// Images per forward pass; does not change results
    #[arg(long, default_value_t = 128)]
    pub(crate) batch: usize,
    /// Seed of attacks and synthetic images
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Compute in this precision
    #[arg(long, default_value = "f32", value_parser = one_of::<Precision>("precision"))]
    pub(crate) precision: Precision,
}

/// Head size of a model without weights.
#[derive(clap::Args)]
pub(crate) struct HeadSize {
    /// Number of classes, for a model without weights
    #[arg(long, default_value = "1000", value_parser = parse_classes)]
    pub(crate) classes: usize,
}
