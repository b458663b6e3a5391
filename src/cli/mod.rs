//! The command line: what was typed, made into calls of the library. The only place that prints.

mod bench;
mod data;
mod demo;
mod embed;
mod eval;
mod export;
mod inspect;
mod plan;
mod predict;
mod preprocessing;
mod screen;
mod train;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use burn::tensor::Device;
use clap::{Parser, Subcommand};

use crate::data::{Dataset, MAX_IMAGE_SIZE, Preprocessing};
use crate::error::{Error, Result};
use crate::fused::{self, DeviceName, Precision, hardware};
use crate::group::{self, Group};
use crate::memory;
use crate::model::ModelConfig;
use crate::model::config::{check_mean, check_std};
use crate::model::weights::{self, Loaded};
use crate::plan::{Work, batch_memory};
use crate::recipe::PRECISIONS;

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
    /// Where to compute: auto (a GPU if this program was built for one and finds it), cpu, cuda, rocm, metal, vulkan or wgpu, or one
    /// of several, such as cuda:1.
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
}

/// Runs the program.
pub fn run() -> ExitCode {
    let arguments = Arguments::parse();
    let group = match Group::open(note) {
        Ok(group) => group,
        Err(error) => {
            note(&format!("error: {error}"));
            return ExitCode::from(error.exit_code());
        }
    };
    IS_QUIET.store(!group.is_first(), Ordering::Relaxed);
    let Err(error) = execute(&arguments, &group) else {
        return ExitCode::SUCCESS;
    };
    let code = error.exit_code();
    if error.is_everywhere() || group.size() == 1 {
        if group.is_first() {
            note(&format!("error: {error}"));
        }
        return ExitCode::from(code);
    }
    // The first process comes first: where all have met the same, it alone tells it.
    if !group.is_first() {
        std::thread::sleep(PATIENCE);
    }
    IS_QUIET.store(false, Ordering::Relaxed);
    note(&format!("error: {group:?}: {error}"));
    // The others wait for this one, and do not know.
    group.abort(code);
    ExitCode::from(code)
}

/// Before another process than the first tells an error.
const PATIENCE: Duration = Duration::from_secs(3);

/// Whether this process is not the one that tells.
static IS_QUIET: AtomicBool = AtomicBool::new(false);

fn is_quiet() -> bool {
    IS_QUIET.load(Ordering::Relaxed)
}

/// Writes a line to standard error.
fn note(text: &str) {
    if !is_quiet() {
        eprintln!("{text}");
    }
}

fn execute(arguments: &Arguments, group: &Group) -> Result<()> {
    if arguments.threads == Some(0) {
        return Err(Error::input("--threads 0: at least one thread is needed"));
    }
    if let Some(device) = arguments.device {
        // Nobody else sets it.
        let _ = WANTED.set(device);
    }
    let threads = arguments.threads.unwrap_or_else(group::threads);
    rayon::ThreadPoolBuilder::new()
        .stack_size(8 << 20)
        .num_threads(threads)
        .build_global()
        .map_err(|error| Error::failed(format!("cannot start threads: {error}")))?;
    // On a thread of the pool: from outside every parallel piece of work, some hundred in an update, would have
    // to wake the pool up and put the caller to sleep.
    rayon::scope(|_| perform(arguments, group))
}

