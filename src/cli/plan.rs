//! `advxl plan`.

use serde_json::json;

use super::device::WANTED;
use super::print::{print_json, print_line};
use super::shared::{HeadSize, RecipeFile};
use super::values::one_of;
use crate::distributed;
use crate::error::{Error, Result};
use crate::files;
use crate::ops::{Api, Device, DeviceName, Precision, peak_flops, usable};
use crate::plan;
use crate::plan::loading::ImageSource;
use crate::plan::{DeviceEngine, Devices, GpuConstants, Link, LoadingPlan};
use crate::recipe::Recipe;
use crate::units::{duration, grouped};

/// Share of the CPU's peak throughput that training reaches (docs/benchmarks/results.md).
const SHARE_OF_PEAK: f64 = 0.62;

/// Estimate the cost of a run: compute (the paper's count and actual), memory by part, hours and price
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  advxl plan recipes/vit_b16_in1k.toml --devices 8 --device-tflops 400 --price 2.5\n  \
        advxl plan recipes/vit_b16_in1k.toml --devices 256 --device-tflops 400 --link 400Gb --latency-us 5"
)]
pub(crate) struct Plan {
    #[command(flatten)]
    recipe: RecipeFile,
    #[command(flatten)]
    head: HeadSize,
    /// Number of devices that share each batch
    #[arg(long, default_value_t = 1)]
    devices: u64,
    /// Sustained (not peak) throughput of one device in 10^12 operations per second [default: that of this machine]
    #[arg(long, value_name = "X")]
    device_tflops: Option<f64>,
    /// NVIDIA GPU to plan for: h100, or a file written by `advxl bench device` [default with --device cuda: the GPU
    /// measured on this machine]
    #[arg(long, value_name = "GPU", conflicts_with = "device_tflops")]
    gpu: Option<String>,
    /// Price of one device per hour
    #[arg(long, value_name = "P")]
    price: Option<f64>,
    /// Full-duplex bandwidth of each device, such as 400Gb or 25Gb (10^9 bits per second), which adds exchanges and
    /// checkpoints to the plan; divide it among devices that share a link
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    link: Option<f64>,
    /// Minimum latency of a message between devices in microseconds; the default was measured over TCP
    #[arg(long, value_name = "X", default_value_t = plan::LATENCY_US, requires = "link")]
    latency_us: f64,
    /// Write speed of the run's folder in 10^9 bytes per second; the default was measured
    #[arg(long, value_name = "X", default_value_t = plan::DISK, requires = "link")]
    disk: f64,
    /// Plan for this precision [default: the recipe's, as far as the device supports it]
    #[arg(long, value_parser = one_of::<Precision>("precision"))]
    precision: Option<Precision>,
    /// Images per second that one core loads, as measured by `advxl data bench` ("per core") [default: the rates in
    /// docs/guides/data.md]
    #[arg(long, value_name = "N")]
    loader_rate: Option<f64>,
    /// CPU cores per GPU [default: all cores of this machine]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    cores_per_gpu: Option<u64>,
}

impl Plan {
    pub(crate) fn run(&self, json: bool) -> Result<()> {
        let above = |flag: &str, value: Option<f64>| match value {
            Some(value) if value.is_nan() || value <= 0.0 => Err(Error::input(format!(
                "--{flag} must be above 0, got {value}"
            ))),
            _ => Ok(()),
        };
        above("device-tflops", self.device_tflops)?;
        above("price", self.price)?;
        above("latency-us", Some(self.latency_us))?;
        above("disk", Some(self.disk))?;
        above("loader-rate", self.loader_rate)?;
        above("devices", Some(self.devices as f64))?;
        let recipe = self.recipe.load()?;
        // Plan for the CPU unless a GPU is named. Planning for a GPU does not open it.
        let engine = match (WANTED.get(), &self.gpu) {
            (Some(DeviceName::Gpu(Api::Cuda, _)), _) | (None, Some(_)) => DeviceEngine::Cuda,
            (Some(other), Some(gpu)) => {
                let message = format!("--gpu {gpu} requires --device cuda, got {other}");
                return Err(Error::input(message).hint("remove one of them"));
            }
            _ => DeviceEngine::Cpu,
        };
        let gpu = match (engine, self.device_tflops) {
            (DeviceEngine::Cuda, None) => Some(self.constants()?),
            _ => None,
        };
        let usable = || match engine {
            DeviceEngine::Cpu => usable(recipe.precision, &Device::cpu()).0,
            DeviceEngine::Cuda => recipe.precision,
        };
        let precision = self.precision.unwrap_or_else(usable);
        let tflops = match (self.device_tflops, &gpu) {
            (Some(tflops), _) => tflops,
            (None, None) => SHARE_OF_PEAK * peak_flops(precision, &Device::cpu()) / 1e12,
            // For the losses that all devices repeat, which are in f32.
            (None, Some(gpu)) => gpu.tflops(Precision::F32)?,
        };
        let devices = Devices {
            count: self.devices,
            tflops,
            price: self.price,
            link: self.link.map(|gbits| Link {
                gbits,
                latency_us: self.latency_us,
                disk: self.disk,
            }),
            engine,
        };
        let classes = self.head.classes;
        let plan = match &gpu {
            None => plan::Plan::new(&recipe, classes, precision, devices),
            Some(gpu) => plan::Plan::on_gpus(&recipe, classes, precision, devices, gpu)?,
        };
        // On a CPU the kernels use the cores, and loading is faster than training.
        let loading = match engine {
            DeviceEngine::Cpu => Vec::new(),
            DeviceEngine::Cuda => {
                LoadingPlan::all(&recipe, &plan.phases, &devices, self.loader_rate)
            }
        };
        let lines = lines(&plan, &recipe, &devices, gpu.as_ref()).into_iter();
        for line in lines.chain(self.loading(&loading)) {
            print_line(&line);
        }
        if json {
            print_json(
                &json!({ "plan": plan, "devices": devices, "gpu": gpu, "loading": loading }),
            );
        }
        Ok(())
    }

