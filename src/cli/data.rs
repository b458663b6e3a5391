//! `advxl data`: look through a data set, measure how fast it loads, index and pack it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use super::inputs::inputs;
use super::memory::require_memory;
use super::preprocessing::{PreprocessingFlags, parse_size, tell};
use super::print::{note, print_json, print_line};
use super::screen::Terminal;
use super::values::one_of;
use crate::data::sources::tensors;
use crate::data::{
    Augmentation, Dataset, Loader, Plan, RandomResizedCrop, Share, Split, check, evaluation_batch,
    loader, shards,
};
use crate::distributed::Comm;
use crate::error::{Error, Result};
use crate::image::resize::Filter;
use crate::image::{Preprocessing, decode};
use crate::ops::Device;
use crate::output::Content;
use crate::screen::Screen;
use crate::units::grouped;
use crate::weights::StatedPreprocessing;
use crate::{files, weights};

/// What to do with a data set.
#[derive(clap::Subcommand)]
pub(crate) enum Data {
    /// Read every sample; say by kind what is damaged and what is odd. Exit code 1 on damage.
    Check(Check),
    /// How fast training images come: random crop, resize, flip, as in training.
    Bench(Bench),
    /// Save beside each shard where its samples lie, so that opening many shards is quick.
    Index(Index),
    /// The pictures of an evaluation as one file of tensors.
    Pack(Pack),
}

impl Data {
    /// Whether several processes can share the work.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self, Data::Check(_) | Data::Pack(_))
    }

    /// `threads` load; two, as in training, if absent.
    pub(crate) fn run(&self, threads: Option<usize>, json: bool, comm: &Comm) -> Result<()> {
        let threads = threads.unwrap_or(2);
        match self {
            Data::Check(check) => check.run(threads, json, comm),
            Data::Bench(bench) => bench.run(threads, json),
            Data::Index(index) => index.run(json),
            Data::Pack(pack) => pack.run(json, comm),
        }
    }
}

/// A data set that a user named.
#[derive(clap::Args)]
struct NamedData {
    /// A folder, tensors:FILE, shards:PATTERN or synthetic:N.
    #[arg(value_name = "SPEC")]
    spec: String,
    /// Read this part of a folder.
    #[arg(long, value_name = "PART", value_parser = one_of::<Split>("part"))]
    split: Option<Split>,
    /// Seed of synthetic images and of random crops.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl NamedData {
    /// An error where the output `out` would replace what is read, before anything is; the first process writes.
    fn check_out(&self, out: &Path, content: Content, comm: &Comm) -> Result<()> {
        comm.all_ok(match comm.is_main() {
            true => inputs(None, Some(&self.spec))?.check_file("--out", out, content),
            false => Ok(()),
        })
    }

    fn open(&self, split: Split) -> Result<Dataset> {
        crate::cli::inputs::open_data(&self.spec, self.split.unwrap_or(split), self.seed)
    }
}

