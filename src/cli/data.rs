//! `advxl data`: check, benchmark, index and pack data sets.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde_json::json;

use super::inputs::inputs;
use super::memory::require_memory;
use super::preprocessing::{PreprocessingFlags, announce, parse_size};
use super::print::{note, print_json, print_line};
use super::screen::Terminal;
use super::values::one_of;
use crate::data::pack::{self, Packing};
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
use crate::recipe::{Recipe, Stage, TrainImages};
use crate::screen::Screen;
use crate::units::grouped;
use crate::weights::StatedPreprocessing;
use crate::{files, weights};

/// Check, benchmark, index and pack data sets
#[derive(clap::Subcommand)]
pub(crate) enum Data {
    /// Check every sample, and count damaged and unusual ones by kind; exit code 1 on damage
    Check(Check),
    /// Benchmark the data loader, for several numbers of threads and for a stage of a recipe
    Bench(Bench),
    /// Index shards: save the sample offsets next to each shard, so that opening many shards is fast
    Index(Index),
    /// Pack evaluation images into one tensor file, or training images into shards of decoded pixels
    Pack(Pack),
}

impl Data {
    /// Returns whether the command can run in several processes.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self, Data::Check(_) | Data::Pack(_))
    }

    /// Runs the command. `threads` is the number of loading threads, 2 as in training if None.
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

/// The data set argument and its flags.
#[derive(clap::Args)]
struct NamedData {
    /// Data set: a folder, tensors:FILE, npz:FILE, parquet:PATTERN, shards:PATTERN or synthetic:N
    #[arg(value_name = "SPEC")]
    spec: String,
    /// Part of a folder to read [default: train, or test for packing evaluation images]
    #[arg(long, value_name = "PART", value_parser = one_of::<Split>("part"))]
    split: Option<Split>,
    /// Seed of synthetic images and random crops
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl NamedData {
    /// Returns an error if the output `out` would replace an input. Checked before any work, by rank 0, which writes.
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

/// Check every sample of a data set
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  advxl data check 'shards:data/{00000..00099}.tar' --out quarantine.jsonl"
)]
pub(crate) struct Check {
    #[command(flatten)]
    data: NamedData,
    /// Write the unusable samples to FILE, one JSON object per line
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
        // Only rank 0 has the counts.
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
            for (title, damage) in [("damage", true), ("unusual, but used", false)] {
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
                    print_line(&format!("              for example {example}"));
                }
            }
        }
        if damages == 0 {
            return Ok(());
        }
        let message = format!(
            "`{}` is damaged: {} of {len} samples are unusable",
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

/// Benchmark the data loader
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  advxl data bench 'shards:data/*.tar' --image-size 112 --workers 1,2,4,8\n  \
        advxl data bench --recipe recipes/vit_b16_in1k.toml --stage pretrain --training-speed 10000\n  \
        advxl data bench 'shards:packed/*.tar' --recipe recipes/vit_b16_in1k.toml"
)]
pub(crate) struct Bench {
    /// Data set: a folder, tensors:FILE, npz:FILE, parquet:PATTERN, shards:PATTERN or synthetic:N [default: the training images of --recipe]
    #[arg(value_name = "SPEC", required_unless_present = "recipe")]
    spec: Option<String>,
    /// Part of a folder to read
    #[arg(long, value_name = "PART", value_parser = one_of::<Split>("part"), default_value = "train")]
    split: Split,
    /// Seed of synthetic images and random crops
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Load images as in a stage of this recipe: image size, augmentation, decoding and captions
    #[arg(long, value_name = "RECIPE", conflicts_with = "image_size")]
    recipe: Option<PathBuf>,
    /// Stage of the recipe [default: the first]
    #[arg(long, value_name = "NAME", requires = "recipe")]
    stage: Option<String>,
    /// Size of the training images in pixels
    #[arg(long, default_value = "112", value_parser = parse_size)]
    image_size: usize,
    /// Decode JPEGs at a reduced scale if the crop allows it (`data.reduced_decode` in recipes)
    #[arg(long)]
    reduced_decode: bool,
    /// Numbers of threads to measure, such as 1,2,4 [default: the value of --threads]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=1024))]
    workers: Vec<u64>,
    /// Estimate the data wait and the required cores for training at N images per second
    #[arg(long, value_name = "N", value_parser = parse_speed)]
    training_speed: Option<f64>,
    /// Seconds to measure for each number of threads
    #[arg(long, default_value_t = 5.0, value_name = "N", value_parser = parse_seconds)]
    seconds: f64,
}

