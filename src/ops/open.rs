//! Opening devices: their names, the self-test, and the precision to use.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;

use advxl_cuda::{ErrorKind, Gpu};
use burn::tensor::{DType, Device as BurnDevice, DeviceType};
use serde::Serializer;

use super::device::Device;
use super::tensor::{from_vec, to_vec};
use super::words::{AttackPrecision, Numerics, Precision};
use crate::error::{Error, Result};
use crate::rng::{Rng, Stream};
use crate::settings::{Invalid, Kind, Setting, Value, Words, words};

/// The name of a device as a user writes it: `auto`, `cpu`, `cuda`, `cuda:1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceName {
    /// The first GPU of an API that this program was built with, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A GPU by its number; if absent, the local rank, which is 0 for a single process.
    Gpu(Api, Option<usize>),
}

words! {
    /// An interface to GPUs, in the order in which `auto` looks for them.
    pub enum Api {
        /// NVIDIA's CUDA.
        Cuda = "cuda",
        /// AMD's ROCm.
        Rocm = "rocm",
        /// Apple's Metal.
        Metal = "metal",
        /// Vulkan, of any vendor.
        Vulkan = "vulkan",
        /// The interface that wgpu finds.
        Wgpu = "wgpu",
    }
}

impl Api {
    /// Burn's name for it; `None` if this program was built without, and for CUDA, which is not Burn's.
    fn kind(self) -> Option<DeviceType> {
        match self {
            #[cfg(feature = "rocm")]
            Self::Rocm => Some(DeviceType::Rocm),
            #[cfg(feature = "metal")]
            Self::Metal => Some(DeviceType::Metal),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => Some(DeviceType::Vulkan),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Some(DeviceType::Wgpu),
            #[allow(unreachable_patterns)] // With all features nothing is left.
            _ => None,
        }
    }

    /// What it needs apart from a GPU.
    fn driver(self) -> &'static str {
        match self {
            Self::Cuda => "NVIDIA's driver, cuBLASLt and NVRTC",
            Self::Rocm => "AMD's ROCm (check it with `rocminfo`)",
            Self::Metal => "macOS",
            Self::Vulkan | Self::Wgpu => {
                "a Vulkan driver and its loader (libvulkan.so.1; check them with `vulkaninfo --summary`)"
            }
        }
    }

    /// The GPUs of this machine.
    fn devices(self) -> Vec<BurnDevice> {
        let Some(kind) = self.kind() else {
            return Vec::new();
        };
        // The loaders panic if the driver is missing.
        quietly(|| BurnDevice::enumerate(kind).into_iter().collect()).unwrap_or_default()
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (word, number) = match text.split_once(':') {
            Some((word, number)) => (word, Some(number)),
            None => (text, None),
        };
        let wrong = || {
            format!(
                "unknown device `{text}`: use auto, cpu, {}, or one of several, such as cuda:0",
                Api::listed()
            )
        };
        match (word, number) {
            ("auto", None) => return Ok(Self::Auto),
            ("cpu", None) => return Ok(Self::Cpu),
            _ => {}
        }
        let api = Api::from_word(word).ok_or_else(wrong)?;
        let number = number.map(|number| number.parse().map_err(|_| wrong()));
        Ok(Self::Gpu(api, number.transpose()?))
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => write!(f, "auto"),
            Self::Cpu => write!(f, "cpu"),
            Self::Gpu(api, None) => write!(f, "{}", api.word()),
            Self::Gpu(api, Some(number)) => write!(f, "{}:{number}", api.word()),
        }
    }
}

impl Setting for DeviceName {
    const KIND: Kind = Kind::Text {
        expected: "a device such as \"auto\", \"cpu\" or \"cuda:0\"",
        pattern: "^(auto|cpu|(cuda|rocm|metal|vulkan|wgpu)(:[0-9]+)?)$",
    };

    fn from_value(value: &Value) -> Option<std::result::Result<Self, Invalid>> {
        match value {
            Value::Text(text) => Some(text.parse().map_err(Invalid::from)),
            _ => None,
        }
    }

    fn print<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A device that was opened, and what the user should know of the choice.
#[derive(Debug)]
pub struct Opened {
    /// The device.
    pub device: Device,
    /// Why `auto` passed over a GPU that seems to be there.
    pub notice: Option<String>,
}

impl DeviceName {
    /// Opens the device. `local` is the local rank of this process: each takes a GPU of its own.
    ///
    /// Errors: this program was built without it, the driver or the GPU is missing, or the self-test failed.
    pub fn open(self, local: usize) -> Result<Opened> {
        let device = match self {
            Self::Cpu => Device::cpu(),
            Self::Gpu(Api::Cuda, number) => self.open_cuda(number, local)?,
            Self::Gpu(api, number) => self.open_burn(api, number, local)?,
            Self::Auto => return Self::open_auto(local),
        };
        let notice = None;
        Ok(Opened { device, notice })
    }

