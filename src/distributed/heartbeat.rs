//! Whether the other ranks are alive: a beat every second over a connection between rank 0 and each other rank.
//!
//! A process that dies is noticed by its transport. One that hangs (stopped, swapped out, behind a broken network) does not die,
//! and collectives wait for it forever. Whoever is silent for [`SILENCE`] is lost, and the run ends with the exit code for "run
//! it again". So it does when every rank waits for the others and nothing arrives for [`STALL`], as with collectives that do not
//! match. Beats also carry a request to stop to all ranks.
//!
//! TCP makes these connections with its own, `mpi_beats` next to MPI.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::files;

/// What the thread of collectives is doing.
#[derive(Default)]
pub(crate) struct Activity {
    /// Exchanges that are done.
    pub(crate) done: AtomicU64,
    /// Whether one is in progress.
    pub(crate) waiting: AtomicBool,
    /// Whether there will be no more.
    pub(crate) ended: AtomicBool,
}

/// Between two beats.
const BEAT: Duration = Duration::from_secs(1);
/// After so long without a beat a process is lost. A busy machine delays a thread by a second or two.
const SILENCE: Duration = Duration::from_secs(20);
/// After so long in which all wait and nothing comes the run hangs. An exchange is of some tens of megabytes.
const STALL: Duration = Duration::from_secs(40);
/// A process as its peers know it.
pub(crate) struct Peer {
    rank: usize,
    host: String,
    stream: TcpStream,
    heard: Instant,
    /// Bytes of a beat that are not all there yet.
    partial: Vec<u8>,
    beat: Beat,
}

/// What a beat says.
#[derive(Clone, Copy, Default, PartialEq)]
struct Beat {
    done: u64,
    waiting: bool,
    ended: bool,
    stop: bool,
}

impl Beat {
    const BYTES: usize = 11;

    fn of(activity: &Activity, stop: &AtomicBool) -> Self {
        Self {
            done: activity.done.load(Ordering::Relaxed),
            waiting: activity.waiting.load(Ordering::Relaxed),
            ended: activity.ended.load(Ordering::Relaxed),
            stop: stop.load(Ordering::Relaxed),
        }
    }

    fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.done.to_le_bytes());
        bytes[8] = self.waiting.into();
        bytes[9] = self.ended.into();
        bytes[10] = self.stop.into();
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        Self {
            done: u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")),
            waiting: bytes[8] != 0,
            ended: bytes[9] != 0,
            stop: bytes[10] != 0,
        }
    }
}

/// What a rank watches, and what it does when another is lost.
pub(crate) struct Watch {
    pub(crate) rank: usize,
    pub(crate) activity: Arc<Activity>,
    /// Set when another rank was asked to stop.
    pub(crate) stop: Arc<AtomicBool>,
    /// Prints why the run ends, and ends it and this process.
    pub(crate) end: Box<dyn Fn(&str) + Send>,
}

impl Watch {
    /// Begins to watch peers, on a thread of its own: all others at rank 0, rank 0 at the others.
    pub(crate) fn start(self, peers: Vec<Peer>) -> Result<()> {
        let failed = |error: std::io::Error| {
            Error::failed(format!("cannot watch the other processes: {error}"))
        };
        for peer in &peers {
            peer.stream.set_nonblocking(true).map_err(failed)?;
        }
        std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || self.watch(peers))
            .map_err(failed)?;
        Ok(())
    }

    /// The beats of this process and those of its peers, until a peer is lost or the run ends.
    fn watch(&self, mut peers: Vec<Peer>) {
        let (activity, stop) = (&self.activity, &self.stop);
        let mut moved = Instant::now();
        let mut last = (Beat::of(activity, stop), Vec::new());
        let mut woken = Instant::now();
        loop {
            std::thread::sleep(BEAT);
            let own = Beat::of(activity, stop);
            // This process hung itself: that it heard nothing in the meantime means nothing.
            if woken.elapsed() > 3 * BEAT {
                peers
                    .iter_mut()
                    .for_each(|peer| peer.heard = Instant::now());
                moved = Instant::now();
            }
            woken = Instant::now();
            for peer in &mut peers {
                peer.exchange(own);
            }
            if peers.iter().any(|peer| peer.beat.stop) {
                stop.store(true, Ordering::Relaxed);
            }
            if let Some(peer) = peers
                .iter()
                .find(|peer| !peer.beat.ended && peer.heard.elapsed() > SILENCE)
            {
                (self.end)(&format!(
                    "process {} on {} sent no heartbeat for {} s: it was stopped, or its machine or network is down",
                    peer.rank,
                    peer.host,
                    SILENCE.as_secs()
                ));
            }
            let beats: Vec<Beat> = peers.iter().map(|peer| peer.beat).collect();
            let all_wait = own.waiting && beats.iter().all(|beat| beat.waiting);
            if !all_wait || last != (own, beats.clone()) {
                moved = Instant::now();
            }
            last = (own, beats);
            if self.rank == 0 && moved.elapsed() > STALL {
                let seconds = STALL.as_secs();
                (self.end)(&format!(
                    "all processes have waited for each other for {seconds} s"
                ));
            }
        }
    }
}

impl Peer {
    #[cfg(feature = "mpi")]
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn new(rank: usize, host: &str, stream: TcpStream) -> Self {
        Self {
            rank,
            host: host.to_owned(),
            stream,
            heard: Instant::now(),
            partial: Vec::new(),
            beat: Beat::default(),
        }
    }

    /// Sends a beat and takes what came. A connection that is gone is silent from then on.
    fn exchange(&mut self, own: Beat) {
        let _ = self.stream.write_all(&own.to_bytes());
        let mut buffer = [0; 64 * Beat::BYTES];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => self.partial.extend(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        let whole = self.partial.len() / Beat::BYTES * Beat::BYTES;
        if whole > 0 {
            self.beat = Beat::from_bytes(&self.partial[whole - Beat::BYTES..whole]);
            self.partial.drain(..whole);
            self.heard = Instant::now();
        }
    }
}

/// The addresses of this machine, as the kernel's routing table has them; that of the loopback last, which on another machine
/// is another.
pub(crate) fn addresses() -> Vec<IpAddr> {
    let table = files::read_text(Path::new("/proc/net/fib_trie")).unwrap_or_default();
    local_addresses(&table)
}

fn local_addresses(table: &str) -> Vec<IpAddr> {
    let mut found = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
    let mut last = None;
    for line in table.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse::<IpAddr>().ok();
        } else if line == "/32 host LOCAL"
            && let Some(address) = last
            && !address.is_loopback()
            && !found.contains(&address)
        {
            found.insert(found.len() - 1, address);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_addresses_are_found_in_the_routing_table() {
        let table = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.0.0.0\n        /24 link UNICAST\n     |-- 10.0.0.7\n        \
                     /32 host LOCAL\n     |-- 127.0.0.1\n        /32 host LOCAL\n     |-- 10.0.0.255\n        /32 link BROADCAST\n";
        let found: Vec<String> = local_addresses(table)
            .iter()
            .map(IpAddr::to_string)
            .collect();
        assert_eq!(found, ["10.0.0.7", "127.0.0.1"]);
    }

    #[test]
    fn a_beat_reads_back() {
        let beat = Beat {
            done: 77,
            waiting: true,
            ended: false,
            stop: true,
        };
        assert!(Beat::from_bytes(&beat.to_bytes()) == beat);
    }
}
