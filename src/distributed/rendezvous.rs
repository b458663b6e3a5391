//! Where the processes of a run meet before they connect to each other.
//!
//! A [`Server`] listens at `MASTER_ADDR:MASTER_PORT`: on a thread of rank 0, or of the launcher. Every rank connects, says who it
//! is, and gets the addresses of all, once all are there and belong together; else all are refused with the same message. The
//! connections stay open until all ranks have reached each other, so that a failure ends the others' wait.

use std::collections::BTreeMap;
use std::io::{Error as IoError, ErrorKind, Read, Result as IoResult, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::launch::{MASTER_ADDR, MASTER_PORT, Meeting, TOKEN};
use super::token::Token;
use crate::error::{Error, Kind, Result};

/// What a process of this program sends first; then its version follows. Neither changes between versions.
const MAGIC: &[u8; 16] = b"advxl rendezvous";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// For one connection to be made, and for what a peer that is there sends at once.
const CONNECT: Duration = Duration::from_secs(5);
/// Between two attempts to connect.
const RETRY: Duration = Duration::from_millis(100);
/// After so long ranks say what they wait for.
const FIRST_NOTE: Duration = Duration::from_secs(5);
/// And from then on.
const NEXT_NOTE: Duration = Duration::from_secs(60);
/// Connections that closed in the meantime are looked for this often.
const LOOK: Duration = Duration::from_millis(200);
/// After a refusal, ranks that arrive within this time are refused too.
const LINGER: Duration = Duration::from_secs(3);
/// For the ranks to reach each other, once they have met.
const REACH: Duration = Duration::from_secs(90);
/// No message is longer, whoever connects.
const LONGEST: u32 = 4 << 20;

/// A rank as it introduces itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) token: Token,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) host: String,
    /// See [`super::launch::machine`].
    pub(crate) machine: String,
    /// Where it accepts the connections of other ranks.
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) port: u16,
}

/// A rank as the others know it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) host: String,
    pub(crate) machine: String,
    /// From where it came to the server; none from the server's own machine.
    source: Option<IpAddr>,
    addresses: Vec<IpAddr>,
    pub(crate) port: u16,
}

/// What the server sends.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Reply {
    /// All are there. The token is what they present to each other.
    Members(Vec<Member>, Token),
    /// All have reached each other.
    Ready,
}

/// Why the run was refused.
#[derive(Clone, Debug, PartialEq)]
struct Refusal {
    kind: Kind,
    message: String,
    hint: String,
}

/// A refusal is text for any version: kind, message, hint.
const REFUSED: u8 = b'R';
const REPLY: u8 = b'V';

fn send_frame(stream: &mut TcpStream, kind: u8, bytes: &[u8]) -> IoResult<()> {
    let mut frame = vec![kind];
    frame.extend((bytes.len() as u32).to_le_bytes());
    frame.extend(bytes);
    stream.write_all(&frame)
}

fn receive_frame(stream: &mut TcpStream) -> IoResult<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    let length = u32::from_le_bytes(head[1..].try_into().expect("four bytes"));
    if length > LONGEST {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes)?;
    Ok((head[0], bytes))
}

fn send<T: Serialize>(stream: &mut TcpStream, value: &T) -> IoResult<()> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).map_err(IoError::other)?;
    send_frame(stream, REPLY, &bytes)
}

/// A value, or the refusal that came in its place.
fn receive<T: DeserializeOwned>(
    stream: &mut TcpStream,
) -> IoResult<std::result::Result<T, Refusal>> {
    match receive_frame(stream)? {
        (REPLY, bytes) => ciborium::from_reader(&bytes[..])
            .map(Ok)
            .map_err(|_| ErrorKind::InvalidData.into()),
        (REFUSED, bytes) => Refusal::from_bytes(&bytes)
            .map(Err)
            .ok_or_else(|| ErrorKind::InvalidData.into()),
        _ => Err(ErrorKind::InvalidData.into()),
    }
}

impl Refusal {
    fn input(message: String, hint: &str) -> Self {
        let hint = hint.to_owned();
        Self {
            kind: Kind::Input,
            message,
            hint,
        }
    }

