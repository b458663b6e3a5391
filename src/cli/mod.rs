//! The command line: what was typed, made into calls of the library. The only place that prints.

pub(crate) mod bench;
pub(crate) mod data;
pub(crate) mod demo;
pub mod device;
pub(crate) mod embed;
pub(crate) mod eval;
pub(crate) mod export;
pub mod inputs;
pub(crate) mod inspect;
pub mod memory;
pub mod model;
pub(crate) mod plan;
pub(crate) mod predict;
pub(crate) mod preprocessing;
pub mod print;
pub(crate) mod recipe;
pub(crate) mod screen;
pub(crate) mod shared;
pub(crate) mod train;
pub mod values;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use advxl_cuda::Gpu;
use clap::{Parser, Subcommand};
use serde_json::json;

use crate::distributed;
use crate::distributed::{Comm, Launch, Reports};
use crate::error::{Error, Kind, Result};
use crate::ops::{Api, DeviceName};

use device::WANTED;
use print::{IS_QUIET, PATIENCE, alarm, all_printed, note, print_json, remember};

/// Train and evaluate adversarially robust vision transformers.
#[derive(Parser)]
#[command(name = "advxl", version, about, propagate_version = true)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 bad input, 75 try again.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Threads for computing; all cores if absent. Results do not depend on it.
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    /// Device to compute on: auto (a GPU that works, else the CPU), cpu, cuda, or in builds with their feature rocm, metal, vulkan
    /// and wgpu; cuda:1 is the second of several.
    #[arg(long, global = true, value_name = "NAME")]
    device: Option<DeviceName>,
    /// Run in N processes on this machine, as the recipe's table `parallel` allows: train, eval, embed, data check, data pack.
    #[arg(long, global = true, value_name = "N")]
    processes: Option<usize>,
    /// The same, with a CUDA GPU for each process.
    #[arg(long, global = true, value_name = "N", conflicts_with = "processes")]
    gpus: Option<usize>,
    /// Print the result, or the error, as one JSON object, the last line of standard output.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// The whole method in minutes on synthetic images: two-stage training beside normal training.
    Demo(demo::Demo),
    /// Train as a recipe says; the same command resumes.
    Train(train::Train),
    /// Robust accuracy of a model under attacks.
    Eval(Box<eval::Eval>),
    /// Logits, and gradients on request, of a model for a data set.
    Predict(predict::Predict),
    /// Embeddings of captions by a text model, for training and evaluation.
    Embed(embed::Embed),
    /// A model for other programs: timm, open_clip, RobustBench.
    Export(export::Export),
    /// What a recipe costs: arithmetic, memory, hours, price. Trains nothing.
    Plan(plan::Plan),
    /// Check and explain recipes.
    Recipe {
        #[command(subcommand)]
        what: recipe::Recipe,
    },
    /// What is in a model, a run or a file of tensors.
    Inspect(inspect::Inspect),
    /// Look at a data set, measure how fast it loads, prepare it.
    Data {
        #[command(subcommand)]
        what: data::Data,
    },
    /// How fast this machine is.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// One adversarial training step.
    Step(bench::Step),
    /// Measure what processes exchange in an update.
    Exchange(bench::Exchange),
    /// Measure the constants of an NVIDIA GPU, by which `advxl plan --device cuda` predicts times.
    Device(bench::Device),
}

/// Runs the program with the arguments of this process.
pub fn run() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    ExitCode::from(run_with(&arguments))
}

/// Runs the program with these arguments (the first is its name) and returns the exit code. Call it once in a process.
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
    // Rank 0 comes first: where all have the same error, it alone prints it.
    if !comm.is_main() {
        std::thread::sleep(PATIENCE);
    }
    IS_QUIET.store(false, Ordering::Relaxed);
    let code = report(&format!("error: {comm:?}: {error}"), &error, arguments.json);
    // The others wait for this one, and do not know.
    comm.abort(code);
    code
}

/// Prints an error, with --json also as an object on standard output; the exit code. Nothing where this process is quiet.
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

/// What this process is.
enum Start {
    /// One of the run.
    Rank(Comm),
    /// The launcher of a run that has ended with this exit code.
    Launched(u8),
}

