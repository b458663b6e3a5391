//! The device that the commands compute on.

use std::sync::OnceLock;

use advxl_cuda::Gpu;

use super::print::note;
use crate::distributed;
use crate::error::Result;
use crate::ops::{Device, DeviceName, Opened, hardware};

/// The value of `--device`, if it was given. Process-wide: a process computes on one device.
pub(crate) static WANTED: OnceLock<DeviceName> = OnceLock::new();

/// Where this program computes.
///
/// Errors: the device that was named is not there or does not compute.
pub(crate) fn device() -> Result<Device> {
    device_or(DeviceName::Auto)
}

/// The same, for a recipe that names a device; the command line comes first.
pub(crate) fn device_or(name: DeviceName) -> Result<Device> {
    static OPENED: OnceLock<Device> = OnceLock::new();
    if let Some(device) = OPENED.get() {
        return Ok(device.clone());
    }
    let name = *WANTED.get().unwrap_or(&name);
    let Opened { device, notice } = name.open(distributed::local_rank())?;
    if let Some(notice) = notice {
        note(&format!(
            "note: computing on the CPU, not on the GPU: {notice}"
        ));
    }
    if let Some(hardware) = hardware(&device) {
        match device.gpu().is_some_and(Gpu::is_software) {
            true => note("note: computing on a GPU in software, for tests (ADVXL_CUDA_SOFTWARE)"),
            false => note(&format!("note: computing on {hardware}")),
        }
    }
    Ok(OPENED.get_or_init(|| device).clone())
}
