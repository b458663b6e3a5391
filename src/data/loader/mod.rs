//! Training batches made in background threads. They do not depend on the number of threads.
//!
//! The sample at position `p` of the run is that of [`RunOrder`], for one source at `p % len` of epoch `p / len`, so a run can
//! resume at any position without further state. A batch is divided into small chunks, which the threads take in order;
//! only a few batches are made ahead.
//! Not for evaluation, which is in [`evaluation`].

pub mod evaluation;
pub mod order;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::data::augment::Augmentation;
use crate::data::augment::mixing::Mixing;
use crate::data::batch::Batch;
use crate::data::dataset::Dataset;
use crate::data::shards::Part;
use crate::error::{Error, Result};
use crate::image::{Cutout, Fault, Picture, Reason};
use crate::storage::store::Ahead;

use order::RunOrder;

/// The settings of a loader.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The run's seed.
    pub seed: u64,
    /// Images per batch; the last batch may have fewer.
    pub batch: usize,
    /// Side of the training images in pixels.
    pub image_size: usize,
    /// Augmentation of single images.
    pub augmentation: Augmentation,
    /// MixUp and CutMix of whole batches.
    pub mixing: Option<Mixing>,
    /// Number of samples that the run has already seen.
    pub position: u64,
    /// Number of samples to deliver.
    pub samples: u64,
    /// Allowed share of broken samples, which are replaced by their successors. Above it the run stops; the share is
    /// checked once 100 samples have been seen. If none, the first broken sample stops the run.
    pub broken_rate: Option<f64>,
    /// Whether JPEGs may be decoded at a reduced scale at which crops are at least as large as the training images.
    /// This is faster but changes the pixels.
    pub reduced_decode: bool,
    /// Whether to deliver captions. A sample without a caption is then broken.
    pub captions: bool,
    /// The part of each batch that is delivered.
    pub share: Share,
}

impl Plan {
    /// Returns the part of an image of the given size that is decoded, for the sample with the given keys.
    pub(crate) fn cutout(&self, width: usize, height: usize, keys: (u64, u64, u64)) -> Cutout {
        match self.reduced_decode {
            true => self
                .augmentation
                .cutout((width, height), self.image_size, keys),
            false => self.augmentation.region(width, height, keys).into(),
        }
    }
}

/// The part of every batch that a loader delivers if the batches are divided among ranks.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Rank, from 0.
    pub index: usize,
    /// World size.
    pub of: usize,
    /// Number of equal parts of a batch within which images are mixed; a multiple of the world size.
    pub shards: usize,
}

impl Default for Share {
    /// Returns the whole batch.
    fn default() -> Self {
        Self {
            index: 0,
            of: 1,
            shards: 1,
        }
    }
}

impl Share {
    /// Returns the rows of a batch of the given size.
    fn rows(&self, batch: usize) -> std::ops::Range<usize> {
        self.index * batch / self.of..(self.index + 1) * batch / self.of
    }
}

/// A sample that could not be used, and why.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Broken {
    /// Index in the data set.
    pub sample: u64,
    /// Where it comes from.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
    /// Kind of damage.
    pub kind: Reason,
}

impl Broken {
    /// Makes the record of a sample that could not be read.
    pub(crate) fn new(dataset: &Dataset, index: usize, fault: &Fault) -> Self {
        let (text, name) = (fault.error.to_string(), dataset.name_of(index));
        let line = text.lines().next().unwrap_or_default();
        let reason = line.strip_prefix(&format!("`{name}`: ")).unwrap_or(line);
        Self {
            sample: index as u64,
            reason: reason.to_owned(),
            name,
            kind: fault.reason,
        }
    }
}

/// Formats the name, which is not repeated if the reason contains it, and the reason.
impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.reason.contains(&self.name) {
            true => f.write_str(&self.reason),
            false => write!(f, "{}: {}", self.name, self.reason),
        }
    }
}

