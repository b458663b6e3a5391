//! Messages and progress on standard error: a progress bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::print::{is_quiet, note};
use crate::screen::Screen;

/// A screen on standard error.
pub(crate) struct Terminal {
    bar: Option<ProgressBar>,
    last_line: Instant,
}

/// Without a bar, progress is printed after this long without any line.
const SILENCE: Duration = Duration::from_secs(60);

impl Terminal {
    pub(crate) fn new() -> Self {
        let bar = (std::io::stderr().is_terminal() && !is_quiet()).then(|| {
            let template = "{bar:30.cyan/blue} {percent:>3} %  {msg}";
            let style = ProgressStyle::with_template(template).expect("the template is valid");
            let bar = ProgressBar::new(0).with_style(style.progress_chars("━╸─"));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        let last_line = Instant::now();
        Self { bar, last_line }
    }
}

impl Screen for Terminal {
    fn line(&mut self, text: &str) {
        self.last_line = Instant::now();
        match &self.bar {
            Some(bar) => bar.suspend(|| note(text)),
            None => note(text),
        }
    }

    fn progress(&mut self, done: u64, total: u64, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(text.to_owned());
        } else if self.last_line.elapsed() > SILENCE {
            self.line(text);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