    fn into_error(self) -> Error {
        let error = Error::new(self.kind, self.message);
        match self.hint.is_empty() {
            true => error,
            false => error.hint(self.hint),
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let code = self.kind.exit_code();
        format!("{code}\n{}\n{}", self.message, self.hint).into_bytes()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.splitn(3, '\n');
        let code: u8 = lines.next()?.parse().ok()?;
        let kinds = [Kind::Input, Kind::TryAgain];
        let kind = kinds.into_iter().find(|kind| kind.exit_code() == code);
        Some(Self {
            kind: kind.unwrap_or(Kind::Failed),
            message: lines.next()?.to_owned(),
            hint: lines.next()?.to_owned(),
        })
    }
}

/// The address of a connection; that of IPv4 through an IPv6 socket is one of IPv4.
fn address(of: IoResult<SocketAddr>) -> Option<IpAddr> {
    of.ok().map(|address| address.ip().to_canonical())
}

/// A listener on all interfaces; port 0 is any that is free.
pub(crate) fn listen_everywhere(port: u16) -> IoResult<TcpListener> {
    TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))
}

/// Who waits for the ranks.
pub(crate) struct Server {
    pub(crate) world_size: usize,
    pub(crate) token: Token,
    /// Where it listens, as users know it.
    pub(crate) place: String,
    pub(crate) patience: Duration,
    pub(crate) report: fn(&str),
    /// Whether connections stay open as long as this process lives, which ranks watch.
    pub(crate) is_watched: bool,
}

/// A process that introduced itself.
struct Caller {
    hello: std::result::Result<Hello, String>,
    stream: TcpStream,
}

