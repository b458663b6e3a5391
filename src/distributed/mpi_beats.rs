//! Connections for heartbeats next to MPI, which has none that a hung rank leaves usable.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::comm::Comm;
use super::heartbeat::{Activity, Peer, Watch, addresses};
use super::launch::{Reports, host};
use super::token::Token;
use crate::error::{Error, Kind, Result};

/// For a connection of one process to the first one.
const CONNECT: Duration = Duration::from_secs(3);
/// Between two looks whether all have tried.
const LOOK: Duration = Duration::from_millis(10);

/// Where rank 0 listens.
#[derive(Serialize, Deserialize)]
struct Place {
    addresses: Vec<IpAddr>,
    port: u16,
    token: Token,
}

/// Connects all ranks to rank 0 and begins to watch.
///
/// Errors: no thread or port is available. Where rank 0 cannot be reached, the run continues unwatched, which a note says.
pub(crate) fn start(comm: &Comm, activity: Arc<Activity>, reports: Reports) -> Result<()> {
    let failed =
        |error: std::io::Error| Error::failed(format!("cannot watch the other processes: {error}"));
    let listener = match comm.is_main() {
        true => Some(TcpListener::bind(("0.0.0.0", 0)).map_err(failed)?),
        false => None,
    };
    let port = match &listener {
        Some(listener) => listener.local_addr().map_err(failed)?.port(),
        None => 0,
    };
    // That of rank 0 counts.
    let place = comm.broadcast(Place {
        addresses: addresses(),
        port,
        token: Token::random(),
    });
    let hosts = comm.all_gather(host());
    let mut peers = Vec::new();
    if let Some(listener) = listener {
        let (all_tried, trying) = channel();
        let (token, names) = (place.token, hosts.clone());
        let accepting = std::thread::Builder::new()
            .name("accept".into())
            .spawn(move || accept(&listener, token, &names, &trying))
            .map_err(failed)?;
        comm.barrier();
        drop(all_tried);
        peers = accepting.join().unwrap_or_default();
        let unwatched: Vec<String> = (1..comm.world_size())
            .filter(|rank| peers.iter().all(|peer| peer.rank() != *rank))
            .map(|rank| format!("{rank} on {}", hosts[rank]))
            .collect();
        if !unwatched.is_empty() {
            (reports.note)(&format!(
                "note: the processes {} cannot reach this one over TCP: if one of them hangs, this is not noticed",
                unwatched.join(", ")
            ));
        }
    } else {
        let stream = connect(&place, comm.rank());
        peers.extend(stream.map(|stream| Peer::new(0, &hosts[0], stream)));
        comm.barrier();
    }
    let watch = Watch {
        rank: comm.rank(),
        activity,
        stop: comm.stop_flag(),
        // `mpirun` ends the others. There is no other way: threads wait within MPI.
        end: Box::new(move |why| {
            (reports.alarm)(&format!(
                "error: {why}\n  hint: run the same command again to resume from the last checkpoint"
            ));
            std::process::exit(i32::from(Kind::TryAgain.exit_code()))
        }),
    };
    watch.start(peers)
}

fn connect(place: &Place, rank: usize) -> Option<TcpStream> {
    let mut addresses = place.addresses.iter();
    addresses.find_map(|address| {
        let address = SocketAddr::new(*address, place.port);
        let mut stream = TcpStream::connect_timeout(&address, CONNECT).ok()?;
        stream.set_read_timeout(Some(CONNECT)).ok()?;
        stream.write_all(&place.token.bytes()).ok()?;
        stream.write_all(&(rank as u64).to_le_bytes()).ok()?;
        // The same address may be another machine's, on which something else listens.
        let mut answer = [0; Token::BYTES];
        stream.read_exact(&mut answer).ok()?;
        (answer == place.token.answer()).then_some(stream)
    })
}

/// The connections of the other ranks, until all have tried, which is when `trying` closes.
fn accept(
    listener: &TcpListener,
    token: Token,
    hosts: &[String],
    trying: &Receiver<()>,
) -> Vec<Peer> {
    let mut peers = Vec::new();
    if listener.set_nonblocking(true).is_err() {
        return peers;
    }
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                let known = greet(stream, token).filter(|(rank, _)| *rank < hosts.len());
                peers.extend(known.map(|(rank, stream)| Peer::new(rank, &hosts[rank], stream)));
            }
            Err(_) if trying.recv_timeout(LOOK) == Err(RecvTimeoutError::Disconnected) => {
                return peers;
            }
            Err(_) => {}
        }
    }
}

/// The rank of a process that connects, if it is one of this run.
fn greet(mut stream: TcpStream, token: Token) -> Option<(usize, TcpStream)> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(CONNECT)).ok()?;
    let mut presented = [0; Token::BYTES];
    stream.read_exact(&mut presented).ok()?;
    if presented != token.bytes() {
        return None;
    }
    let mut rank = [0; 8];
    stream.read_exact(&mut rank).ok()?;
    stream.write_all(&token.answer()).ok()?;
    Some((u64::from_le_bytes(rank) as usize, stream))
}
