//! What the launcher left in the environment: how many processes there are, and how many on this machine.

use std::num::NonZeroUsize;
use std::path::Path;

use crate::{files, memory};

/// How many processes were started together, if a launcher of MPI started this one.
///
/// Open MPI's variable, and that of the launchers of MPICH's kind.
pub(crate) fn processes() -> Option<usize> {
    number(["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
}

fn number<const N: usize>(names: [&str; N]) -> Option<usize> {
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

/// Ranks on this machine, as far as the launcher says; 1 without a launcher.
pub fn local_world_size() -> usize {
    let count = number(["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"]);
    count.unwrap_or(1).max(1)
}

/// The number of this process among the ranks on this machine; 0 without a launcher.
pub fn local_rank() -> usize {
    number(["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"]).unwrap_or(0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_processors_is_counted() {
        assert_eq!(count("0-3,8\n"), 5);
        assert_eq!(count("0"), 1);
        assert_eq!(count(""), 0);
    }
}
