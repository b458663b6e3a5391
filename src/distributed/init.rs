//! Joins the processes that were started together.

use super::comm::Comm;
use super::launch::{Launch, Reports};
use super::signals::Stop;
use super::tcp;
use crate::error::Result;

#[cfg(feature = "mpi")]
use crate::distributed::mpi;
#[cfg(not(feature = "mpi"))]
use crate::error::Error;

/// This process with those that were started together with it.
///
/// Errors: they do not belong together, were not all started, or cannot reach each other.
pub fn init(launch: &Launch, reports: Reports) -> Result<Comm> {
    match launch {
        Launch::Single(placement) => {
            placement.set();
            Ok(Comm::single_with(Stop::reporting(reports)))
        }
        Launch::Tcp(meeting) => tcp::join(meeting, reports),
        #[cfg(feature = "mpi")]
        Launch::Mpi { .. } => mpi::join(reports),
        #[cfg(not(feature = "mpi"))]
        Launch::Mpi { .. } => Err(Error::failed("this program was built without MPI")),
    }
}
