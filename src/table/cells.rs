//! The cells of a table: one `advxl eval` command for each model, data set and evaluation.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::protocol::{Layout, Protocol, TableData, TableEvaluation, TableModel, slug};
use crate::error::{Error, Result};
use crate::files;

/// Severities that `{severity}` stands for.
const SEVERITIES: [&str; 5] = ["1", "2", "3", "4", "5"];

/// Arguments of `advxl eval` that do not change clean accuracy.
const OF_ATTACKS: [&str; 9] = [
    "--version",
    "--bound",
    "--strength",
    "--step-size",
    "--steps",
    "--targets",
    "--restarts",
    "--queries",
    "--eps-curve",
];

/// What the user gives besides the protocol.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// The models, in the order of the table.
    pub models: Vec<TableModel>,
    /// Paths by name, from `--data NAME=PATH`.
    pub paths: BTreeMap<String, String>,
    /// Folder with the other data sets.
    pub root: Option<PathBuf>,
    /// Arguments for every evaluation, such as `--batch 64`.
    pub arguments: Vec<String>,
    /// Text model for models that name none.
    pub text: Option<PathBuf>,
    /// Folder of the table.
    pub out: PathBuf,
}

/// One evaluation of one model on one data set, or on one severity of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// Index of the model.
    pub model: usize,
    /// Index of the data set.
    pub data: usize,
    /// Index of the evaluation.
    pub evaluation: usize,
    /// Index of the model that is evaluated on the adversarial images of `model`; None for the attack itself.
    pub target: Option<usize>,
    /// The arguments of `advxl eval`, without `--out`.
    pub arguments: Vec<String>,
    /// Folder of its `result.json`.
    pub folder: PathBuf,
    /// Lengths and modification times of the model's files.
    stamp: String,
}

/// The cells of a table, and what they lack.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The cells, by model, data set and evaluation.
    pub cells: Vec<Cell>,
    /// Messages about data sets without a path, by index of the data set.
    pub missing: BTreeMap<usize, String>,
}

impl Plan {
    /// Returns the cells of a protocol.
    ///
    /// Errors: a path for a name that the protocol does not use; two models with one name.
    pub fn new(protocol: &Protocol, inputs: &Inputs) -> Result<Self> {
        check_paths(protocol, inputs)?;
        check_models(&inputs.models)?;
        let mut plan = Self {
            cells: Vec::new(),
            missing: BTreeMap::new(),
        };
        let stamps = inputs.models.iter().map(|model| stamp(&model.path));
        let stamps = stamps.collect::<Result<Vec<String>>>()?;
        for (model, named) in inputs.models.iter().enumerate() {
            for (data, set) in protocol.data.iter().enumerate() {
                let set = match filled(set, inputs) {
                    Ok(set) => set,
                    Err(missing) => {
                        plan.missing.insert(data, missing);
                        continue;
                    }
                };
                let specs = severities(&set.spec);
                for (evaluation, wanted) in protocol.evaluation.iter().enumerate() {
                    if source_of(protocol, evaluation) != evaluation {
                        continue;
                    }
                    for (part, spec) in specs.iter().enumerate() {
                        let mut place = slug(&set.name);
                        if specs.len() > 1 {
                            place = format!("{place}/{}", part + 1);
                        }
                        let folder = inputs.out.join(slug(&named.name)).join(place);
                        plan.cells.push(Cell {
                            model,
                            data,
                            evaluation,
                            target: None,
                            arguments: arguments(named, &set, wanted, spec, inputs),
                            folder: folder.join(slug(&wanted.name)),
                            stamp: stamps[model].clone(),
                        });
                    }
                }
            }
        }
        if protocol.layout == Layout::Transfer {
            plan.add_transfers(inputs, &stamps);
        }
        Ok(plan)
    }