/// Samples seen before the broken rate is checked.
const LEAST_SEEN: u64 = 100;
/// Number of consecutive broken samples after which the next one is not tried.
const MOST_IN_A_ROW: usize = 100;
/// Samples that a thread takes at a time.
const CHUNK: usize = 16;
/// Batches made ahead, unless more are needed to keep all threads busy or fewer fit into [`MOST_AHEAD`].
const AHEAD: usize = 3;
/// Largest size in bytes of the batches made ahead, counted as floats: three batches of 4,096 images of 112 pixels, or
/// one of 32,768.
const MOST_AHEAD: usize = 2 << 30;
/// Threads if the device is the CPU, where the kernels need the cores: enough to supply them with small images.
const WORKERS_FOR_CPU: usize = 2;

/// Returns the default number of loader threads. With a GPU, it is all of the rank's cores except one, which the host
/// side of the training loop needs.
pub fn default_workers(cores: usize, computes_on_cpu: bool) -> usize {
    match computes_on_cpu {
        true => WORKERS_FOR_CPU,
        false => cores.saturating_sub(1).max(1),
    }
}

/// Returns the number of batches that `threads` threads make ahead, for batches of `rows` images of `values` numbers.
pub fn batches_ahead(threads: usize, rows: usize, values: usize) -> usize {
    // Two chunks for each thread, so that none is idle while another finishes the last chunk of a batch.
    let busy = (2 * threads * CHUNK).div_ceil(rows.max(1));
    let fit = MOST_AHEAD / (4 * values * rows).max(1);
    busy.max(AHEAD).min(fit).max(1)
}

/// Returns an error if an image was packed at a smaller size than it is used for.
///
/// Images that were already small before packing are accepted, as in any data set.
pub fn check_packed(picture: &Picture, image_size: usize) -> Result<()> {
    let side = picture.width().min(picture.height());
    if !picture.is_packed() || side >= image_size {
        return Ok(());
    }
    let message = format!(
        "packed at {side} pixels on the shorter side, but training uses {image_size} pixels"
    );
    Err(Error::input(message).hint(format!(
        "pack the original images again: `advxl data pack SPEC --shorter-side {image_size}` or more"
    )))
}

/// Delivers training batches in order.
pub struct Loader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    broken: Vec<Broken>,
    seen: u64,
    waited: Duration,
}

/// The state that the threads share.
struct Shared {
    dataset: Arc<Dataset>,
    plan: Plan,
    state: Mutex<Queue>,
    /// Signals that a batch was taken or the loader is dropped.
    work: Condvar,
    /// Signals that a batch is complete.
    done: Condvar,
    order: RunOrder,
    /// How far samples have been requested from stores.
    ahead: Ahead,
    /// Number of batches made ahead.
    depth: usize,
}

struct Queue {
    /// Batches in progress, the next to deliver first.
    batches: VecDeque<Making>,
    /// Number of the first batch in `batches`.
    front: u64,
    stop: bool,
}

struct Making {
    /// Number of chunks that threads have taken.
    taken: usize,
    chunks: Vec<Option<Chunk>>,
    complete: Option<Result<Finished>>,
}

#[derive(Default)]
struct Chunk {
    batch: Batch,
    broken: Vec<Broken>,
    error: Option<Error>,
}

type Finished = (Batch, Vec<Broken>);

