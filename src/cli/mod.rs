//! The command line: parses arguments and calls the library. The only module that prints.

pub(crate) mod bench;
pub(crate) mod data;
pub(crate) mod demo;
pub mod device;
pub(crate) mod embed;
pub(crate) mod eval;
pub(crate) mod export;
pub mod inputs;
pub(crate) mod inspect;
pub(crate) mod manual;
pub mod memory;
pub mod model;
pub(crate) mod plan;
pub(crate) mod predict;
pub(crate) mod preprocessing;
pub mod print;
pub(crate) mod recipe;
pub(crate) mod screen;
pub(crate) mod shared;
pub(crate) mod table;
pub(crate) mod train;
pub mod values;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use advxl_cuda::Gpu;
use clap::{CommandFactory, Parser, Subcommand};
use serde_json::json;

use crate::distributed;
use crate::distributed::{Comm, Launch, Reports};
use crate::error::{Error, Kind, Result};
use crate::ops::{Api, DeviceName};

use device::WANTED;
use print::{IS_QUIET, PATIENCE, alarm, all_printed, note, print_json, remember};

/// Train and evaluate adversarially robust vision models.
#[derive(Parser)]
#[command(name = "advxl", version, about, propagate_version = true)]
#[command(next_help_heading = "Global options")]
#[command(
    after_help = "Exit codes: 0 success, 1 failure, 2 invalid input, 75 temporary failure: run the same command again"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Number of threads; does not change results [default: all cores, or 2 loading threads in `data check` and `data
    /// bench`]
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    /// Device: auto (a working GPU, else the CPU), cpu or cuda, and rocm, metal, vulkan or wgpu in builds with that
    /// feature; cuda:1 is the second GPU [default: auto; in `train` the recipe's `device`, in `plan` cpu]
    #[arg(long, global = true, value_name = "NAME")]
    device: Option<DeviceName>,
    /// Run N processes on this machine, for `train` (within the recipe's `parallel` table), `eval`, `table`, `embed`, `data
    /// check`, `data pack` and `bench exchange` [default: 1]
    #[arg(long, global = true, value_name = "N")]
    processes: Option<usize>,
    /// Run N processes on this machine, each on its own CUDA GPU
    #[arg(long, global = true, value_name = "N", conflicts_with = "processes")]
    gpus: Option<usize>,
    /// Print the result or error as one JSON object, on the last line of standard output
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Demonstrate the method in minutes on synthetic images: two-stage adversarial training against standard training
    Demo(demo::Demo),
    /// Train a model from a recipe; rerun the same command to resume
    Train(train::Train),
    /// Evaluate the accuracy of a model under attacks
    ///
    /// Each attack runs only on the images that survived the attacks before it. Progress is saved after every batch:
    /// rerun the same command to resume.
    Eval(Box<eval::Eval>),
    /// Evaluate models by a published protocol and print the table
    ///
    /// Each number is one `advxl eval` command with a folder of its own in --out. Rerun the same command to resume;
    /// several processes with the same --out share the work.
    Table(table::TableCommand),
    /// Predict logits, and optionally input gradients, for a data set
    Predict(predict::Predict),
    /// Embed captions with a text model, for training and evaluation
    Embed(embed::Embed),
    /// Export a model for timm, open_clip, transformers or RobustBench
    Export(export::Export),
    /// Export results as the YAML files that Hugging Face reads from `.eval_results` of a model repository
    ExportResults(export::ExportResults),
    /// Estimate the compute, memory, time and price of a recipe without training
    Plan(plan::Plan),
    /// Check recipes and explain their keys
    Recipe {
        #[command(subcommand)]
        what: recipe::Recipe,
    },
    /// Inspect a model, a run or a weights file
    Inspect(inspect::Inspect),
    /// Check, benchmark, index and pack data sets
    Data {
        #[command(subcommand)]
        what: data::Data,
    },
    /// Benchmark this machine
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Print shell completions
    Completions(manual::Completions),
    /// Write man pages, or print the command-line reference as Markdown
    Man(manual::Man),
}

#[derive(Subcommand)]
enum Bench {
    /// Benchmark one adversarial training step
    Step(bench::Step),
    /// Benchmark the communication of processes in one update
    Exchange(bench::Exchange),
    /// Benchmark an NVIDIA GPU and save its constants for `advxl plan --device cuda`
    Device(bench::Device),
}

/// Runs the program with the arguments of this process.
pub fn run() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    ExitCode::from(run_with(&arguments))
}

