//! Collectives over TCP: a connection between each pair of ranks, without MPI.
//!
//! One thread serves collectives in the order in which they are requested, as with MPI. Each connection has a thread that
//! writes and one that reads, so that all pairs exchange at once and a rank that reads always makes room for the one that writes.
//! Every message says which exchange it belongs to: ranks that disagree are noticed and do not mix values up.
//!
//! A process that ends closes its connections, which the readers of all others notice at once. It announces a regular end, and
//! an exit with a code, with a message of its own. A rank that hangs is noticed by [`super::heartbeat`].
//! What it does not do: encrypt, replace lost ranks, reduce.

use std::io::{ErrorKind, Read, Result as IoResult, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::comm::{Comm, Transport};
use super::heartbeat::{Activity, Peer, Watch, addresses};
use super::launch::{Meeting, Reports, host, machine};
use super::rendezvous::{Hello, Member, Met, launcher_gone, listen_everywhere, wait_for_end};
use super::signals::Stop;
use super::token::Token;
use super::worker::Worker;
use crate::error::{Error, Kind, Result};

/// For one attempt to reach an address.
const CONNECT: Duration = Duration::from_secs(5);
/// For all ranks to reach this one.
const REACH: Duration = Duration::from_secs(60);
/// From a lost connection to its report: the rank behind it may have ended because another did, which says so.
const SETTLE: Duration = Duration::from_millis(300);
/// For a lower rank to report a lost one, and for an exit code to be sent.
const PATIENCE: Duration = Duration::from_secs(2);
/// Messages of one rank that wait for this one's turn. Ranks run ahead by one at most, except those that only send.
const AHEAD: usize = 2;
/// Buffers of a connection that are kept for the next message: fresh memory costs as much as the transfer.
const SPARE: usize = 1;
/// Messages up to this size are sent in one piece with their header.
const SMALL: usize = 64 << 10;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Tag {
    AllToAll = 1,
    AllGather,
    Broadcast,
    Bytes,
    /// The sender ends as it should.
    Bye,
    /// The sender exits with a code, and so do all.
    Abort,
}

impl Tag {
    fn of(byte: u8) -> Option<Self> {
        [
            Self::AllToAll,
            Self::AllGather,
            Self::Broadcast,
            Self::Bytes,
            Self::Bye,
            Self::Abort,
        ]
        .into_iter()
        .find(|tag| *tag as u8 == byte)
    }
}

/// Before the bytes of each message.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Header {
    tag: Tag,
    /// With which an aborted process exits.
    code: u8,
    /// The number of the exchange.
    exchange: u32,
    bytes: u64,
}

impl Header {
    const BYTES: usize = 16;

    fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        (bytes[0], bytes[1]) = (self.tag as u8, self.code);
        bytes[4..8].copy_from_slice(&self.exchange.to_le_bytes());
        bytes[8..].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    fn read(mut stream: &TcpStream) -> IoResult<Self> {
        let mut bytes = [0; Self::BYTES];
        stream.read_exact(&mut bytes)?;
        Ok(Self {
            tag: Tag::of(bytes[0]).ok_or(ErrorKind::InvalidData)?,
            code: bytes[1],
            exchange: u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes")),
            bytes: u64::from_le_bytes(bytes[8..].try_into().expect("eight bytes")),
        })
    }
}

/// What is sent: values that several messages share, or bytes.
#[derive(Clone)]
enum Payload {
    Floats(Arc<Vec<f32>>, Range<usize>),
    Bytes(Arc<Vec<u8>>),
}