impl Loader {
    /// Starts the threads.
    ///
    /// Errors: an empty data set, a batch or image size of 0, a batch that cannot be divided among the ranks, missing
    /// captions, or a thread that cannot be started.
    pub fn new(dataset: Arc<Dataset>, plan: Plan, threads: usize) -> Result<Self> {
        if dataset.is_empty() || plan.batch == 0 || plan.image_size == 0 {
            return Err(Error::input(
                "a loader needs a data set with images, and a batch size and an image size above 0",
            ));
        }
        if !plan.batch.is_multiple_of(plan.share.shards)
            || !plan.share.shards.is_multiple_of(plan.share.of)
        {
            let Share { of, shards, .. } = plan.share;
            let message = format!(
                "a batch of {} in {shards} shards cannot be divided among {of} ranks",
                plan.batch
            );
            return Err(Error::input(message));
        }
        if plan.captions && !dataset.is_captioned() {
            return Err(Error::input("the data set has no captions to train on")
                .hint("use `shards:` with `.txt` or `.json` members, or train on classes"));
        }
        let rows = plan.share.rows(plan.batch).len();
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            depth: batches_ahead(threads, rows, 3 * plan.image_size.pow(2)),
            order: RunOrder::new(plan.seed, &dataset),
            ahead: Ahead::new(plan.position + plan.samples),
            dataset,
            plan,
            state: Mutex::new(Queue {
                batches: VecDeque::new(),
                front: 0,
                stop: false,
            }),
            work: Condvar::new(),
            done: Condvar::new(),
        });
        let mut loader = Self {
            shared,
            threads: Vec::new(),
            broken: Vec::new(),
            seen: 0,
            waited: Duration::ZERO,
        };
        for number in 0..threads {
            let shared = loader.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("loader-{number}"))
                .spawn(move || shared.work())
                .map_err(|error| {
                    Error::failed(format!("cannot start a data loading thread: {error}"))
                })?;
            loader.threads.push(thread);
        }
        Ok(loader)
    }

    /// Waits for the next batch and returns it; none when all samples have been delivered.
    ///
    /// Errors: a broken sample, or too many of them (see [`Plan::broken_rate`]); a panic in a thread. Earlier batches
    /// are delivered first.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        let start = Instant::now();
        let finished = self.shared.deliver();
        self.waited += start.elapsed();
        let Some((batch, broken)) = finished? else {
            return Ok(None);
        };
        self.seen += batch.first.len() as u64;
        self.broken.extend(broken);
        self.check_rate()?;
        Ok(Some(batch))
    }

    /// Returns the next batch if it is ready; none if it is not, and at the end.
    ///
    /// Errors: as [`Self::next_batch`].
    pub fn next_if_ready(&mut self) -> Result<Option<Batch>> {
        match self.shared.is_ready() {
            true => self.next_batch(),
            false => Ok(None),
        }
    }

    fn check_rate(&self) -> Result<()> {
        let (Some(allowed), Some(last)) = (self.shared.plan.broken_rate, self.broken.last()) else {
            return Ok(());
        };
        let count = self.broken.len();
        if self.seen < LEAST_SEEN || count as f64 <= allowed * self.seen as f64 {
            return Ok(());
        }
        Err(Error::input(format!(
            "{count} of {} samples are broken, above the allowed rate of {allowed}; the last is {last}",
            self.seen
        ))
        .hint("repair the data (every broken sample is logged) or allow a higher rate"))
    }

    /// Returns the broken samples encountered so far, in the order of the run.
    pub fn broken(&self) -> &[Broken] {
        &self.broken
    }

    /// Returns the total time that [`Self::next_batch`] has waited for the threads.
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A panic in a sample was already caught and delivered as an error.
            let _ = thread.join();
        }
        self.shared.dataset.forget_asked();
    }
}