fn parse_seconds(text: &str) -> std::result::Result<f64, String> {
    let seconds = text
        .parse()
        .ok()
        .filter(|seconds| *seconds > 0.0 && *seconds <= 86_400.0);
    seconds.ok_or_else(|| "expected seconds above 0 and up to 86400".to_owned())
}

fn parse_speed(text: &str) -> std::result::Result<f64, String> {
    let speed = text.replace(['_', ','], "").parse().ok();
    speed
        .filter(|speed: &f64| speed.is_finite() && *speed > 0.0)
        .ok_or_else(|| "expected images per second above 0".to_owned())
}

/// Batch size, unless the recipe's is smaller.
const BATCH: u64 = 256;
/// Number of images whose loading is timed part by part.
const FOR_PARTS: usize = 200;

/// Throughput of a number of loading threads.
struct Pace {
    workers: usize,
    images: usize,
    seconds: f64,
    /// CPU time of all threads, if the system reports it.
    cpu_seconds: Option<f64>,
    broken: usize,
}

impl Pace {
    fn rate(&self) -> f64 {
        self.images as f64 / self.seconds
    }

    /// Images per second of CPU time: the throughput of one core that does nothing else.
    fn per_core(&self) -> f64 {
        let all = self.seconds * self.workers as f64;
        self.images as f64 / self.cpu_seconds.filter(|spent| *spent > 0.0).unwrap_or(all)
    }

    /// Share of its time that training at `speed` images per second would wait for these threads.
    fn wait(&self, speed: f64) -> f64 {
        (1.0 - self.rate() / speed).max(0.0)
    }

    /// Number of threads, each on its own core, that deliver `speed` images per second.
    fn needed(&self, speed: f64) -> u64 {
        (speed / self.per_core()).ceil() as u64
    }
}

impl Bench {
    fn run(&self, threads: usize, json: bool) -> Result<()> {
        let (spec, plan) = self.plan()?;
        let workers: Vec<usize> = match self.workers[..] {
            [] => vec![threads],
            _ => self.workers.iter().map(|count| *count as usize).collect(),
        };
        let most = workers.iter().copied().max().unwrap_or(threads);
        let values = 3 * plan.image_size.pow(2);
        let batches = loader::batches_ahead(most, plan.batch, values) + 2;
        // One byte per value, except for data sets of floats, and one image in floats on each thread.
        let needed = values as f64 * (batches * plan.batch + 4 * most) as f64;
        let what = format!(
            "{} images of {} pixels",
            batches * plan.batch,
            plan.image_size
        );
        require_memory(&what, needed, "use a smaller --image-size")?;
        let dataset = super::inputs::open_data(&spec, self.split, self.seed)?;
        let dataset = Arc::new(dataset);
        let plan = Plan {
            captions: plan.captions && dataset.is_captioned(),
            ..plan
        };
        if let Some(picture) = dataset.packed_example() {
            loader::check_packed(&picture, plan.image_size)?;
        }
        let paces = workers
            .iter()
            .map(|workers| self.pace(&dataset, &plan, *workers));
        let paces: Vec<Pace> = paces.collect::<Result<_>>()?;
        let parts = parts(&dataset, &plan);
        match json {
            true => print_json(&self.report(&spec, &plan, &paces, parts)),
            false => self.print(&plan, &paces, parts),
        }
        Ok(())
    }

