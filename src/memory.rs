//! Checks the available memory before large allocations, and the free space of a disk before large files: an error
//! message is better than an abort.

use std::path::Path;

use crate::error::{Error, Result};
use crate::files;

/// Returns the available memory of this machine in bytes, or None if the system is not Linux.
pub fn available() -> Option<u64> {
    let text = files::read_text(Path::new("/proc/meminfo")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Returns an error if `what` needs more bytes than are available; `hint` says how to reduce them.
///
/// `needed` is an f64, so that absurd sizes do not overflow in the caller's arithmetic.
pub fn require(what: &str, needed: f64, available: Option<u64>, hint: &str) -> Result<()> {
    match available {
        Some(available) if needed > available as f64 => {
            let (needed, available) = (bytes(needed), bytes(available as f64));
            let message =
                format!("{what} needs {needed} of memory, but only {available} are available");
            Err(Error::input(message).hint(hint))
        }
        _ => Ok(()),
    }
}

/// Returns an error if the disk of a folder has less space than `what` needs; `hint` says how to get more. Does nothing
/// where the space is unknown.
pub fn require_space(folder: &Path, what: &str, needed: u64, hint: &str) -> Result<()> {
    match free_space(folder) {
        Some(free) if needed > free => {
            let size = |count: u64| bytes(count as f64);
            let (needed, free, folder) = (size(needed), size(free), folder.display());
            let message = format!("{what} needs {needed} in `{folder}`, but only {free} are free");
            Err(Error::failed(message).hint(hint))
        }
        _ => Ok(()),
    }
}

#[cfg(unix)]
fn free_space(folder: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(folder).ok()?;
    disk.f_bavail.checked_mul(disk.f_frsize)
}

#[cfg(not(unix))]
fn free_space(_: &Path) -> Option<u64> {
    None
}

/// Formats a number of bytes, such as `1.5 GiB`.
fn bytes(count: f64) -> String {
    const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let step = |unit: usize| 1024f64.powi(unit as i32);
    let unit = (1..UNITS.len()).rev().find(|unit| count >= step(*unit));
    match unit {
        None => format!("{count:.0} bytes"),
        Some(unit) => format!("{:.1} {}", count / step(unit), UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn more_than_the_free_space_is_refused_with_both_sizes() {
        let folder = tempfile::tempdir().unwrap();
        assert!(require_space(folder.path(), "the copy", 1, "less").is_ok());
        let error = require_space(folder.path(), "the copy", u64::MAX, "less").unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("the copy needs 16.0 EiB in `"), "{text}");
        assert!(text.ends_with(" are free\n  hint: less"), "{text}");
    }

    #[test]
    fn too_large_allocations_are_rejected_with_both_sizes() {
        let giga = f64::from(1 << 30);
        let require = |needed, available| require("the batch", needed, available, "less");
        assert!(require(2.0 * giga, Some(2 << 30)).is_ok());
        assert!(require(1e30, None).is_ok());
        let error = require(2.5 * giga, Some(2 << 30)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text =
            "the batch needs 2.5 GiB of memory, but only 2.0 GiB are available\n  hint: less";
        assert_eq!(error.to_string(), text);
        let error = require(3e30, Some(700)).unwrap_err().to_string();
        assert!(
            error.contains("EiB of memory, but only 700 bytes"),
            "{error}"
        );
    }
}