/// Reads every sample of a data set.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  advxl data check 'shards:data/{00000..00099}.tar' --out quarantine.jsonl"
)]
pub(crate) struct Check {
    #[command(flatten)]
    data: NamedData,
    /// A file for the samples that cannot be used, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl Check {
    fn run(&self, threads: usize, json: bool, comm: &Comm) -> Result<()> {
        if let Some(out) = &self.out {
            self.data.check_out(out, Content::Lines("sample"), comm)?;
        }
        let dataset = self.data.open(Split::Train)?;
        let mut screen = Terminal::new();
        if let Some(out) = &self.out
            && comm.is_main()
        {
            files::write(out, b"")?;
        }
        let broken = |broken: &crate::data::loader::Broken| match &self.out {
            None => Ok(()),
            Some(out) => {
                let line = json!({
                    "sample": broken.sample,
                    "name": broken.name,
                    "reason": broken.kind,
                    "detail": broken.reason,
                });
                files::append(out, &format!("{line}\n"))
            }
        };
        let len = dataset.len();
        let progress = |done| {
            let text = format!(
                "{} of {} samples",
                grouped(done as u64),
                grouped(len as u64)
            );
            screen.progress(done as u64, len as u64, &text);
        };
        let checked = check::check(&dataset, threads, comm, broken, progress)?;
        drop(screen);
        let rate = checked.samples as f64 / checked.took.as_secs_f64();
        // The first process alone has counted.
        let damages = comm.broadcast(checked.health.damages());
        if json {
            let found: Vec<_> = checked
                .health
                .iter()
                .map(|(reason, count, example)| {
                    json!({
                        "reason": reason,
                        "damage": reason.is_damage(),
                        "count": count,
                        "example": example,
                    })
                })
                .collect();
            print_json(&json!({
                "data": self.data.spec,
                "samples": checked.samples,
                "broken": checked.broken,
                "damages": damages,
                "found": found,
                "samples_per_second": rate,
            }));
        } else {
            print_line(&format!(
                "{} samples, {} of them broken, {rate:.0} samples/s",
                grouped(checked.samples as u64),
                grouped(checked.broken as u64)
            ));
            for (title, damage) in [("damage", true), ("odd, but used", false)] {
                let rows = checked.health.iter();
                let mut rows = rows
                    .filter(|(reason, ..)| reason.is_damage() == damage)
                    .peekable();
                if rows.peek().is_some() {
                    print_line(&format!("\n{title}"));
                }
                for (reason, count, example) in rows {
                    print_line(&format!(
                        "  {:>10}  {:<18} {}",
                        grouped(count),
                        reason.word(),
                        reason.text()
                    ));
                    print_line(&format!("              such as {example}"));
                }
            }
        }
        if damages == 0 {
            return Ok(());
        }
        let message = format!(
            "`{}` is damaged: {} of {len} samples cannot be used",
            self.data.spec, checked.broken
        );
        let hint = match &self.out {
            Some(out) => format!("`{}` lists them", out.display()),
            None => {
                "--out FILE lists them; training replaces them up to data.broken_rate".to_owned()
            }
        };
        Err(Error::failed(message).hint(hint).everywhere())
    }
}

/// Measures how fast training images come.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  advxl data bench 'shards:data/*.tar' --image-size 112 --threads 2"
)]
pub(crate) struct Bench {
    #[command(flatten)]
    data: NamedData,
    /// Pixels on a side of the training images.
    #[arg(long, default_value = "112", value_parser = parse_size)]
    image_size: usize,
    /// How long to measure.
    #[arg(long, default_value_t = 5.0, value_name = "N", value_parser = parse_seconds)]
    seconds: f64,
}

fn parse_seconds(text: &str) -> std::result::Result<f64, String> {
    let seconds = text
        .parse()
        .ok()
        .filter(|seconds| *seconds > 0.0 && *seconds <= 86_400.0);
    seconds.ok_or_else(|| "give seconds above 0 and up to 86400".to_owned())
}

/// Images of a batch.
const BATCH: usize = 50;
/// Images that are taken through the parts one by one.
const FOR_PARTS: usize = 200;

impl Bench {
    fn run(&self, threads: usize, json: bool) -> Result<()> {
        let numbers = 3.0 * (self.image_size as f64).powi(2);
        let batches = (loader::AHEAD + 2) * BATCH;
        // A byte a number, but for data sets of floats; and on each thread one image in floats.
        let needed = numbers * (batches + 4 * threads) as f64;
        let what = format!("{batches} images of {} pixels", self.image_size);
        require_memory(&what, needed, "give a smaller --image-size")?;
        let dataset = Arc::new(self.data.open(Split::Train)?);
        let augmentation = Augmentation {
            random_resized_crop: Some(RandomResizedCrop {
                area: [0.4, 1.0],
                ratio: [0.75, 4.0 / 3.0],
            }),
            flip: true,
            ..Augmentation::default()
        };
        let plan = Plan {
            seed: self.data.seed,
            batch: BATCH,
            image_size: self.image_size,
            augmentation: augmentation.clone(),
            mixing: None,
            position: 0,
            samples: u64::MAX / 2,
            broken_rate: Some(1.0),
            captions: false,
            share: Share::default(),
        };
        let mut loader = Loader::new(dataset.clone(), plan, threads)?;
        // Until the batches that are made ahead are there, the threads have not shown their pace.
        for _ in 0..4 {
            loader.next_batch()?;
        }
        let (begun, mut images) = (Instant::now(), 0);
        let mut took = Duration::ZERO;
        while took.as_secs_f64() < self.seconds {
            images += loader.next_batch()?.map_or(0, |batch| batch.first.len());
            took = begun.elapsed();
        }
        let broken = loader.broken().len();
        drop(loader);
        let rate = images as f64 / took.as_secs_f64();
        let parts = self.parts(&dataset, &augmentation);
        if json {
            let names = ["read", "decode", "crop_resize_float"];
            let milliseconds: serde_json::Map<_, _> = names
                .iter()
                .zip(parts)
                .map(|(name, part)| ((*name).to_owned(), json!(part)))
                .collect();
            print_json(&json!({
                "data": self.data.spec,
                "image_size": self.image_size,
                "threads": threads,
                "images_per_second": rate,
                "seconds": took.as_secs_f64(),
                "broken": broken,
                "milliseconds_per_image": milliseconds,
            }));
        } else {
            print_line(&format!(
                "{rate:.1} images/s at {} pixels with {} threads",
                self.image_size, threads
            ));
            print_line(&format!(
                "one image on one thread: read {:.2} ms, decode {:.2} ms, crop, resize and floats {:.2} ms",
                parts[0], parts[1], parts[2]
            ));
        }
        Ok(())
    }

