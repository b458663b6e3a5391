//! `advxl export`.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::inputs::inputs;
use super::model::NamedModel;
use super::print::{note, print_json};
use super::values::one_of;
use crate::error::{Context, Error, Result};
use crate::settings::words;
use crate::weights::export::card::Facts;
use crate::weights::{Loaded, export};
use crate::{files, json};

words! {
    /// A program that models are exported for.
    pub(crate) enum Program {
        /// timm: a folder with a model card.
        Timm = "timm",
        /// open_clip: a folder with both towers and a model card.
        OpenClip = "open-clip",
        /// RobustBench: timm's folder and an entry for the leaderboard.
        Robustbench = "robustbench",
    }
}

/// A model for other programs: a folder that timm or open_clip loads with a model card, or RobustBench's entry beside it.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  advxl export runs/cifar10_micro --to robustbench --name Doe2026Two --dataset cifar10 \
    --result full/result.json --out export\n  advxl export runs/clip --to open-clip --text \
    CLIPA-L-14 --out export"
)]
pub(crate) struct Export {
    #[command(flatten)]
    model: NamedModel,
    /// Export for this program.
    #[arg(long, value_name = "PROGRAM", value_parser = one_of::<Program>("program"))]
    to: Program,
    /// For open-clip: the folder of the open_clip model whose text tower the model was trained against.
    #[arg(long, value_name = "FOLDER")]
    text: Option<PathBuf>,
    /// The folder that is made.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What the model is called; RobustBench has LastnameYearFirstword.
    #[arg(long, default_value = "advxl-model")]
    name: String,
    /// Who made it.
    #[arg(long, default_value = "")]
    authors: String,
    /// Where it is described.
    #[arg(long, default_value = "")]
    link: String,
    /// What it was trained on, such as imagenet; for robustbench the board: cifar10, cifar100 or imagenet.
    #[arg(long, default_value = "")]
    dataset: String,
    /// Images beyond the data set's own were used.
    #[arg(long)]
    additional_data: bool,
    /// A result.json of `advxl eval` of this model; may be given several times.
    #[arg(long, value_name = "FILE")]
    result: Vec<PathBuf>,
}

impl Export {
    pub(crate) fn run(&self, json: bool) -> Result<()> {
        type Write<'a> = Box<dyn Fn(&Loaded, &Facts, &Path) -> Result<()> + 'a>;
        let write: Write = match (self.to, &self.text) {
            (Program::OpenClip, Some(text)) => {
                Box::new(move |loaded, facts, out| export::open_clip(loaded, facts, text, out))
            }
            (Program::OpenClip, None) => {
                return Err(Error::input("--to open-clip: open_clip loads whole models only")
                    .hint("give the folder of the model whose text tower belongs to this one with --text"));
            }
            (Program::Timm | Program::Robustbench, Some(_)) => {
                return Err(Error::input("--text is for --to open-clip").hint("leave it out"));
            }
            (Program::Timm, None) => Box::new(export::timm),
            (Program::Robustbench, None) => Box::new(export::robustbench),
        };
        files::check_name(&self.name)
            .map_err(|(message, hint)| Error::input(format!("--name: {message}")).hint(hint))?;
        // RobustBench's entry lies beside the model's own files.
        if self.to == Program::Robustbench && self.name.eq_ignore_ascii_case("config") {
            let message = "--name config: `config.json` describes the model in the exported folder";
            return Err(Error::input(message)
                .hint("give the name of RobustBench's entry, such as Doe2026Two"));
        }
        let mut inputs = inputs(Some(&self.model.path), None)?;
        self.text.iter().for_each(|text| inputs.add("--text", text));
        inputs.check_folder("--out", &self.out)?;
        let loaded = self.model.load()?;
        let read = |path: &PathBuf| {
            let doing = || format!("`{}`", path.display());
            let found = json::parse(&files::read(path)?)
                .map_err(|error| Error::input(format!("not JSON: {error}")))
                .context(doing)?;
            match found["model_hash"] == json!(loaded.hash) {
                true => Ok(found),
                false => Err(Error::input("this is the result of another model")
                    .hint("evaluate the model that is exported"))
                .context(doing),
            }
        };
        let recipe = self.model.path.join("recipe.toml");
        let recipe = match recipe.is_file() {
            true => Some(files::read_text(&recipe)?),
            false => None,
        };
        let facts = Facts {
            recipe,
            name: self.name.clone(),
            authors: self.authors.clone(),
            link: self.link.clone(),
            dataset: self.dataset.clone(),
            additional_data: self.additional_data,
            results: self.result.iter().map(read).collect::<Result<_>>()?,
        };
        write(&loaded, &facts, &self.out)?;
        note(&format!("exported to `{}`", self.out.display()));
        if json {
            print_json(&json!({ "out": self.out.display().to_string(), "name": self.name }));
        }
        Ok(())
    }
}