    /// Returns the data set, and the plan for loading it.
    fn plan(&self) -> Result<(String, Plan)> {
        let usual = Plan {
            seed: self.seed,
            batch: BATCH as usize,
            image_size: self.image_size,
            augmentation: Augmentation {
                random_resized_crop: Some(RandomResizedCrop {
                    area: [0.4, 1.0],
                    ratio: [0.75, 4.0 / 3.0],
                }),
                flip: true,
                ..Augmentation::default()
            },
            mixing: None,
            position: 0,
            samples: u64::MAX / 2,
            broken_rate: Some(1.0),
            reduced_decode: self.reduced_decode,
            captions: false,
            share: Share::default(),
        };
        let Some(path) = &self.recipe else {
            return Ok((self.spec.clone().unwrap_or_default(), usual));
        };
        let recipe = Recipe::load(path, &[])?;
        let named = |stage: &&Stage| self.stage.as_ref().is_none_or(|name| *name == stage.name);
        let Some(stage) = recipe.stage.iter().find(named) else {
            let names: Vec<_> = recipe.stage.iter().map(|stage| &stage.name[..]).collect();
            let name = self.stage.as_deref().unwrap_or_default();
            let message = format!("--stage: unknown stage `{name}`");
            return Err(Error::input(message).hint(format!("use one of {}", names.join(", "))));
        };
        let data = recipe.data_of(stage);
        let spec = match (&self.spec, &data.train) {
            (Some(spec), _) => spec.clone(),
            (None, TrainImages::One(spec)) => spec.to_string(),
            (None, TrainImages::Mixed(_)) => {
                let message = format!("stage `{}` mixes several sources", stage.name);
                return Err(Error::input(message).hint("name one of them as the data set"));
            }
        };
        let plan = Plan {
            batch: stage.batch.min(BATCH) as usize,
            image_size: stage.phases[0].image_size as usize,
            augmentation: stage.augmentation.clone(),
            mixing: stage.mixing,
            reduced_decode: data.reduced_decode || self.reduced_decode,
            captions: stage.text.is_some(),
            ..usual
        };
        Ok((spec, plan))
    }

    /// Measures the throughput of `workers` threads, after the batches that they prefetch.
    fn pace(&self, dataset: &Arc<Dataset>, plan: &Plan, workers: usize) -> Result<Pace> {
        let values = 3 * plan.image_size.pow(2);
        let ahead = loader::batches_ahead(workers, plan.batch, values);
        let mut loader = Loader::new(dataset.clone(), plan.clone(), workers)?;
        for _ in 0..=ahead {
            loader.next_batch()?;
        }
        let (begun, spent) = (Instant::now(), processor_seconds());
        let (mut images, mut seconds) = (0, 0.0);
        while seconds < self.seconds {
            images += loader.next_batch()?.map_or(0, |batch| batch.first.len());
            seconds = begun.elapsed().as_secs_f64();
        }
        let cpu_seconds = processor_seconds().zip(spent);
        Ok(Pace {
            workers,
            images,
            seconds,
            cpu_seconds: cpu_seconds.map(|(now, before)| now - before),
            broken: loader.broken().len(),
        })
    }

    fn report(
        &self,
        spec: &str,
        plan: &Plan,
        paces: &[Pace],
        parts: [f64; 3],
    ) -> serde_json::Value {
        let names = ["read", "decode", "crop_resize_float"];
        let milliseconds: serde_json::Map<_, _> = names
            .iter()
            .zip(parts)
            .map(|(name, part)| ((*name).to_owned(), json!(part)))
            .collect();
        let run = |pace: &Pace| {
            json!({
                "threads": pace.workers,
                "images_per_second": pace.rate(),
                "images_per_core_second": pace.per_core(),
                "data_wait": self.training_speed.map(|speed| pace.wait(speed)),
                "cores_needed": self.training_speed.map(|speed| pace.needed(speed)),
                "seconds": pace.seconds,
                "broken": pace.broken,
            })
        };
        let mut report = paces.last().map(run).unwrap_or_default();
        report["data"] = json!(spec);
        report["image_size"] = json!(plan.image_size);
        report["reduced_decode"] = json!(plan.reduced_decode);
        report["milliseconds_per_image"] = json!(milliseconds);
        report["runs"] = paces.iter().map(run).collect();
        report
    }

    fn print(&self, plan: &Plan, paces: &[Pace], parts: [f64; 3]) {
        let wait = self
            .training_speed
            .map(|speed| format!("data wait at {speed}/s"));
        print_line(&format!(
            "{:>7} {:>10} {:>14} {}",
            "threads",
            "images/s",
            "per core",
            wait.as_deref().unwrap_or_default()
        ));
        for pace in paces {
            let wait = self.training_speed.map(|speed| {
                format!(
                    " {:>5.1} %, {} cores needed",
                    100.0 * pace.wait(speed),
                    pace.needed(speed)
                )
            });
            print_line(&format!(
                "{:>7} {:>10.1} {:>14.1}{}",
                pace.workers,
                pace.rate(),
                pace.per_core(),
                wait.unwrap_or_default()
            ));
        }
        print_line(&format!(
            "one image of {} pixels on one thread: read {:.2} ms, decode {:.2} ms, crop, resize and floats {:.2} ms",
            plan.image_size, parts[0], parts[1], parts[2]
        ));
    }
}