    /// Returns the constants of the GPU named by --gpu, or of the GPU measured on this machine.
    fn constants(&self) -> Result<GpuConstants> {
        if let Some(name) = &self.gpu {
            return GpuConstants::load(name);
        }
        let folder = GpuConstants::folder();
        let found = folder
            .and_then(|folder| files::list(&folder).ok())
            .unwrap_or_default();
        let hint = "add --gpu h100 or --device-tflops, or measure this machine's GPU with `advxl bench device --device cuda`";
        match &found[..] {
            [one] => GpuConstants::load(&one.display().to_string()),
            [] => Err(Error::input("--device cuda: the speed of the GPU is unknown").hint(hint)),
            several => {
                let names: Vec<_> = several
                    .iter()
                    .map(|path| path.display().to_string())
                    .collect();
                let message = "--device cuda: found measurements of several GPUs on this machine";
                Err(Error::input(message)
                    .hint(format!("add --gpu with one of {}", names.join(", "))))
            }
        }
    }
}

impl Plan {
    /// Returns lines with the cores that each GPU needs for loading, and warnings with remedies if there are fewer.
    fn loading(&self, all: &[LoadingPlan]) -> Vec<String> {
        if all.is_empty() {
            return Vec::new();
        }
        let (cores, of) = match self.cores_per_gpu {
            Some(cores) => (cores, "--cores-per-gpu"),
            None => (distributed::threads() as u64, "this machine"),
        };
        let rates = match self.loader_rate {
            Some(_) => "at the measured rate (--loader-rate)",
            None => {
                "at the rates in docs/guides/data.md for photographs of 500 x 375 pixels (--loader-rate)"
            }
        };
        let mut lines = vec![
            format!("loading for one GPU, {rates}:"),
            format!(
                "  {:<12} {:>6} {:>10} {:<13} {:>10} {:>6}",
                "stage", "image", "images/s", "source", "per core", "cores"
            ),
        ];
        for plan in all {
            lines.push(format!(
                "  {:<12} {:>6} {:>10.0} {:<13} {:>10.0} {:>6}",
                plan.stage,
                plan.image_size,
                plan.images_per_second,
                plan.source.name(),
                plan.per_core,
                plan.cores
            ));
        }
        for plan in all.iter().filter(|plan| plan.cores > cores) {
            let remedies = plan.remedies.iter().map(|(source, cores)| {
                let change = match source {
                    ImageSource::Packed => "pack the images (`advxl data pack --shorter-side`)",
                    _ => "set data.reduced_decode = true",
                };
                format!("{change}: {cores} cores")
            });
            let remedies: Vec<String> = remedies.collect();
            lines.push(format!(
                "warning: stage `{}` @{} needs {} cores per GPU, but {of} has {cores}{}",
                plan.stage,
                plan.image_size,
                plan.cores,
                match remedies[..] {
                    [] => String::new(),
                    _ => format!("; {}", remedies.join(", or ")),
                }
            ));
        }
        lines
    }
}

