//! What the launcher left in the environment: rank, world size, where to meet, how many ranks share this machine.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use super::token::Token;
use crate::error::{Error, Result};
use crate::{files, memory};

/// The variables that say how to join over TCP, those of torchrun.
pub(crate) const RANK: &str = "RANK";
pub(crate) const WORLD_SIZE: &str = "WORLD_SIZE";
pub(crate) const MASTER_ADDR: &str = "MASTER_ADDR";
pub(crate) const MASTER_PORT: &str = "MASTER_PORT";
pub(crate) const LOCAL_RANK: &str = "LOCAL_RANK";
pub(crate) const LOCAL_WORLD_SIZE: &str = "LOCAL_WORLD_SIZE";
/// A secret of the run: who presents another is not let in. The launcher makes one.
pub(crate) const TOKEN: &str = "ADVXL_TOKEN";
/// Seconds to wait for all processes.
const TIMEOUT: &str = "ADVXL_RENDEZVOUS_TIMEOUT";
/// Set by `--processes` and `--gpus`, whose own process waits at the rendezvous in place of rank 0.
pub(crate) const LAUNCHED: &str = "ADVXL_LAUNCHED";

/// How long processes wait for each other at the start, unless `ADVXL_RENDEZVOUS_TIMEOUT` says otherwise.
const PATIENCE: Duration = Duration::from_secs(300);

/// How threads that watch the other processes print.
#[derive(Clone, Copy, Debug)]
pub struct Reports {
    /// A line that rank 0 alone prints.
    pub note: fn(&str),
    /// A line that any rank prints, since rank 0 may be gone.
    pub alarm: fn(&str),
}

impl Reports {
    /// Prints nothing.
    pub fn silent() -> Self {
        Self {
            note: |_| (),
            alarm: |_| (),
        }
    }
}

/// How this process was started.
#[derive(Clone, Debug)]
pub enum Launch {
    /// As the only one.
    Single(Placement),
    /// By an MPI launcher, as one of several.
    Mpi {
        /// Rank, as the launcher's variables have it.
        rank: usize,
        /// Number of processes.
        world_size: usize,
    },
    /// By `--processes`, torchrun or a scheduler, with torchrun's variables.
    Tcp(Meeting),
}

/// Where the processes of a run meet, and which of them this is.
#[derive(Clone, Debug)]
pub struct Meeting {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) token: Token,
    pub(crate) patience: Duration,
    /// Whether `--processes` started this process: its launcher waits at the rendezvous, on this machine.
    pub(crate) launched: bool,
    local_rank: Option<usize>,
    local_world_size: Option<usize>,
}

/// This process among those on its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    local_rank: usize,
    local_world_size: usize,
}

/// Known once the processes have met. Process-wide, like the environment.
static PLACEMENT: OnceLock<Placement> = OnceLock::new();

impl Launch {
    /// From the environment. For a command whose work is not shared, incomplete variables are those of a job script around it.
    ///
    /// Errors: torchrun's variables are incomplete or contradict each other; an MPI launcher started a program that was built
    /// without MPI.
    pub fn read(is_shared: bool) -> Result<Self> {
        let value = |name: &str| {
            std::env::var_os(name).map(|value| value.to_string_lossy().trim().to_owned())
        };
        Self::from_variables(&value, cfg!(feature = "mpi"), is_shared)
    }

