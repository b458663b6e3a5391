//! Runs of several processes: ranks, collectives, heartbeats, sharded optimizer state.
//!
//! Open MPI launches the processes, connects them and ends them all when one dies. Scheduling jobs is left
//! to the cluster.
//!
//! | file          | what                                                                          |
//! |---------------|-------------------------------------------------------------------------------|
//! | [`config`]    | the recipe's table `parallel`                                                 |
//! | [`launch`]    | what the launcher left in the environment                                     |
//! | [`signals`]   | requests to stop                                                              |
//! | [`comm`]      | [`Comm`]: rank, world size, collectives                                       |
//! | `heartbeat` | notices ranks that hang, over TCP                                             |
//! | `mpi`       | the collectives over MPI (feature `mpi`)                                      |
//! | [`init`](mod@init) | joins the processes that were started together                           |
//! | [`zero`]      | ZeRO-1: each rank keeps the optimizer state of its part; the replica check    |

pub mod comm;
pub mod config;
#[cfg(feature = "mpi")]
pub(crate) mod heartbeat;
pub mod init;
pub mod launch;
#[cfg(feature = "mpi")]
pub(crate) mod mpi;
pub mod signals;
pub mod zero;

pub use comm::{BUCKET, Comm, Pending};
pub use config::{Parallel, Reduce};
pub use init::init;
pub use launch::{available_memory, local_rank, local_world_size, threads};
pub use signals::ExitGuard;
pub use zero::Zero;
