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

/// Train as a recipe says. The same command resumes after a stop of any kind.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  advxl train recipes/cifar10_micro.toml --set data.train=cifar\n  \
    advxl train recipes/cifar10_micro.toml --set stage.finetune.attack.steps=2 --out runs/pgd2"
)]
pub(crate) struct Train {
    #[command(flatten)]
    file: RecipeFile,
    /// The folder of the run; runs/NAME-OF-THE-RECIPE if absent.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on in a folder whose recipe or images differ.
    #[arg(long)]
    accept_changes: bool,
    /// Check the recipe and print every value; where all images are synthetic, also make two updates of each phase.
    #[arg(long)]
    dry_run: bool,
    /// Images in an update of a dry run; the recipe's if absent.
    #[arg(long, value_name = "N", requires = "dry_run")]
    batch: Option<u64>,
}

impl Train {
    pub(crate) fn run(&self, json: bool, comm: &Comm) -> Result<()> {
        let recipe = self.file.load()?;
        if self.dry_run {
            print_line(&recipe.to_toml());
            print_line(&format!(
                "# {} samples, {:.4e} giga multiply-adds as the paper counts them",
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

    /// An error where the run would write over the recipe that the user wrote. One that a run wrote may be given as well.
    fn check_recipe(&self, folder: &Path) -> Result<()> {
        let is_runs = folder.join("lock").is_file();
        if is_runs || !is_same(&self.file.recipe, &folder.join("recipe.toml")) {
            return Ok(());
        }
        // That of a crash bundle, which is no run yet, is as a run writes it.
        let written = Recipe::load(&self.file.recipe, &[])?.to_toml();
        match files::read_text(&self.file.recipe)? == written {
            true => Ok(()),
            false => {
                let recipe = self.file.recipe.display();
                let message = format!(
                    "--out `{}` holds the recipe `{recipe}`, which the run would write over",
                    folder.display()
                );
                Err(Error::input(message)
                    .hint("choose another folder with --out, or another name for the recipe"))
            }
        }
    }

    /// Two updates of each phase in a folder that is removed, if all images are synthetic.
    fn rehearse(&self, recipe: &Recipe, comm: &Comm) -> Result<()> {
        if self.batch == Some(0) {
            return Err(Error::input("--batch 0 must be at least 1"));
        }
        if !recipe.is_synthetic() {
            return match self.batch {
                None => Ok(()),
                Some(_) => Err(Error::input(
                    "--batch has no effect: the images of this recipe are real, and a dry run looks at no data",
                )
                .hint("add --set data.train=synthetic:64 --set data.test=synthetic:64")),
            };
        }
        let process = comm.broadcast(std::process::id());
        let folder = std::env::temp_dir().join(format!("advxl-dry-run-{process}"));
        // Of a dry run that was killed, when this process has its number.
        if comm.is_main() && folder.is_dir() {
            files::remove_folder(&folder)?;
        }
        let rehearsal = recipe.rehearsal(self.batch);
        for (stage, rehearsed) in recipe.stage.iter().zip(&rehearsal.stage) {
            if stage.text != rehearsed.text {
                let name = &stage.name;
                note(&format!(
                    "note: stage `{name}`: its text model is not there; a tiny new one is taken"
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
        print_line("# two updates of each phase were made, and nothing was kept");
        Ok(())
    }
}
