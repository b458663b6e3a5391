//! `advxl bench`.

use std::path::PathBuf;

use serde_json::json;

use super::device::device;
use super::memory::require_memory;
use super::model::{check_image_size, named_sizes};
use super::preprocessing::parse_size;
use super::print::{note, print_json};
use super::shared::HeadSize;
use super::values::{one_of, usable_precision};
use crate::bench;
use crate::distributed::Comm;
use crate::error::{Error, Result};
use crate::files;
use crate::model::ModelConfig;
use crate::ops::{AttackPrecision, Precision};
use crate::plan;
use crate::plan::{GpuConstants, Work, batch_memory};

/// One adversarial training step: k attack passes, forward, backward, optimizer.
#[derive(clap::Args)]
pub(crate) struct Step {
    /// Size of the model, such as vit_s16.
    #[arg(long, default_value = "vit_s16")]
    model: String,
    /// Pixels on a side.
    #[arg(long, default_value = "112", value_parser = parse_size)]
    image_size: usize,
    /// Images in a step.
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Steps of the attack; 0 for ordinary training.
    #[arg(long, default_value_t = 1)]
    attack_steps: u64,
    /// Time the attack alone: no gradient of the weights, no update.
    #[arg(long)]
    attack_only: bool,
    /// Time nothing: compare the gradients of the device with those of the processor in f32.
    #[arg(long, conflicts_with = "attack_only")]
    gradients: bool,
    /// Compute activations again in backward passes instead of keeping them.
    #[arg(long)]
    recompute: bool,
    /// Time every kernel of one more step, one after the other; needs --device cuda.
    #[arg(long, conflicts_with = "gradients")]
    profile: bool,
    #[command(flatten)]
    head: HeadSize,
    /// Steps that are timed; the median is told.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Compute with this arithmetic.
    #[arg(long, default_value = "bf16", value_parser = one_of::<Precision>("precision"))]
    precision: Precision,
    /// Compute the attack with this arithmetic; that of --precision if absent.
    #[arg(long, value_parser = one_of::<AttackPrecision>("precision"))]
    attack_precision: Option<AttackPrecision>,
}

/// Measure what processes exchange in an update: gradients summed, weights gathered.
#[derive(clap::Args)]
#[command(
    after_help = "Example, for `advxl plan --link`:\n  advxl bench exchange --processes 2 --parameters 86000000 --threads 1"
)]
pub(crate) struct Exchange {
    /// Weights of the model.
    #[arg(long, default_value_t = 22_000_000)]
    parameters: usize,
    /// Exchanges that are timed; the median is told.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
}

/// Measure the constants of an NVIDIA GPU, by which `advxl plan --device cuda` predicts times; some seconds.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  advxl bench device --device cuda\n  advxl plan recipes/vit_b16_in1k.toml --device cuda --devices 8"
)]
pub(crate) struct Device {
    /// Write the constants to this file; if absent to the program's cache, where `advxl plan` finds them.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl Device {
    pub(crate) fn run(&self) -> Result<()> {
        let device = device()?;
        let Some(gpu) = device.gpu() else {
            let message = "the constants of a GPU are measured on one";
            return Err(Error::input(message).hint("add --device cuda"));
        };
        let measured = gpu.measure().map_err(|error| Error::of_gpu(&error))?;
        let name = &gpu.facts().name;
        let constants = GpuConstants::of(name, &measured);
        let path = self.out.clone().or_else(|| GpuConstants::path(name));
        let path = path.ok_or_else(|| {
            Error::input("there is no folder for caches")
                .hint("give --out FILE, or set ADVXL_CACHE")
        })?;
        if let Some(folder) = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
        {
            files::make_folder(folder)?;
        }
        let value = json!(constants);
        files::write(&path, format!("{value:#}\n").as_bytes())?;
        note(&format!("written to {}", path.display()));
        print_json(&value);
        Ok(())
    }
}

impl Exchange {
    pub(crate) fn run(&self, comm: &Comm) -> Result<()> {
        for (flag, value) in [("parameters", self.parameters), ("repeats", self.repeats)] {
            if value == 0 {
                let message = format!("--{flag} 0 must be at least 1");
                return Err(Error::input(message).everywhere());
            }
        }
        // Gradients and weights, each as they are sent and as they come.
        let needed = 16.0 * self.parameters as f64;
        let what = format!("exchanging {} parameters", self.parameters);
        require_memory(&what, needed, "give fewer --parameters")?;
        let told = bench::exchange(comm, self.parameters, self.repeats, &device()?)?;
        if comm.is_main() {
            print_json(&told);
        }
        Ok(())
    }
}

impl Step {
    pub(crate) fn run(&self) -> Result<()> {
        let config = ModelConfig::named(&self.model).ok_or_else(|| {
            Error::input(format!("--model {}: there is no such size", self.model))
                .hint(named_sizes(&self.model))
        })?;
        check_image_size(&config, self.image_size)?;
        for (flag, value) in [("batch", self.batch), ("repeats", self.repeats)] {
            if value == 0 {
                return Err(Error::input(format!("--{flag} 0 must be at least 1")));
            }
        }
        if self.attack_only && self.attack_steps == 0 {
            let message = "--attack-only with --attack-steps 0 leaves nothing to time";
            return Err(Error::input(message).hint("give at least one attack step"));
        }
        let (size, batch, recompute) = (self.image_size, self.batch, self.recompute);
        let work = match self.attack_only {
            true => Work::Attack,
            false => Work::Update { recompute },
        };
        let needed = batch_memory(&config, self.head.classes, size, batch, work);
        let what = format!("a step of {batch} images of {size} pixels");
        require_memory(&what, needed, "give a smaller --batch or --image-size")?;
        let device = device()?;
        if self.profile && device.gpu().is_none() {
            let message = "--profile times the kernels of an NVIDIA GPU";
            return Err(Error::input(message).hint("add --device cuda"));
        }
        let work = bench::StepWork {
            model: config,
            image_size: self.image_size,
            batch: self.batch,
            attack_steps: self.attack_steps,
            classes: self.head.classes,
            repeats: self.repeats,
            precision: usable_precision(self.precision)?,
            attack_precision: self.attack_precision,
            attack_only: self.attack_only,
            recompute: self.recompute,
            profile: self.profile,
        };
        if device.gpu().is_some() && !self.attack_only {
            plan::check_memory(&work.plan(&device), plan::free_memory(&device))?;
        }
        print_json(&match self.gradients {
            true => bench::gradients(&work, &device)?,
            false => bench::step(&work, &device)?,
        });
        Ok(())
    }
}
