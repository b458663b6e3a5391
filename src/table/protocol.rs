//! A protocol: the data sets and evaluations of a table, in one TOML file.

use std::path::{Path, PathBuf};

use crate::attack::Norm;
use crate::error::{Error, Result};
use crate::files;
use crate::image::RobustBench;
use crate::settings::{Problem, Section, Table, nearest, read, settings, words};
use crate::units::Fraction;

words! {
    /// What the columns of a table are.
    pub enum Layout {
        /// A row for each model, a column for each data set and evaluation.
        Models = "models",
        /// A column for each data set, a row for each model and evaluation.
        Data = "data",
        /// A matrix: the accuracy of each model (columns) on the adversarial images of each model (rows).
        Transfer = "transfer",
    }
}

settings! {
    /// A table of results.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Protocol(table) {
        /// Title of the table.
        pub title: String { example: "\"ImageNet, linf 4/255\"" },
        /// Where the protocol is published, and where it differs from it.
        pub source: Option<String> { example: "\"Croce et al. 2021\"" },
        /// What the columns are.
        pub layout: Layout {} [= Layout::Models],
        /// Whether the mean over the data sets is added.
        pub mean: bool {} [= false],
        /// Whether all data sets show the same images, as corruptions do: the interval of their mean then assumes no
        /// independence.
        pub same_images: bool {} [= false],
        /// Digits after the decimal point.
        pub decimals: u64 { limits: within(0.0, 4.0) } [= 1],
        /// Evaluations, in the order of their columns or rows.
        pub evaluation: Vec<TableEvaluation> {} [
            => table.children(Self::DESCRIPTION.key("evaluation"), TableEvaluation::read)
        ],
        /// Data sets, in the order of their columns.
        pub data: Vec<TableData> {} [=> table.children(Self::DESCRIPTION.key("data"), TableData::read)],
    }
    check {
        check_names(table, evaluation.as_deref(), data.as_deref());
        check_transfer(table, layout, evaluation.as_deref(), data.as_deref());
    }
}

settings! {
    /// An evaluation of every model on every data set.
    #[derive(Clone, Debug, PartialEq)]
    pub struct TableEvaluation(table) {
        /// Name in the table.
        pub name: String { example: "\"AA\"" },
        /// Attacks to run, in order, named as in `advxl eval --attack`. The clean accuracy of `["clean"]` is taken from
        /// another evaluation on the same images, if there is one.
        pub attacks: Vec<String> { example: "[\"autoattack\"]" },
        /// Norm that bounds the perturbation.
        pub norm: Option<Norm> { example: "\"linf\"" },
        /// Maximum size of the perturbation in this norm, for pixels in [0, 1].
        pub epsilon: Option<Fraction> { limits: at_least(0.0), example: "\"4/255\"" },
        /// Further arguments of `advxl eval`, such as `["--version", "plus"]`.
        pub arguments: Vec<String> { fallback: "none" } [= Vec::new()],
    }
}

settings! {
    /// A data set. In `spec`, `ids`, `classes`, `real_labels`, `zero_shot` and `templates`, `{NAME}` is the path that the user gives with
    /// `--data NAME=PATH`, or the folder NAME in that of `--root`.
    #[derive(Clone, Debug, PartialEq)]
    pub struct TableData(table) {
        /// Name in the table.
        pub name: String { example: "\"imagenet\"" },
        /// Data set, named as in `advxl eval --data`. With `{severity}`, the mean of the accuracies at severities 1 to 5.
        pub spec: String { example: "\"{imagenet}\"" },
        /// How to get it.
        pub obtain: Option<String> { example: "\"https://image-net.org\"" },
        /// Number of images to sample, stratified by class; all images if omitted.
        pub images: Option<u64> { limits: at_least(1.0), unit: "images", example: "1_000" },
        /// File that lists the images instead.
        pub ids: Option<String> { example: "\"{imagenet-ids}\"" },
        /// File with the data set's name of each class of the model.
        pub classes: Option<String> { example: "\"{imagenet}/classes.txt\"" },
        /// File of ImageNet-ReaL's labels, which clean accuracy is computed with.
        pub real_labels: Option<String> { example: "\"{imagenet-real}/real.json\"" },
        /// Predict only among the classes of the data set.
        pub only_data_classes: bool {} [= false],
        /// File of class names, for zero-shot classification with the model's text model.
        pub zero_shot: Option<String> { example: "\"{cars}/classnames.txt\"" },
        /// File of prompt templates.
        pub templates: Option<String> { example: "\"{cars}/zeroshot_classification_templates.txt\"" },
        /// Attacks that replace those of every evaluation with attacks, such as `["apgd-ce"]` for two classes.
        pub attacks: Option<Vec<String>> { example: "[\"apgd-ce\"]" },
        /// Error rate of the baseline that the mean corruption error (mCE) divides by.
        pub baseline_error: Option<f64> { limits: above(0.0).at_most(1.0), example: "0.886" },
    }
}

