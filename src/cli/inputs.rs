//! Data sets, subsets and other inputs named on the command line.

use std::path::{Path, PathBuf};

use super::print::note;
use crate::data::{Dataset, Selection, Spec, Split, Subset};
use crate::error::{Error, Result};
use crate::output::Inputs;

/// The images of a data set that an evaluation uses.
#[derive(clap::Args)]
pub(crate) struct ChosenImages {
    /// Use a stratified sample of N images, the same for every model and machine [default: all images]
    #[arg(short, long, alias = "count", value_name = "N", conflicts_with = "ids")]
    n: Option<usize>,
    /// Use the images listed in FILE, one per line: paths within the data set, shard keys or indices
    #[arg(long, value_name = "FILE")]
    ids: Option<PathBuf>,
}

impl ChosenImages {
    pub(crate) fn of(&self, dataset: &Dataset) -> Result<Subset> {
        let selection = match (&self.ids, self.n) {
            (Some(ids), _) => Selection::Listed(ids.clone()),
            (None, Some(0)) => return Err(Error::input("--n must be at least 1, got 0")),
            (None, Some(n)) => Selection::Sample(n),
            (None, None) => Selection::All,
        };
        let subset = Subset::choose(dataset, &selection)?;
        if selection != Selection::All {
            note(&format!("images: {}", subset.describe()));
        }
        Ok(subset)
    }
}

/// Opens a data set and prints its summary.
pub(crate) fn open_data(spec: &str, split: Split, seed: u64) -> Result<Dataset> {
    let dataset = Dataset::open(&spec.parse::<Spec>()?, split, seed)?;
    note(&format!("data: {}", dataset.summary()));
    for notice in dataset.notices() {
        note(&format!("note: {notice}"));
    }
    Ok(dataset)
}

/// Returns `runs/NAME` for `recipes/NAME.toml`.
///
/// Errors: a name that points outside `runs`, such as that of `...toml`.
pub(crate) fn default_folder(recipe: &Path) -> Result<PathBuf> {
    let name = recipe.file_stem().unwrap_or_default();
    if name.is_empty() || name == "." || name == ".." {
        let message = format!("cannot name the run folder after `{}`", recipe.display());
        return Err(Error::input(message).hint("choose a folder with --out"));
    }
    Ok(Path::new("runs").join(name))
}

/// Returns what a command reads of a model and of a data set.
pub(crate) fn inputs(model: Option<&Path>, data: Option<&str>) -> Result<Inputs> {
    let mut inputs = Inputs::default();
    if let Some(model) = model {
        inputs.add("MODEL", model);
        // A run's model is in its `model` folder.
        inputs.add("MODEL", model.join("model"));
    }
    if let Some(path) = data
        .map(str::parse::<Spec>)
        .transpose()?
        .as_ref()
        .and_then(Spec::path)
    {
        inputs.add_data("--data", path);
    }
    Ok(inputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_folder_is_always_inside_runs() {
        for (recipe, folder) in [
            ("recipes/demo.toml", "runs/demo"),
            ("/a/my recipe", "runs/my recipe"),
            (".toml", "runs/.toml"),
        ] {
            assert_eq!(
                default_folder(Path::new(recipe)).unwrap(),
                Path::new(folder)
            );
        }
        for recipe in ["...toml", "a/...toml", "..toml", "..", "/"] {
            let error = default_folder(Path::new(recipe)).unwrap_err();
            assert!(error.to_string().contains("--out"), "{error}");
        }
    }
}
