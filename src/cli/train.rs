//! `advxl train`.

use std::path::PathBuf;

use serde_json::json;

use super::screen::Terminal;
use super::{default_folder, device, print_json};
use crate::error::Result;
use crate::recipe::Recipe;
use crate::screen::Screen;
use crate::train::{Monitor, Run, evaluate_finally, train};
use crate::units::grouped;

/// Train as a recipe says. The same command resumes after a stop of any kind.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  advxl train recipes/cifar10_micro.toml --set data.train=cifar\n  \
    advxl train recipes/cifar10_micro.toml --set stage.finetune.attack.steps=2 --out runs/pgd2"
)]
pub(super) struct Train {
    /// The recipe, a TOML file.
    recipe: PathBuf,
    /// Another value for a key, such as stage.finetune.attack.steps=2; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// The folder of the run; runs/NAME-OF-THE-RECIPE if absent.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on in a folder whose recipe or images differ.
    #[arg(long)]
    accept_changes: bool,
    /// Check the recipe, print every value, train nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Train {
    pub(super) fn run(&self, json: bool) -> Result<()> {
        let recipe = Recipe::load(&self.recipe, &self.overrides)?;
        if self.dry_run {
            print!("{}", recipe.to_toml());
            println!(
                "\n# {} samples, {:.4e} giga multiply-adds as the paper counts them",
                grouped(recipe.samples()),
                recipe.paper_macs() / 1e9
            );
            return Ok(());
        }
        let folder = self
            .out
            .clone()
            .unwrap_or_else(|| default_folder(&self.recipe));
        let run = Run::open(recipe, &folder, self.accept_changes, &device())?;
        let mut screen = Terminal::new();
        let mut monitor = Monitor::new(&run.recipe, &run.folder, &mut screen);
        let state = train(&run, &mut monitor)?;
        let evaluations = evaluate_finally(&run, &mut screen)?;
        screen.line(&format!("done: {}", folder.join("model").display()));
        drop(screen);
        if json {
            print_json(&json!({
                "run": folder.display().to_string(),
                "model": folder.join("model").display().to_string(),
                "samples": state.samples,
                "robust_accuracy": evaluations
                    .iter()
                    .map(|(name, result)| (name.clone(), result["robust_accuracy"].clone()))
                    .collect::<serde_json::Map<_, _>>(),
            }));
        }
        Ok(())
    }
}