/// Runs the program with the given arguments (the first is its name) and returns the exit code. Call it once per
/// process.
pub fn run_with(arguments: &[OsString]) -> u8 {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(usage) => return print_usage(&usage, arguments),
    };
    let comm = match start(&arguments) {
        Ok(Start::Rank(comm)) => comm,
        Ok(Start::Launched(code)) => return code,
        Err(error) => return report(&format!("error: {error}"), &error, arguments.json),
    };
    IS_QUIET.store(!comm.is_main(), Ordering::Relaxed);
    let done = comm
        .check_binary()
        .and_then(|()| execute(&arguments, &comm))
        .and_then(|()| all_printed());
    let Err(error) = done else {
        return 0;
    };
    if error.is_everywhere() || comm.world_size() == 1 {
        return report(&format!("error: {error}"), &error, arguments.json);
    }
    // Rank 0 goes first, so that it alone prints an error that all ranks have.
    if !comm.is_main() {
        std::thread::sleep(PATIENCE);
    }
    IS_QUIET.store(false, Ordering::Relaxed);
    let code = report(&format!("error: {comm:?}: {error}"), &error, arguments.json);
    // The other ranks are waiting for this one and do not know that it failed.
    comm.abort(code);
    code
}

/// Prints an error, with --json also as a JSON object on standard output, and returns its exit code. Prints nothing if
/// this process is quiet.
fn report(text: &str, error: &Error, json: bool) -> u8 {
    note(text);
    if json {
        let (message, hint) = error.clone().into_parts();
        print_error(&message, hint.as_deref(), error.exit_code());
    }
    error.exit_code()
}

/// Prints an error as a JSON object.
fn print_error(message: &str, hint: Option<&str>, code: u8) {
    print_json(&json!({ "error": { "message": message, "hint": hint, "exit_code": code } }));
}

/// The role of this process.
enum Start {
    /// A rank of the run.
    Rank(Comm),
    /// The launcher of a run that has ended with this exit code.
    Launched(u8),
}

/// Launches the requested processes, or joins the run that this process was launched for.
fn start(arguments: &Arguments) -> Result<Start> {
    let launch = Launch::read(arguments.is_shared())?;
    if let Some((flag, count)) = arguments.asked() {
        arguments.check_processes(flag, count)?;
        if arguments.gpus.is_some() {
            // Set only once: `execute` skips it with --gpus.
            let _ = WANTED.set(DeviceName::Gpu(Api::Cuda, None));
        }
        if launch.world_size() > 1 && !launch.is_launched() {
            let message = format!(
                "--{flag} {count}: this process already belongs to a run of world size {}, as rank {}",
                launch.world_size(),
                launch.rank()
            );
            return Err(Error::input(message).hint(format!(
                "remove --{flag}, or unset RANK and WORLD_SIZE and start the command without mpirun or srun"
            )));
        }
        if count > 1 && !launch.is_launched() {
            if arguments.gpus.is_some() {
                check_gpus(count)?;
            }
            return distributed::launch(count, note).map(Start::Launched);
        }
    }
    if launch.world_size() > 1 && !arguments.is_shared() {
        IS_QUIET.store(launch.rank() > 0, Ordering::Relaxed);
        let message = format!(
            "this command runs in one process, but {} were started",
            launch.world_size()
        );
        return Err(Error::input(message).hint(format!("start one process; {SHARED}")));
    }
    distributed::init(&launch, Reports { note, alarm }).map(Start::Rank)
}

/// The commands that run in several processes, for hints.
const SHARED: &str = "train, eval, table, embed, data check, data pack and bench exchange can run in several processes";

impl Arguments {
    /// Returns whether the command can run in several processes.
    fn is_shared(&self) -> bool {
        match &self.command {
            Command::Train(_) | Command::Eval(_) | Command::Table(_) | Command::Embed(_) => true,
            Command::Data { what } => what.is_shared(),
            Command::Bench { what } => matches!(what, Bench::Exchange(_)),
            _ => false,
        }
    }

    /// Returns the flag that requests processes, with their number.
    fn asked(&self) -> Option<(&'static str, usize)> {
        let gpus = self.gpus.map(|count| ("gpus", count));
        gpus.or(self.processes.map(|count| ("processes", count)))
    }

    fn check_processes(&self, flag: &str, count: usize) -> Result<()> {
        if count == 0 {
            let message = format!("--{flag} must be at least 1, got 0");
            return Err(Error::input(message));
        }
        if !self.is_shared() {
            let message = format!("--{flag} {count}: this command runs in one process");
            return Err(Error::input(message).hint(format!("remove --{flag}; {SHARED}")));
        }
        match self.device {
            None | Some(DeviceName::Auto | DeviceName::Gpu(Api::Cuda, None)) => Ok(()),
            Some(device) if self.gpus.is_some() => {
                let message = format!(
                    "--gpus {count} uses CUDA GPUs 0 to {}, but --device is {device}",
                    count - 1
                );
                Err(Error::input(message)
                    .hint("remove --device, or use --processes N for processes on another device"))
            }
            Some(_) => Ok(()),
        }
    }
}

