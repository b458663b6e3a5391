//! `advxl export`.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::inputs::inputs;
use super::model::NamedModel;
use super::print::{note, print_json};
use super::values::one_of;
use crate::error::{Context, Error, Result};
use crate::eval::hub;
use crate::eval::hub::Benchmark;
use crate::settings::words;
use crate::weights::export::card::Facts;
use crate::weights::{Loaded, export};
use crate::{files, json};

words! {
    /// Program to export a model for.
    pub(crate) enum Program {
        /// timm folder with a model card.
        Timm = "timm",
        /// open_clip folder with both towers and a model card.
        OpenClip = "open-clip",
        /// transformers folder for CLIPVisionModel and CLIPVisionModelWithProjection, with --text also CLIPModel, and a
        /// model card.
        HfClip = "hf-clip",
        /// timm folder with an entry for the RobustBench leaderboard.
        Robustbench = "robustbench",
    }
}

/// Export a model for other programs: a folder for timm, open_clip or transformers with a model card, optionally with a
/// RobustBench entry
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  advxl export runs/cifar10_micro --to robustbench --name Doe2026Two --dataset cifar10 \
    --result full/result.json --out export\n  advxl export runs/clip --to open-clip --text \
    CLIPA-L-14 --out export\n  advxl export runs/robust_clip --to hf-clip --out export"
)]
pub(crate) struct Export {
    #[command(flatten)]
    model: NamedModel,
    /// Program to export for
    #[arg(long, value_name = "PROGRAM", value_parser = one_of::<Program>("program"))]
    to: Program,
    /// Folder of the text tower that the model was trained against: for open-clip an open_clip folder, required; for
    /// hf-clip an open_clip, transformers or advxl folder, without which only the image tower is written
    #[arg(long, value_name = "FOLDER")]
    text: Option<PathBuf>,
    /// Write the exported model to this new folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Name of the model; RobustBench uses LastnameYearFirstword
    #[arg(long, default_value = "advxl-model")]
    name: String,
    /// Authors of the model
    #[arg(long, default_value = "")]
    authors: String,
    /// Link to the paper or description
    #[arg(long, default_value = "")]
    link: String,
    /// Training data set, such as imagenet; for robustbench the leaderboard: cifar10, cifar100 or imagenet
    #[arg(long, default_value = "")]
    dataset: String,
    /// State that additional training data was used
    #[arg(long)]
    additional_data: bool,
    /// Include a result.json that `advxl eval` wrote for this model; may be repeated
    #[arg(long, value_name = "FILE")]
    result: Vec<PathBuf>,
}

