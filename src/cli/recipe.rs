//! `advxl recipe`: check recipes and explain their keys without training.

use serde_json::json;

use super::print::{print_json, print_line};
use super::shared::RecipeFile;
use crate::error::Result;
use crate::recipe;
use crate::units::grouped;

/// Check recipes and explain their keys
#[derive(clap::Subcommand)]
pub(crate) enum Recipe {
    /// Check a recipe without opening data or a device, and print a summary or all problems
    Check(RecipeFile),
    /// Explain a key such as stage.attack.epsilon or a table such as stage.attack, or list all keys
    Explain(Explain),
    /// Print the JSON schema of recipes, for completion and checks in editors
    Schema,
    /// Print the reference of all keys as Markdown
    Docs,
}

/// The key to explain.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  advxl recipe explain stage.attack\n  advxl recipe explain model.pool"
)]
pub(crate) struct Explain {
    /// Full path of a key or table [default: all keys]
    key: Option<String>,
}

impl Recipe {
    pub(crate) fn run(&self, json: bool) -> Result<()> {
        match self {
            Self::Check(file) => check(file, json),
            Self::Explain(Explain { key }) => {
                let text = match key {
                    Some(key) => recipe::reference::explain(key)?,
                    None => recipe::reference::outline(),
                };
                print(&text, "text", json);
                Ok(())
            }
            Self::Schema => {
                match json {
                    true => print_json(&recipe::reference::schema()),
                    false => print_line(recipe::reference::schema_text().trim_end()),
                }
                Ok(())
            }
            Self::Docs => {
                print(recipe::reference::page().trim_end(), "markdown", json);
                Ok(())
            }
        }
    }
}

fn print(text: &str, key: &str, json: bool) {
    match json {
        true => print_json(&json!({ key: text })),
        false => print_line(text),
    }
}

fn check(file: &RecipeFile, json: bool) -> Result<()> {
    let recipe = file.load()?;
    let stages = recipe.stage.len();
    let samples = recipe.samples();
    let giga_macs = recipe.paper_macs() / 1e9;
    if json {
        print_json(&json!({
            "recipe": file.recipe.display().to_string(),
            "model": recipe.model.size(),
            "stages": stages,
            "samples": samples,
            "giga_macs": giga_macs,
        }));
        return Ok(());
    }
    print_line(&format!(
        "ok: {}, {stages} {}, {} samples, {giga_macs:.4e} giga multiply-adds in the paper's count",
        recipe.model.size(),
        if stages == 1 { "stage" } else { "stages" },
        grouped(samples),
    ));
    Ok(())
}
