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

/// Benchmark one adversarial training step: attack steps, forward, backward and optimizer
#[derive(clap::Args)]
pub(crate) struct Step {
    /// Model size, such as vit_s16
    #[arg(long, default_value = "vit_s16")]
    model: String,
    /// Image size in pixels
    #[arg(long, default_value = "112", value_parser = parse_size)]
    image_size: usize,
    /// Batch size
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Number of attack steps; 0 for standard training
    #[arg(long, default_value_t = 1)]
    attack_steps: u64,
    /// Time only the attack, without weight gradients and optimizer
    #[arg(long)]
    attack_only: bool,
    /// Compare the device's gradients with the CPU's in f32 instead of timing
    #[arg(long, conflicts_with = "attack_only")]
    gradients: bool,
    /// Recompute activations in backward passes instead of storing them (activation checkpointing)
    #[arg(long)]
    recompute: bool,
    /// Time each kernel of one more step individually; requires --device cuda
    #[arg(long, conflicts_with = "gradients")]
    profile: bool,
    #[command(flatten)]
    head: HeadSize,
    /// Number of timed steps, whose median is reported
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Compute in this precision
    #[arg(long, default_value = "bf16", value_parser = one_of::<Precision>("precision"))]
    precision: Precision,
    /// Compute the attack in this precision [default: the value of --precision]
    #[arg(long, value_parser = one_of::<AttackPrecision>("precision"))]
    attack_precision: Option<AttackPrecision>,
}

/// Benchmark the communication of processes in one update: summing gradients and gathering weights
#[derive(clap::Args)]
#[command(
    after_help = "Example (the result is input for `advxl plan --link`):\n  advxl bench exchange --processes 2 --parameters 86000000 --threads 1"
)]
pub(crate) struct Exchange {
    /// Number of model parameters
    #[arg(long, default_value_t = 22_000_000)]
    parameters: usize,
    /// Number of timed exchanges, whose median is reported
    #[arg(long, default_value_t = 5)]
    repeats: usize,
}

/// Benchmark an NVIDIA GPU for a few seconds and save its constants for `advxl plan --device cuda`
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  advxl bench device --device cuda\n  advxl plan recipes/vit_b16_in1k.toml --device cuda --devices 8"
)]
pub(crate) struct Device {
    /// Write the constants to FILE [default: a file in advxl's cache, where `advxl plan` finds it]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl Device {
    pub(crate) fn run(&self) -> Result<()> {
        let device = device()?;
        let Some(gpu) = device.gpu() else {
            let message = "`bench device` requires an NVIDIA GPU";
            return Err(Error::input(message).hint("add --device cuda"));
        };
        let measured = gpu.measure().map_err(|error| Error::of_gpu(&error))?;
        let name = &gpu.facts().name;
        let constants = GpuConstants::of(name, &measured);
        let path = self.out.clone().or_else(|| GpuConstants::path(name));
        let path = path.ok_or_else(|| {
            Error::input("cannot find a cache folder").hint("add --out FILE, or set ADVXL_CACHE")
        })?;
        if let Some(folder) = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
        {
            files::make_folder(folder)?;
        }
        let value = json!(constants);
        files::write(&path, format!("{value:#}\n").as_bytes())?;
        note(&format!("constants written to `{}`", path.display()));
        print_json(&value);
        Ok(())
    }
}

impl Exchange {
    pub(crate) fn run(&self, comm: &Comm) -> Result<()> {
        for (flag, value) in [("parameters", self.parameters), ("repeats", self.repeats)] {
            if value == 0 {
                let message = format!("--{flag} must be at least 1, got 0");
                return Err(Error::input(message).everywhere());
            }
        }
        // Gradients and weights in f32, each once to send and once to receive.
        let needed = 16.0 * self.parameters as f64;
        let what = format!("exchanging {} parameters", self.parameters);
        require_memory(&what, needed, "use fewer --parameters")?;
        let timings = bench::exchange(comm, self.parameters, self.repeats, &device()?)?;
        if comm.is_main() {
            print_json(&timings);
        }
        Ok(())
    }
}

impl Step {
    pub(crate) fn run(&self) -> Result<()> {
        let config = ModelConfig::named(&self.model).ok_or_else(|| {
            Error::input(format!("--model: unknown model size `{}`", self.model))
                .hint(named_sizes(&self.model))
        })?;
        check_image_size(&config, self.image_size)?;
        for (flag, value) in [("batch", self.batch), ("repeats", self.repeats)] {
            if value == 0 {
                return Err(Error::input(format!("--{flag} must be at least 1, got 0")));
            }
        }
        if self.attack_only && self.attack_steps == 0 {
            let message = "--attack-only with --attack-steps 0 has nothing to time";
            return Err(Error::input(message).hint("use at least one attack step"));
        }
        let (size, batch, recompute) = (self.image_size, self.batch, self.recompute);
        let work = match self.attack_only {
            true => Work::Attack,
            false => Work::Update { recompute },
        };
        let needed = batch_memory(&config, self.head.classes, size, batch, work);
        let what = format!("a step on {batch} images of {size} pixels");
        require_memory(&what, needed, "use a smaller --batch or --image-size")?;
        let device = device()?;
        if self.profile && device.gpu().is_none() {
            let message = "--profile requires an NVIDIA GPU";
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
