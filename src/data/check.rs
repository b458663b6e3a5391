//! Checks a whole data set: reads every sample and counts damage and oddities by kind. The ranks divide the samples
//! among themselves.
//!
//! Not for training, where [`crate::data::loader`] encounters broken samples one by one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::dataset::Dataset;
use super::loader::{Broken, guarded};
use super::shards::{Part, Sample};
use crate::distributed::Comm;
use crate::error::Result;
use crate::image::{Fault, Health, Reason};
use crate::storage::store::Ahead;

/// The result of a check.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Number of samples.
    pub samples: usize,
    /// Number of samples that cannot be used.
    pub broken: usize,
    /// Damage and oddities by kind, including those of shards as a whole.
    pub health: Health,
    /// Duration of the check.
    pub took: Duration,
}

/// Samples that a rank processes at a time: a few seconds of work.
const PIECE: usize = 2048;
/// Samples that a thread processes at a time.
const CHUNK: usize = 16;

/// Odd and broken samples, in the order of the samples.
type Outcome = (Vec<(usize, Reason)>, Vec<Broken>);

/// Reads every sample. On rank 0, `broken` is called with each sample that cannot be used, in order, and `progress`
/// with the number of samples read so far.
///
/// Errors: those of `broken`, of shards that cannot be read at all, and of stores.
pub fn check(
    dataset: &Dataset,
    threads: usize,
    comm: &Comm,
    mut broken: impl FnMut(&Broken) -> Result<()>,
    mut progress: impl FnMut(usize),
) -> Result<Checked> {
    let started = Instant::now();
    let len = dataset.len();
    // Only rank 0 counts the damage of shards as a whole.
    let health = match dataset.shards() {
        Some(shards) if comm.is_main() => shards.health(),
        _ => Ok(Health::default()),
    };
    let mut health = comm.all_ok(health)?;
    let (mut count, mut place) = (0, 0);
    let take = |(odd, damaged): Outcome| {
        for (sample, reason) in odd {
            health.add(reason, || dataset.name_of(sample));
        }
        for sample in damaged {
            health.add(sample.kind, || sample.to_string());
            count += 1;
            broken(&sample)?;
        }
        place += PIECE;
        progress(place.min(len));
        Ok(())
    };
    comm.map_in_order(len, PIECE, |range| piece(dataset, range, threads), take)?;
    Ok(Checked {
        samples: len,
        broken: count,
        health,
        took: started.elapsed(),
    })
}

/// Checks a range of samples with several threads. The outcome is in the order of the samples.
fn piece(dataset: &Dataset, range: Range<usize>, threads: usize) -> Result<Outcome> {
    let ahead = Ahead::new(range.end as u64);
    let next = AtomicUsize::new(range.start);
    let found = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let first = next.fetch_add(CHUNK, Ordering::Relaxed);
                    if first >= range.end {
                        break;
                    }
                    let outcome = chunk(dataset, first..(first + CHUNK).min(range.end), &ahead);
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    found.insert(first, outcome);
                }
            });
        }
    });
    let (mut odd, mut broken) = (Vec::new(), Vec::new());
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    for outcome in found.into_values() {
        let (more_odd, more_broken) = outcome?;
        odd.extend(more_odd);
        broken.extend(more_broken);
    }
    Ok((odd, broken))
}

fn chunk(dataset: &Dataset, range: Range<usize>, ahead: &Ahead) -> Result<Outcome> {
    let (mut odd, mut broken) = (Vec::new(), Vec::new());
    let captions = dataset.is_captioned();
    ahead.ask(range.start as u64..range.end as u64, |soon| {
        dataset.ask(soon as usize, Part::Both);
    });
    for sample in range {
        match read(dataset, sample, captions)? {
            Ok(found) => odd.extend(found.picture.odd.iter().map(|reason| (sample, *reason))),
            Err(damage) => broken.push(damage),
        }
    }
    Ok((odd, broken))
}

/// Reads a sample, or returns why it cannot be used.
///
/// Errors: those of stores.
fn read(
    dataset: &Dataset,
    sample: usize,
    caption: bool,
) -> Result<std::result::Result<Sample, Broken>> {
    // A panic in a decoder means damage that it does not handle.
    let read = guarded(|| Ok(dataset.read(sample, caption)));
    let read = read.unwrap_or_else(|error| {
        Err(Fault {
            reason: Reason::DamagedImage,
            error,
            outage: false,
        })
    });
    match read {
        Err(fault) if fault.outage => Err(fault.error),
        read => Ok(read.map_err(|fault| Broken::new(dataset, sample, &fault))),
    }
}

/// Returns the given samples whose images cannot be read, in order.
///
/// Errors: those of stores.
pub fn broken_among(dataset: &Dataset, samples: &[usize]) -> Result<Vec<Broken>> {
    if !dataset.is_decoded() {
        return Ok(Vec::new());
    }
    let mut broken = Vec::new();
    for some in samples.chunks(CHUNK * CHUNK) {
        some.iter()
            .for_each(|sample| dataset.ask(*sample, Part::Picture));
        let found: Vec<_> = some
            .par_iter()
            .map(|sample| Ok(read(dataset, *sample, false)?.err()))
            .collect::<Result<_>>()?;
        broken.extend(found.into_iter().flatten());
    }
    Ok(broken)
}