impl TableData {
    /// Returns the texts in which `{NAME}` stands for a path of the user.
    pub(super) fn paths_mut(&mut self) -> impl Iterator<Item = &mut String> {
        let optional = [
            &mut self.ids,
            &mut self.classes,
            &mut self.real_labels,
            &mut self.zero_shot,
            &mut self.templates,
        ];
        std::iter::once(&mut self.spec).chain(optional.into_iter().flatten())
    }
}

settings! {
    /// A model of a table.
    #[derive(Clone, Debug, PartialEq)]
    pub struct TableModel(table) {
        /// Name in the table.
        pub name: String { example: "\"ViT-B\"" },
        /// Model folder, run folder or weights file.
        pub path: PathBuf { example: "\"weights/vit_b.pt\"" },
        /// Architecture of a weights file.
        pub arch: Option<String> { example: "\"vit_base_patch16_224\"" },
        /// Text model for zero-shot classification; the folder `text` of the model if omitted.
        pub text: Option<PathBuf> { example: "\"weights/text\"" },
        /// Preprocessing by its name in RobustBench; the model's own if omitted.
        pub preprocessing: Option<RobustBench> { example: "\"Res256Crop224\"" },
        /// Further arguments of `advxl eval`, such as `["--mean", "0,0,0"]`.
        pub arguments: Vec<String> { fallback: "none" } [= Vec::new()],
        /// What the source of the model reports, to compare with.
        pub reported: Option<String> { example: "\"clean 76.3, AA 53.2\"" },
    }
}

settings! {
    /// The models of a table.
    #[derive(Clone, Debug, PartialEq)]
    pub struct TableModels(table) {
        /// Models, in the order of their rows.
        pub model: Vec<TableModel> {} [=> table.children(Self::DESCRIPTION.key("model"), TableModel::read)],
    }
}

/// Reports names that would be the same folder.
fn check_names(table: &Table, evaluations: Option<&[TableEvaluation]>, data: Option<&[TableData]>) {
    let evaluations = evaluations.unwrap_or_default().iter();
    let data = data.unwrap_or_default().iter();
    unique(table, "evaluation", evaluations.map(|one| &one.name[..]));
    unique(table, "data", data.map(|one| &one.name[..]));
}

/// Reports a matrix of more than one evaluation.
fn check_transfer(
    table: &Table,
    layout: Option<Layout>,
    evaluations: Option<&[TableEvaluation]>,
    data: Option<&[TableData]>,
) {
    let (Some(Layout::Transfer), Some(evaluations), Some(data)) = (layout, evaluations, data)
    else {
        return;
    };
    let is_one = matches!(evaluations, [only] if only.is_attacked());
    let is_whole = matches!(data, [only] if !only.spec.contains("{severity}"));
    if !(is_one && is_whole) {
        let message = "layout = \"transfer\" needs one evaluation with attacks, and one data set";
        table.problem("layout", message);
    }
}

impl TableEvaluation {
    /// Returns whether it has attacks besides `clean`.
    pub fn is_attacked(&self) -> bool {
        self.attacks.iter().any(|attack| attack != "clean")
    }
}

fn unique<'a>(table: &Table, key: &str, names: impl Iterator<Item = &'a str>) {
    let mut seen: Vec<String> = Vec::new();
    for name in names {
        let slug = slug(name);
        if slug.is_empty() {
            table.problem(key, format!("the name `{name}` has no letters or digits"));
        } else if seen.contains(&slug) {
            let message = format!("several `{key}` tables have the folder name `{slug}`");
            table.problem_with_hint(key, message, "give each a unique name");
        }
        seen.push(slug);
    }
}

/// Returns a name as a folder name: letters and digits, in lower case, joined by hyphens.
pub fn slug(name: &str) -> String {
    let words = name.split(|letter: char| !letter.is_alphanumeric());
    let words: Vec<String> = words
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect();
    words.join("-")
}