fn lines(
    plan: &plan::Plan,
    recipe: &Recipe,
    devices: &Devices,
    gpu: Option<&GpuConstants>,
) -> Vec<String> {
    let millions = plan.parameters as f64 / 1e6;
    let mut lines = vec![
        format!(
            "{}: {millions:.1} M parameters for {} classes",
            recipe.model.size(),
            plan.classes
        ),
        String::new(),
        format!(
            "{:<12} {:>14} {:>6} {:>7} {:>7} {:>12} {:>16} {:>12}",
            "stage",
            "samples",
            "image",
            "tokens",
            "attack",
            "GMAC/image",
            "paper, 1e10 GMAC",
            "GFLOP/image"
        ),
    ];
    for phase in &plan.phases {
        lines.push(format!(
            "{:<12} {:>14} {:>6} {:>7} {:>7} {:>12.2} {:>16.3e} {:>12.1}",
            phase.stage,
            grouped(phase.samples),
            phase.image_size,
            phase
                .tokens
                .map_or("-".to_owned(), |tokens| tokens.to_string()),
            phase.attack_steps,
            phase.forward_macs as f64 / 1e9,
            phase.paper_macs / 1e19,
            phase.flops_per_sample / 1e9,
        ));
    }
    let (paper, flops) = (plan.paper_macs / 1e19, plan.flops);
    lines.push(String::new());
    lines.push(format!("compute: {paper:.3} x 10^10 giga multiply-adds in the paper's count, {flops:.2e} actual floating-point operations"));
    lines.push(format!(
        "peak memory per device with {} devices:",
        devices.count
    ));
    let total = ("total", plan.memory.total());
    for (name, bytes) in plan.memory.parts().into_iter().chain([total]) {
        lines.push(format!(
            "  {name:<17} {:>10.0} MiB",
            bytes as f64 / f64::from(1 << 20)
        ));
    }
    if let Some(link) = &devices.link {
        lines.extend(exchanges(plan, recipe, devices, link));
    }
    let hours = duration(plan.hours * 3600.0);
    let rate = match gpu {
        None => format!("{:.3} TFLOP/s per device", devices.tflops),
        Some(gpu) => {
            lines.push(format!(
                "one step on one {}, from {}:",
                gpu.name, gpu.source
            ));
            let stages = recipe
                .stage
                .iter()
                .flat_map(|stage| stage.phases.iter().map(move |_| stage));
            for (phase, stage) in plan.phases.iter().zip(stages) {
                let seconds = phase.update.compute;
                lines.push(format!(
                    "  {:<12} @{:<4} {:>9.2} ms {:>10.0} images/s",
                    phase.stage,
                    phase.image_size,
                    1e3 * seconds,
                    stage.batch as f64 / devices.count as f64 / seconds
                ));
            }
            "this rate".to_owned()
        }
    };
    lines.push(match devices.link {
        None => {
            format!("time: {hours} at {rate}, excluding loading, evaluation and exchange (--link)")
        }
        Some(_) => format!(
            "time: {hours} at {rate}, {:.0} % of it computing; excluding loading and evaluation",
            100.0 * plan.efficiency
        ),
    });
    if let Some(price) = plan.price {
        lines.push(format!("price: {price:.0}"));
    }
    lines
}

/// Returns lines with the time that devices spend on exchanges, and the cost of checkpoints.
fn exchanges(plan: &plan::Plan, recipe: &Recipe, devices: &Devices, link: &Link) -> Vec<String> {
    let mut lines = vec![
        format!(
            "seconds per update at {} Gb/s and {} us per message:",
            link.gbits, link.latency_us
        ),
        format!(
            "  {:<12} {:>7} {:>9} {:>9} {:>9} {:>9}",
            "stage", "batch", "compute", "exchange", "contrast", "bubble"
        ),
    ];
    let mut phases = plan.phases.iter();
    for stage in &recipe.stage {
        for phase in phases.by_ref().take(stage.phases.len()) {
            let update = phase.update;
            lines.push(format!(
                "  {:<12} {:>7} {:>9.3} {:>9.3} {:>9.3} {:>7.1} %",
                stage.name,
                stage.batch,
                update.compute,
                update.exchange,
                update.contrast,
                100.0 * update.bubble()
            ));
        }
    }
    let shards = recipe.parallel.shards;
    if !shards.is_multiple_of(devices.count) {
        lines.push(format!(
            "note: {} devices cannot share batches of {shards} {}: parallel.shards must be a multiple of the number of devices",
            devices.count,
            if shards == 1 { "shard" } else { "shards" }
        ));
    }
    if let Some(checkpoints) = plan.checkpoints {
        lines.push(format!(
            "checkpoints: {} of {:.2} GB, {:.1} s each at {} GB/s",
            checkpoints.count,
            checkpoints.bytes as f64 / 1e9,
            checkpoints.seconds,
            link.disk
        ));
    }
    lines
}

/// Parses a bandwidth such as `400Gb` and returns it in 10^9 bits per second.
fn parse_rate(text: &str) -> std::result::Result<f64, String> {
    let wrong = || {
        format!(
            "invalid bandwidth `{text}`: expected a rate such as 400Gb, 200Mb or 50GB (per second)"
        )
    };
    let digits = text.trim_end_matches(|c: char| c.is_alphabetic() || c == '/');
    let factor = match text[digits.len()..].trim_end_matches("/s") {
        "Gb" | "Gbit" => 1.0,
        "Mb" | "Mbit" => 1e-3,
        "GB" => 8.0,
        "MB" => 8e-3,
        _ => return Err(wrong()),
    };
    let number: f64 = digits.trim().parse().map_err(|_| wrong())?;
    match number.is_finite() && number > 0.0 {
        true => Ok(number * factor),
        false => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidths_are_in_bits_or_bytes() {
        assert_eq!(parse_rate("400Gb"), Ok(400.0));
        assert_eq!(parse_rate("1.5 Gbit/s"), Ok(1.5));
        assert_eq!(parse_rate("50GB"), Ok(400.0));
        assert_eq!(parse_rate("200Mb/s"), Ok(0.2));
        for wrong in ["400", "fast", "-1Gb", "0Gb", "NaNGb", "1gb"] {
            assert!(
                parse_rate(wrong).unwrap_err().contains("such as 400Gb"),
                "{wrong}"
            );
        }
    }
}