/// Starts the processes that were asked for, or joins those that this one was started with.
fn start(arguments: &Arguments) -> Result<Start> {
    let launch = Launch::read(arguments.is_shared())?;
    if let Some((flag, count)) = arguments.asked() {
        arguments.check_processes(flag, count)?;
        if arguments.gpus.is_some() {
            // Nobody else sets it.
            let _ = WANTED.set(DeviceName::Gpu(Api::Cuda, None));
        }
        if launch.world_size() > 1 && !launch.is_launched() {
            let message = format!(
                "--{flag} {count}: this process is one of {} already, rank {}",
                launch.world_size(),
                launch.rank()
            );
            return Err(Error::input(message).hint(format!(
                "leave out --{flag}, or unset RANK and WORLD_SIZE and start it without mpirun or srun"
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
            "this command works in one process, and {} were started",
            launch.world_size()
        );
        return Err(Error::input(message).hint(format!("start it once; {SHARED}")));
    }
    distributed::init(&launch, Reports { note, alarm }).map(Start::Rank)
}

/// Which commands share their work.
const SHARED: &str = "train, eval, embed, data check and data pack share their work";

impl Arguments {
    /// Whether several processes can share the work of the command.
    fn is_shared(&self) -> bool {
        match &self.command {
            Command::Train(_) | Command::Eval(_) | Command::Embed(_) => true,
            Command::Data { what } => what.is_shared(),
            Command::Bench { what } => matches!(what, Bench::Exchange(_)),
            _ => false,
        }
    }

    /// The flag that asks for processes, and their number.
    fn asked(&self) -> Option<(&'static str, usize)> {
        let gpus = self.gpus.map(|count| ("gpus", count));
        gpus.or(self.processes.map(|count| ("processes", count)))
    }

    fn check_processes(&self, flag: &str, count: usize) -> Result<()> {
        if count == 0 {
            let message = format!("--{flag} 0: at least one process is needed");
            return Err(Error::input(message));
        }
        if !self.is_shared() {
            let message = format!("--{flag} {count}: this command works in one process");
            return Err(Error::input(message).hint(format!("leave it out; {SHARED}")));
        }
        match self.device {
            None | Some(DeviceName::Auto | DeviceName::Gpu(Api::Cuda, None)) => Ok(()),
            Some(device) if self.gpus.is_some() => {
                let message = format!(
                    "--gpus {count} computes on CUDA GPUs 0 to {}, but --device is {device}",
                    count - 1
                );
                Err(Error::input(message).hint(
                    "leave out --device, or use --processes N for processes on another device",
                ))
            }
            Some(_) => Ok(()),
        }
    }
}

/// An error where this machine has fewer GPUs than processes. Each process makes a GPU in software of its own.
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
        let message = format!("--gpus {count}: this machine has {present}");
        return Err(Error::input(message).hint(format!(
            "use --gpus {present}; CUDA_VISIBLE_DEVICES can hide some"
        )));
    }
    Ok(())
}

/// Prints help, the version, or what is wrong with the arguments.
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
            "  hint: data sets and overrides are named in UTF-8: rename the file or folder, or name a link to it",
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
        return Err(Error::input("--threads 0: at least one thread is needed"));
    }
    if let Some(device) = arguments.device.filter(|_| arguments.gpus.is_none()) {
        // Nobody else sets it.
        let _ = WANTED.set(device);
    }
    start_threads(arguments.threads)?;
    // On a thread of the pool: from outside every parallel piece of work, some hundred in an update, would have
    // to wake the pool up and put the caller to sleep.
    let work = || rayon::scope(|_| perform(arguments, comm));
    // A GPU that fails ends the work where it is noticed, which may be deep in a read of a tensor.
    advxl_cuda::caught(work).unwrap_or_else(|error| Err(Error::of_gpu(&error)))
}

/// Starts the threads of all computations, as many as this process has cores if no number is given. Once in a process.
///
/// Errors: they run already.
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
        Command::Plan(plan) => plan.run(json),
        Command::Inspect(inspect) => inspect.run(json),
        Command::Recipe { what } => what.run(json),
        Command::Bench {
            what: Bench::Step(step),
        } => step.run(),
        Command::Bench {
            what: Bench::Device(measure),
        } => measure.run(),
        Command::Train(_)
        | Command::Eval(_)
        | Command::Embed(_)
        | Command::Data { .. }
        | Command::Bench { .. } => Ok(()),
    }
}
