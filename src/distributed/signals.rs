//! Signals that request a stop: a flag that is polled at good moments, and an exit where none comes soon enough.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use super::launch::Reports;
use crate::error::{Error, Kind, Result};

/// From a signal to the exit of a process that has nothing to lose. Schedulers kill after 30 seconds or sooner.
const GRACE: Duration = Duration::from_secs(3);
/// Signals this close together are one: a terminal sends Ctrl-C to the launcher and to its ranks, and the launcher forwards it.
const ECHO: Duration = Duration::from_millis(300);
/// Interval at which a second signal is polled for.
const LOOK: Duration = Duration::from_millis(50);
/// Where all ranks are to exit, rank 0 comes first, prints why, and ends the others.
const AFTER_MAIN: Duration = Duration::from_millis(500);

/// Whether a stop was requested, and whether exiting would lose anything.
#[derive(Clone)]
pub(crate) struct Stop {
    pub(crate) requested: Arc<AtomicBool>,
    /// Number of [`ExitGuard`] guards that are alive.
    guards: Arc<AtomicUsize>,
    /// Whether a thread handles signals.
    is_listening: Arc<AtomicBool>,
    reports: Reports,
}

/// While it lives, everything worth keeping is on disk; see [`crate::distributed::comm::Comm::allow_exit`].
#[must_use]
pub struct ExitGuard(Arc<AtomicUsize>);

impl Drop for ExitGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Default for Stop {
    fn default() -> Self {
        Self::reporting(Reports::silent())
    }
}

impl Stop {
    pub(crate) fn reporting(reports: Reports) -> Self {
        Self {
            requested: Arc::default(),
            guards: Arc::default(),
            is_listening: Arc::default(),
            reports,
        }
    }

    pub(crate) fn allow_exit(&self) -> ExitGuard {
        self.guards.fetch_add(1, Ordering::Relaxed);
        ExitGuard(Arc::clone(&self.guards))
    }

    /// Handles signals on a thread of their own; once, also if called again. `leave` exits, and ends the other ranks.
    pub(crate) fn on_signals(
        &self,
        is_main: bool,
        leave: impl Fn(u8) + Send + 'static,
    ) -> Result<()> {
        if self.is_listening.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let failed =
            |error: std::io::Error| Error::failed(format!("cannot handle signals: {error}"));
        let signals = Signals::new([SIGINT, SIGTERM, SIGUSR1]).map_err(failed)?;
        let stop = self.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || stop.listen(signals, is_main, &leave))
            .map_err(failed)?;
        Ok(())
    }

    fn listen(&self, mut signals: Signals, is_main: bool, leave: &dyn Fn(u8)) {
        let Some(signal) = signals.forever().next() else {
            return;
        };
        self.requested.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
        let grace = match is_main {
            true => GRACE,
            false => GRACE + AFTER_MAIN,
        };
        (self.reports.note)(&format!(
            "received {name}: stopping; a second signal ends the process at once"
        ));
        loop {
            std::thread::sleep(LOOK);
            let again = signals.pending().count() > 0;
            if again && begun.elapsed() > ECHO {
                leave(Kind::TryAgain.exit_code());
            }
            if self.guards.load(Ordering::Relaxed) > 0 && begun.elapsed() > grace {
                (self.reports.alarm)(
                    "error: stopped by signal in the middle of a pass\n  hint: run the same command again to resume after the \
                     last saved batch; smaller batches are saved more often",
                );
                leave(Kind::TryAgain.exit_code());
            }
        }
    }
}