    fn from_variables(
        value: &dyn Fn(&str) -> Option<String>,
        has_mpi: bool,
        is_shared: bool,
    ) -> Result<Self> {
        let number = |names: [&str; 2]| names.iter().find_map(|name| value(name)?.parse().ok());
        let of_mpi: Option<usize> = number(["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]);
        let complete = [RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT].map(value);
        let complete = complete.iter().all(Option::is_some);
        match of_mpi {
            Some(world_size) if value(LAUNCHED).is_none() && (has_mpi || !complete) => {
                let rank = number(["OMPI_COMM_WORLD_RANK", "PMI_RANK"]).unwrap_or(0);
                if has_mpi {
                    return Ok(Self::Mpi { rank, world_size });
                }
                if world_size > 1 {
                    let message = format!(
                        "mpirun started {world_size} processes, but this program was built without MPI"
                    );
                    return Err(Error::input(message).hint(
                        "start them with `advxl train --gpus N` or `--processes N`, or with torchrun's variables (docs/guides/several_processes.md); \
                         or build with: cargo build --release --features mpi",
                    ));
                }
                Ok(Self::Single(Placement::default()))
            }
            _ => Meeting::from_variables(value, is_shared),
        }
    }

    /// The rank of this process.
    pub fn rank(&self) -> usize {
        match self {
            Self::Single(_) => 0,
            Self::Mpi { rank, .. } => *rank,
            Self::Tcp(meeting) => meeting.rank,
        }
    }

    /// The number of processes.
    pub fn world_size(&self) -> usize {
        match self {
            Self::Single(_) => 1,
            Self::Mpi { world_size, .. } => *world_size,
            Self::Tcp(meeting) => meeting.world_size,
        }
    }

    /// Whether `--processes` or `--gpus` of another process started this one.
    pub fn is_launched(&self) -> bool {
        matches!(self, Self::Tcp(meeting) if meeting.launched)
    }
}

impl Meeting {
    fn from_variables(value: &dyn Fn(&str) -> Option<String>, is_shared: bool) -> Result<Launch> {
        let world_size = integer(value, WORLD_SIZE, 1, usize::MAX)?;
        let last = world_size.unwrap_or(usize::MAX);
        let local_world_size = match world_size {
            Some(world_size) => integer(value, LOCAL_WORLD_SIZE, 1, world_size)?,
            None => None,
        };
        let last_local = match local_world_size {
            Some(size) => size - 1,
            None => usize::MAX,
        };
        let rank = integer(value, RANK, 0, last - 1)?;
        let port = integer(value, MASTER_PORT, 1, usize::from(u16::MAX))?;
        let host = value(MASTER_ADDR).filter(|host| !host.is_empty());
        let local_rank = || integer(value, LOCAL_RANK, 0, last_local);
        if world_size == Some(1) {
            let placement = Placement {
                local_rank: integer(value, LOCAL_RANK, 0, usize::MAX)?.unwrap_or(0),
                local_world_size: 1,
            };
            return Ok(Launch::Single(placement));
        }
        let (Some(rank), Some(world_size), Some(host), Some(port)) =
            (rank, world_size, &host, port)
        else {
            let there = [
                (RANK, rank.is_some()),
                (WORLD_SIZE, world_size.is_some()),
                (MASTER_ADDR, host.is_some()),
                (MASTER_PORT, port.is_some()),
            ];
            let names = |wanted: bool| {
                let names = there.iter().filter(|(_, is_there)| *is_there == wanted);
                names.map(|(name, _)| *name).collect::<Vec<_>>()
            };
            let (set, missing) = (names(true), names(false));
            if set.is_empty() || !is_shared {
                return Ok(Launch::Single(Placement::default()));
            }
            let message = format!(
                "{} {} missing from the environment, though {} {} set",
                missing.join(", "),
                if missing.len() == 1 { "is" } else { "are" },
                set.join(", "),
                if set.len() == 1 { "is" } else { "are" },
            );
            return Err(Error::input(message).hint(
                "set all of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for a run of several processes, or unset them; \
                 `--processes N` and `--gpus N` set them by themselves",
            ));
        };
        let launched = value(LAUNCHED).is_some();
        // torchrun's own store listens at MASTER_PORT then, where rank 0 is to listen.
        if !launched && value("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True") {
            let message = format!("MASTER_PORT = {port} is taken by torchrun's own store");
            return Err(Error::input(message).hint(
                "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or start with `--gpus N` in place of torchrun",
            ));
        }
        let patience = integer(value, TIMEOUT, 1, 1_000_000)?
            .map_or(PATIENCE, |seconds| Duration::from_secs(seconds as u64));
        Ok(Launch::Tcp(Self {
            rank,
            world_size,
            host: host.clone(),
            port: port as u16,
            token: Token::hashed(value(TOKEN).unwrap_or_default().as_bytes()),
            patience,
            launched,
            local_rank: local_rank()?,
            local_world_size,
        }))
    }

    /// The placement of this process, given the machine of every rank: by `LOCAL_RANK` and `LOCAL_WORLD_SIZE`, and where these
    /// are not set, among the ranks on the same machine.
    pub(crate) fn placement(&self, machines: &[String]) -> Placement {
        let own = &machines[self.rank];
        let same = |machines: &[String]| machines.iter().filter(|other| *other == own).count();
        Placement {
            local_rank: self
                .local_rank
                .unwrap_or_else(|| same(&machines[..self.rank])),
            local_world_size: self.local_world_size.unwrap_or_else(|| same(machines)),
        }
    }
}

impl Default for Placement {
    fn default() -> Self {
        Self {
            local_rank: 0,
            local_world_size: 1,
        }
    }
}

impl Placement {
    /// Makes it that of this process.
    pub(crate) fn set(self) {
        // A process joins one run.
        let _ = PLACEMENT.set(self);
    }
}

/// The number in a variable. Errors: it holds something else.
fn integer(
    value: &dyn Fn(&str) -> Option<String>,
    name: &str,
    least: usize,
    most: usize,
) -> Result<Option<usize>> {
    let Some(text) = value(name) else {
        return Ok(None);
    };
    let number = text.parse::<usize>().ok();
    if let Some(number) = number.filter(|number| (least..=most).contains(number)) {
        return Ok(Some(number));
    }
    let expected = match (name, most) {
        (RANK, _) if most < usize::MAX - 1 => {
            format!("0 to {most}, since WORLD_SIZE is {}", most + 1)
        }
        (LOCAL_RANK, _) if most < usize::MAX => {
            format!("0 to {most}, since LOCAL_WORLD_SIZE is {}", most + 1)
        }
        (LOCAL_WORLD_SIZE, _) => format!("1 to {most}, which is WORLD_SIZE"),
        _ if most >= usize::MAX - 1 => format!("a whole number from {least}"),
        _ => format!("a whole number from {least} to {most}"),
    };
    Err(Error::input(format!(
        "environment variable {name} = `{text}`: expected {expected}"
    )))
}

fn number(names: [&str; 2]) -> Option<usize> {
    let mut values = names.iter().filter_map(|name| std::env::var(name).ok());
    values.find_map(|value| value.parse().ok())
}

/// Threads for computing: the processors that this process may use, and no more than its share of the machine's.
pub fn threads() -> usize {
    let may = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let ranks = local_world_size();
    let online = files::read_text(Path::new("/sys/devices/system/cpu/online"));
    let all = online.map_or(may, |list| count(&list)).max(may);
    may.min(all / ranks).max(1)
}

/// Ranks on this machine, as far as is known; 1 without a launcher.
pub fn local_world_size() -> usize {
    let placed = PLACEMENT
        .get()
        .map(|placement| placement.local_world_size)
        .or_else(|| number(["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"]));
    placed.unwrap_or(1).max(1)
}

/// The number of this process among the ranks on this machine; 0 without a launcher.
pub fn local_rank() -> usize {
    let placed = PLACEMENT
        .get()
        .map(|placement| placement.local_rank)
        .or_else(|| number(["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"]));
    placed.unwrap_or(0)
}

/// Bytes of memory that this rank may take: its share of what the machine can still give. `None` where that is unknown.
pub fn available_memory() -> Option<u64> {
    memory::available().map(|free| free / local_world_size() as u64)
}

/// The number of processors in a list such as `0-3,8`.
fn count(list: &str) -> usize {
    let ranges = list.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        (last + 1).checked_sub(first)
    });
    ranges.sum()
}