impl Payload {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Floats(values, range) => bytemuck::cast_slice(&values[range.clone()]),
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// For a connection's writer.
enum Outgoing {
    Part(Tag, u32, Payload),
    Bye,
    /// Something is sent when it is written.
    Abort(u8, Sender<()>),
}

/// From a connection's reader.
struct Part {
    tag: Tag,
    exchange: u32,
    values: Values,
}

enum Values {
    Floats(Vec<f32>),
    Bytes(Vec<u8>),
}

/// The way from one peer.
struct Inbox {
    parts: Receiver<Part>,
    /// Gives buffers back to the reader.
    spent: SyncSender<Vec<f32>>,
}

/// The connections to the other ranks.
struct Mesh {
    rank: usize,
    hosts: Vec<String>,
    /// To the writers, by rank; none to itself.
    outboxes: Vec<Option<Mutex<Sender<Outgoing>>>>,
    /// Ranks whose connection closed before they said that they end.
    lost: Vec<AtomicBool>,
    alarm: fn(&str),
}

enum Request {
    AllToAll(Vec<f32>, Sender<Vec<f32>>),
    AllGather(Vec<f32>, Sender<Vec<f32>>),
    Broadcast(Vec<f32>, Sender<Vec<f32>>),
    Gather(Vec<u8>, bool, Sender<Vec<Vec<u8>>>),
}

/// The way to the thread that serves collectives.
struct Link {
    mesh: Arc<Mesh>,
    exchange: Worker<Request>,
}

/// Joins the ranks that were started together.
///
/// Errors: they do not belong together, were not all started, or cannot reach each other.
pub(super) fn join(meeting: &Meeting, reports: Reports) -> Result<Comm> {
    let failed = |error| Error::failed(format!("cannot listen for the other processes: {error}"));
    // The ranks of a launcher are on this machine alone.
    let listener = match meeting.launched {
        true => TcpListener::bind(("127.0.0.1", 0)),
        false => listen_everywhere(0),
    };
    let listener = listener.map_err(failed)?;
    if meeting.rank == 0 && !meeting.launched {
        meeting.host(reports.note)?;
    }
    let hello = Hello {
        token: meeting.token,
        rank: meeting.rank,
        world_size: meeting.world_size,
        host: host(),
        machine: machine(),
        addresses: if meeting.launched {
            Vec::new()
        } else {
            addresses()
        },
        port: listener.local_addr().map_err(failed)?.port(),
    };
    let met = meeting.meet(&hello, reports.note)?;
    let machines: Vec<String> = met.members.iter().map(|m| m.machine.clone()).collect();
    let hosts: Vec<String> = met.members.iter().map(|m| m.host.clone()).collect();
    let reached = connect(meeting.rank, &met, listener);
    let (streams, server) = met.all_reached(reached)?;
    meeting.placement(&machines).set();
    let stop = Stop::reporting(reports);
    let link = Link::start(meeting.rank, hosts, streams, &stop, reports.alarm)?;
    if meeting.launched {
        let mesh = Arc::clone(&link.mesh);
        spawn("launcher", move || {
            wait_for_end(server);
            // Each rank notices it. Who is in the middle of its own end is left in peace.
            (reports.note)(&format!("error: {}", launcher_gone()));
            mesh.exit(Kind::TryAgain.exit_code());
        })?;
    }
    let world_size = meeting.world_size;
    Ok(Comm::new(meeting.rank, world_size, Arc::new(link), stop))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(work);
    thread.map_err(|error| Error::failed(format!("cannot start a thread: {error}")))
}

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Purpose {
    Values,
    /// Between rank 0 and each other.
    Beats,
}

const PURPOSES: [Purpose; 2] = [Purpose::Values, Purpose::Beats];

/// Connections by purpose and rank.
#[derive(Default)]
struct Streams {
    values: Vec<Option<TcpStream>>,
    beats: Vec<Option<TcpStream>>,
}

impl Streams {
    fn slot(&mut self, purpose: Purpose, rank: usize) -> Option<&mut Option<TcpStream>> {
        match purpose {
            Purpose::Values => self.values.get_mut(rank),
            Purpose::Beats => self.beats.get_mut(rank),
        }
    }
}

/// Connections to all others: each rank connects to those below it and accepts those above.
fn connect(rank: usize, met: &Met, listener: TcpListener) -> Result<Streams> {
    let world_size = met.members.len();
    let (token, hosts) = (met.token, met.members.clone());
    let accepting = std::thread::Builder::new()
        .name("accept".into())
        .spawn(move || accept(rank, token, &hosts, &listener))
        .map_err(|error| Error::failed(format!("cannot start a thread: {error}")))?;
    let mut below = Vec::new();
    for (peer, member) in met.members[..rank].iter().enumerate() {
        for purpose in PURPOSES {
            if purpose == Purpose::Values || peer == 0 {
                let stream = reach(rank, peer, member, token, purpose)?;
                below.push((purpose, peer, stream));
            }
        }
    }
    let mut streams = accepting
        .join()
        .map_err(|_| Error::failed("a thread panicked"))??;
    debug_assert_eq!(streams.values.len(), world_size);
    for (purpose, peer, stream) in below {
        if let Some(slot) = streams.slot(purpose, peer) {
            *slot = Some(stream);
        }
    }
    Ok(streams)
}

/// A connection to a rank below this one.
fn reach(
    rank: usize,
    peer: usize,
    member: &Member,
    token: Token,
    purpose: Purpose,
) -> Result<TcpStream> {
    let mut tried = Vec::new();
    for address in member.candidates() {
        let attempt = || -> IoResult<TcpStream> {
            let mut stream = TcpStream::connect_timeout(&address, CONNECT)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(CONNECT))?;
            let mut greeting = token.bytes().to_vec();
            greeting.extend((rank as u32).to_le_bytes());
            greeting.extend((peer as u32).to_le_bytes());
            greeting.push(purpose as u8);
            stream.write_all(&greeting)?;
            // The same address may be another machine's, where something else listens.
            let mut answer = [0; Token::BYTES];
            stream.read_exact(&mut answer)?;
            if answer != token.answer() {
                return Err(ErrorKind::InvalidData.into());
            }
            stream.set_read_timeout(None)?;
            Ok(stream)
        };
        match attempt() {
            Ok(stream) => return Ok(stream),
            Err(error) => tried.push(format!("{address}: {error}")),
        }
    }
    let message = format!(
        "process {rank} on {} cannot reach process {peer} on {} ({})",
        host(),
        member.host,
        tried.join("; ")
    );
    Err(Error::failed(message).hint(
        "processes connect to each other at any port: open them between the machines of the run; MASTER_ADDR chooses the network",
    ))
}

