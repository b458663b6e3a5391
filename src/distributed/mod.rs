//! Runs of several processes: ranks, collectives, heartbeats, sharded optimizer state.
//!
//! Processes are started by `--processes` and `--gpus`, by a launcher that sets torchrun's variables, or by an MPI
//! launcher. Scheduling jobs is left to the cluster.
//!
//! | file          | what                                                                          |
//! |---------------|-------------------------------------------------------------------------------|
//! | [`config`]    | the recipe's table `parallel`                                                 |
//! | `token`       | distinguishes the connections of one run from those of another                |
//! | [`program`]   | how this program was started, for starting it again                           |
//! | [`launch`](mod@launch) | what the launcher left in the environment                                     |
//! | [`signals`]   | requests to stop                                                              |
//! | [`comm`]      | [`Comm`]: rank, world size, collectives                                       |
//! | `heartbeat`   | notices ranks that hang                                                       |
//! | `rendezvous`  | where the ranks of a run over TCP meet                                        |
//! | `worker`      | the thread that serves a transport's requests                                 |
//! | `tcp`         | the collectives over TCP                                                      |
//! | `mpi_beats`, `mpi` | the collectives over MPI (feature `mpi`), and heartbeats next to it      |
//! | `gpus`        | what GPUs exchange without the host, over NCCL                                |
//! | [`launcher`]  | starts processes on this machine, forwards signals, ends them together        |
//! | [`init`](mod@init) | joins the processes that were started together                           |
//! | [`zero`]      | ZeRO-1: each rank keeps the optimizer state of its part; the replica check    |

pub mod comm;
pub mod config;
pub(crate) mod gpus;
pub(crate) mod heartbeat;
pub mod init;
pub mod launch;
pub mod launcher;
#[cfg(feature = "mpi")]
pub(crate) mod mpi;
#[cfg(feature = "mpi")]
pub(crate) mod mpi_beats;
pub mod program;
pub(crate) mod rendezvous;
pub mod signals;
pub(crate) mod tcp;
pub(crate) mod token;
pub(crate) mod worker;
pub mod zero;

pub use comm::{BUCKET, Comm, Pending};
pub use config::{Parallel, Reduce};
pub use init::init;
pub use launch::{Launch, Reports, available_memory, local_rank, local_world_size, threads};
pub use launcher::launch;
pub use signals::ExitGuard;
pub use zero::Zero;
