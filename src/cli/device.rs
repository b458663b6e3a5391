//! The compute device of the commands.

use std::sync::OnceLock;

use advxl_cuda::Gpu;

use super::print::note;
use crate::distributed;
use crate::error::Result;
use crate::ops::{Device, DeviceName, Opened, hardware};

/// The value of `--device`, if given. Process-wide, since a process computes on one device.
pub(crate) static WANTED: OnceLock<DeviceName> = OnceLock::new();

/// Opens the device of `--device`, or the default one, and returns it.
///
/// Errors: the named device is missing or fails its self-test.
pub(crate) fn device() -> Result<Device> {
    device_or(DeviceName::Auto)
}

/// Same as [`device`], with the device that a recipe names as the default. `--device` takes precedence.
pub(crate) fn device_or(name: DeviceName) -> Result<Device> {
    static OPENED: OnceLock<Device> = OnceLock::new();
    if let Some(device) = OPENED.get() {
        return Ok(device.clone());
    }
    let name = *WANTED.get().unwrap_or(&name);
    let Opened { device, notice } = name.open(distributed::local_rank())?;
    if let Some(notice) = notice {
        note(&format!(
            "note: computing on the CPU instead of the GPU: {notice}"
        ));
    }
    if let Some(hardware) = hardware(&device) {
        match device.gpu().is_some_and(Gpu::is_software) {
            true => note("note: computing on a software GPU, for tests (ADVXL_CUDA_SOFTWARE)"),
            false => note(&format!("note: computing on {hardware}")),
        }
    }
    Ok(OPENED.get_or_init(|| device).clone())
}