/// The connections of the ranks above this one; rank 0 also gets theirs for beats.
fn accept(
    rank: usize,
    token: Token,
    members: &[Member],
    listener: &TcpListener,
) -> Result<Streams> {
    let failed = |error| Error::failed(format!("cannot accept other processes: {error}"));
    let mut streams = Streams {
        values: members.iter().map(|_| None).collect(),
        beats: members.iter().map(|_| None).collect(),
    };
    let above = members.len() - rank - 1;
    let mut missing = if rank == 0 { 2 * above } else { above };
    let end = Instant::now() + REACH;
    listener.set_nonblocking(true).map_err(failed)?;
    while missing > 0 {
        match listener.accept() {
            Ok((stream, _)) => {
                let Ok((peer, purpose, stream)) = greet(stream, rank, token) else {
                    continue;
                };
                let slot = streams.slot(purpose, peer).filter(|_| peer > rank);
                if let Some(slot) = slot.filter(|slot| slot.is_none()) {
                    *slot = Some(stream);
                    missing -= 1;
                }
            }
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            Err(_) => {
                let absent = (rank + 1..members.len()).find(|peer| streams.values[*peer].is_none());
                let absent = absent.unwrap_or(rank + 1);
                let message = format!(
                    "process {absent} on {} did not connect to process {rank} on {} within {} s",
                    members[absent].host,
                    host(),
                    REACH.as_secs()
                );
                return Err(Error::failed(message)
                    .hint("open all TCP ports between the machines of the run"));
            }
        }
    }
    Ok(streams)
}