    /// The first GPU that works, else the processor.
    fn open_auto(local: usize) -> Result<Opened> {
        let mut notice = None;
        match Self::Gpu(Api::Cuda, None).open_cuda(None, local) {
            Ok(device) => return Ok(Opened { device, notice }),
            // A machine without NVIDIA's driver has no such GPU; one with it expects to compute there.
            Err(_) if !advxl_cuda::has_driver() => {}
            Err(error) => {
                let (message, hint) = error.into_parts();
                let hint = hint.map_or_else(String::new, |hint| format!(" ({hint})"));
                notice = Some(format!("{message}{hint}"));
            }
        }
        let mut apis = Api::VALUES.iter();
        let device = match apis.find(|api| !api.devices().is_empty()) {
            Some(api) => Self::Gpu(*api, None).open_burn(*api, None, local)?,
            None => Device::cpu(),
        };
        Ok(Opened { device, notice })
    }

    /// An NVIDIA GPU through the CUDA engine.
    fn open_cuda(self, number: Option<usize>, local: usize) -> Result<Device> {
        let named = |error: advxl_cuda::Error| {
            let message = format!("device `{self}`: {}", error.message());
            let wrapped = match error.kind() {
                ErrorKind::Missing => Error::input(message),
                ErrorKind::Memory | ErrorKind::Failed | ErrorKind::Lost => Error::failed(message),
            };
            match error.advice() {
                Some(advice) => wrapped.hint(format!("{advice}; or use --device cpu")),
                None => wrapped.hint("use --device cpu"),
            }
        };
        // More processes than GPUs share them.
        let number = match number {
            Some(number) => number,
            None => local % Gpu::count().map_err(named)?.max(1),
        };
        let gpu = Gpu::open(number).map_err(named)?;
        gpu.self_test().map_err(named)?;
        Ok(Device::Cuda(gpu))
    }

    /// A GPU through Burn.
    fn open_burn(self, api: Api, number: Option<usize>, local: usize) -> Result<Device> {
        if api.kind().is_none() {
            let message = format!("device `{self}`: not supported by this build");
            let hint = format!(
                "build it with: cargo build --release --features {}",
                api.word()
            );
            return Err(Error::input(message).hint(hint).everywhere());
        }
        let devices = api.devices();
        if devices.is_empty() {
            let message = format!("device `{self}`: not found on this machine");
            let hint = format!("it needs a GPU and {}; or use --device cpu", api.driver());
            return Err(Error::input(message).hint(hint));
        }
        // More processes than GPUs share them.
        let number = number.unwrap_or(local % devices.len());
        let Some(device) = devices.get(number) else {
            let message = format!(
                "device `{self}`: no such GPU: this machine has {}",
                match devices.len() {
                    1 => "one, number 0".to_owned(),
                    count => format!("{count}, numbers 0 to {}", count - 1),
                }
            );
            return Err(Error::input(message).hint("use one of these numbers"));
        };
        let device = Device::Burn(device.clone());
        match quietly(|| largest_error(&device)) {
            Ok(error) if error < 1e-4 => Ok(device),
            Ok(error) => {
                let message = format!(
                    "device `{self}`: self-test failed: matrix products are off by {error:.1e}"
                );
                let hint = "the driver or its compiler returns wrong results: try --device wgpu, built with the feature wgpu alone, or --device cpu";
                Err(Error::failed(message).hint(hint))
            }
            Err(why) => {
                let message = format!("device `{self}`: self-test failed: {why}");
                let hint = format!("it needs {}; or use --device cpu", api.driver());
                Err(Error::failed(message).hint(hint))
            }
        }
    }
}

/// The self-test: how far a device's matrix products are from those of the processor, whose elements are near 1.
///
/// Sides as in attention, padded or not. A broken installation fails at the first product; some drivers panic, and one
/// returned wrong products (SwiftShader, with the SPIR-V shaders of Burn 0.22).
fn largest_error(device: &Device) -> f32 {
    let errors = |[count, rows, inner, columns]: [usize; 4]| {
        let matrices = |seed: u64, shape: [usize; 3]| {
            let mut rng = Rng::new(seed, Stream::Bench);
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.normal()).collect();
            [device, &Device::cpu()].map(|device| from_vec::<3>(values.clone(), shape, device))
        };
        let [a, right_a] = matrices(1, [count, rows, inner]);
        let [b, right_b] = matrices(2, [count, inner, columns]);
        let products = to_vec(a.matmul(b));
        let right = to_vec(right_a.matmul(right_b));
        let errors = products.into_iter().zip(right).map(|(a, b)| (a - b).abs());
        errors.collect::<Vec<_>>()
    };
    let shapes = [
        [8, 5, 5, 16],
        [8, 8, 8, 16],
        [8, 8, 16, 8],
        [4, 56, 56, 64],
        [1, 64, 192, 32],
    ];
    // In this order NaN comes last.
    let errors = shapes.into_iter().flat_map(errors);
    errors.max_by(f32::total_cmp).expect("at least one shape")
}

/// The name of a device's hardware, if it is a GPU.
pub fn hardware(device: &Device) -> Option<String> {
    match device {
        Device::Cuda(gpu) => Some(gpu.facts().name.clone()),
        #[cfg(feature = "gpu")]
        Device::Burn(device) => device.identity().map(|identity| identity.name),
        #[cfg(not(feature = "gpu"))]
        Device::Burn(_) => None,
    }
}