    /// Milliseconds of an image in each part, on one thread: read, decode, the rest.
    ///
    /// Floats are what resizing gives, so they are no part of their own. Sources that are no image files have
    /// reading and decoding in one.
    fn parts(&self, dataset: &Dataset, augmentation: &Augmentation) -> [f64; 3] {
        let mut sums = [0.0; 3];
        let mut count = 0.0_f64;
        for index in (0..dataset.len()).step_by(dataset.len().div_ceil(FOR_PARTS)) {
            let begun = Instant::now();
            let bytes = dataset.file_bytes(index);
            let read = begun.elapsed();
            let keys = (self.data.seed, 0, index as u64);
            let view = |width, height| augmentation.region(width, height, keys);
            let picture = match &bytes {
                Some(Ok(bytes)) => decode::examine_part(bytes, &view).ok(),
                Some(Err(_)) => continue,
                None => dataset.read(index, false).ok().map(|sample| sample.picture),
            };
            let decoded = begun.elapsed();
            let Some(picture) = picture.map(|examined| examined.picture) else {
                continue;
            };
            std::hint::black_box(augmentation.apply(&picture, self.image_size, keys));
            let all = begun.elapsed();
            for (sum, part) in sums.iter_mut().zip([read, decoded - read, all - decoded]) {
                *sum += 1e3 * part.as_secs_f64();
            }
            count += 1.0;
        }
        sums.map(|sum| sum / count.max(1.0))
    }
}

/// Saves indexes beside the shards of a pattern.
#[derive(clap::Args)]
pub(crate) struct Index {
    /// Such as data/{00000..00099}.tar; ranges, `*`, `?`, `[0-9]`, a folder, several joined by commas. Of shards in
    /// stores the indexes go into this machine's cache.
    #[arg(value_name = "PATTERN")]
    pattern: String,
}

impl Index {
    fn run(&self, json: bool) -> Result<()> {
        let pattern = self
            .pattern
            .strip_prefix("shards:")
            .unwrap_or(&self.pattern);
        let screen = Mutex::new(Terminal::new());
        let indexed = shards::save_indexes(pattern, |done, total| {
            let mut screen = screen.lock().unwrap_or_else(PoisonError::into_inner);
            screen.progress(
                done as u64,
                total as u64,
                &format!("{done} of {total} shards"),
            );
        })?;
        drop(screen);
        if json {
            print_json(&json!({
                "shards": indexed.shards,
                "samples": indexed.samples,
                "written": indexed.written,
                "kept": indexed.kept,
            }));
        } else {
            print_line(&format!(
                "{} shards with {} samples, {} indexes written",
                grouped(indexed.shards as u64),
                grouped(indexed.samples),
                indexed.written
            ));
            if let Some(folder) = indexed.kept {
                print_line(&format!(
                    "those of shards in stores are kept in `{}`; nothing was written to a store",
                    folder.display()
                ));
            }
        }
        Ok(())
    }
}

