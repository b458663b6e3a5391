//! Joins the processes that a launcher started together.

use super::comm::Comm;
use super::launch::processes;
use super::signals::Stop;
use crate::error::Result;

#[cfg(feature = "mpi")]
use crate::distributed::mpi;
#[cfg(not(feature = "mpi"))]
use crate::error::Error;

/// This process with those that were started together with it, over MPI.
///
/// `report` prints lines that come from other threads: that a signal was received, or that a rank is lost.
///
/// Errors: there are others and this binary was built without MPI; they run another binary.
pub fn init(report: fn(&str)) -> Result<Comm> {
    let Some(count) = processes() else {
        return Ok(Comm::single_with(Stop::reporting(report)));
    };
    #[cfg(feature = "mpi")]
    {
        let _ = count;
        let comm = mpi::join(report)?;
        comm.check_binary()?;
        Ok(comm)
    }
    #[cfg(not(feature = "mpi"))]
    {
        let message = format!("{count} processes were started, and this binary was built for one");
        Err(Error::input(message).hint("build it with: cargo build --release --features mpi"))
    }
}