fn perform(arguments: &Arguments, group: &Group) -> Result<()> {
    let json = arguments.json;
    match &arguments.command {
        Command::Train(train) => return train.run(json, group),
        Command::Eval(eval) => return eval.run(json, group),
        Command::Embed(embed) => return embed.run(json, group),
        Command::Data { what } => return what.run(arguments.threads, json, group),
        Command::Bench {
            what: Bench::Exchange(exchange),
        } => return exchange.run(group),
        _ => {}
    }
    if group.size() > 1 {
        let message = format!(
            "this command works in one process, and {} were started",
            group.size()
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
        Command::Bench {
            what: Bench::Step(step),
        } => step.run(),
        Command::Train(_)
        | Command::Eval(_)
        | Command::Embed(_)
        | Command::Data { .. }
        | Command::Bench { .. } => Ok(()),
    }
}

/// Where the user wants this program to compute, if it was said on the command line.
static WANTED: OnceLock<DeviceName> = OnceLock::new();

/// Where this program computes.
///
/// Errors: the device that was named is not there or does not compute.
fn device() -> Result<Device> {
    device_or(DeviceName::Auto)
}

/// The same, for a recipe that names a device; the command line comes first.
fn device_or(name: DeviceName) -> Result<Device> {
    static OPENED: OnceLock<Device> = OnceLock::new();
    if let Some(device) = OPENED.get() {
        return Ok(device.clone());
    }
    let name = *WANTED.get().unwrap_or(&name);
    let device = name.open(group::number_here())?;
    if let Some(hardware) = hardware(&device) {
        note(&format!("note: computing on {hardware}"));
    }
    Ok(OPENED.get_or_init(|| device).clone())
}

/// The model that a user named.
#[derive(clap::Args)]
struct NamedModel {
    /// A model folder, the folder of a run, or with --arch a file of weights.
    #[arg(value_name = "MODEL")]
    path: PathBuf,
    /// Architecture of a file of weights (safetensors, .pth, .bin): timm's name, open_clip's or ours.
    #[arg(long, value_name = "NAME")]
    arch: Option<String>,
    /// Mean of each channel for pixels in [0, 1]. If absent the folder's; of a file the one in it, ImageNet's, or CLIP's for its
    /// models.
    #[arg(long, value_name = "R,G,B", value_parser = parse_mean)]
    mean: Option<[f64; 3]>,
    /// Standard deviation of each channel; see --mean.
    #[arg(long, value_name = "R,G,B", value_parser = parse_std)]
    std: Option<[f64; 3]>,
}

impl NamedModel {
    fn load(&self) -> Result<Loaded> {
        let mut loaded = match &self.arch {
            None => weights::load_any(&self.path, &device()?)?,
            Some(_) if self.path.is_dir() => {
                return Err(
                    Error::input("--arch is for a file of weights, not for a folder")
                        .hint("leave it out: the folder says what its model is"),
                );
            }
            Some(name) => weights::load_file(&self.path, name, &device()?)?,
        };
        if let Some(key) = &loaded.wrapper {
            note(&format!(
                "note: of several things in the file, the weights are those in `{key}`"
            ));
        }
        for text in &loaded.notes {
            note(&format!("note: {text}"));
        }
        if self.mean.is_some() || self.std.is_some() {
            loaded.model.normalise_by(self.mean, self.std);
            // Normalized otherwise it is another model, whose evaluations are not gone on with.
            let (mean, std) = loaded.model.config().statistics();
            let identity = format!("{} {mean:?} {std:?}", loaded.hash);
            loaded.hash = blake3::hash(identity.as_bytes()).to_string();
        }
        Ok(loaded)
    }
}

fn parse_classes(text: &str) -> std::result::Result<usize, String> {
    let classes = text.parse().ok();
    classes
        .filter(|classes| (1..=100_000_000).contains(classes))
        .ok_or_else(|| "give a number from 1 to 100000000".to_owned())
}

fn parse_channels(text: &str) -> std::result::Result<[f64; 3], String> {
    let numbers = text
        .split(',')
        .map(|number| number.trim().parse::<f64>().ok());
    let numbers: Option<Vec<f64>> = numbers
        .map(|number| number.filter(|n| n.is_finite()))
        .collect();
    let three = numbers.and_then(|numbers| numbers.try_into().ok());
    three.ok_or_else(|| "give three numbers, such as 0.5,0.5,0.5".to_owned())
}

fn parse_mean(text: &str) -> std::result::Result<[f64; 3], String> {
    let mean = parse_channels(text)?;
    let text = |(message, hint): (String, String)| format!("{message}; {hint}");
    check_mean(&mean).map(|()| mean).map_err(text)
}

fn parse_std(text: &str) -> std::result::Result<[f64; 3], String> {
    let std = parse_channels(text)?;
    let text = |(message, hint): (String, String)| format!("{message}; {hint}");
    check_std(&std).map(|()| std).map_err(text)
}

/// Patches along a side of images of `--image-size`; an error unless they are whole.
fn check_image_size(config: &ModelConfig, size: usize) -> Result<usize> {
    if size > MAX_IMAGE_SIZE {
        let message =
            format!("--image-size {size} is more than {MAX_IMAGE_SIZE}, the largest side");
        return Err(Error::input(message).hint("give a size near to the model's own"));
    }
    config.grid(size).map_err(|(message, hint)| {
        Error::input(message.replace("image_size =", "--image-size")).hint(hint)
    })
}

/// An error where a batch of images, or `more` numbers kept besides, do not fit into memory.
fn check_memory(
    loaded: &Loaded,
    preprocessing: &Preprocessing,
    batch: usize,
    work: Work,
    more: usize,
) -> Result<()> {
    let (config, classes) = (loaded.model.config(), loaded.model.classes());
    let size = preprocessing.image_size;
    let of_batch = batch_memory(&config, classes, size, batch, work);
    // The model is in memory already.
    let needed = of_batch - 4.0 * config.parameters(classes, loaded.image_size) as f64;
    let what = format!("a batch of {batch} images of {size} pixels");
    require_memory(&what, needed, "give a smaller --batch or --image-size")?;
    let what = format!("keeping what is to be written of all images of {size} pixels");
    require_memory(
        &what,
        needed + 4.0 * more as f64,
        "take fewer images with --n",
    )
}

/// An error where so many bytes are not available to this process on the processor; of GPUs it is not known what is free.
fn require_memory(what: &str, needed: f64, hint: &str) -> Result<()> {
    if !fused::is_processor(&device()?) {
        return Ok(());
    }
    let available = memory::available().map(|free| free / group::processes_here() as u64);
    memory::require(what, needed, available, hint)
}

/// How many images to use of a data set.
fn image_count(wanted: Option<usize>, dataset: &Dataset) -> usize {
    wanted.unwrap_or(dataset.len()).min(dataset.len())
}

/// An error unless the labels of a data set can be classes of a model that has so many.
fn check_classes(of_model: usize, dataset: &Dataset, data: &str) -> Result<()> {
    let of_data = dataset.classes().len();
    if of_data <= of_model {
        return Ok(());
    }
    let message = format!("`{data}` has {of_data} classes and the model {of_model}");
    Err(Error::input(message).hint("use the data set that the model was trained for"))
}

fn parse_precision(text: &str) -> std::result::Result<Precision, String> {
    let found = PRECISIONS.iter().find(|(word, _)| *word == text);
    found
        .map(|(_, precision)| *precision)
        .ok_or_else(|| "use f32 or bf16".to_owned())
}

/// The arithmetic that is used for what was asked; says so where it is another.
fn usable_precision(wanted: Precision) -> Result<Precision> {
    let (precision, notice) = crate::fused::usable(wanted, &device()?);
    if let Some(notice) = notice {
        note(&format!("note: {notice}"));
    }
    Ok(precision)
}

/// Writes the JSON result to standard output.
fn print_json(value: &serde_json::Value) {
    print_line(&value.to_string());
}

/// Writes a line to standard output. Nobody may be listening any more, as in `| head`; that is no fault.
fn print_line(text: &str) {
    if !is_quiet() {
        let _ = writeln!(std::io::stdout(), "{text}");
    }
}

/// `runs/NAME` for `recipes/NAME.toml`.
fn default_folder(recipe: &Path) -> PathBuf {
    Path::new("runs").join(recipe.file_stem().unwrap_or_default())
}
