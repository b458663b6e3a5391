//! Folders of numbered tar files, as CLIP Benchmark publishes data sets: `test/0.tar` to `test/{N-1}.tar`, with N in
//! `test/nshards.txt`.
//!
//! Next to the splits are `classnames.txt` and `zeroshot_classification_templates.txt`, which `advxl eval --zero-shot` and
//! `--templates` read.

use std::path::Path;

use super::spec::Split;
use crate::error::{Error, Result};
use crate::files;

/// Largest number of files of a split.
const MOST_SHARDS: usize = 100_000;

/// Returns the pattern of a split's tar files.
///
/// Errors: no such split, or no number in `nshards.txt`.
pub fn pattern(folder: &Path, split: Split) -> Result<String> {
    let of_split = folder.join(split.word());
    let list = of_split.join("nshards.txt");
    if !list.is_file() {
        let message = format!("`{}` does not exist", list.display());
        return Err(Error::input(message).hint(
            "use a folder of CLIP Benchmark's form, with `test/nshards.txt` and `test/0.tar`, or `shards:PATTERN`",
        ));
    }
    let text = files::read_text(&list)?;
    let count = text.trim().parse().ok();
    let count = count
        .filter(|count: &usize| (1..=MOST_SHARDS).contains(count))
        .ok_or_else(|| {
            let message = format!("`{}` must contain the number of tar files", list.display());
            Error::input(message).hint("it is the number of files `0.tar`, `1.tar` and so on")
        })?;
    let files = of_split.display();
    Ok(match count {
        1 => format!("{files}/0.tar"),
        _ => format!("{files}/{{0..{}}}.tar", count - 1),
    })
}
