//! `advxl table`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Parser;

use super::eval::Eval;
use super::print::{note, print_json, print_line};
use super::values::one_of;
use crate::distributed::Comm;
use crate::error::{Context, Error, Kind, Result};
use crate::files;
use crate::ops::Precision;
use crate::table::protocol::{PROTOCOLS, TableModels};
use crate::table::{Cell, Inputs, Plan, Protocol, Results, Table, TableModel};

/// Evaluate models by a published protocol and print the table
///
/// Each number is one `advxl eval` command with a folder of its own in --out. Rerun the same command to resume; several
/// processes with the same --out share the work.
#[derive(clap::Args)]
#[command(
    disable_version_flag = true,
    after_help = "Examples:\n  advxl table --list\n  advxl table robustbench-cifar10-linf runs/a runs/b --data \
                  cifar10=cifar-10-batches-bin --out tables/cifar10\n  advxl table imagenet-c base=runs/a --root \
                  /data/robustness --out tables/c --dry-run"
)]
pub(crate) struct TableCommand {
    /// Protocol: a name from --list, or a TOML file
    #[arg(value_name = "PROTOCOL", required_unless_present = "list")]
    protocol: Option<String>,
    /// Models: folders, runs or weights files, optionally with a name for the table
    #[arg(value_name = "[NAME=]MODEL")]
    models: Vec<String>,
    /// TOML file with further models and their architectures, preprocessing and text models
    #[arg(long = "models", value_name = "FILE")]
    listed: Option<PathBuf>,
    /// Path of a data set or file of the protocol; may be repeated
    #[arg(long, value_name = "NAME=PATH")]
    data: Vec<String>,
    /// Folder with the data sets that --data does not name, each in a folder of its name
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Text model that embeds class names, for models that --models lists without one [default: the folder text of the
    /// model]
    #[arg(long, value_name = "FOLDER")]
    text: Option<PathBuf>,
    /// Folder of the table and its results
    #[arg(long, value_name = "DIR", required_unless_present = "list")]
    out: Option<PathBuf>,
    /// Images per forward pass; does not change results
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Seed of the attacks
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Compute in this precision
    #[arg(long, default_value = "f32", value_parser = one_of::<Precision>("precision"))]
    precision: Precision,
    /// Print the command of each evaluation instead of running it
    #[arg(long)]
    dry_run: bool,
    /// List the protocols
    #[arg(long)]
    list: bool,
}

/// The evaluation of a cell, parsed like the command.
#[derive(Parser)]
#[command(name = "advxl eval")]
struct EvalCommand {
    #[command(flatten)]
    eval: Eval,
}

impl TableCommand {
    pub(crate) fn run(&self, json: bool, comm: &Comm) -> Result<()> {
        if self.list {
            for (name, _) in PROTOCOLS {
                print_line(&format!("{name:<28}{}", Protocol::load(name)?.title));
            }
            return Ok(());
        }
        let (Some(protocol), Some(out)) = (&self.protocol, &self.out) else {
            return Err(Error::input("PROTOCOL and --out are missing"));
        };
        let protocol = Protocol::load(protocol)?;
        let inputs = self.inputs(out)?;
        let plan = Plan::new(&protocol, &inputs)?;
        // Invalid arguments of any cell are reported before the first is evaluated.
        let evaluations = plan.cells.iter().map(parsed);
        let evaluations = evaluations.collect::<Result<Vec<Eval>>>()?;
        if self.dry_run {
            plan.cells
                .iter()
                .for_each(|cell| print_line(&cell.command()));
            plan.missing
                .values()
                .for_each(|text| note(&format!("missing data set {text}")));
            return Ok(());
        }
        comm.all_ok(match comm.is_main() {
            true => files::make_folder(out),
            false => Ok(()),
        })?;
        comm.stop_on_signals()?;
        let mut results = Results::new(&plan, out);
        let mut failed = Vec::new();
        for (index, eval) in evaluations.iter().enumerate() {
            match evaluate(&plan, &mut results, index, eval, comm) {
                Ok(Done::Now) => comm.all_ok(match comm.is_main() {
                    true => write(&protocol, &inputs, &mut results).map(drop),
                    false => Ok(()),
                })?,
                Ok(Done::Before | Done::Elsewhere) => {}
                // A stop, or an error that only this rank has.
                Err(error) if error.kind() == Kind::TryAgain => return Err(error),
                Err(error) if comm.world_size() > 1 && !error.is_everywhere() => return Err(error),
                Err(error) => {
                    let folder = plan.cells[index].folder.display();
                    note(&format!("error: {folder}: {error}"));
                    failed.push(error);
                }
            }
        }
        // What other processes were at when this one passed it may be finished by now.
        let unfinished = match comm.is_main() {
            true => {
                let written = write(&protocol, &inputs, &mut results);
                written.map(|(table, unfinished)| {
                    match json {
                        true => print_json(&table.to_json()),
                        false => print_line(table.to_text().trim_end()),
                    }
                    unfinished
                })
            }
            false => Ok(0),
        };
        let elsewhere = comm.broadcast(comm.all_ok(unfinished)?);
        if let Some(first) = failed.into_iter().next() {
            return Err(first.context("some evaluations failed, first"));
        }
        match elsewhere {
            0 => Ok(()),
            count => {
                let message = format!("{count} evaluations are in progress in other processes");
                Err(Error::new(Kind::TryAgain, message)
                    .hint("run the same command again when they have finished")
                    .everywhere())
            }
        }
    }