impl Shared {
    /// Locks the queue. No code panics while it holds the lock, so the queue is consistent even if the lock is
    /// poisoned.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn batches(&self) -> u64 {
        self.plan.samples.div_ceil(self.plan.batch as u64)
    }

    /// Returns the first sample of batch `batch` that is delivered and the one after the last, counted from the
    /// beginning of the plan.
    fn rows(&self, batch: u64) -> (u64, u64) {
        let (plan, start) = (&self.plan, batch * self.plan.batch as u64);
        let rows = plan.share.rows(plan.batch);
        let at = |row: usize| (start + row as u64).min(plan.samples);
        (at(rows.start), at(rows.end))
    }

    /// Returns the run positions of chunk `chunk` of batch `batch`.
    fn positions(&self, batch: u64, chunk: usize) -> std::ops::Range<u64> {
        let (start, end) = self.rows(batch);
        let first = start + (chunk * CHUNK) as u64;
        let last = (first + CHUNK as u64).min(end);
        self.plan.position + first..self.plan.position + last
    }

    /// Returns whether the next batch is complete.
    fn is_ready(&self) -> bool {
        let state = self.lock();
        let next = state.batches.front();
        next.is_some_and(|making| making.complete.is_some())
    }

    fn deliver(&self) -> Result<Option<Finished>> {
        let mut state = self.lock();
        if state.front >= self.batches() {
            return Ok(None);
        }
        loop {
            let complete = state.batches.front_mut();
            if let Some(result) = complete.and_then(|making| making.complete.take()) {
                state.batches.pop_front();
                state.front += 1;
                self.work.notify_all();
                return result.map(Some);
            }
            state = self
                .done
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The loop of a thread: takes a chunk, makes it, and finishes the batch if it was the last chunk.
    fn work(&self) {
        while let Some((batch, chunk)) = self.take() {
            let made = guarded(|| Ok(self.make(self.positions(batch, chunk))));
            let made = made.unwrap_or_else(|error| Chunk {
                error: Some(error),
                ..Chunk::default()
            });
            let mut state = self.lock();
            // Only complete batches are delivered, so this one is still in the queue.
            let place = (batch - state.front) as usize;
            let making = &mut state.batches[place];
            making.chunks[chunk] = Some(made);
            if making.chunks.iter().any(Option::is_none) {
                continue;
            }
            let chunks = std::mem::take(&mut making.chunks);
            drop(state);
            let finished = guarded(|| self.finish(batch, chunks));
            let mut state = self.lock();
            let place = (batch - state.front) as usize;
            state.batches[place].complete = Some(finished);
            self.done.notify_all();
        }
    }

    /// Returns the next chunk to make; none when there is nothing left to do.
    fn take(&self) -> Option<(u64, usize)> {
        let mut state = self.lock();
        loop {
            if state.stop {
                return None;
            }
            let front = state.front;
            for (number, making) in state.batches.iter_mut().enumerate() {
                if making.taken < making.chunks.len() {
                    making.taken += 1;
                    return Some((front + number as u64, making.taken - 1));
                }
            }
            let next = front + state.batches.len() as u64;
            if next >= self.batches() {
                return None;
            }
            if state.batches.len() < self.depth {
                let (start, end) = self.rows(next);
                // A batch without rows for this rank is delivered empty.
                let chunks = ((end - start) as usize).div_ceil(CHUNK).max(1);
                state.batches.push_back(Making {
                    taken: 0,
                    chunks: std::iter::repeat_with(|| None).take(chunks).collect(),
                    complete: None,
                });
                continue;
            }
            state = self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Returns the sample at a position of the run, before broken samples are replaced.
    fn sample_at(&self, position: u64) -> usize {
        self.order.at(position).1
    }

    fn make(&self, positions: std::ops::Range<u64>) -> Chunk {
        let mut chunk = Chunk::default();
        let part = match self.plan.captions {
            true => Part::Both,
            false => Part::Picture,
        };
        self.ahead.ask(positions.clone(), |position| {
            // Other ranks load the other rows.
            let row = (position - self.plan.position) % self.plan.batch as u64;
            if self
                .plan
                .share
                .rows(self.plan.batch)
                .contains(&(row as usize))
            {
                self.dataset.ask(self.sample_at(position), part);
            }
        });
        // Without reserving, growing would copy every image once more.
        let values = 3 * self.plan.image_size * self.plan.image_size;
        chunk.batch.images.reserve(values * CHUNK);
        for position in positions {
            if let Err(error) = self.add_sample(position, &mut chunk) {
                chunk.error = Some(error);
                break;
            }
        }
        chunk
    }

    /// Adds the sample at a position of the run, or the next sample that is not broken.
    fn add_sample(&self, position: u64, chunk: &mut Chunk) -> Result<()> {
        let len = self.dataset.len();
        let (epoch, first) = self.order.at(position);
        for step in 0..len.min(MOST_IN_A_ROW) {
            let index = (first + step) % len;
            let plan = &self.plan;
            let keys = (plan.seed, epoch, index as u64);
            let view = |width, height| plan.cutout(width, height, keys);
            let sample = match self.dataset.read_part(index, plan.captions, &view) {
                Ok(sample) => sample,
                Err(fault) if fault.outage => return Err(fault.error.context("reading the data")),
                Err(fault) if plan.broken_rate.is_none() => {
                    return Err(fault.error.context("broken sample"));
                }
                Err(fault) => {
                    chunk.broken.push(Broken::new(&self.dataset, index, &fault));
                    continue;
                }
            };
            let picture = &sample.picture.picture;
            check_packed(picture, plan.image_size)
                .map_err(|error| error.context(self.dataset.name_of(index)))?;
            let image = plan.augmentation.apply(picture, plan.image_size, keys);
            // Captioned images may have no labels; their losses do not need any.
            let label = match self.dataset.classes() {
                [] => 0,
                _ => self.dataset.label(index)?,
            };
            let batch = &mut chunk.batch;
            batch.images.extend(image);
            batch.first.push(label);
            batch.second.push(label);
            batch.weight.push(1.0);
            batch.samples.push(index as u64);
            batch.epochs.push(epoch);
            batch.captions.extend(sample.caption);
            return Ok(());
        }
        let last = chunk.broken.last().map(Broken::to_string);
        Err(Error::input(format!(
            "{} samples in a row are broken; the last: {}",
            len.min(MOST_IN_A_ROW),
            last.unwrap_or_default()
        )))
    }

    fn finish(&self, number: u64, chunks: Vec<Option<Chunk>>) -> Result<Finished> {
        let mut batch = Batch::default();
        let mut broken = Vec::new();
        let values = 3 * self.plan.image_size * self.plan.image_size;
        batch
            .images
            .reserve(values * self.plan.share.rows(self.plan.batch).len());
        for chunk in chunks.into_iter().flatten() {
            if let Some(error) = chunk.error {
                return Err(error);
            }
            let part = chunk.batch;
            batch.images.extend(part.images);
            batch.first.extend(part.first);
            batch.second.extend(part.second);
            batch.weight.extend(part.weight);
            batch.samples.extend(part.samples);
            batch.epochs.extend(part.epochs);
            batch.captions.extend(part.captions);
            broken.extend(chunk.broken);
        }
        if let Some(mixing) = &self.plan.mixing {
            let first = self.plan.position + self.rows(number).0;
            let shard = self.plan.batch / self.plan.share.shards;
            for begin in (0..batch.first.len()).step_by(shard) {
                let rows = begin..(begin + shard).min(batch.first.len());
                let position = first + begin as u64;
                mixing.apply(
                    &mut batch,
                    rows,
                    self.plan.image_size,
                    self.plan.seed,
                    position,
                );
            }
        }
        Ok((batch, broken))
    }
}

/// Turns a panic into an error, so that it reaches the training loop.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(
            Error::failed(format!("a data loading thread panicked: {text}"))
                .hint("this is a bug in advxl; please report it with the data that caused it"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::spec::{Spec, Split};

    fn dataset(count: usize) -> Arc<Dataset> {
        let spec = Spec::Synthetic {
            count,
            image_size: 16,
        };
        Arc::new(Dataset::open(&spec, Split::Train, 0).unwrap())
    }

    fn plan(position: u64, samples: u64) -> Plan {
        Plan {
            seed: 5,
            batch: 40,
            image_size: 16,
            augmentation: Augmentation {
                pad_crop: Some(2),
                flip: true,
                ..Augmentation::default()
            },
            mixing: Some(Mixing {
                mixup_alpha: Some(0.8),
                cutmix_alpha: Some(1.0),
                probability: 1.0,
                switch_probability: Some(0.5),
            }),
            position,
            samples,
            broken_rate: None,
            reduced_decode: false,
            captions: false,
            share: Share::default(),
        }
    }

    fn all(mut loader: Loader) -> Vec<Batch> {
        let mut batches = Vec::new();
        while let Some(batch) = loader.next_batch().unwrap() {
            batches.push(batch);
        }
        assert!(loader.next_batch().unwrap().is_none());
        batches
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let one = all(Loader::new(dataset(100), plan(0, 250), 1).unwrap());
        for threads in [2, 3, 16] {
            let several = all(Loader::new(dataset(100), plan(0, 250), threads).unwrap());
            assert!(one == several, "{threads} threads");
        }
        let lengths: Vec<usize> = one.iter().map(|batch| batch.first.len()).collect();
        assert_eq!(lengths, [40, 40, 40, 40, 40, 40, 10]);
        assert_eq!(one[0].images.len(), 40 * 3 * 256);
    }

    #[test]
    fn batches_ahead_keep_all_threads_busy_within_a_memory_limit() {
        let values = 3 * 112 * 112;
        assert_eq!(batches_ahead(2, 1024, values), AHEAD);
        // Two chunks of 16 for each of 15 threads.
        assert_eq!(batches_ahead(15, 32, values), 15);
        assert_eq!(batches_ahead(15, 32_768, values), 1);
        assert_eq!(batches_ahead(1, 0, values), 32);
    }

    #[test]
    fn a_gpu_leaves_the_loader_all_cores_but_one() {
        assert_eq!(default_workers(16, false), 15);
        assert_eq!(default_workers(1, false), 1);
        assert_eq!(default_workers(64, true), 2);
    }

    #[test]
    fn a_resumed_loader_continues_with_the_same_batches() {
        let whole = all(Loader::new(dataset(100), plan(0, 240), 2).unwrap());
        let rest = all(Loader::new(dataset(100), plan(120, 120), 2).unwrap());
        assert!(whole[3..] == rest);
    }

    #[test]
    fn each_epoch_has_every_sample_once_in_a_different_order() {
        let batches = all(Loader::new(dataset(90), plan(0, 180), 2).unwrap());
        let samples: Vec<u64> = batches.iter().flat_map(|b| b.samples.clone()).collect();
        let epochs: Vec<u64> = batches.iter().flat_map(|b| b.epochs.clone()).collect();
        assert_eq!(epochs, [[0; 90], [1; 90]].concat());
        let (first, second) = samples.split_at(90);
        assert_ne!(first, second);
        for epoch in [first, second] {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..90).collect::<Vec<u64>>());
        }
    }

    #[test]
    fn mixed_sources_have_their_fractions_and_their_own_epochs() {
        let specs = ["synthetic:100@16", "synthetic:350@16"];
        let specs: Vec<Spec> = specs.iter().map(|spec| spec.parse().unwrap()).collect();
        let sources = [(&specs[0], 0.3), (&specs[1], 0.7)];
        let mixed = Arc::new(Dataset::open_mixed(&sources, 0).unwrap());
        assert_eq!(mixed.len(), 450);
        let batches = all(Loader::new(mixed.clone(), plan(0, 1000), 2).unwrap());
        let pairs = batches.iter().flat_map(|batch| {
            let samples = batch.samples.iter().copied();
            samples
                .zip(batch.epochs.iter().copied())
                .collect::<Vec<_>>()
        });
        let (mut first, mut second): (Vec<_>, Vec<_>) =
            pairs.partition(|(sample, _)| *sample < 100);
        // 300 and 700 of 1,000 samples: three and two whole epochs.
        for (found, range, epochs) in [(&mut first, 0..100, 3), (&mut second, 100..450, 2)] {
            found.sort_unstable_by_key(|(sample, epoch)| (*epoch, *sample));
            let right =
                (0..epochs).flat_map(|epoch| range.clone().map(move |sample| (sample, epoch)));
            assert_eq!(*found, right.collect::<Vec<(u64, u64)>>());
        }
        // From any position on, the same samples follow.
        let later = all(Loader::new(mixed, plan(520, 480), 2).unwrap());
        let samples = |batches: &[Batch]| -> Vec<u64> {
            batches
                .iter()
                .flat_map(|batch| batch.samples.clone())
                .collect()
        };
        assert_eq!(samples(&later), samples(&batches)[520..]);
    }

    #[test]
    fn labels_stay_with_their_images() {
        let dataset = dataset(50);
        let plan = Plan {
            mixing: None,
            augmentation: Augmentation::default(),
            ..plan(0, 50)
        };
        for batch in all(Loader::new(dataset.clone(), plan, 2).unwrap()) {
            for (place, sample) in batch.samples.iter().enumerate() {
                let index = *sample as usize;
                assert_eq!(batch.first[place], dataset.label(index).unwrap());
                assert_eq!(batch.second[place], batch.first[place]);
                assert_eq!(batch.weight[place], 1.0);
                let pixels = batch.pixels(16);
                let image = &pixels[place * 768..][..768];
                assert_eq!(image, dataset.picture(index).unwrap().to_planes());
            }
        }
    }

    #[test]
    fn a_loader_dropped_in_the_middle_ends_its_threads() {
        let mut loader = Loader::new(dataset(100), plan(0, 1_000_000), 3).unwrap();
        loader.next_batch().unwrap();
        drop(loader);
    }

    #[test]
    fn a_plan_without_samples_ends_at_once() {
        assert!(all(Loader::new(dataset(10), plan(7, 0), 1).unwrap()).is_empty());
    }

    #[test]
    fn a_panic_in_a_thread_becomes_an_error() {
        let error = guarded::<()>(|| panic!("index {} of 3", 7)).unwrap_err();
        assert!(
            error.to_string().contains("panicked: index 7 of 3"),
            "{error}"
        );
    }

    /// Makes 130 images. Every tenth is broken.
    fn folder_with_broken_pictures() -> (tempfile::TempDir, Arc<Dataset>) {
        let folder = tempfile::tempdir().unwrap();
        let mut png = std::io::Cursor::new(Vec::new());
        let image = image::DynamicImage::new_rgb8(16, 16);
        image.write_to(&mut png, image::ImageFormat::Png).unwrap();
        let png = png.into_inner();
        for number in 0..130 {
            let class = folder.path().join(if number < 65 { "a" } else { "b" });
            crate::files::make_folder(&class).unwrap();
            let bytes = if number % 10 == 3 {
                &png[..40]
            } else {
                &png[..]
            };
            crate::files::write(&class.join(format!("{number:03}.png")), bytes).unwrap();
        }
        let spec = Spec::Folder(folder.path().into());
        let dataset = Dataset::open(&spec, Split::Train, 0).unwrap();
        (folder, Arc::new(dataset))
    }

    fn plan_with_rate(broken_rate: Option<f64>) -> Plan {
        Plan {
            broken_rate,
            ..plan(0, 130)
        }
    }

    #[test]
    fn without_a_rate_the_first_broken_sample_stops_the_run_with_its_name() {
        let (_folder, dataset) = folder_with_broken_pictures();
        let mut loader = Loader::new(dataset, plan_with_rate(None), 2).unwrap();
        let error = (0..4).find_map(|_| loader.next_batch().err()).unwrap();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains("3.png`: the image data is damaged"), "{text}");
    }

    #[test]
    fn below_the_rate_broken_samples_are_replaced_by_the_next_ones_and_recorded() {
        let (_folder, dataset) = folder_with_broken_pictures();
        let run = |threads| {
            let plan = plan_with_rate(Some(0.2));
            let mut loader = Loader::new(dataset.clone(), plan, threads).unwrap();
            let mut samples = Vec::new();
            while let Some(batch) = loader.next_batch().unwrap() {
                samples.extend(batch.samples);
            }
            (samples, loader.broken().to_vec())
        };
        let (samples, broken) = run(1);
        assert_eq!(run(3), (samples.clone(), broken.clone()));
        assert_eq!(samples.len(), 130);
        assert!(samples.iter().all(|sample| sample % 10 != 3));
        // The sample after a broken one is seen twice.
        assert_eq!(samples.iter().filter(|sample| **sample == 14).count(), 2);
        assert_eq!(broken.len(), 13);
        assert!(broken[0].name.ends_with("3.png") && broken[0].reason.contains("damaged"));
        assert!(!broken[0].reason.contains("hint"));
    }

    #[test]
    fn above_the_rate_the_run_stops() {
        let (_folder, dataset) = folder_with_broken_pictures();
        let mut loader = Loader::new(dataset, plan_with_rate(Some(0.05)), 2).unwrap();
        // The rate is checked from 100 samples on, so two batches of 40 are delivered.
        assert!(loader.next_batch().unwrap().is_some());
        assert!(loader.next_batch().unwrap().is_some());
        let error = loader.next_batch().unwrap_err().to_string();
        assert!(
            error.contains("samples are broken, above the allowed rate of 0.05"),
            "{error}"
        );
    }
}
