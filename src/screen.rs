//! Where lines and progress go: a trait, so that the library prints nothing itself.

/// Where text goes; the command line has one for terminals and one for files.
pub trait Screen {
    /// A line that stays.
    fn line(&mut self, text: &str);
    /// Where the work is; replaced by the next call.
    fn progress(&mut self, done: u64, total: u64, text: &str);
}
