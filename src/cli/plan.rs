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

/// The share of the processor's peak that training reaches here (docs/benchmarks/results.md).
const SHARE_OF_PEAK: f64 = 0.62;

/// What a run costs: arithmetic as the paper counts it and in truth, memory by part, hours and price.
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
    /// Devices that share each batch.
    #[arg(long, default_value_t = 1)]
    devices: u64,
    /// What one device computes in truth, not its peak, in 10^12 operations a second; this machine's if absent.
    #[arg(long, value_name = "X")]
    device_tflops: Option<f64>,
    /// Constants of the NVIDIA GPU to plan for: `h100`, or a file that `advxl bench device` wrote; this machine's if absent.
    /// With --device cuda.
    #[arg(long, value_name = "GPU", conflicts_with = "device_tflops")]
    gpu: Option<String>,
    /// Price of one device for an hour.
    #[arg(long, value_name = "P")]
    price: Option<f64>,
    /// What one device sends to the others while it receives as much, such as 400Gb or 25Gb (10^9 bits a second): with it,
    /// exchanges and checkpoints are planned too. Devices that share a link have a part of it each.
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    link: Option<f64>,
    /// What a message between devices takes at the least, in millionths of a second; TCP's as measured if absent.
    #[arg(long, value_name = "X", default_value_t = plan::LATENCY_US, requires = "link")]
    latency_us: f64,
    /// What is written to the run's folder in a second, in 10^9 bytes; as measured if absent.
    #[arg(long, value_name = "X", default_value_t = plan::DISK, requires = "link")]
    disk: f64,
    /// Compute with this arithmetic; that of the recipe without it, as far as this machine supports it.
    #[arg(long, value_parser = one_of::<Precision>("precision"))]
    precision: Option<Precision>,
    /// Images a second that one core loads, as `advxl data bench` measures it ("a core alone"); the rates of docs/guides/data.md if
    /// absent.
    #[arg(long, value_name = "N")]
    loader_rate: Option<f64>,
    /// Processor cores for each GPU; this machine's if absent.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    cores_per_gpu: Option<u64>,
}

impl Plan {
    pub(crate) fn run(&self, json: bool) -> Result<()> {
        let above = |flag: &str, value: Option<f64>| match value {
            Some(value) if value.is_nan() || value <= 0.0 => {
                Err(Error::input(format!("--{flag} {value} must be above 0")))
            }
            _ => Ok(()),
        };
        above("device-tflops", self.device_tflops)?;
        above("price", self.price)?;
        above("latency-us", Some(self.latency_us))?;
        above("disk", Some(self.disk))?;
        above("loader-rate", self.loader_rate)?;
        above("devices", Some(self.devices as f64))?;
        let recipe = self.recipe.load()?;
        // For this processor, unless another device is named. No GPU is opened to plan for one.
        let engine = match (WANTED.get(), &self.gpu) {
            (Some(DeviceName::Gpu(Api::Cuda, _)), _) | (None, Some(_)) => DeviceEngine::Cuda,
            (Some(other), Some(gpu)) => {
                let message = format!("--gpu {gpu} is for --device cuda, not {other}");
                return Err(Error::input(message).hint("leave one of them out"));
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
            // Of the losses that devices repeat, in f32.
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
        // On a CPU the kernels take the cores, and images come faster than they are trained on.
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

    /// Constants of the GPU that is named, or of the one that was measured on this machine.
    fn constants(&self) -> Result<GpuConstants> {
        if let Some(name) = &self.gpu {
            return GpuConstants::load(name);
        }
        let folder = GpuConstants::folder();
        let found = folder
            .and_then(|folder| files::list(&folder).ok())
            .unwrap_or_default();
        let hint = "add --gpu h100, measure this machine's: advxl bench device --device cuda, or add --device-tflops";
        match &found[..] {
            [one] => GpuConstants::load(&one.display().to_string()),
            [] => {
                Err(Error::input("--device cuda: how fast the GPU computes is missing").hint(hint))
            }
            several => {
                let names: Vec<_> = several
                    .iter()
                    .map(|path| path.display().to_string())
                    .collect();
                let message = "--device cuda: several GPUs were measured on this machine";
                Err(Error::input(message)
                    .hint(format!("add --gpu with one of {}", names.join(", "))))
            }
        }
    }
}

impl Plan {
    /// The cores that each GPU needs, and what to do where there are fewer.
    fn loading(&self, all: &[LoadingPlan]) -> Vec<String> {
        if all.is_empty() {
            return Vec::new();
        }
        let (cores, of) = match self.cores_per_gpu {
            Some(cores) => (cores, "--cores-per-gpu"),
            None => (distributed::threads() as u64, "this machine"),
        };
        let rates = match self.loader_rate {
            Some(_) => "as measured (--loader-rate)",
            None => {
                "by the rates of docs/guides/data.md, for photographs of 500 x 375 pixels (--loader-rate)"
            }
        };
        let mut lines = vec![
            format!("loading for one GPU, {rates}:"),
            format!(
                "  {:<12} {:>6} {:>10} {:<13} {:>10} {:>6}",
                "stage", "image", "images/s", "source", "a core", "cores"
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
                "warning: stage `{}` @{} needs {} cores for each GPU, and {of} has {cores}{}",
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
    lines.push(format!("as the paper counts: {paper:.3} x 10^10 giga multiply-adds; in truth {flops:.2e} floating point operations"));
    lines.push(format!(
        "memory of a device at its largest, of {} devices:",
        devices.count
    ));
    let together = ("together", plan.memory.total());
    for (name, bytes) in plan.memory.parts().into_iter().chain([together]) {
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
        None => format!("{:.3} TFLOP/s a device", devices.tflops),
        Some(gpu) => {
            lines.push(format!("a step of one {}, by {}:", gpu.name, gpu.source));
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
        None => format!(
            "time: {hours} at {rate}, without loading, evaluation and exchange (--link)"
        ),
        Some(_) => format!(
            "time: {hours} at {rate}; devices compute {:.0} % of it; without loading and evaluation",
            100.0 * plan.efficiency
        ),
    });
    if let Some(price) = plan.price {
        lines.push(format!("price: {price:.0}"));
    }
    lines
}

/// What devices wait for.
fn exchanges(plan: &plan::Plan, recipe: &Recipe, devices: &Devices, link: &Link) -> Vec<String> {
    let mut lines = vec![
        format!(
            "an update, in seconds, with {} Gb/s and {} us a message:",
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
            "note: {} devices cannot share batches of {shards} {}: parallel.shards must be a multiple of them",
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

/// A rate such as `400Gb` in 10^9 bits a second.
fn parse_rate(text: &str) -> std::result::Result<f64, String> {
    let wrong = || format!("`{text}` is no rate of a link such as 400Gb, 200Mb or 50GB (a second)");
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
    fn rates_of_links_are_bits_or_bytes() {
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