/// Writes the pictures of an evaluation as `images` f32 `[n, 3, h, w]` and `labels`.
#[derive(clap::Args)]
pub(crate) struct Pack {
    #[command(flatten)]
    data: NamedData,
    /// The model that the images are for, whose folder says how they are preprocessed; else bicubic interpolation of the
    /// shortest side, and a center crop, to --image-size.
    #[arg(long, value_name = "MODEL")]
    like: Option<PathBuf>,
    #[command(flatten)]
    preprocessing: PreprocessingFlags,
    /// The safetensors file to write; `tensors:FILE` reads it.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    chosen: crate::cli::inputs::ChosenImages,
}

/// Pictures that are made at a time; fewer if they are large.
const AT_A_TIME: usize = 64;
/// Numbers that are made at a time, unless one picture has more.
const NUMBERS_AT_A_TIME: usize = 1 << 26;

impl Pack {
    fn run(&self, json: bool, comm: &Comm) -> Result<()> {
        self.data
            .check_out(&self.out, Content::Tensors("images"), comm)?;
        let (stated, image_size) = self.stated()?;
        let dataset = self.data.open(Split::Test)?;
        let subset = self.chosen.of(&dataset)?;
        let count = subset.len();
        if dataset.classes().is_empty() {
            note("note: not every image has a label; the file gets no `labels`");
        }
        let (preprocessing, text) = self.preprocessing.over(&stated, image_size, &dataset)?;
        let numbers = preprocessing.numbers();
        let at_a_time = (NUMBERS_AT_A_TIME / numbers).clamp(1, AT_A_TIME);
        // As they are made, sent to the first process, and written.
        let needed = 4.0 * 3.0 * (numbers * at_a_time.min(count) * comm.world_size()) as f64;
        let what = format!(
            "{} images of {} pixels",
            at_a_time.min(count),
            preprocessing.image_size
        );
        require_memory(&what, needed, "give a smaller --image-size")?;
        tell(&text, None);
        let mut screen = Terminal::new();
        let places: Vec<usize> = (0..count).map(|index| subset.place(index)).collect();
        let mut done = 0;
        let rounds = places.chunks(at_a_time * comm.world_size()).map(|round| {
            let own = &round[comm.local_range(round.len())];
            let images = match own.is_empty() {
                true => Ok(Vec::new()),
                false => evaluation_batch(&dataset, own, &preprocessing),
            };
            let images = comm.gather_f32(comm.all_ok(images)?).concat();
            done += round.len();
            screen.progress(
                done as u64,
                count as u64,
                &format!("{done} of {count} images"),
            );
            Ok(images)
        });
        if !comm.is_main() {
            return rounds
                .map(|images| images.map(drop))
                .try_for_each(|done| done);
        }
        let labels: Option<Vec<i64>> = match dataset.classes() {
            [] => None,
            _ => {
                let labels = places
                    .iter()
                    .map(|place| dataset.label(*place).map(i64::from));
                Some(labels.collect::<Result<_>>()?)
            }
        };
        let image_size = preprocessing.image_size;
        let shape = [count, 3, image_size, image_size];
        tensors::save_parts(
            &self.out,
            rounds,
            shape,
            labels.as_deref(),
            dataset.classes(),
        )?;
        drop(screen);
        let out = self.out.display().to_string();
        if json {
            print_json(&json!({
                "out": out,
                "images": count,
                "image_size": image_size,
                "preprocessing": preprocessing,
            }));
        } else {
            print_line(&format!(
                "{} pictures of {} pixels in `{out}`",
                grouped(count as u64),
                image_size
            ));
        }
        Ok(())
    }

    /// What the model says, or the usual, and the image size.
    fn stated(&self) -> Result<(StatedPreprocessing, usize)> {
        if let Some(model) = &self.like {
            let loaded = weights::load_any(model, &Device::cpu())?;
            return Ok((loaded.preprocessing, loaded.image_size));
        }
        let Some(image_size) = self.preprocessing.image_size else {
            return Err(Error::input("--image-size is missing")
                .hint("give it, or the model that the images are for with --like MODEL"));
        };
        let usual = Preprocessing {
            interpolation: Filter::Bicubic,
            ..Preprocessing::new(image_size)
        };
        let stated = StatedPreprocessing {
            source: "defaults",
            preprocessing: Ok(usual),
        };
        Ok((stated, image_size))
    }
}
