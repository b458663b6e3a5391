//! Output of messages and progress, as a trait, so that the library itself prints nothing.

/// Receives messages and progress. The command line prints them to standard error.
pub trait Screen {
    /// Prints a permanent line.
    fn line(&mut self, text: &str);
    /// Shows the progress, replacing that of the previous call.
    fn progress(&mut self, done: u64, total: u64, text: &str);
}