/// CPU time of this process so far in seconds, if the system is Linux.
fn processor_seconds() -> Option<f64> {
    // Linux reports hundredths of a second on every architecture.
    const TICKS: f64 = 100.0;
    let text = files::read_text(Path::new("/proc/self/stat")).ok()?;
    // The second field is a name that may contain spaces; user and system time are fields 14 and 15.
    let fields = text.rsplit_once(')')?.1.split_whitespace();
    let mut times = fields.skip(11).map(str::parse::<f64>);
    Some((times.next()?.ok()? + times.next()?.ok()?) / TICKS)
}

/// Returns the milliseconds per image of each part on one thread: read, decode, the rest.
///
/// Conversion to floats is part of resizing and not timed separately. For sources without image files, decoding
/// includes reading.
fn parts(dataset: &Dataset, plan: &Plan) -> [f64; 3] {
    let mut sums = [0.0; 3];
    let mut count = 0.0_f64;
    for index in (0..dataset.len()).step_by(dataset.len().div_ceil(FOR_PARTS)) {
        let begun = Instant::now();
        let bytes = dataset.file_bytes(index);
        let read = begun.elapsed();
        let keys = (plan.seed, 0, index as u64);
        let view = |width, height| plan.cutout(width, height, keys);
        let picture = match &bytes {
            Some(Ok(bytes)) => decode::examine_part(bytes, &view).ok(),
            Some(Err(_)) => continue,
            None => dataset.read(index, false).ok().map(|sample| sample.picture),
        };
        let decoded = begun.elapsed();
        let Some(picture) = picture.map(|examined| examined.picture) else {
            continue;
        };
        std::hint::black_box(plan.augmentation.apply(&picture, plan.image_size, keys));
        let all = begun.elapsed();
        for (sum, part) in sums.iter_mut().zip([read, decoded - read, all - decoded]) {
            *sum += 1e3 * part.as_secs_f64();
        }
        count += 1.0;
    }
    sums.map(|sum| sum / count.max(1.0))
}

/// Index shards
#[derive(clap::Args)]
pub(crate) struct Index {
    /// Shards, such as data/{00000..00099}.tar: ranges, `*`, `?`, `[0-9]` or a folder, several separated by commas;
    /// indexes of shards in object stores are saved in this machine's cache
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
                    "indexes of shards in object stores are cached in `{}`; nothing was written to a store",
                    folder.display()
                ));
            }
        }
        Ok(())
    }
}

/// Pack evaluation images into one tensor file, or training images into shards of decoded pixels
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  advxl data pack imagenet/val --image-size 224 --out val.safetensors\n  \
        advxl data pack 'shards:data/*.tar' --shorter-side 146 --out packed"
)]
pub(crate) struct Pack {
    #[command(flatten)]
    data: NamedData,
    /// Preprocess evaluation images as stated by the folder of this model [default: resize the shortest side to
    /// --image-size with bicubic interpolation, then center crop]
    #[arg(long, value_name = "MODEL")]
    like: Option<PathBuf>,
    #[command(flatten)]
    preprocessing: PreprocessingFlags,
    /// Pack training images: write shards of decoded images to the folder --out, for `shards:FOLDER`; images with a
    /// shorter side above N pixels are resized to N
    #[arg(long, value_name = "N", value_parser = parse_size, conflicts_with_all = NOT_FOR_TRAINING)]
    shorter_side: Option<usize>,
    /// Skip broken samples instead of stopping at the first
    #[arg(long, requires = "shorter_side")]
    skip_broken: bool,
    /// Write `images`, f32 [n, 3, h, w], and `labels` to this safetensors file, for `tensors:FILE`; with
    /// --shorter-side, a folder
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    #[command(flatten)]
    chosen: crate::cli::inputs::ChosenImages,
}

/// Flags for evaluation images only.
const NOT_FOR_TRAINING: [&str; 7] = [
    "like",
    "image_size",
    "crop_fraction",
    "interpolation",
    "resize_mode",
    "n",
    "ids",
];

