//! How this program was started, so that the launcher can start it again.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::OnceLock;

/// A program that another one hosts, such as a Python interpreter.
#[derive(Clone, Debug)]
pub struct Hosted {
    /// The command that starts it, without its arguments: `python -m advxl`.
    pub command: Vec<OsString>,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// The file with its code.
    pub binary: PathBuf,
}

/// Process-wide, like the program.
static HOSTED: OnceLock<Hosted> = OnceLock::new();

/// Says that this program runs inside another one. Only the first call counts.
pub fn set_hosted(hosted: Hosted) {
    let _ = HOSTED.set(hosted);
}

/// The command that starts this program again with the same arguments.
pub(crate) fn command() -> std::io::Result<Vec<OsString>> {
    if let Some(hosted) = HOSTED.get() {
        return Ok([&hosted.command[..], &hosted.arguments].concat());
    }
    let program = std::env::current_exe()?.into_os_string();
    Ok(std::iter::once(program)
        .chain(std::env::args_os().skip(1))
        .collect())
}

/// The file with this program's code.
pub(crate) fn binary() -> std::io::Result<PathBuf> {
    match HOSTED.get() {
        Some(hosted) => Ok(hosted.binary.clone()),
        None => std::env::current_exe(),
    }
}