/// The name of this machine.
pub(crate) fn host() -> String {
    let name = files::read_text(Path::new("/proc/sys/kernel/hostname"));
    name.map_or_else(|_| "an unknown host".into(), |name| name.trim().to_owned())
}

/// What only processes on this machine share: its name, and the number of its last boot where names repeat.
pub(crate) fn machine() -> String {
    let boot = files::read_text(Path::new("/proc/sys/kernel/random/boot_id"));
    format!("{} {}", host(), boot.unwrap_or_default().trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The launch that variables `NAME=VALUE` describe.
    fn launch(variables: &str, has_mpi: bool) -> Result<Launch> {
        let value = |name: &str| {
            let mut pairs = variables.split_whitespace();
            pairs.find_map(|pair| Some(pair.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
        };
        Launch::from_variables(&value, has_mpi, true)
    }

    const FOUR: &str = "RANK=2 WORLD_SIZE=4 MASTER_ADDR=node0 MASTER_PORT=29500";

    #[test]
    fn a_list_of_processors_is_counted() {
        assert_eq!(count("0-3,8\n"), 5);
        assert_eq!(count("0"), 1);
        assert_eq!(count(""), 0);
    }

    #[test]
    fn torchruns_variables_are_a_run_over_tcp() {
        let Launch::Tcp(meeting) = launch(FOUR, false).unwrap() else {
            panic!("not over TCP");
        };
        assert_eq!(
            (meeting.rank, meeting.world_size, meeting.port),
            (2, 4, 29500)
        );
        assert_eq!(meeting.host, "node0");
        assert_eq!(meeting.patience, PATIENCE);
        for single in [
            "",
            "WORLD_SIZE=1",
            "WORLD_SIZE=1 RANK=0 MASTER_ADDR=x",
            "LOCAL_RANK=3",
        ] {
            assert!(matches!(launch(single, false).unwrap(), Launch::Single(_)));
        }
    }

    #[test]
    fn wrong_variables_are_named_with_what_would_be_right() {
        for (variables, expected) in [
            ("RANK=0", "WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing"),
            (
                "RANK=0 WORLD_SIZE=2 MASTER_ADDR=x",
                "MASTER_PORT is missing",
            ),
            (
                "RANK=4 WORLD_SIZE=4",
                "RANK = `4`: expected 0 to 3, since WORLD_SIZE is 4",
            ),
            ("RANK=1 WORLD_SIZE=1", "RANK = `1`: expected 0 to 0"),
            (
                "WORLD_SIZE=four",
                "WORLD_SIZE = `four`: expected a whole number from 1",
            ),
            ("WORLD_SIZE=0", "WORLD_SIZE = `0`"),
            (
                "RANK=0 WORLD_SIZE=2 MASTER_ADDR=x MASTER_PORT=70000",
                "MASTER_PORT = `70000`: expected a whole number from 1 to 65535",
            ),
            (
                "WORLD_SIZE=2 LOCAL_WORLD_SIZE=3",
                "LOCAL_WORLD_SIZE = `3`: expected 1 to 2",
            ),
        ] {
            let error = launch(variables, false).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let text = error.to_string();
            assert!(text.contains(expected), "{text}");
        }
        let all = format!("{FOUR} LOCAL_WORLD_SIZE=2 LOCAL_RANK=2");
        let text = launch(&all, false).unwrap_err().to_string();
        assert!(text.contains("LOCAL_RANK = `2`: expected 0 to 1"), "{text}");
        let all = format!("{FOUR} TORCHELASTIC_USE_AGENT_STORE=True");
        let text = launch(&all, false).unwrap_err().to_string();
        assert!(
            text.contains("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
            "{text}"
        );
    }

    #[test]
    fn mpi_comes_first_where_the_program_has_it() {
        let mpi = "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1";
        let both = format!("{mpi} {FOUR}");
        let partial = format!("{mpi} RANK=1");
        assert!(matches!(
            launch(&both, true).unwrap(),
            Launch::Mpi {
                rank: 1,
                world_size: 2
            }
        ));
        assert!(matches!(launch(&both, false).unwrap(), Launch::Tcp(_)));
        for alone in [mpi, &partial] {
            let text = launch(alone, false).unwrap_err().to_string();
            assert!(text.contains("mpirun started 2 processes"), "{text}");
            assert!(text.contains("`advxl train --gpus N`"), "{text}");
        }
        let launched = format!("{both} ADVXL_LAUNCHED=1");
        assert!(matches!(launch(&launched, true).unwrap(), Launch::Tcp(_)));
    }

    #[test]
    fn ranks_share_a_machine_as_the_variables_or_the_machines_say() {
        let machines = ["a", "a", "b", "b"].map(str::to_owned);
        let placement = |variables: &str| {
            let Launch::Tcp(meeting) = launch(variables, false).unwrap() else {
                panic!("not over TCP");
            };
            let placement = meeting.placement(&machines);
            (placement.local_rank, placement.local_world_size)
        };
        assert_eq!(placement(FOUR), (0, 2));
        assert_eq!(placement(&FOUR.replace("RANK=2", "RANK=3")), (1, 2));
        let given = format!("{FOUR} LOCAL_RANK=1 LOCAL_WORLD_SIZE=4");
        assert_eq!(placement(&given), (1, 4));
    }
}