/// Returns an error if this machine has fewer GPUs than processes. Software GPUs are not limited: each process makes
/// one.
fn check_gpus(count: usize) -> Result<()> {
    if Gpu::is_software_requested() {
        return Ok(());
    }
    let present = Gpu::count().map_err(|error| {
        let named = Error::input(format!("--gpus {count}: {}", error.message()));
        match error.advice() {
            Some(advice) => named.hint(format!("{advice}; or use --processes N for CPUs")),
            None => named.hint("use --processes N for CPUs"),
        }
    })?;
    if present < count {
        let message = format!("--gpus {count}: found {present} on this machine");
        return Err(Error::input(message).hint(format!(
            "use --gpus {present}, or check whether CUDA_VISIBLE_DEVICES hides some"
        )));
    }
    Ok(())
}

/// Prints the help, the version, or the error in the arguments, and returns the exit code.
fn print_usage(usage: &clap::Error, arguments: &[OsString]) -> u8 {
    let code = Kind::Input.exit_code();
    if usage.kind() == clap::error::ErrorKind::InvalidUtf8 {
        let strange = arguments
            .iter()
            .filter(|argument| argument.to_str().is_none());
        for argument in strange {
            let argument = argument.to_string_lossy();
            note(&format!("error: `{argument}` is not UTF-8"));
        }
        note(
            "  hint: arguments must be UTF-8: rename the file or folder, or pass a symbolic link to it",
        );
        return code;
    }
    let printed = usage.print();
    if usage.use_stderr() {
        if arguments.iter().any(|argument| argument == "--json") {
            let text = usage.to_string();
            let message = text.trim().trim_start_matches("error: ");
            print_error(message, None, code);
        }
        return code;
    }
    remember(printed.and_then(|()| std::io::stdout().flush()));
    match all_printed() {
        Ok(()) => 0,
        Err(error) => report(&format!("error: {error}"), &error, false),
    }
}

fn execute(arguments: &Arguments, comm: &Comm) -> Result<()> {
    if arguments.threads == Some(0) {
        return Err(Error::input("--threads must be at least 1, got 0"));
    }
    if let Some(device) = arguments.device.filter(|_| arguments.gpus.is_none()) {
        // Set only once: `start` sets it with --gpus only.
        let _ = WANTED.set(device);
    }
    start_threads(arguments.threads)?;
    // On a thread of the pool: from outside, each parallel section (about a hundred per update) would have to wake the
    // pool and put the caller to sleep.
    let work = || rayon::scope(|_| perform(arguments, comm));
    // A GPU failure unwinds from where it is noticed, which may be deep inside a tensor read.
    advxl_cuda::caught(work).unwrap_or_else(|error| Err(Error::of_gpu(&error)))
}

/// Starts the thread pool for all computations, with one thread per core of this process by default. Call it once per
/// process.
///
/// Errors: the pool is already running.
pub fn start_threads(count: Option<usize>) -> Result<()> {
    rayon::ThreadPoolBuilder::new()
        .stack_size(8 << 20)
        .num_threads(count.unwrap_or_else(distributed::threads))
        .build_global()
        .map_err(|error| Error::failed(format!("cannot start threads: {error}")))
}

fn perform(arguments: &Arguments, comm: &Comm) -> Result<()> {
    let json = arguments.json;
    match &arguments.command {
        Command::Train(train) => return train.run(json, comm),
        Command::Eval(eval) => return eval.run(json, comm),
        Command::Table(table) => return table.run(json, comm),
        Command::Embed(embed) => return embed.run(json, comm),
        Command::Data { what } => return what.run(arguments.threads, json, comm),
        Command::Bench {
            what: Bench::Exchange(exchange),
        } => return exchange.run(comm),
        _ => {}
    }
    match &arguments.command {
        Command::Demo(demo) => demo.run(json),
        Command::Predict(predict) => predict.run(json),
        Command::Export(export) => export.run(json),
        Command::ExportResults(results) => results.run(json),
        Command::Plan(plan) => plan.run(json),
        Command::Inspect(inspect) => inspect.run(json),
        Command::Completions(completions) => completions.run(Arguments::command(), json),
        Command::Man(man) => man.run(Arguments::command(), json),
        Command::Recipe { what } => what.run(json),
        Command::Bench {
            what: Bench::Step(step),
        } => step.run(),
        Command::Bench {
            what: Bench::Device(measure),
        } => measure.run(),
        Command::Train(_)
        | Command::Eval(_)
        | Command::Table(_)
        | Command::Embed(_)
        | Command::Data { .. }
        | Command::Bench { .. } => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_reference_is_up_to_date() {
        let page = include_str!("../../docs/reference/cli.md");
        assert!(
            page == manual::markdown(Arguments::command()),
            "docs/reference/cli.md is stale: run `advxl man --markdown > docs/reference/cli.md`"
        );
    }
}
