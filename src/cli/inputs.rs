//! Data sets, subsets and other inputs as they are named on the command line.

use std::path::{Path, PathBuf};

use super::print::note;
use crate::data::{Dataset, Selection, Spec, Split, Subset};
use crate::error::{Error, Result};
use crate::output::Inputs;

/// Which images of a data set an evaluation uses.
#[derive(clap::Args)]
pub(crate) struct ChosenImages {
    /// Use a stratified sample of N images, the same for every model and machine. [default: all images]
    #[arg(short, long, alias = "count", value_name = "N", conflicts_with = "ids")]
    n: Option<usize>,
    /// Use the images that FILE lists, one a line: paths within the data set, keys of shards, or numbers.
    #[arg(long, value_name = "FILE")]
    ids: Option<PathBuf>,
}

impl ChosenImages {
    pub(crate) fn of(&self, dataset: &Dataset) -> Result<Subset> {
        let selection = match (&self.ids, self.n) {
            (Some(ids), _) => Selection::Listed(ids.clone()),
            (None, Some(0)) => return Err(Error::input("--n 0: at least 1 image is needed")),
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

/// Opens a data set and says what it is.
pub(crate) fn open_data(spec: &str, split: Split, seed: u64) -> Result<Dataset> {
    let dataset = Dataset::open(&spec.parse::<Spec>()?, split, seed)?;
    note(&format!("data: {}", dataset.summary()));
    for notice in dataset.notices() {
        note(&format!("note: {notice}"));
    }
    Ok(dataset)
}

/// `runs/NAME` for `recipes/NAME.toml`.
///
/// Errors: a name that leads elsewhere, such as that of `...toml`.
pub(crate) fn default_folder(recipe: &Path) -> Result<PathBuf> {
    let name = recipe.file_stem().unwrap_or_default();
    if name.is_empty() || name == "." || name == ".." {
        let message = format!("`{}` gives the folder of the run no name", recipe.display());
        return Err(Error::input(message).hint("choose a folder with --out"));
    }
    Ok(Path::new("runs").join(name))
}

/// What a command reads of a data set and of a model, for [`Inputs`].
pub(crate) fn inputs(model: Option<&Path>, data: Option<&str>) -> Result<Inputs> {
    let mut inputs = Inputs::default();
    if let Some(model) = model {
        inputs.add("MODEL", model);
        // Of a run it is the model in it that is read.
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
