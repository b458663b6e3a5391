//! Starts the processes of a run on this machine, forwards signals to them, and ends them together.
//!
//! The launcher's own process takes no part in the run. It serves the rendezvous, so that no port has to be chosen in advance,
//! and its connections show the ranks that it lives: they end when it is killed.

use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use super::launch::{
    LAUNCHED, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, RANK, TOKEN, WORLD_SIZE,
};
use super::program;
use super::rendezvous::Server;
use super::token::Token;
use crate::error::{Error, Kind, Result};

/// Between two looks at processes and signals.
const LOOK: Duration = Duration::from_millis(20);
/// From the failure of a rank to SIGKILL for the others, which notice it by themselves within a second or two, and print.
const GRACE: Duration = Duration::from_secs(6);
/// For the processes to meet.
const PATIENCE: Duration = Duration::from_secs(300);

/// The ranks, killed when this is dropped.
struct Ranks(Vec<Rank>);

struct Rank {
    child: Child,
    ended: Option<ExitStatus>,
    /// Whether the launcher killed it.
    killed: bool,
}

/// Starts this program `count` times with the same arguments, waits for all, and gives the exit code of the run.
///
/// Errors: a process cannot be started.
pub fn launch(count: usize, report: fn(&str)) -> Result<u8> {
    let failed = |error| Error::failed(format!("cannot start {count} processes: {error}"));
    // From here on signals are forwarded.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1]).map_err(failed)?;
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    let secret = Token::random().to_hex();
    let met = Arc::new(AtomicBool::new(false));
    let have_met = Arc::clone(&met);
    let server = Server {
        world_size: count,
        token: Token::hashed(secret.as_bytes()),
        place: format!("127.0.0.1:{port}"),
        patience: PATIENCE,
        report,
        is_watched: true,
    };
    server.start(listener, move || have_met.store(true, Ordering::Relaxed))?;

    let command = program::command().map_err(failed)?;
    let mut ranks = Ranks(Vec::new());
    for rank in 0..count {
        let child = Command::new(&command[0])
            .args(&command[1..])
            .env(RANK, rank.to_string())
            .env(WORLD_SIZE, count.to_string())
            .env(LOCAL_RANK, rank.to_string())
            .env(LOCAL_WORLD_SIZE, count.to_string())
            .env(MASTER_ADDR, "127.0.0.1")
            .env(MASTER_PORT, port.to_string())
            .env(TOKEN, &secret)
            .env(LAUNCHED, "1")
            .stdin(Stdio::null())
            .spawn()
            .map_err(failed)?;
        ranks.0.push(Rank {
            child,
            ended: None,
            killed: false,
        });
    }
    ranks.wait(&mut signals, &met, report)
}

impl Ranks {
    /// Until all have ended.
    fn wait(&mut self, signals: &mut Signals, met: &AtomicBool, report: fn(&str)) -> Result<u8> {
        let mut failed: Option<Instant> = None;
        let mut is_stopping = false;
        loop {
            for signal in signals.pending() {
                is_stopping = true;
                self.forward(signal);
            }
            for (number, rank) in self.0.iter_mut().enumerate() {
                if rank.ended.is_some() {
                    continue;
                }
                let ended = rank.child.try_wait();
                rank.ended = ended.map_err(|error| {
                    Error::failed(format!("cannot wait for process {number}: {error}"))
                })?;
                let Some(status) = rank.ended else { continue };
                if !status.success() && failed.is_none() {
                    failed = Some(Instant::now());
                }
                if let (Some(signal), false, false) = (status.signal(), rank.killed, is_stopping) {
                    report(&killed_by(number, signal));
                }
            }
            if self.0.iter().all(|rank| rank.ended.is_some()) {
                return Ok(self.exit_code());
            }
            // Before they have met they cannot notice a loss, and have nothing to lose themselves.
            let grace = match met.load(Ordering::Relaxed) {
                true => GRACE,
                false => GRACE / 20,
            };
            if failed.is_some_and(|at| at.elapsed() > grace) {
                self.kill();
            }
            std::thread::sleep(LOOK);
        }
    }

    fn forward(&self, signal: i32) {
        let signal = match signal {
            SIGINT => Signal::INT,
            SIGUSR1 => Signal::USR1,
            _ => Signal::TERM,
        };
        for rank in self.0.iter().filter(|rank| rank.ended.is_none()) {
            // One that ends at this moment needs none.
            let _ = kill_process(Pid::from_child(&rank.child), signal);
        }
    }

    fn kill(&mut self) {
        for rank in self.0.iter_mut().filter(|rank| rank.ended.is_none()) {
            rank.killed = true;
            let _ = rank.child.kill();
        }
    }

    /// The most informative code that a rank ended with: bad input, a failure, any other, and last "run it again", which
    /// is also that of a rank that a signal killed.
    fn exit_code(&self) -> u8 {
        let again = Kind::TryAgain.exit_code();
        let codes = self.0.iter().filter_map(|rank| {
            let status = rank.ended.filter(|_| !rank.killed)?;
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            Some(code.unwrap_or(again))
        });
        most_informative(codes)
    }
}

fn most_informative(codes: impl Iterator<Item = u8>) -> u8 {
    let again = Kind::TryAgain.exit_code();
    let order = |code: &u8| match *code {
        0 => 4,
        code if code == Kind::Input.exit_code() => 0,
        code if code == Kind::Failed.exit_code() => 1,
        code if code == again => 3,
        _ => 2,
    };
    codes.min_by_key(order).unwrap_or(again)
}

/// A line about a process that somebody else killed.
fn killed_by(rank: usize, signal: i32) -> String {
    let name = signal_hook::low_level::signal_name(signal)
        .map_or_else(|| format!("signal {signal}"), str::to_owned);
    let message = format!("error: process {rank} was killed by {name}");
    match name.as_str() {
        "SIGKILL" => message + "\n  hint: Linux kills processes when memory runs out: see `dmesg`",
        _ => message,
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.kill();
        for rank in &mut self.0 {
            // One that has ended already gives its status once more.
            let _ = rank.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_informative_exit_code_is_that_of_the_run() {
        let of = |codes: &[u8]| most_informative(codes.iter().copied());
        assert_eq!(of(&[0, 0]), 0);
        assert_eq!(of(&[75, 0]), 75);
        assert_eq!(of(&[75, 1, 2]), 2);
        assert_eq!(of(&[75, 1]), 1);
        assert_eq!(of(&[75, 101]), 101);
    }
}