/// The rank of a process that connects, and what for, if it is one of this run.
fn greet(
    mut stream: TcpStream,
    rank: usize,
    token: Token,
) -> IoResult<(usize, Purpose, TcpStream)> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(CONNECT))?;
    let mut greeting = [0; Token::BYTES + 9];
    stream.read_exact(&mut greeting)?;
    let (presented, rest) = greeting.split_at(Token::BYTES);
    let number = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().expect("four bytes"));
    let purpose = PURPOSES
        .into_iter()
        .find(|purpose| *purpose as u8 == rest[8]);
    let purpose = purpose.filter(|_| presented == token.bytes() && number(4) as usize == rank);
    let purpose = purpose.ok_or(ErrorKind::InvalidData)?;
    stream.write_all(&token.answer())?;
    stream.set_read_timeout(None)?;
    Ok((number(0) as usize, purpose, stream))
}

impl Link {
    fn start(
        rank: usize,
        hosts: Vec<String>,
        streams: Streams,
        stop: &Stop,
        alarm: fn(&str),
    ) -> Result<Self> {
        // Writer and reader of a connection share it.
        let streams_of_values = streams.values.into_iter();
        let values: Vec<Option<Arc<TcpStream>>> = streams_of_values
            .map(|stream| stream.map(Arc::new))
            .collect();
        let mut outboxes = Vec::new();
        let mut writers = Vec::new();
        for stream in &values {
            outboxes.push(stream.as_ref().map(|stream| {
                let (outbox, outgoing) = channel();
                writers.push((Arc::clone(stream), outgoing));
                Mutex::new(outbox)
            }));
        }
        let mesh = Arc::new(Mesh {
            rank,
            lost: hosts.iter().map(|_| AtomicBool::new(false)).collect(),
            hosts,
            outboxes,
            alarm,
        });
        let mut threads = Vec::new();
        for (stream, outgoing) in writers {
            threads.push(spawn("write", move || write_all(&stream, &outgoing))?);
        }
        let mut inboxes = Vec::new();
        for (peer, stream) in values.into_iter().enumerate() {
            inboxes.push(match stream {
                Some(stream) => {
                    let (inbox, parts) = sync_channel(AHEAD);
                    let (spent, spare) = sync_channel(SPARE);
                    let mesh = Arc::clone(&mesh);
                    threads.push(spawn("read", move || {
                        mesh.read_all(peer, &stream, &inbox, &spare);
                    })?);
                    Some(Inbox { parts, spent })
                }
                None => None,
            });
        }
        let activity = Arc::new(Activity::default());
        let watched = Arc::clone(&mesh);
        let watch = Watch {
            rank,
            activity: Arc::clone(&activity),
            stop: Arc::clone(&stop.requested),
            end: Box::new(move |why| watched.end(why)),
        };
        let peers = streams
            .beats
            .into_iter()
            .enumerate()
            .filter_map(|(peer, stream)| Some(Peer::new(peer, &mesh.hosts[peer], stream?)));
        watch.start(peers.collect())?;
        let (requests, incoming) = channel();
        let exchange = Exchange {
            mesh: Arc::clone(&mesh),
            inboxes,
            number: 0,
        };
        threads.push(spawn("exchange", move || {
            exchange.serve(&incoming, &activity)
        })?);
        Ok(Self {
            mesh,
            exchange: Worker::new(requests, threads),
        })
    }
}

const ALIVE: &str = "the exchange thread lives as long as the communicator";

impl Transport for Link {
    fn all_to_all(&self, values: Vec<f32>) -> Receiver<Vec<f32>> {
        self.exchange
            .ask(|answer| Request::AllToAll(values, answer))
    }

    fn all_gather(&self, values: Vec<f32>) -> Receiver<Vec<f32>> {
        self.exchange
            .ask(|answer| Request::AllGather(values, answer))
    }

    fn broadcast(&self, values: Vec<f32>) -> Vec<f32> {
        let answer = self
            .exchange
            .ask(|answer| Request::Broadcast(values, answer));
        answer.recv().expect(ALIVE)
    }