impl Server {
    /// Serves on threads of their own, as long as this process lives: who comes too late is refused. `ready` is called once, when all ranks have reached each other.
    pub(crate) fn start(
        self,
        listener: TcpListener,
        ready: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
        let (callers, calling) = channel();
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into()).spawn(work);
            thread.map_err(|error| Error::failed(format!("cannot start a thread: {error}")))
        };
        spawn("accept", Box::new(move || accept(&listener, &callers)))?;
        spawn("rendezvous", Box::new(move || self.serve(&calling, ready)))?;
        Ok(())
    }

    fn serve(&self, calling: &Receiver<Caller>, ready: impl FnOnce()) {
        let mut members = BTreeMap::new();
        let met = self
            .gather(calling, &mut members)
            .and_then(|()| self.introduce(&mut members));
        match met {
            Ok(()) => {
                ready();
                let (hosts, streams): (BTreeMap<usize, String>, Vec<TcpStream>) = members
                    .into_iter()
                    .map(|(rank, (hello, stream))| ((rank, hello.host), stream))
                    .unzip();
                let _watched = self.is_watched.then_some(streams);
                for Caller { hello, stream } in calling {
                    let refusal = match hello {
                        Ok(hello) => self.latecomer(&hello, &hosts),
                        Err(version) => self.other_version(&version, &stream),
                    };
                    refuse(stream, &refusal);
                }
            }
            Err(refusal) => self.refuse_all(&refusal, members, calling),
        }
    }

    /// Waits for all ranks.
    fn gather(
        &self,
        calling: &Receiver<Caller>,
        members: &mut BTreeMap<usize, (Hello, TcpStream)>,
    ) -> std::result::Result<(), Refusal> {
        let begun = Instant::now();
        let mut next_note = FIRST_NOTE;
        while members.len() < self.world_size {
            if let Ok(caller) = calling.recv_timeout(LOOK) {
                self.admit(caller, members)?;
                continue;
            }
            // A rank that ended while it waited may come again.
            members.retain(|_, (_, stream)| is_open(stream));
            let waited = begun.elapsed();
            if waited > self.patience {
                let message = format!(
                    "gave up after {} s without {}",
                    self.patience.as_secs(),
                    self.missing(members)
                );
                return Err(Refusal {
                    kind: Kind::TryAgain,
                    message,
                    hint: format!(
                        "check that they were started, and reach {} from their machines",
                        self.place
                    ),
                });
            }
            if waited > next_note {
                (self.report)(&format!("waiting for {}", self.missing(members)));
                next_note = waited + NEXT_NOTE;
            }
        }
        Ok(())
    }

    /// Such as `3 of 4 processes at node0:29500: ranks 1, 2, 3`.
    fn missing(&self, members: &BTreeMap<usize, (Hello, TcpStream)>) -> String {
        let missing: Vec<String> = (0..self.world_size)
            .filter(|rank| !members.contains_key(rank))
            .map(|rank| rank.to_string())
            .collect();
        format!(
            "{} of {} processes at {}: {} {}",
            missing.len(),
            self.world_size,
            self.place,
            if missing.len() == 1 { "rank" } else { "ranks" },
            missing.join(", ")
        )
    }

    /// Takes a process in, if it is one of this run.
    fn admit(
        &self,
        Caller { hello, stream }: Caller,
        members: &mut BTreeMap<usize, (Hello, TcpStream)>,
    ) -> std::result::Result<(), Refusal> {
        let hello = match hello {
            Ok(hello) => hello,
            Err(version) => {
                let refusal = self.other_version(&version, &stream);
                refuse(stream, &refusal);
                return Err(refusal);
            }
        };
        // It may be the earlier one of a process that came again.
        if !is_open(&stream) {
            return Ok(());
        }
        if hello.token != self.token {
            let message = format!(
                "process {} on {} has a different {TOKEN}",
                hello.rank, hello.host
            );
            (self.report)(&format!("note: refused at {}: {message}", self.place));
            refuse(
                stream,
                &Refusal::input(
                    message,
                    "it belongs to another run, or its variable is missing",
                ),
            );
            return Ok(());
        }
        let refusal = if hello.world_size != self.world_size {
            Some(Refusal::input(
                format!(
                    "process {} on {} has WORLD_SIZE = {}, process 0 has {}",
                    hello.rank, hello.host, hello.world_size, self.world_size
                ),
                "give all processes the same WORLD_SIZE",
            ))
        } else {
            let earlier = members.get(&hello.rank);
            let earlier = earlier.filter(|(_, stream)| is_open(stream));
            earlier.map(|(earlier, _)| {
                Refusal::input(
                    format!(
                        "two processes have RANK = {}, on {} and on {}",
                        hello.rank, earlier.host, hello.host
                    ),
                    "give each process a RANK of its own, from 0 to WORLD_SIZE - 1",
                )
            })
        };
        match refusal {
            Some(refusal) => {
                refuse(stream, &refusal);
                Err(refusal)
            }
            None => {
                members.insert(hello.rank, (hello, stream));
                Ok(())
            }
        }
    }

    /// Gives all the addresses of all, and waits until they have reached each other.
    fn introduce(
        &self,
        members: &mut BTreeMap<usize, (Hello, TcpStream)>,
    ) -> std::result::Result<(), Refusal> {
        let table: Vec<Member> = members
            .values()
            .map(|(hello, stream)| hello.member(stream))
            .collect();
        let reply = Reply::Members(table, Token::random());
        let gone = |hello: &Hello| Refusal {
            kind: Kind::TryAgain,
            message: format!(
                "process {} on {} ended while the processes connected to each other",
                hello.rank, hello.host
            ),
            hint: "see its own messages; then run the same command again".into(),
        };
        for (hello, stream) in members.values_mut() {
            send(stream, &reply).map_err(|_| gone(hello))?;
        }
        for (hello, stream) in members.values_mut() {
            let _ = stream.set_read_timeout(Some(REACH));
            receive::<()>(stream).map_err(|_| gone(hello))??;
        }
        for (hello, stream) in members.values_mut() {
            send(stream, &Reply::Ready).map_err(|_| gone(hello))?;
        }
        Ok(())
    }

    fn other_version(&self, version: &str, stream: &TcpStream) -> Refusal {
        let from = address(stream.peer_addr()).map_or_else(String::new, |ip| format!(" at {ip}"));
        Refusal::input(
            format!("a process{from} runs advxl {version}, process 0 runs {VERSION}"),
            "run the same program on all machines",
        )
    }

    fn latecomer(&self, hello: &Hello, hosts: &BTreeMap<usize, String>) -> Refusal {
        let mut message = format!(
            "all {} processes of the run at {} have already joined",
            self.world_size, self.place
        );
        if let Some(host) = hosts.get(&hello.rank) {
            message += &format!("; process {} runs on {host}", hello.rank);
        }
        Refusal::input(
            message,
            "give each process a RANK of its own, and each run a MASTER_PORT of its own",
        )
    }

    /// Refuses those who are there and those who still come; rank 0 last, since its process may be this one.
    fn refuse_all(
        &self,
        refusal: &Refusal,
        mut members: BTreeMap<usize, (Hello, TcpStream)>,
        calling: &Receiver<Caller>,
    ) {
        let first = members.remove(&0);
        let mut expected = self.world_size.saturating_sub(members.len() + 2);
        for (_, stream) in members.into_values() {
            refuse(stream, refusal);
        }
        let end = Instant::now() + LINGER;
        while expected > 0 && first.is_some() {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(caller) = calling.recv_timeout(left) else {
                break;
            };
            refuse(caller.stream, refusal);
            expected -= 1;
        }
        if let Some((_, stream)) = first {
            refuse(stream, refusal);
        }
        for caller in calling {
            refuse(caller.stream, refusal);
        }
    }
}