/// The arithmetic to compute in on a device if `wanted` is asked for, and a notice if it is another.
pub fn usable(wanted: Precision, device: &Device) -> (Precision, Option<&'static str>) {
    match (device, wanted) {
        (Device::Cuda(_), _) => (wanted, None),
        (_, Precision::Tf32) => {
            let notice = "TF32 is for NVIDIA GPUs: computing in f32";
            (Precision::F32, Some(notice))
        }
        (_, _) if device.is_cpu() => {
            let notice = "this processor does not multiply bf16 faster than f32: computing in f32";
            f32_unless(advxl_kernels::bf16_is_faster(), wanted, notice)
        }
        (Device::Burn(device), _) => {
            let notice = "this GPU does not compute in bf16: computing in f32";
            f32_unless(device.supports_dtype(DType::BF16), wanted, notice)
        }
    }
}

/// The arithmetic of a training attack on a device, if a recipe asks for `wanted` and its run for `of_run`, and a
/// notice if it is another.
///
/// Errors: FP8 on a device that neither has it nor emulates it.
pub fn usable_in_attacks(
    wanted: Option<AttackPrecision>,
    of_run: Precision,
    device: &Device,
) -> Result<(Numerics, Option<&'static str>)> {
    if wanted == Some(AttackPrecision::Fp8) {
        return fp8_attacks(device);
    }
    if device.gpu().is_some() {
        return Ok((Numerics::of_gpu_attack(wanted, of_run), None));
    }
    let precision = wanted.map_or(of_run, |wanted| match wanted {
        AttackPrecision::Bf16 | AttackPrecision::Fp8 => Precision::Bf16,
        AttackPrecision::Tf32 => Precision::Tf32,
        AttackPrecision::F32 => Precision::F32,
    });
    let (precision, notice) = usable(precision, device);
    // What the run cannot do was said of the run.
    Ok((precision.into(), notice.filter(|_| wanted.is_some())))
}

fn fp8_attacks(device: &Device) -> Result<(Numerics, Option<&'static str>)> {
    let refused = |message: String| {
        let hint = "use attack.precision = \"bf16\", or leave it out";
        Err(Error::input(message).hint(hint))
    };
    match device {
        Device::Cuda(gpu) => match gpu.check_fp8() {
            Ok(()) => Ok((Numerics::AttackFp8, None)),
            Err(why) => refused(format!("attack.precision = `fp8` does not work here: {why}")),
        },
        Device::Burn(_) if device.is_cpu() => {
            let notice = "fp8 attacks are emulated on the CPU: the numbers of an NVIDIA GPU, at less than the speed of f32";
            Ok((Numerics::AttackFp8, Some(notice)))
        }
        Device::Burn(_) => refused(
            "attack.precision = `fp8` is for NVIDIA GPUs with --device cuda, and emulated on the CPU".into(),
        ),
    }
}

fn f32_unless(
    bf16_is_fast: bool,
    wanted: Precision,
    notice: &'static str,
) -> (Precision, Option<&'static str>) {
    match wanted {
        Precision::Bf16 if !bf16_is_fast => (Precision::F32, Some(notice)),
        _ => (wanted, None),
    }
}

/// The result of `work`, or the message of its panic, which is not printed.
fn quietly<T>(work: impl FnOnce() -> T) -> std::result::Result<T, String> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let result = catch_unwind(AssertUnwindSafe(work));
    std::panic::set_hook(hook);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
        let text = text.unwrap_or_default();
        text.lines().next().unwrap_or_default().to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_falls_back_to_f32_with_a_notice_where_it_is_not_faster() {
        let choose = |wanted, is_fast| f32_unless(is_fast, wanted, "computing in f32");
        assert_eq!(choose(Precision::Bf16, true), (Precision::Bf16, None));
        assert_eq!(choose(Precision::F32, false), (Precision::F32, None));
        let fallback = (Precision::F32, Some("computing in f32"));
        assert_eq!(choose(Precision::Bf16, false), fallback);
    }

    #[test]
    fn devices_are_named_as_elsewhere() {
        for text in [
            "auto", "cpu", "cuda", "cuda:0", "vulkan:3", "rocm", "metal", "wgpu:1",
        ] {
            let name: DeviceName = text.parse().unwrap();
            assert_eq!(name.to_string(), text);
        }
        for wrong in ["gpu", "cuda:", "cuda:x", "cpu:0", "auto:1", ""] {
            let error = wrong.parse::<DeviceName>().unwrap_err();
            assert!(error.contains("such as cuda:0"), "{error}");
        }
    }

    #[test]
    fn the_processor_is_always_there_and_a_missing_feature_is_named() {
        assert_eq!(DeviceName::Cpu.open(0).unwrap().device, Device::cpu());
        if Api::Metal.kind().is_none() {
            let error = DeviceName::Gpu(Api::Metal, None).open(0).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(
                error.to_string().contains("not supported by this build"),
                "{error}"
            );
        }
    }
}