    fn gather_bytes(&self, bytes: Vec<u8>, to_all: bool) -> Vec<Vec<u8>> {
        let answer = self
            .exchange
            .ask(|answer| Request::Gather(bytes, to_all, answer));
        answer.recv().expect(ALIVE)
    }

    fn abort(&self, code: u8) {
        self.mesh.exit(code)
    }

    fn leave(&self, code: u8) -> ! {
        self.mesh.exit(code)
    }
}

impl Drop for Link {
    /// Waits until all ranks are here, so that no rank mistakes the end of this one for a loss. A panic does not wait.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.exchange.end();
        }
    }
}

/// The thread of collectives.
struct Exchange {
    mesh: Arc<Mesh>,
    /// By rank; none from itself.
    inboxes: Vec<Option<Inbox>>,
    number: u32,
}

impl Exchange {
    fn serve(mut self, requests: &Receiver<Request>, activity: &Activity) {
        while let Ok(request) = requests.recv() {
            activity.waiting.store(true, Ordering::Relaxed);
            self.perform(request);
            activity.waiting.store(false, Ordering::Relaxed);
            activity.done.fetch_add(1, Ordering::Relaxed);
        }
        activity.ended.store(true, Ordering::Relaxed);
        self.mesh.send_all(|_| Outgoing::Bye);
    }

    /// Nobody may wait for the answer any more: then it is dropped.
    fn perform(&mut self, request: Request) {
        self.number = self.number.wrapping_add(1);
        match request {
            Request::AllToAll(values, answer) => {
                let width = values.len() / self.world_size();
                let own = Arc::new(values);
                let range = |rank: usize| rank * width..(rank + 1) * width;
                self.send_all(Tag::AllToAll, |rank| {
                    Payload::Floats(Arc::clone(&own), range(rank))
                });
                let _ = answer.send(self.collect(Tag::AllToAll, &own[range(self.mesh.rank)]));
            }
            Request::AllGather(values, answer) => {
                let own = Arc::new(values);
                let whole = 0..own.len();
                self.send_all(Tag::AllGather, |_| {
                    Payload::Floats(Arc::clone(&own), whole.clone())
                });
                let _ = answer.send(self.collect(Tag::AllGather, &own));
            }
            Request::Broadcast(values, answer) => {
                let _ = answer.send(self.broadcast(values));
            }
            Request::Gather(bytes, to_all, answer) => {
                let _ = answer.send(self.gather(bytes, to_all));
            }
        }
    }

    /// As many values from each rank as there are own, in the order of ranks.
    fn collect(&self, tag: Tag, own: &[f32]) -> Vec<f32> {
        let mut all = Vec::with_capacity(own.len() * self.world_size());
        for rank in 0..self.world_size() {
            match rank == self.mesh.rank {
                true => all.extend_from_slice(own),
                false => {
                    let values = self.floats(tag, rank, own.len());
                    all.extend_from_slice(&values);
                    self.give_back(rank, values);
                }
            }
        }
        all
    }

    /// Another buffer may be there already.
    fn give_back(&self, rank: usize, values: Vec<f32>) {
        let _ = self.inbox(rank).spent.try_send(values);
    }

    fn inbox(&self, rank: usize) -> &Inbox {
        let inbox = self.inboxes[rank].as_ref();
        inbox.expect("no rank sends to itself")
    }