/// Whoever waits for it may be gone.
fn refuse(mut stream: TcpStream, refusal: &Refusal) {
    let _ = send_frame(&mut stream, REFUSED, &refusal.to_bytes());
}

fn is_open(stream: &TcpStream) -> bool {
    let peeked = stream
        .set_nonblocking(true)
        .and_then(|()| stream.peek(&mut [0]));
    let open = match peeked {
        Ok(count) => count > 0,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    };
    open && stream.set_nonblocking(false).is_ok()
}

/// Each connection is greeted on its own thread, so that a silent one does not block the others.
fn accept(listener: &TcpListener, callers: &Sender<Caller>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // Out of file descriptors, say.
            std::thread::sleep(RETRY);
            continue;
        };
        let callers = callers.clone();
        let _ = std::thread::Builder::new()
            .name("greet".into())
            .spawn(move || {
                // Other programs that connect are ignored.
                if let Ok(caller) = greet(stream) {
                    let _ = callers.send(caller);
                }
            });
    }
}

fn greet(mut stream: TcpStream) -> IoResult<Caller> {
    stream.set_read_timeout(Some(CONNECT))?;
    stream.set_write_timeout(Some(CONNECT))?;
    stream.set_nodelay(true)?;
    let mut magic = [0; MAGIC.len()];
    stream.read_exact(&mut magic)?;
    if &magic != MAGIC {
        return Err(ErrorKind::InvalidData.into());
    }
    let (_, version) = receive_frame(&mut stream)?;
    let version = String::from_utf8_lossy(&version).into_owned();
    let hello = match version == VERSION {
        true => Ok(receive(&mut stream)?.map_err(|_| IoError::from(ErrorKind::InvalidData))?),
        false => Err(version),
    };
    Ok(Caller { hello, stream })
}

impl Hello {
    fn member(&self, stream: &TcpStream) -> Member {
        Member {
            host: self.host.clone(),
            machine: self.machine.clone(),
            source: address(stream.peer_addr()).filter(|source| !source.is_loopback()),
            addresses: self.addresses.clone(),
            port: self.port,
        }
    }
}

impl Member {
    /// Where it accepts connections, most promising first: over the network that the run meets on.
    pub(crate) fn candidates(&self) -> Vec<SocketAddr> {
        let mut found: Vec<IpAddr> = self.source.into_iter().collect();
        let more = self.addresses.iter();
        found.extend(more.filter(|more| Some(**more) != self.source));
        let found = found.into_iter();
        found.map(|ip| SocketAddr::new(ip, self.port)).collect()
    }
}

/// A rank that has met the others.
pub(crate) struct Met {
    pub(crate) members: Vec<Member>,
    /// What ranks present to each other.
    pub(crate) token: Token,
    stream: TcpStream,
}