    fn inputs(&self, out: &Path) -> Result<Inputs> {
        let mut models = Vec::new();
        for text in &self.models {
            let (name, path) = match text.split_once('=') {
                Some((name, path)) => (name.to_owned(), path),
                None => (text.trim_end_matches('/').to_owned(), &text[..]),
            };
            models.push(TableModel {
                name,
                path: files::expanded(path),
                arch: None,
                text: None,
                preprocessing: None,
                arguments: Vec::new(),
                reported: None,
            });
        }
        if let Some(path) = &self.listed {
            models.extend(TableModels::load(path)?.model);
        }
        if models.is_empty() {
            return Err(
                Error::input("no models to evaluate").hint("add model folders, or --models FILE")
            );
        }
        if let Some(missing) = models.iter().find(|model| !model.path.exists()) {
            let message = format!(
                "model `{}`: `{}` does not exist",
                missing.name,
                missing.path.display()
            );
            return Err(Error::input(message));
        }
        let mut paths = BTreeMap::new();
        for text in &self.data {
            let Some((name, path)) = text.split_once('=') else {
                return Err(Error::input(format!("--data {text}: expected NAME=PATH")));
            };
            if paths.insert(name.to_owned(), path.to_owned()).is_some() {
                return Err(Error::input(format!("--data {name}=... is given twice")));
            }
        }
        if let Some(root) = self.root.as_ref().filter(|root| !root.is_dir()) {
            let message = format!("--root `{}` is not a folder", root.display());
            return Err(Error::input(message));
        }
        let arguments = [
            ("--batch", self.batch.to_string()),
            ("--seed", self.seed.to_string()),
            ("--precision", self.precision.word().to_owned()),
        ];
        let arguments = arguments.into_iter();
        Ok(Inputs {
            models,
            paths,
            root: self.root.clone(),
            text: self.text.clone(),
            arguments: arguments
                .flat_map(|(flag, value)| [flag.to_owned(), value])
                .collect(),
            out: out.to_owned(),
        })
    }
}

/// Writes the table of what has finished, and returns it with the number of cells that have not.
fn write(protocol: &Protocol, inputs: &Inputs, results: &mut Results) -> Result<(Table, usize)> {
    let unfinished = results.unfinished()?;
    let table = Table::new(protocol, &inputs.models, results)?;
    write_all(&table, &inputs.out)?;
    Ok((table, unfinished))
}

/// Evaluates a cell, unless it is finished or another process evaluates it.
fn evaluate(
    plan: &Plan,
    results: &mut Results,
    index: usize,
    eval: &Eval,
    comm: &Comm,
) -> Result<Done> {
    let cell = &plan.cells[index];
    let mut lock = None;
    let mut claim = || -> Result<Done> {
        if results.has(index)? {
            return Ok(Done::Before);
        }
        if let Some(source) = plan.source(cell)
            && !results.has(source)?
        {
            return Ok(Done::Elsewhere);
        }
        files::make_folder(&cell.folder)?;
        lock = files::lock_kept(&cell.folder.join("lock"))?;
        Ok(match &lock {
            None => Done::Elsewhere,
            // Another process may have finished it meanwhile.
            Some(_) if results.has(index)? => Done::Before,
            Some(_) => Done::Now,
        })
    };
    let claimed = match comm.is_main() {
        true => claim(),
        false => Ok(Done::Before),
    };
    let claimed = comm.broadcast(comm.all_ok(claimed)?);
    if claimed == Done::Now {
        note(&format!("\n{}", cell.command()));
        eval.run(false, comm)?;
        comm.all_ok(match comm.is_main() {
            true => cell.finish(),
            false => Ok(()),
        })?;
    }
    Ok(claimed)
}

/// Who evaluated a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum Done {
    /// This call.
    Now,
    /// An earlier one.
    Before,
    /// Another process, which is at it.
    Elsewhere,
}

fn parsed(cell: &Cell) -> Result<Eval> {
    let arguments = cell.all_arguments();
    let words = std::iter::once("advxl eval".to_owned()).chain(arguments);
    let command = EvalCommand::try_parse_from(words).map_err(|usage| {
        let text = usage.to_string();
        let first = text.lines().next().unwrap_or_default();
        Error::input(first.trim_start_matches("error: ").to_owned())
    });
    command
        .map(|command| command.eval)
        .context(|| format!("`{}`", cell.command()))
}

fn write_all(table: &Table, out: &Path) -> Result<()> {
    for (name, text) in [
        ("table.txt", table.to_text()),
        ("table.md", table.to_markdown()),
        ("table.tex", table.to_latex()),
        ("table.csv", table.to_csv()),
        ("table.json", format!("{:#}\n", table.to_json())),
    ] {
        files::write(&out.join(name), text.as_bytes())?;
    }
    Ok(())
}