    /// Rank 0 sends each rank a piece, which that one sends to all: no link carries more than twice the values.
    fn broadcast(&self, mut values: Vec<f32>) -> Vec<f32> {
        let size = self.world_size();
        let length = values.len();
        let piece = |rank: usize| rank * length / size..(rank + 1) * length / size;
        let own = piece(self.mesh.rank);
        if self.mesh.rank == 0 {
            let all = Arc::new(values);
            self.send_all(Tag::Broadcast, |rank| {
                Payload::Floats(Arc::clone(&all), piece(rank))
            });
            self.send_all(Tag::Broadcast, |_| {
                Payload::Floats(Arc::clone(&all), own.clone())
            });
            for rank in 1..size {
                // What comes back is dropped: all ranks send the same to all.
                self.floats(Tag::Broadcast, rank, piece(rank).len());
            }
            return Arc::unwrap_or_clone(all);
        }
        let mine = Arc::new(self.floats(Tag::Broadcast, 0, own.len()));
        self.send_all(Tag::Broadcast, |_| {
            Payload::Floats(Arc::clone(&mine), 0..own.len())
        });
        for rank in 0..size {
            match rank == self.mesh.rank {
                true => values[piece(rank)].copy_from_slice(&mine),
                false => {
                    let received = self.floats(Tag::Broadcast, rank, piece(rank).len());
                    values[piece(rank)].copy_from_slice(&received);
                }
            }
        }
        values
    }

    fn gather(&self, bytes: Vec<u8>, to_all: bool) -> Vec<Vec<u8>> {
        let own = Arc::new(bytes);
        let payload = |_| Payload::Bytes(Arc::clone(&own));
        match to_all {
            true => self.send_all(Tag::Bytes, payload),
            false if self.mesh.rank > 0 => {
                let part = Outgoing::Part(Tag::Bytes, self.number, payload(0));
                self.mesh.send(0, part);
                return Vec::new();
            }
            false => {}
        }
        let all = (0..self.world_size()).map(|rank| match rank == self.mesh.rank {
            true => own.to_vec(),
            false => match self.receive(Tag::Bytes, rank) {
                Values::Bytes(bytes) => bytes,
                Values::Floats(_) => self.disagree(rank, "sent values in place of bytes"),
            },
        });
        all.collect()
    }

    fn world_size(&self) -> usize {
        self.inboxes.len()
    }

    fn send_all(&self, tag: Tag, payload: impl Fn(usize) -> Payload) {
        self.mesh
            .send_all(|rank| Outgoing::Part(tag, self.number, payload(rank)));
    }

    fn floats(&self, tag: Tag, rank: usize, length: usize) -> Vec<f32> {
        match self.receive(tag, rank) {
            Values::Floats(values) if values.len() == length => values,
            Values::Floats(values) => self.disagree(
                rank,
                &format!("sent {} values where {length} are expected", values.len()),
            ),
            Values::Bytes(_) => self.disagree(rank, "sent bytes in place of values"),
        }
    }

    /// The next message of a rank, which is one of this exchange.
    fn receive(&self, tag: Tag, rank: usize) -> Values {
        match self.inbox(rank).parts.recv() {
            Ok(part) if (part.tag, part.exchange) == (tag, self.number) => part.values,
            Ok(part) => self.disagree(
                rank,
                &format!("is at exchange {} ({:?})", part.exchange, part.tag),
            ),
            // It said that it ends.
            Err(_) => self.disagree(rank, "has ended"),
        }
    }

    /// A bug: ranks must agree about what they exchange.
    fn disagree(&self, rank: usize, what: &str) -> ! {
        let mesh = &self.mesh;
        (mesh.alarm)(&format!(
            "error: processes {} and {rank} disagree about an exchange: process {rank} on {} {what}, this one is at exchange {}",
            mesh.rank, mesh.hosts[rank], self.number
        ));
        mesh.exit(Kind::Failed.exit_code())
    }
}

/// Writes messages in their order, until there are none or the connection is gone, which its reader notices.
fn write_all(stream: &TcpStream, outgoing: &Receiver<Outgoing>) {
    for message in outgoing {
        let header = |tag, code, exchange, bytes: &[u8]| Header {
            tag,
            code,
            exchange,
            bytes: bytes.len() as u64,
        };
        let written = match &message {
            Outgoing::Part(tag, exchange, payload) => {
                let bytes = payload.bytes();
                write(stream, header(*tag, 0, *exchange, bytes), bytes)
            }
            Outgoing::Bye => {
                let _ = write(stream, header(Tag::Bye, 0, 0, &[]), &[]);
                return;
            }
            Outgoing::Abort(code, sent) => {
                let written = write(stream, header(Tag::Abort, *code, 0, &[]), &[]);
                let _ = sent.send(());
                written
            }
        };
        if written.is_err() {
            return;
        }
    }
}