impl Meeting {
    /// Where users know it, such as `node0:29500`.
    pub(crate) fn place(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// Starts the server, which is rank 0's task unless a launcher serves.
    pub(crate) fn host(&self, report: fn(&str)) -> Result<()> {
        let listener = listen_everywhere(self.port).map_err(|error| {
            let message = format!(
                "process 0 cannot listen at {MASTER_PORT} = {}: {error}",
                self.port
            );
            Error::input(message).hint(
                "another process has RANK = 0 on this machine, or another program uses the port: choose another MASTER_PORT for \
                 all processes",
            )
        })?;
        let server = Server {
            world_size: self.world_size,
            token: self.token,
            place: self.place(),
            patience: self.patience,
            report,
            is_watched: false,
        };
        server.start(listener, || ())
    }

    /// Connects and waits until all are there.
    ///
    /// Errors: they did not come in time, or do not belong together.
    pub(crate) fn meet(&self, hello: &Hello, report: fn(&str)) -> Result<Met> {
        let begun = Instant::now();
        let mut next_note = 2 * FIRST_NOTE;
        loop {
            let why = match self.try_to_meet(hello, begun) {
                Ok(met) => return met,
                Err(error) => error,
            };
            let waited = begun.elapsed();
            if self.launched {
                return Err(launcher_gone());
            }
            if waited > self.patience {
                let message = format!(
                    "process {} gave up after {} s: process 0 cannot be reached at {}: {why}",
                    self.rank,
                    self.patience.as_secs(),
                    self.place()
                );
                return Err(Error::new(Kind::TryAgain, message).hint(format!(
                    "process 0 listens there: check that it was started, and that {MASTER_ADDR} names its machine"
                )));
            }
            if waited > next_note {
                report(&format!(
                    "process {} waits for process 0 at {}: {why}",
                    self.rank,
                    self.place()
                ));
                next_note = waited + NEXT_NOTE;
            }
            std::thread::sleep(RETRY);
        }
    }

    /// An error of the connection, which is tried again; within it, an answer of the server, which is not.
    fn try_to_meet(&self, hello: &Hello, begun: Instant) -> IoResult<Result<Met>> {
        let mut stream = self.connect()?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(CONNECT))?;
        stream.write_all(MAGIC)?;
        send_frame(&mut stream, REPLY, VERSION.as_bytes())?;
        send(&mut stream, hello)?;
        // The server gives up first.
        let left = self.patience.saturating_sub(begun.elapsed());
        stream.set_read_timeout(Some(left + 2 * LINGER))?;
        let (mut members, token) = match receive(&mut stream)? {
            Ok(Reply::Members(members, token)) => (members, token),
            Ok(Reply::Ready) => return Err(ErrorKind::InvalidData.into()),
            Err(refusal) => return Ok(Err(refusal.into_error())),
        };
        // Who connected from the server's own machine is reached like the server.
        let server = address(stream.peer_addr());
        for member in &mut members {
            member.source = member.source.or(server);
        }
        Ok(Ok(Met {
            members,
            token,
            stream,
        }))
    }

    fn connect(&self) -> IoResult<TcpStream> {
        // Rank 0 runs the server, even where its own name leads elsewhere.
        if self.rank == 0 && !self.launched {
            return TcpStream::connect_timeout(&([127, 0, 0, 1], self.port).into(), CONNECT);
        }
        let mut why = ErrorKind::AddrNotAvailable.into();
        // Names are looked up each time: a cluster may know them only once the machine is up.
        for address in (self.host.as_str(), self.port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(stream) => return Ok(stream),
                Err(error) => why = error,
            }
        }
        Err(why)
    }
}

impl Met {
    /// Says whether this rank has reached the others, and waits until all have. The connection is given back.
    pub(crate) fn all_reached<T>(mut self, reached: Result<T>) -> Result<(T, TcpStream)> {
        let lost = |_| {
            Error::new(
                Kind::TryAgain,
                "process 0 ended while the processes connected to each other",
            )
            .hint("see its own messages; then run the same command again")
        };
        let value = match reached {
            Ok(value) => value,
            Err(error) => {
                let kind = error.kind();
                let (message, hint) = error.into_parts();
                let refusal = Refusal {
                    kind,
                    message,
                    hint: hint.unwrap_or_default(),
                };
                refuse(self.stream, &refusal);
                return Err(refusal.into_error());
            }
        };
        send(&mut self.stream, &()).map_err(lost)?;
        self.stream
            .set_read_timeout(Some(2 * REACH))
            .map_err(lost)?;
        match receive(&mut self.stream).map_err(lost)? {
            Ok(Reply::Ready) => Ok((value, self.stream)),
            Ok(Reply::Members(..)) => Err(lost(ErrorKind::InvalidData.into())),
            Err(refusal) => Err(refusal.into_error()),
        }
    }
}