/// Images processed at a time, unless they are large.
const AT_A_TIME: usize = 64;
/// Values processed at a time, unless one image has more.
const NUMBERS_AT_A_TIME: usize = 1 << 26;

impl Pack {
    fn run(&self, json: bool, comm: &Comm) -> Result<()> {
        if let Some(shorter_side) = self.shorter_side {
            return self.pack_for_training(shorter_side, json, comm);
        }
        self.data
            .check_out(&self.out, Content::Tensors("images"), comm)?;
        let (stated, image_size) = self.stated()?;
        let dataset = self.data.open(Split::Test)?;
        let subset = self.chosen.of(&dataset)?;
        let count = subset.len();
        if dataset.classes().is_empty() {
            note("note: not every image has a label; writing no `labels`");
        }
        let (preprocessing, text) = self.preprocessing.over(&stated, image_size, &dataset)?;
        let numbers = preprocessing.numbers();
        let at_a_time = (NUMBERS_AT_A_TIME / numbers).clamp(1, AT_A_TIME);
        // Each image is in memory three times: as produced, as sent to rank 0, and as written.
        let needed = 4.0 * 3.0 * (numbers * at_a_time.min(count) * comm.world_size()) as f64;
        let what = format!(
            "{} images of {} pixels",
            at_a_time.min(count),
            preprocessing.image_size
        );
        require_memory(&what, needed, "use a smaller --image-size")?;
        announce(&text, None);
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
                "wrote {} images of {} pixels to `{out}`",
                grouped(count as u64),
                image_size
            ));
        }
        Ok(())
    }

    fn pack_for_training(&self, shorter_side: usize, json: bool, comm: &Comm) -> Result<()> {
        let read = inputs(None, Some(&self.data.spec))?;
        read.check_folder("--out", &self.out)?;
        let dataset = self.data.open(Split::Train)?;
        let is_source = dataset.shards().is_some_and(|shards| {
            let mut places = shards.places();
            places.any(|place| Path::new(&place).parent() == Some(&self.out))
        });
        if is_source {
            let message = format!("--out `{}` contains the shards to pack", self.out.display());
            return Err(Error::input(message)
                .hint("choose another folder")
                .everywhere());
        }
        let packing = Packing {
            shorter_side,
            skip_broken: self.skip_broken,
        };
        let mut screen = Terminal::new();
        let packed = pack::pack(&dataset, &self.out, packing, comm, |done, all| {
            let text = format!("{done} of {all} images");
            screen.progress(done as u64, all as u64, &text);
        })?;
        drop(screen);
        for broken in &packed.broken {
            note(&format!("warning: skipped broken sample: {broken}"));
        }
        if let (None, [_, ..]) = (dataset.shards(), dataset.classes()) {
            let names = self.out.join("classes.txt");
            if comm.is_main() {
                files::write(&names, (dataset.classes().join("\n") + "\n").as_bytes())?;
            }
            note(&format!(
                "note: shards store class indices; wrote the class names to `{}` (--classes)",
                names.display()
            ));
        }
        let out = self.out.display().to_string();
        if json {
            print_json(&json!({
                "out": out,
                "shorter_side": shorter_side,
                "shards": packed.shards,
                "shards_kept": packed.kept,
                "images": packed.samples,
                "resized": packed.resized,
                "bytes": packed.bytes,
                "broken": packed.broken.len(),
            }));
        } else {
            print_line(&format!(
                "{} shards in `{out}`, {} of them from an earlier run; wrote {} images, {} resized, {:.2} GB",
                packed.shards,
                packed.kept,
                grouped(packed.samples as u64),
                grouped(packed.resized as u64),
                packed.bytes as f64 / 1e9
            ));
        }
        Ok(())
    }

    /// Returns the preprocessing of the model, or the default one, and the image size.
    fn stated(&self) -> Result<(StatedPreprocessing, usize)> {
        if let Some(model) = &self.like {
            let loaded = weights::load_any(model, &Device::cpu())?;
            return Ok((loaded.preprocessing, loaded.image_size));
        }
        let Some(image_size) = self.preprocessing.image_size else {
            return Err(Error::input("--image-size is missing")
                .hint("add --image-size N, or --like MODEL to prepare images for a model"));
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
