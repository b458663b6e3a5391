//! Looks through a whole data set: reads every sample and counts by kind what is wrong or odd.
//!
//! Not for training, where [`super::loader`] meets broken samples one by one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::loader::guarded;
use super::store::Ahead;
use super::{Broken, Dataset, Fault, Health, Part, Reason};
use crate::error::Result;

/// What a look through a data set found.
#[derive(Clone, Debug)]
pub struct Checked {
    /// Samples.
    pub samples: usize,
    /// Those that cannot be used.
    pub broken: usize,
    /// Damages and oddities by kind; those of shards as a whole included.
    pub health: Health,
    /// How long it took.
    pub took: Duration,
}

/// Samples that a thread takes at a time.
const CHUNK: usize = 16;
/// Chunks that wait to be counted.
const WAITING: usize = 64;

/// A chunk's outcome: what was odd and what was broken.
type Outcome = (Vec<(usize, Reason)>, Vec<Broken>);

/// Reads every sample. `broken` is told each that cannot be used, in order, and `progress` how many were read.
///
/// Errors: those of `broken`, of shards that cannot be read at all, and of stores.
pub fn check(
    dataset: &Dataset,
    threads: usize,
    mut broken: impl FnMut(&Broken) -> Result<()>,
    mut progress: impl FnMut(usize),
) -> Result<Checked> {
    let started = Instant::now();
    let (len, next) = (dataset.len(), AtomicUsize::new(0));
    let ahead = Ahead::new(len as u64);
    let mut health = match dataset.shards() {
        Some(shards) => shards.health()?,
        None => Health::default(),
    };
    let mut count = 0;
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel::<(usize, Result<Outcome>)>(WAITING);
        for _ in 0..threads.max(1) {
            let (sender, next, ahead) = (sender.clone(), &next, &ahead);
            scope.spawn(move || {
                loop {
                    let first = next.fetch_add(CHUNK, Ordering::Relaxed);
                    // Nobody listens any more when counting has failed.
                    if first >= len {
                        break;
                    }
                    let outcome = chunk(dataset, first, ahead);
                    if sender.send((first, outcome)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        // Threads finish in any order; counts and examples are those of the samples' order.
        let mut early = BTreeMap::new();
        let mut place = 0;
        for (first, outcome) in receiver {
            early.insert(first, outcome?);
            while let Some((odd, damaged)) = early.remove(&place) {
                for (sample, reason) in odd {
                    health.add(reason, || dataset.name_of(sample));
                }
                for sample in damaged {
                    health.add(sample.kind, || {
                        format!("{}: {}", sample.name, sample.reason)
                    });
                    count += 1;
                    broken(&sample)?;
                }
                place += CHUNK;
                progress(place.min(len));
            }
        }
        Ok(Checked {
            samples: len,
            broken: count,
            health: health.clone(),
            took: started.elapsed(),
        })
    })
}

fn chunk(dataset: &Dataset, first: usize, ahead: &Ahead) -> Result<Outcome> {
    let (mut odd, mut broken) = (Vec::new(), Vec::new());
    let captions = dataset.is_captioned();
    let samples = first..(first + CHUNK).min(dataset.len());
    ahead.ask(samples.start as u64..samples.end as u64, |soon| {
        dataset.ask(soon as usize, Part::Both);
    });
    for sample in samples {
        // A decoder that panics has met a damage that it does not know.
        let read = guarded(|| Ok(dataset.read(sample, captions)));
        let read = read.unwrap_or_else(|error| {
            Err(Fault {
                reason: Reason::DamagedImage,
                error,
                outage: false,
            })
        });
        match read {
            Ok(found) => odd.extend(found.picture.odd.iter().map(|reason| (sample, *reason))),
            Err(fault) if fault.outage => return Err(fault.error),
            Err(fault) => broken.push(Broken::new(dataset, sample, &fault)),
        }
    }
    Ok((odd, broken))
}
