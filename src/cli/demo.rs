//! `advxl demo`.

use std::path::PathBuf;

use super::device::device;
use super::print::print_json;
use super::screen::Terminal;
use crate::demo;
use crate::error::Result;
use crate::screen::Screen;

/// Demonstrate the whole method in minutes, without data: train a small network adversarially and normally on synthetic
/// images, attack both, and draw what happens
#[derive(clap::Args)]
pub(crate) struct Demo {
    /// Folder of the two runs
    #[arg(long, value_name = "DIR", default_value = "runs/demo")]
    out: PathBuf,
    /// Seed of images, weights and attacks
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl Demo {
    pub(crate) fn run(&self, json: bool) -> Result<()> {
        let mut screen = Terminal::new();
        let overrides = [format!("seed={}", self.seed)];
        let outcome = demo::run(&self.out, &overrides, &device()?, &mut screen)?;
        for line in demo::report(&outcome) {
            screen.line(&line);
        }
        drop(screen);
        if json {
            print_json(&outcome);
        }
        Ok(())
    }
}