/// Export results as the YAML files that Hugging Face reads from `.eval_results` of a model repository
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  advxl export-results runs/a/result.json --benchmark ORG/NAME --out MODEL_REPOSITORY"
)]
pub(crate) struct ExportResults {
    /// Files that `advxl eval` wrote
    #[arg(value_name = "RESULT.json", required = true)]
    results: Vec<PathBuf>,
    /// Id of the benchmark's data set on the Hub, such as ORG/NAME
    #[arg(long, value_name = "ID")]
    benchmark: String,
    /// Id of the task in the benchmark's eval.yaml
    #[arg(long, value_name = "ID", default_value = "default")]
    task: String,
    /// Link to attribute the results to, such as a paper
    #[arg(long, value_name = "URL")]
    source: Option<String>,
    /// Folder of the model repository; the files go to its folder .eval_results
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl ExportResults {
    pub(crate) fn run(&self, json: bool) -> Result<()> {
        let benchmark = Benchmark {
            dataset: self.benchmark.clone(),
            task: self.task.clone(),
            source: self.source.clone(),
        };
        let mut all: Vec<(String, String)> = Vec::new();
        for path in &self.results {
            let doing = || format!("`{}`", path.display());
            let result = json::parse(&files::read(path)?)
                .map_err(|error| Error::input(format!("invalid JSON: {error}")))
                .context(doing)?;
            let found = hub::files(&benchmark, &result);
            if found.is_empty() {
                return Err(Error::input("this is not a result of `advxl eval`")).context(doing);
            }
            for (name, text) in found {
                match all.iter().find(|(known, _)| *known == name) {
                    Some((_, known)) if *known == text => {}
                    Some(_) => {
                        let message = format!("several results give different `{name}`");
                        return Err(Error::input(message).hint("export them to different folders"))
                            .context(doing);
                    }
                    None => all.push((name, text)),
                }
            }
        }
        let folder = self.out.join(".eval_results");
        if let Some((name, _)) = all.iter().find(|(name, _)| folder.join(name).exists()) {
            let message = format!("`{}` exists", folder.join(name).display());
            return Err(Error::input(message).hint("remove it first, or choose another --out"));
        }
        files::make_folder(&folder)?;
        for (name, text) in &all {
            files::write(&folder.join(name), text.as_bytes())?;
        }
        note(&format!(
            "wrote {} files to `{}`",
            all.len(),
            folder.display()
        ));
        if json {
            let names: Vec<&str> = all.iter().map(|(name, _)| &name[..]).collect();
            print_json(&json!({ "out": folder.display().to_string(), "files": names }));
        }
        Ok(())
    }
}

impl Export {
    pub(crate) fn run(&self, json: bool) -> Result<()> {
        // Returns notes for the user.
        type Write<'a> = Box<dyn Fn(&Loaded, &Facts, &Path) -> Result<Vec<String>> + 'a>;
        let without_notes = |()| Vec::new();
        let write: Write = match (self.to, &self.text) {
            (Program::OpenClip, Some(text)) => Box::new(move |loaded, facts, out| {
                export::open_clip(loaded, facts, text, out).map(without_notes)
            }),
            (Program::HfClip, text) => Box::new(move |loaded, facts, out| {
                export::hugging_face_clip(loaded, facts, text.as_deref(), out)
            }),
            (Program::OpenClip, None) => {
                return Err(Error::input("--to open-clip requires --text: open_clip loads only complete models")
                    .hint("add --text with the folder of the model whose text tower belongs to this model"));
            }
            (Program::Timm | Program::Robustbench, Some(_)) => {
                return Err(
                    Error::input("--text requires --to open-clip or --to hf-clip")
                        .hint("remove --text"),
                );
            }
            (Program::Timm, None) => Box::new(move |loaded, facts, out| {
                export::timm(loaded, facts, out).map(without_notes)
            }),
            (Program::Robustbench, None) => Box::new(move |loaded, facts, out| {
                export::robustbench(loaded, facts, out).map(without_notes)
            }),
        };
        files::check_name(&self.name)
            .map_err(|(message, hint)| Error::input(format!("--name: {message}")).hint(hint))?;
        // RobustBench's entry is in the same folder as the model's own files.
        if self.to == Program::Robustbench && self.name.eq_ignore_ascii_case("config") {
            let message =
                "--name config: `config.json` is the model's own file in the exported folder";
            return Err(Error::input(message)
                .hint("use the name of the RobustBench entry, such as Doe2026Two"));
        }
        let mut inputs = inputs(Some(&self.model.path), None)?;
        self.text.iter().for_each(|text| inputs.add("--text", text));
        inputs.check_folder("--out", &self.out)?;
        let loaded = self.model.load()?;
        let read = |path: &PathBuf| {
            let doing = || format!("`{}`", path.display());
            let found = json::parse(&files::read(path)?)
                .map_err(|error| Error::input(format!("invalid JSON: {error}")))
                .context(doing)?;
            match found["model_hash"] == json!(loaded.hash) {
                true => Ok(found),
                false => Err(Error::input("the result belongs to a different model")
                    .hint("evaluate the exported model with `advxl eval`"))
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
        let notes = write(&loaded, &facts, &self.out)?;
        notes.iter().for_each(|text| note(&format!("note: {text}")));
        note(&format!("exported to `{}`", self.out.display()));
        if json {
            let out = self.out.display().to_string();
            print_json(&json!({ "out": out, "name": self.name, "notes": notes }));
        }
        Ok(())
    }
}