    /// Makes the attacks save their adversarial images, and adds the evaluation of every model on each of them.
    fn add_transfers(&mut self, inputs: &Inputs, stamps: &[String]) {
        let mut transfers = Vec::new();
        for source in &mut self.cells {
            let images = source
                .folder
                .join("adversarial.safetensors")
                .display()
                .to_string();
            source
                .arguments
                .extend(["--save-adversarial".to_owned(), images.clone()]);
            for (target, named) in inputs.models.iter().enumerate() {
                let mut arguments = vec![named.path.display().to_string()];
                let arch = named.arch.iter();
                arguments.extend(arch.flat_map(|arch| ["--arch".to_owned(), arch.clone()]));
                let data = format!("tensors:{images}");
                arguments.extend(["--data", &data, "--attack", "clean"].map(str::to_owned));
                arguments.extend_from_slice(&named.arguments);
                arguments.extend_from_slice(&inputs.arguments);
                transfers.push(Cell {
                    target: Some(target),
                    arguments,
                    folder: source.folder.join(format!("to-{}", slug(&named.name))),
                    stamp: format!("{} {}", source.stamp, stamps[target]),
                    ..source.clone()
                });
            }
        }
        self.cells.extend(transfers);
    }

    /// Returns the index of the attack whose adversarial images a cell needs.
    pub fn source(&self, cell: &Cell) -> Option<usize> {
        cell.target?;
        let is_source = |other: &Cell| other.target.is_none() && other.model == cell.model;
        self.cells.iter().position(is_source)
    }
}

/// Returns the evaluation whose result contains that of this one: for clean accuracy, the first one with attacks.
pub fn source_of(protocol: &Protocol, evaluation: usize) -> usize {
    if protocol.evaluation[evaluation].is_attacked() {
        return evaluation;
    }
    let plain = |other: &TableEvaluation| {
        let mut flags = other.arguments.iter().filter(|word| word.starts_with("--"));
        other.is_attacked() && flags.all(|flag| OF_ATTACKS.contains(&&flag[..]))
    };
    let found = protocol.evaluation.iter().position(plain);
    found
        .filter(|_| protocol.evaluation[evaluation].arguments.is_empty())
        .unwrap_or(evaluation)
}

impl Cell {
    /// Returns the command as a shell takes it.
    pub fn command(&self) -> String {
        let words = self.all_arguments();
        let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
        format!("advxl eval {}", words.join(" "))
    }

    /// Returns the arguments with `--out`.
    pub fn all_arguments(&self) -> Vec<String> {
        let out = self.folder.display().to_string();
        [&self.arguments[..], &["--out".to_owned(), out]].concat()
    }

    /// Returns the path of its result.
    pub fn result(&self) -> PathBuf {
        self.folder.join("result.json")
    }

    fn record(&self) -> PathBuf {
        self.folder.join("cell.json")
    }

    /// Returns the result if this command finished before, with the model's files as they are now.
    pub fn finished(&self) -> Result<Option<Value>> {
        let read = |path: &Path| -> Result<Option<Value>> {
            match path.is_file() {
                true => Ok(serde_json::from_slice(&files::read(path)?).ok()),
                false => Ok(None),
            }
        };
        let record = read(&self.record())?;
        match record == Some(self.contents()) {
            true => read(&self.result()),
            false => Ok(None),
        }
    }

    /// Records that the result is complete.
    pub fn finish(&self) -> Result<()> {
        let text = format!("{:#}\n", self.contents());
        files::write(&self.record(), text.as_bytes())
    }

    fn contents(&self) -> Value {
        json!({ "arguments": self.arguments, "model_files": self.stamp })
    }
}

/// Returns a data set with the user's paths filled in. Errors: what is missing, and how to get it.
fn filled(set: &TableData, inputs: &Inputs) -> std::result::Result<TableData, String> {
    let mut found = set.clone();
    for text in found.paths_mut() {
        *text = fill(text, inputs).map_err(|name| {
            let obtain = set.obtain.as_deref();
            let obtain = obtain.map_or_else(String::new, |text| format!(" ({text})"));
            format!(
                "`{}`: add --data {name}=PATH or put it into --root DIR{obtain}",
                set.name
            )
        })?;
    }
    Ok(found)
}

/// Returns the data sets that `{severity}` stands for, or the only one.
fn severities(spec: &str) -> Vec<String> {
    let of = |severity: &&str| spec.replace("{severity}", severity);
    match spec.contains("{severity}") {
        true => SEVERITIES.iter().map(of).collect(),
        false => vec![spec.to_owned()],
    }
}

/// Returns the names in braces, apart from `{severity}`.
fn names_in(text: &str) -> Vec<&str> {
    let parts = text.split('{').skip(1);
    let names = parts.filter_map(|part| Some(part.split_once('}')?.0));
    names.filter(|name| *name != "severity").collect()
}