/// Waits until the launcher at the other end is gone.
pub(crate) fn wait_for_end(mut stream: TcpStream) {
    let endless = stream.set_read_timeout(None);
    // It sends nothing any more.
    while endless.is_ok() && stream.read(&mut [0]).is_ok_and(|count| count > 0) {}
}

pub(crate) fn launcher_gone() -> Error {
    Error::new(
        Kind::TryAgain,
        "the process that started this one has ended",
    )
    .hint("run the same command again to resume from the last checkpoint")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server of two ranks; where it listens.
    fn serve() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server {
            world_size: 2,
            token: Token::hashed(b""),
            place: "here:1".into(),
            patience: Duration::from_secs(60),
            report: |_| (),
            is_watched: false,
        };
        server.start(listener, || ()).unwrap();
        address
    }

    fn introduced(rank: usize, version: &str, server: SocketAddr) -> TcpStream {
        let mut stream = TcpStream::connect(server).unwrap();
        let hello = Hello {
            token: Token::hashed(b""),
            rank,
            world_size: 2,
            host: format!("host-{rank}"),
            machine: String::new(),
            addresses: Vec::new(),
            port: 7,
        };
        stream.write_all(MAGIC).unwrap();
        send_frame(&mut stream, REPLY, version.as_bytes()).unwrap();
        send(&mut stream, &hello).unwrap();
        stream
    }

    fn refusal(stream: &mut TcpStream) -> Refusal {
        receive::<Reply>(stream).unwrap().unwrap_err()
    }

    #[test]
    fn another_version_is_refused_on_all_sides() {
        let server = serve();
        let mut known = introduced(0, VERSION, server);
        let mut other = introduced(1, "9.9.9", server);
        let expected = format!("runs advxl 9.9.9, process 0 runs {VERSION}");
        for stream in [&mut other, &mut known] {
            let refusal = refusal(stream);
            assert_eq!(refusal.kind, Kind::Input);
            assert!(refusal.message.contains(&expected), "{refusal:?}");
        }
    }

    #[test]
    fn strangers_are_ignored_a_restarted_rank_is_taken_and_a_late_one_refused() {
        let server = serve();
        let mut stranger = TcpStream::connect(server).unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let silent = TcpStream::connect(server).unwrap();
        drop(introduced(1, VERSION, server));
        let mut ranks = [1, 0].map(|rank| introduced(rank, VERSION, server));
        for stream in &mut ranks {
            let Ok(Reply::Members(members, _)) = receive(stream).unwrap() else {
                panic!("refused");
            };
            let hosts: Vec<&str> = members.iter().map(|member| &member.host[..]).collect();
            assert_eq!(hosts, ["host-0", "host-1"]);
            assert_eq!(members[0].port, 7);
            send(stream, &()).unwrap();
        }
        for stream in &mut ranks {
            assert!(matches!(receive(stream).unwrap(), Ok(Reply::Ready)));
        }
        let refusal = refusal(&mut introduced(1, VERSION, server));
        let expected =
            "all 2 processes of the run at here:1 have already joined; process 1 runs on host-1";
        assert_eq!(refusal.message, expected);
        drop(silent);
    }

    #[test]
    fn a_rank_that_cannot_reach_another_ends_the_wait_of_all() {
        let server = serve();
        let mut ranks = [0, 1].map(|rank| introduced(rank, VERSION, server));
        for stream in &mut ranks {
            assert!(receive::<Reply>(stream).unwrap().is_ok());
        }
        let [mut first, second] = ranks;
        let cannot = Refusal {
            kind: Kind::Failed,
            message: "process 1 cannot reach process 0".into(),
            hint: "open the ports".into(),
        };
        send(&mut first, &()).unwrap();
        refuse(second, &cannot);
        assert_eq!(refusal(&mut first), cannot);
    }
}