fn write(mut stream: &TcpStream, header: Header, bytes: &[u8]) -> IoResult<()> {
    if bytes.len() <= SMALL {
        return stream.write_all(&[&header.to_bytes(), bytes].concat());
    }
    stream.write_all(&header.to_bytes())?;
    stream.write_all(bytes)
}

impl Mesh {
    fn send(&self, rank: usize, message: Outgoing) {
        if let Some(outbox) = &self.outboxes[rank] {
            let outbox = outbox
                .lock()
                .expect("no code panics while it holds the lock");
            // Without its writer the connection is gone, which its reader notices.
            let _ = outbox.send(message);
        }
    }

    fn send_all(&self, message: impl Fn(usize) -> Outgoing) {
        for rank in 0..self.outboxes.len() {
            if rank != self.rank {
                self.send(rank, message(rank));
            }
        }
    }

    /// Reads messages until the peer says that it ends.
    fn read_all(
        &self,
        peer: usize,
        mut stream: &TcpStream,
        inbox: &SyncSender<Part>,
        spare: &Receiver<Vec<f32>>,
    ) {
        loop {
            let Ok(header) = Header::read(stream) else {
                self.lose(peer);
            };
            let length = header.bytes as usize;
            let values = match header.tag {
                Tag::Bye => return,
                Tag::Abort => std::process::exit(i32::from(header.code)),
                Tag::Bytes => {
                    let mut bytes = vec![0; length];
                    stream.read_exact(&mut bytes).map(|()| Values::Bytes(bytes))
                }
                Tag::AllToAll | Tag::AllGather | Tag::Broadcast => {
                    let mut values = spare.try_recv().unwrap_or_default();
                    values.resize(length / size_of::<f32>(), 0.0);
                    let read = stream.read_exact(bytemuck::cast_slice_mut(&mut values));
                    read.map(|()| Values::Floats(values))
                }
            };
            let Ok(values) = values else {
                self.lose(peer);
            };
            // At the end no rank is listening.
            let _ = inbox.send(Part {
                tag: header.tag,
                exchange: header.exchange,
                values,
            });
        }
    }

    /// Ends the run because a connection closed. The lowest rank that is left reports it.
    fn lose(&self, peer: usize) -> ! {
        self.lost[peer].store(true, Ordering::Relaxed);
        let begun = Instant::now();
        std::thread::sleep(SETTLE);
        let is_lost = |rank: &usize| self.lost[*rank].load(Ordering::Relaxed);
        // Those below end this process when they report.
        while begun.elapsed() < PATIENCE && !(0..self.rank).all(|rank| is_lost(&rank)) {
            std::thread::sleep(SETTLE / 10);
        }
        let lost: Vec<String> = (0..self.hosts.len())
            .filter(is_lost)
            .map(|rank| format!("process {rank} on {}", self.hosts[rank]))
            .collect();
        self.end(&format!(
            "lost {}: its connection closed",
            lost.join(" and ")
        ))
    }

    /// Ends all ranks with the exit code for "run it again".
    fn end(&self, why: &str) -> ! {
        // Of several threads one reports.
        static REPORT: Mutex<()> = Mutex::new(());
        let _one = REPORT.lock();
        (self.alarm)(&format!(
            "error: {why}\n  hint: run the same command again to resume from the last checkpoint"
        ));
        self.exit(Kind::TryAgain.exit_code())
    }

