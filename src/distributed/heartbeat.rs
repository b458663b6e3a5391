//! Whether the other processes live: a beat every second, apart from MPI, over connections to the first process.
//!
//! `mpirun` ends all processes when one dies. One that stands still (stopped, swapped out, behind a broken network)
//! does not die, and MPI waits for it without end. Each process therefore keeps a connection to the first one and beats; whoever
//! is not heard of for [`SILENCE`] is lost, and the run ends with the exit code for "run it again". So it does when every
//! process waits for the others and nothing comes for [`STALL`], as with exchanges that do not match.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::comm::Comm;
use super::launch::host;
use crate::error::{Error, Kind, Result};
use crate::files;

/// What the thread of MPI is doing.
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
/// For a connection of one process to the first one.
const CONNECT: Duration = Duration::from_secs(3);

/// Where the first process listens.
#[derive(Serialize, Deserialize)]
struct Place {
    addresses: Vec<IpAddr>,
    port: u16,
    /// Tells this run's connections from others.
    token: u64,
}

/// A process as its peers know it.
struct Peer {
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

/// Connects all processes to the first one and begins to watch.
///
/// Errors: no thread or port to be had. Where the first process cannot be reached, the run goes on unwatched, which `lost` tells.
pub(crate) fn start(comm: &Comm, activity: Arc<Activity>, lost: fn(&str)) -> Result<()> {
    let failed =
        |error: std::io::Error| Error::failed(format!("cannot watch the other processes: {error}"));
    let listener = match comm.is_main() {
        true => Some(TcpListener::bind(("0.0.0.0", 0)).map_err(failed)?),
        false => None,
    };
    let place = match &listener {
        Some(listener) => Place {
            addresses: addresses(),
            port: listener.local_addr().map_err(failed)?.port(),
            token: token(),
        },
        None => Place {
            addresses: Vec::new(),
            port: 0,
            token: 0,
        },
    };
    let place = comm.broadcast(place);
    let hosts = comm.all_gather(host());
    let mut peers = Vec::new();
    if let Some(listener) = listener {
        let (all_tried, told) = channel();
        let (token, names) = (place.token, hosts.clone());
        let accepting = std::thread::Builder::new()
            .name("accept".into())
            .spawn(move || accept(&listener, token, &names, &told))
            .map_err(failed)?;
        comm.barrier();
        drop(all_tried);
        peers = accepting.join().unwrap_or_default();
        let unwatched: Vec<String> = (1..comm.world_size())
            .filter(|rank| peers.iter().all(|peer| peer.rank != *rank))
            .map(|rank| format!("{rank} on {}", hosts[rank]))
            .collect();
        if !unwatched.is_empty() {
            lost(&format!(
                "note: the processes {} cannot reach this one over TCP: if one of them stands still, this is not noticed",
                unwatched.join(", ")
            ));
        }
    } else {
        let stream = connect(&place, comm.rank());
        peers.extend(stream.map(|stream| peer(0, &hosts, stream)));
        comm.barrier();
    }
    for peer in &peers {
        peer.stream.set_nonblocking(true).map_err(failed)?;
    }
    let (rank, stop) = (comm.rank(), comm.stop_flag());
    std::thread::Builder::new()
        .name("watch".into())
        .spawn(move || watch(rank, peers, &activity, &stop, lost))
        .map_err(failed)?;
    Ok(())
}

fn peer(rank: usize, hosts: &[String], stream: TcpStream) -> Peer {
    Peer {
        rank,
        host: hosts[rank].clone(),
        stream,
        heard: Instant::now(),
        partial: Vec::new(),
        beat: Beat::default(),
    }
}

/// The beats of this process and those of its peers, until a peer is lost or the run ends.
fn watch(
    rank: usize,
    mut peers: Vec<Peer>,
    activity: &Activity,
    stop: &AtomicBool,
    lost: fn(&str),
) {
    let mut moved = Instant::now();
    let mut last = (Beat::of(activity, stop), Vec::new());
    let mut woken = Instant::now();
    loop {
        std::thread::sleep(BEAT);
        let own = Beat::of(activity, stop);
        // This process stood still itself: what it did not hear in the meantime tells nothing.
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
            end(
                lost,
                &format!(
                    "process {} on {} has not been heard of for {} s: it was stopped, or its machine or network is gone",
                    peer.rank,
                    peer.host,
                    SILENCE.as_secs()
                ),
            );
        }
        let beats: Vec<Beat> = peers.iter().map(|peer| peer.beat).collect();
        let all_wait = own.waiting && beats.iter().all(|beat| beat.waiting);
        if !all_wait || last != (own, beats.clone()) {
            moved = Instant::now();
        }
        last = (own, beats);
        if rank == 0 && moved.elapsed() > STALL {
            let seconds = STALL.as_secs();
            end(
                lost,
                &format!("all processes have waited for each other for {seconds} s"),
            );
        }
    }
}

/// Ends this process, which makes `mpirun` end the others. There is no other way: threads wait within MPI.
fn end(lost: fn(&str), why: &str) -> ! {
    lost(&format!(
        "error: {why}\n  hint: run the same command again; it goes on from the last checkpoint"
    ));
    std::process::exit(i32::from(Kind::TryAgain.exit_code()))
}

impl Peer {
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

fn connect(place: &Place, rank: usize) -> Option<TcpStream> {
    let mut addresses = place.addresses.iter();
    addresses.find_map(|address| {
        let address = SocketAddr::new(*address, place.port);
        let mut stream = TcpStream::connect_timeout(&address, CONNECT).ok()?;
        stream.set_read_timeout(Some(CONNECT)).ok()?;
        stream.write_all(&place.token.to_le_bytes()).ok()?;
        stream.write_all(&(rank as u64).to_le_bytes()).ok()?;
        // The same address may be another machine's, on which something else listens.
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).ok()?;
        (answer == (!place.token).to_le_bytes()).then_some(stream)
    })
}

/// The connections of the other processes, until all have tried, which is when `told` closes.
fn accept(listener: &TcpListener, token: u64, hosts: &[String], told: &Receiver<()>) -> Vec<Peer> {
    let mut peers = Vec::new();
    if listener.set_nonblocking(true).is_err() {
        return peers;
    }
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                let known = greet(stream, token).filter(|(rank, _)| *rank < hosts.len());
                peers.extend(known.map(|(rank, stream)| peer(rank, hosts, stream)));
            }
            Err(_) if told.recv_timeout(BEAT / 100) == Err(RecvTimeoutError::Disconnected) => {
                return peers;
            }
            Err(_) => {}
        }
    }
}

/// The rank of a process that connects, if it is one of this run.
fn greet(mut stream: TcpStream, token: u64) -> Option<(usize, TcpStream)> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(CONNECT)).ok()?;
    let mut word = [0; 8];
    stream.read_exact(&mut word).ok()?;
    if word != token.to_le_bytes() {
        return None;
    }
    stream.read_exact(&mut word).ok()?;
    stream.write_all(&(!token).to_le_bytes()).ok()?;
    Some((u64::from_le_bytes(word) as usize, stream))
}

/// A number that no other run on this machine has.
fn token() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let text = format!("{} {} {}", host(), std::process::id(), now.as_nanos());
    let hash = blake3::hash(text.as_bytes());
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"))
}

/// The addresses of this machine, as the kernel's routing table has them; that of the loopback last, which on another machine
/// is another.
fn addresses() -> Vec<IpAddr> {
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
