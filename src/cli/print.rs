//! Printing to standard output and standard error.

use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::files;

/// How long ranks other than 0 wait before they print an error.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);

/// Whether this process prints nothing, like all ranks but 0. Process-wide, like the streams.
pub(crate) static IS_QUIET: AtomicBool = AtomicBool::new(false);

pub(crate) fn is_quiet() -> bool {
    IS_QUIET.load(Ordering::Relaxed)
}

/// Writes a line to standard error. If that fails, the line is lost, since no work should stop for it.
pub(crate) fn note(text: &str) {
    if !is_quiet() {
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

/// Writes a line to standard error from any rank, since rank 0 may be gone.
pub(crate) fn alarm(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Writes the JSON result to standard output.
pub(crate) fn print_json(value: &serde_json::Value) {
    print_line(&value.to_string());
}

/// Writes a line to standard output. [`all_printed`] reports errors at the end.
pub(crate) fn print_line(text: &str) {
    if !is_quiet() {
        let mut out = std::io::stdout().lock();
        remember(writeln!(out, "{text}").and_then(|()| out.flush()));
    }
}

/// The first error of writing to standard output. Process-wide, like the stream.
pub(crate) static UNPRINTED: OnceLock<Error> = OnceLock::new();

/// Keeps a printing error for [`all_printed`]. A closed pipe, as after `| head`, is not an error.
pub(crate) fn remember(printed: std::io::Result<()>) {
    if let Err(error) = printed
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        let out = Path::new("standard output");
        // Only the first error is kept.
        let _ = UNPRINTED.set(files::explain("write to", out, &error));
    }
}

/// Returns an error if a result could not be printed although the command succeeded.
pub(crate) fn all_printed() -> Result<()> {
    match UNPRINTED.get() {
        None => Ok(()),
        Some(error) => Err(Error::failed(error.to_string())),
    }
}