    /// Ends all ranks with an exit code.
    fn exit(&self, code: u8) -> ! {
        let (sent, written) = channel();
        self.send_all(|_| Outgoing::Abort(code, sent.clone()));
        drop(sent);
        let end = Instant::now() + PATIENCE;
        // The channel closes once all have written, or lost their connection.
        while written
            .recv_timeout(end.saturating_duration_since(Instant::now()))
            .is_ok()
        {}
        std::process::exit(i32::from(code))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back() {
        let (mut writer, reader) = pair();
        let header = Header {
            tag: Tag::Broadcast,
            code: 75,
            exchange: 7,
            bytes: 1 << 40,
        };
        writer.write_all(&header.to_bytes()).unwrap();
        assert_eq!(Header::read(&reader).unwrap(), header);
        writer.write_all(&[99; Header::BYTES]).unwrap();
        assert!(Header::read(&reader).is_err());
    }

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let writer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (writer, listener.accept().unwrap().0)
    }

    /// The links of ranks that are threads of this process.
    fn links(count: usize) -> Vec<Link> {
        let empty = || Streams {
            values: (0..count).map(|_| None).collect(),
            beats: (0..count).map(|_| None).collect(),
        };
        let mut all: Vec<Streams> = (0..count).map(|_| empty()).collect();
        for high in 0..count {
            for low in 0..high {
                let (one, other) = pair();
                all[low].values[high] = Some(one);
                all[high].values[low] = Some(other);
            }
        }
        let hosts = vec!["here".to_owned(); count];
        let start = |(rank, streams)| {
            Link::start(rank, hosts.clone(), streams, &Stop::default(), |_| ()).unwrap()
        };
        all.into_iter().enumerate().map(start).collect()
    }

    /// What each rank makes of its link, all at once.
    fn together<T: Send>(count: usize, work: impl Fn(usize, &Link) -> T + Sync) -> Vec<T> {
        let links = links(count);
        let work = &work;
        std::thread::scope(|scope| {
            let ranks = links.into_iter().enumerate();
            let threads: Vec<_> = ranks
                .map(|(rank, link)| scope.spawn(move || work(rank, &link)))
                .collect();
            let results = threads.into_iter();
            results.map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn values_arrive_in_the_order_of_ranks() {
        for count in [2, 3, 5] {
            let all = together(count, |rank, link| {
                let parts = (0..count).map(|to| (10 * rank + to) as f32).collect();
                let exchanged = link.all_to_all(parts);
                let gathered = link.all_gather(vec![rank as f32; 2]);
                let first =
                    link.broadcast((0..7).map(|value| (value * (rank + 1)) as f32).collect());
                let bytes = link.gather_bytes(vec![rank as u8; rank], true);
                let to_first = link.gather_bytes(vec![rank as u8], false);
                (
                    exchanged.recv().unwrap(),
                    gathered.recv().unwrap(),
                    first,
                    bytes,
                    to_first,
                )
            });
            for (rank, (exchanged, gathered, first, bytes, to_first)) in all.into_iter().enumerate()
            {
                let expected: Vec<f32> = (0..count).map(|from| (10 * from + rank) as f32).collect();
                assert_eq!(exchanged, expected);
                let expected: Vec<f32> = (0..2 * count).map(|at| (at / 2) as f32).collect();
                assert_eq!(gathered, expected);
                assert_eq!(first, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
                let expected: Vec<Vec<u8>> =
                    (0..count).map(|from| vec![from as u8; from]).collect();
                assert_eq!(bytes, expected);
                let expected = if rank == 0 { count } else { 0 };
                assert_eq!(to_first.len(), expected);
            }
        }
    }

    #[test]
    fn large_exchanges_and_ranks_that_run_ahead_do_not_block() {
        let len = 3 << 20;
        together(3, |rank, link| {
            let pending: Vec<_> = (0..4)
                .map(|round| link.all_to_all(vec![(rank + round) as f32; len]))
                .collect();
            // Only rank 0 waits for these.
            for _ in 0..20 {
                link.gather_bytes(vec![0; 100_000], false);
            }
            for (round, values) in pending.into_iter().enumerate() {
                let values = values.recv().unwrap();
                assert_eq!(values.len(), len);
                assert!(values.chunks(len / 3).enumerate().all(|(from, part)| {
                    part.iter().all(|value| *value == (from + round) as f32)
                }));
            }
        });
    }
}
