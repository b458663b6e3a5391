//! Arguments that several commands share, each declared once.

use std::path::PathBuf;

use super::model::parse_classes;
use super::values::one_of;
use crate::error::Result;
use crate::ops::Precision;
use crate::recipe::Recipe;

/// A recipe and the changes to it.
#[derive(clap::Args)]
pub(crate) struct RecipeFile {
    /// The recipe, a TOML file.
    #[arg(value_name = "RECIPE")]
    pub(crate) recipe: PathBuf,
    /// Change a key, such as stage.finetune.attack.steps=2; KEY=none removes it. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

impl RecipeFile {
    /// The recipe with its changes.
    pub(crate) fn load(&self) -> Result<Recipe> {
        Recipe::load(&self.recipe, &self.overrides)
    }
}

/// Test images, and how a model runs on them.
#[derive(clap::Args)]
pub(crate) struct TestRun {
    /// Test images: a folder, tensors:FILE or synthetic:N.
    #[arg(long, value_name = "SPEC")]
    pub(crate) data: String,
    /// Images per forward pass; changes no result.
    #[arg(long, default_value_t = 128)]
    pub(crate) batch: usize,
    /// Seed of attacks and of synthetic images.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Compute with this arithmetic.
    #[arg(long, default_value = "f32", value_parser = one_of::<Precision>("precision"))]
    pub(crate) precision: Precision,
}

/// The head of a model without weights.
#[derive(clap::Args)]
pub(crate) struct HeadSize {
    /// Number of classes of a model without weights.
    #[arg(long, default_value = "1000", value_parser = parse_classes)]
    pub(crate) classes: usize,
}