/// The protocols in the binary: name and text.
pub const PROTOCOLS: &[(&str, &str)] = &[
    (
        "robustbench-cifar10-linf",
        include_str!("../../protocols/robustbench-cifar10-linf.toml"),
    ),
    (
        "robustbench-cifar10-l2",
        include_str!("../../protocols/robustbench-cifar10-l2.toml"),
    ),
    (
        "robustbench-cifar100-linf",
        include_str!("../../protocols/robustbench-cifar100-linf.toml"),
    ),
    (
        "robustbench-imagenet-linf",
        include_str!("../../protocols/robustbench-imagenet-linf.toml"),
    ),
    ("cifar10-c", include_str!("../../protocols/cifar10-c.toml")),
    (
        "cifar100-c",
        include_str!("../../protocols/cifar100-c.toml"),
    ),
    (
        "imagenet-c",
        include_str!("../../protocols/imagenet-c.toml"),
    ),
    (
        "imagenet-3dcc",
        include_str!("../../protocols/imagenet-3dcc.toml"),
    ),
    (
        "imagenet-ua",
        include_str!("../../protocols/imagenet-ua.toml"),
    ),
    (
        "natural-shifts",
        include_str!("../../protocols/natural-shifts.toml"),
    ),
    (
        "zero-shot-robust",
        include_str!("../../protocols/zero-shot-robust.toml"),
    ),
];

impl Protocol {
    /// Loads a protocol by its name, or from a file.
    ///
    /// Errors: an unknown name; all problems of a file at once.
    pub fn load(name: &str) -> Result<Self> {
        let known = PROTOCOLS.iter().find(|(known, _)| *known == name);
        match known {
            Some((_, text)) => Self::parse(name, text),
            None if Path::new(name).is_file() => {
                Self::parse(name, &files::read_text(Path::new(name))?)
            }
            None => {
                let names: Vec<&str> = PROTOCOLS.iter().map(|(name, _)| *name).collect();
                let error = Error::input(format!("unknown protocol `{name}`, and no such file"));
                Err(error.hint(match nearest(name, &names) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("use a TOML file, or one of {}", names.join(", ")),
                }))
            }
        }
    }

    /// Parses a protocol. `name` is for messages.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        read(text, &[], Self::read).map_err(|problems| invalid(name, &problems))
    }
}

impl TableModels {
    /// Loads a file of models.
    ///
    /// Errors: all problems of the file at once.
    pub fn load(path: &Path) -> Result<Self> {
        let text = files::read_text(path)?;
        let name = path.display().to_string();
        read(&text, &[], Self::read).map_err(|problems| invalid(&name, &problems))
    }
}

fn invalid(name: &str, problems: &[Problem]) -> Error {
    let lines: Vec<String> = problems
        .iter()
        .map(|problem| format!("  {problem}"))
        .collect();
    Error::input(format!("`{name}` is invalid:\n{}", lines.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocols_in_the_binary_are_valid() {
        for (name, _) in PROTOCOLS {
            let protocol = Protocol::load(name).unwrap();
            assert!(protocol.source.is_some(), "{name}");
            assert!(
                protocol.data.iter().all(|data| data.obtain.is_some()),
                "{name}"
            );
        }
    }

    #[test]
    fn all_problems_of_a_file_are_reported() {
        let text = "heading = \"x\"\n[[evaluation]]\nname = \"a b\"\nattacks = [\"pgd\"]\nnorm = \"l3\"\n[[evaluation]]\nname = \
                    \"A-B\"\nattacks = []\n[[data]]\nname = \"d\"";
        let message = Protocol::parse("file.toml", text).unwrap_err().to_string();
        for part in ["heading", "l3", "`spec`"] {
            assert!(message.contains(part), "{part}: {message}");
        }
        let evaluation = |name| format!("[[evaluation]]\nname = \"{name}\"\nattacks = [\"pgd\"]\n");
        let twice = [
            "title = \"x\"\n",
            &evaluation("a b"),
            &evaluation("A-B"),
            "[[data]]\nname = \"d\"\nspec = \"e\"",
        ];
        let message = Protocol::parse("twice.toml", &twice.concat())
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("several `evaluation` tables have the folder name `a-b`"),
            "{message}"
        );
        let message = Protocol::load("imagenet_c").unwrap_err().to_string();
        assert!(message.contains("did you mean `imagenet-c`?"), "{message}");
    }
}
