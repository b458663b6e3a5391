//! Standard output and standard error of the commands.

use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::files;

/// How long ranks other than 0 wait before they print an error.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);

/// Whether this process prints nothing, as all ranks but 0. Process-wide, like the streams.
pub(crate) static IS_QUIET: AtomicBool = AtomicBool::new(false);

pub(crate) fn is_quiet() -> bool {
    IS_QUIET.load(Ordering::Relaxed)
}

/// Writes a line to standard error. Where that is not possible the line is lost: no work ends for it.
pub(crate) fn note(text: &str) {
    if !is_quiet() {
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

/// Writes a line to standard error from any rank: rank 0 may be gone.
pub(crate) fn alarm(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Writes the JSON result to standard output.
pub(crate) fn print_json(value: &serde_json::Value) {
    print_line(&value.to_string());
}

/// Writes a line to standard output. Errors are reported at the end, by [`all_printed`].
pub(crate) fn print_line(text: &str) {
    if !is_quiet() {
        let mut out = std::io::stdout().lock();
        remember(writeln!(out, "{text}").and_then(|()| out.flush()));
    }
}

/// Why standard output could not be written, the first time. Process-wide, like the stream.
pub(crate) static UNPRINTED: OnceLock<Error> = OnceLock::new();

/// Keeps the error of printing. Nobody may be listening any more, as in `| head`; that is no fault.
pub(crate) fn remember(printed: std::io::Result<()>) {
    if let Err(error) = printed
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        let out = Path::new("standard output");
        // Only the first error is kept.
        let _ = UNPRINTED.set(files::explain("write to", out, &error));
    }
}

/// An error where a result could not be printed, though everything else was done.
pub(crate) fn all_printed() -> Result<()> {
    match UNPRINTED.get() {
        None => Ok(()),
        Some(error) => Err(Error::failed(error.to_string())),
    }
}