/// Replaces each `{NAME}` by the user's path. Errors: the first name without one.
fn fill(text: &str, inputs: &Inputs) -> std::result::Result<String, String> {
    let mut filled = text.to_owned();
    for name in names_in(text) {
        let below = |root: &PathBuf| {
            let path = root.join(name);
            path.exists().then(|| path.display().to_string())
        };
        let path = inputs.paths.get(name).cloned();
        let path = path.or_else(|| inputs.root.as_ref().and_then(below));
        filled = filled.replace(&format!("{{{name}}}"), &path.ok_or(name)?);
    }
    Ok(filled)
}

fn check_paths(protocol: &Protocol, inputs: &Inputs) -> Result<()> {
    let mut data = protocol.data.clone();
    let texts = data.iter_mut().flat_map(TableData::paths_mut);
    let mut known: Vec<&str> = texts.flat_map(|text| names_in(text)).collect();
    known.sort_unstable();
    known.dedup();
    let unknown = inputs.paths.keys().find(|name| !known.contains(&&name[..]));
    match unknown {
        None => Ok(()),
        Some(name) => {
            let message = format!("--data {name}=...: the protocol has no data set `{name}`");
            let hint = match known.is_empty() {
                true => "it uses no paths".to_owned(),
                false => format!("use one of {}", known.join(", ")),
            };
            Err(Error::input(message).hint(hint))
        }
    }
}

fn check_models(models: &[TableModel]) -> Result<()> {
    let slugs: Vec<String> = models.iter().map(|model| slug(&model.name)).collect();
    for (index, name) in slugs.iter().enumerate() {
        if slugs[..index].contains(name) {
            let message = format!("several models have the folder name `{name}`");
            return Err(Error::input(message).hint("name them: NAME=PATH"));
        }
    }
    Ok(())
}

/// Returns lengths and modification times of a model's files, to notice that it has changed.
fn stamp(path: &Path) -> Result<String> {
    let folders = [path.to_owned(), path.join("model")];
    let mut found = Vec::new();
    if path.is_file() {
        found.push((String::new(), files::stamp(path)?));
    }
    for folder in folders.iter().filter(|folder| folder.is_dir()) {
        for file in files::list(folder)? {
            let is_weights = file.extension().is_some_and(|kind| {
                ["safetensors", "pth", "pt", "bin"]
                    .iter()
                    .any(|known| kind == *known)
            });
            if file.is_file() && is_weights {
                found.push((file.display().to_string(), files::stamp(&file)?));
            }
        }
    }
    found.sort();
    Ok(blake3::hash(format!("{found:?}").as_bytes())
        .to_hex()
        .to_string())
}

fn arguments(
    model: &TableModel,
    set: &TableData,
    evaluation: &TableEvaluation,
    spec: &str,
    inputs: &Inputs,
) -> Vec<String> {
    let mut found = vec![model.path.display().to_string()];
    let mut add = |flag: &str, value: Option<String>| {
        if let Some(value) = value {
            found.extend([flag.to_owned(), value]);
        }
    };
    let attacks = match (&set.attacks, evaluation.is_attacked()) {
        (Some(attacks), true) => attacks,
        _ => &evaluation.attacks,
    };
    add("--arch", model.arch.clone());
    add("--data", Some(spec.to_owned()));
    add("--n", set.images.map(|count| count.to_string()));
    add("--ids", set.ids.clone());
    add("--classes", set.classes.clone());
    add("--real-labels", set.real_labels.clone());
    add("--attack", Some(attacks.join(",")));
    add("--norm", evaluation.norm.map(|norm| norm.word().to_owned()));
    add(
        "--eps",
        evaluation.epsilon.as_ref().map(ToString::to_string),
    );
    let named = model.preprocessing.map(|named| named.word().to_owned());
    add("--preprocessing", named);
    if set.zero_shot.is_some() {
        let own = || model.path.join("text");
        let text = model.text.clone().or_else(|| inputs.text.clone());
        let text = text.unwrap_or_else(own);
        add("--text", Some(text.display().to_string()));
    }
    add("--zero-shot", set.zero_shot.clone());
    add("--templates", set.templates.clone());
    if set.only_data_classes {
        found.push("--only-data-classes".to_owned());
    }
    found.extend_from_slice(&evaluation.arguments);
    found.extend_from_slice(&model.arguments);
    found.extend_from_slice(&inputs.arguments);
    found
}

/// Returns a word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./:,=@+%".contains(letter);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}
