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

use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use clap::{Parser, Subcommand};

use crate::distributed;
use crate::distributed::Comm;
use crate::error::{Error, Kind, Result};
use crate::ops::DeviceName;

use device::WANTED;
use print::{IS_QUIET, PATIENCE, all_printed, note, remember};

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
    /// Print the result as one JSON object, the last line of standard output.
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
    /// What processes exchange in an update.
    Exchange(bench::Exchange),
    /// Measure the constants of an NVIDIA GPU, by which `advxl plan --device cuda` predicts times.
    Device(bench::Device),
}

/// Runs the program.
pub fn run() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(usage) => return print_usage(&usage),
    };
    let comm = match distributed::init(note) {
        Ok(comm) => comm,
        Err(error) => {
            note(&format!("error: {error}"));
            return ExitCode::from(error.exit_code());
        }
    };
    IS_QUIET.store(!comm.is_main(), Ordering::Relaxed);
    let done = execute(&arguments, &comm).and_then(|()| all_printed());
    let Err(error) = done else {
        return ExitCode::SUCCESS;
    };
    let code = error.exit_code();
    if error.is_everywhere() || comm.world_size() == 1 {
        if comm.is_main() {
            note(&format!("error: {error}"));
        }
        return ExitCode::from(code);
    }
    // The first process comes first: where all have met the same, it alone tells it.
    if !comm.is_main() {
        std::thread::sleep(PATIENCE);
    }
    IS_QUIET.store(false, Ordering::Relaxed);
    note(&format!("error: {comm:?}: {error}"));
    // The others wait for this one, and do not know.
    comm.abort(code);
    ExitCode::from(code)
}

/// Prints help, the version, or what is wrong with the arguments.
fn print_usage(usage: &clap::Error) -> ExitCode {
    if usage.kind() == clap::error::ErrorKind::InvalidUtf8 {
        let arguments = std::env::args_os().filter(|argument| argument.to_str().is_none());
        for argument in arguments {
            let argument = argument.to_string_lossy();
            note(&format!("error: `{argument}` is not UTF-8"));
        }
        note(
            "  hint: data sets and overrides are named in UTF-8: rename the file or folder, or name a link to it",
        );
        return ExitCode::from(Kind::Input.exit_code());
    }
    let printed = usage.print();
    if usage.use_stderr() {
        return ExitCode::from(Kind::Input.exit_code());
    }
    remember(printed.and_then(|()| std::io::stdout().flush()));
    match all_printed() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note(&format!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

fn execute(arguments: &Arguments, comm: &Comm) -> Result<()> {
    if arguments.threads == Some(0) {
        return Err(Error::input("--threads 0: at least one thread is needed"));
    }
    if let Some(device) = arguments.device {
        // Nobody else sets it.
        let _ = WANTED.set(device);
    }
    let threads = arguments.threads.unwrap_or_else(distributed::threads);
    rayon::ThreadPoolBuilder::new()
        .stack_size(8 << 20)
        .num_threads(threads)
        .build_global()
        .map_err(|error| Error::failed(format!("cannot start threads: {error}")))?;
    // On a thread of the pool: from outside every parallel piece of work, some hundred in an update, would have
    // to wake the pool up and put the caller to sleep.
    let work = || rayon::scope(|_| perform(arguments, comm));
    // A GPU that fails ends the work where it is noticed, which may be deep in a read of a tensor.
    advxl_cuda::caught(work).unwrap_or_else(|error| Err(Error::of_gpu(&error)))
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
    if comm.world_size() > 1 {
        let message = format!(
            "this command works in one process, and {} were started",
            comm.world_size()
        );
        return Err(Error::input(message)
            .hint("start it without mpirun; train, eval, embed, data check and data pack share their work")
            .everywhere());
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
