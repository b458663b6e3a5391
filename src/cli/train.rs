//! `advxl train`.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::device::device_or;
use super::inputs::default_folder;
use super::print::{note, print_json, print_line};
use super::screen::Terminal;
use super::shared::RecipeFile;
use crate::distributed::Comm;
use crate::error::{Error, Result};
use crate::files;
use crate::output::is_same;
use crate::recipe::Recipe;
use crate::screen::Screen;
use crate::train::{Monitor, Run, evaluate_finally, train};
use crate::units::grouped;

/// Train a model from a recipe; rerun the same command to resume after any interruption
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  advxl train recipes/cifar10_micro.toml --set data.train=cifar\n  \
    advxl train recipes/cifar10_micro.toml --set stage.finetune.attack.steps=2 --out runs/pgd2"
)]
pub(crate) struct Train {
    #[command(flatten)]
    file: RecipeFile,
    /// Folder of the run [default: runs/NAME for a recipe NAME.toml]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Resume a run even if its recipe or images have changed
    #[arg(long)]
    accept_changes: bool,
    /// Check the recipe and print all values; if all images are synthetic, also run two updates of each phase
    #[arg(long)]
    dry_run: bool,
    /// Batch size of a dry run [default: the recipe's]
    #[arg(long, value_name = "N", requires = "dry_run")]
    batch: Option<u64>,
}

impl Train {
    pub(crate) fn run(&self, json: bool, comm: &Comm) -> Result<()> {
        let recipe = self.file.load()?;
        if self.dry_run {
            print_line(&recipe.to_toml());
            print_line(&format!(
                "# {} samples, {:.4e} giga multiply-adds in the paper's count",
                grouped(recipe.samples()),
                recipe.paper_macs() / 1e9
            ));
            return self.rehearse(&recipe, comm);
        }
        let folder = match &self.out {
            Some(out) => out.clone(),
            None => default_folder(&self.file.recipe)?,
        };
        self.check_recipe(&folder)?;
        let device = device_or(recipe.device)?;
        let run = Run::open(recipe, &folder, self.accept_changes, &device, comm)?;
        let mut screen = Terminal::new();
        let mut monitor = Monitor::new(&run.recipe, &run.folder, &run.comm, &mut screen);
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

    /// Returns an error if the run would overwrite a recipe that the user wrote. A recipe written by a run is accepted.
    fn check_recipe(&self, folder: &Path) -> Result<()> {
        let is_runs = folder.join("lock").is_file();
        if is_runs || !is_same(&self.file.recipe, &folder.join("recipe.toml")) {
            return Ok(());
        }
        // A crash bundle is not a run yet, but its recipe is as a run writes it.
        let written = Recipe::load(&self.file.recipe, &[])?.to_toml();
        let by_0_1 = written.replace("[stage.objective]", "[stage.loss]");
        match [written, by_0_1].contains(&files::read_text(&self.file.recipe)?) {
            true => Ok(()),
            false => {
                let recipe = self.file.recipe.display();
                let message = format!(
                    "--out `{}` contains the recipe `{recipe}`, which the run would overwrite",
                    folder.display()
                );
                Err(Error::input(message)
                    .hint("choose another folder with --out, or rename the recipe"))
            }
        }
    }

    /// Runs two updates of each phase in a temporary folder, if all images are synthetic.
    fn rehearse(&self, recipe: &Recipe, comm: &Comm) -> Result<()> {
        if self.batch == Some(0) {
            return Err(Error::input("--batch must be at least 1, got 0"));
        }
        if !recipe.is_synthetic() {
            return match self.batch {
                None => Ok(()),
                Some(_) => Err(Error::input(
                    "--batch has no effect: this recipe's images are not synthetic, and a dry run reads no data",
                )
                .hint("add --set data.train=synthetic:64 --set data.test=synthetic:64")),
            };
        }
        let process = comm.broadcast(std::process::id());
        let folder = std::env::temp_dir().join(format!("advxl-dry-run-{process}"));
        // Left by a killed dry run whose process id this process now has.
        if comm.is_main() && folder.is_dir() {
            files::remove_folder(&folder)?;
        }
        let rehearsal = recipe.rehearsal(self.batch);
        for (stage, rehearsed) in recipe.stage.iter().zip(&rehearsal.stage) {
            if stage.text != rehearsed.text {
                let name = &stage.name;
                note(&format!(
                    "note: stage `{name}`: text model not found; using a tiny new one"
                ));
            }
        }
        let device = device_or(recipe.device)?;
        let done = Run::open(rehearsal, &folder, false, &device, comm).and_then(|run| {
            let mut screen = Terminal::new();
            let mut monitor = Monitor::new(&run.recipe, &run.folder, &run.comm, &mut screen);
            train(&run, &mut monitor).map(drop)
        });
        let removed = match comm.is_main() {
            true => files::remove_folder(&folder),
            false => Ok(()),
        };
        done?;
        removed?;
        print_line("# ran two updates of each phase, kept nothing");
        Ok(())
    }
}
