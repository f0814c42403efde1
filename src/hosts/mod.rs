//! Several processes that train together, one on each host: what one of them needs of the others.
//!
//! A rank is one process. Its devices are summed within it first (`train`); only that sum goes between hosts. MPI does
//! the carrying (`hosts/mpi.rs`, cargo feature `mpi`); there is no transport of our own.

mod agree;
mod alone;
#[cfg(feature = "mpi")]
mod mpi;
pub mod threads;

use crate::error::{Error, Result};

pub use agree::{Alike, Digest, same_on_all};
pub use alone::Alone;

/// One rank's view of all of them.
///
/// What takes `&mut self` is collective: every rank must call it, in the same order, and waits until the others do. An
/// error from one of them means that the run is over on this rank: [`Hosts::abort`] then ends it on the others.
///
/// A process that exits without [`Hosts::finish`] ends the job, whatever its exit code: the others would wait for it
/// forever. So nothing is to be done when a value is dropped on the way out of a failure.
pub trait Hosts: Send {
    /// This process among the [`Hosts::count`] that there are, from 0.
    fn rank(&self) -> usize;

    fn count(&self) -> usize;

    /// The name of this host, for messages.
    fn name(&self) -> &str;

    /// Bytes that this rank has sent to others so far.
    fn sent(&self) -> u64;

    /// Replaces `values` by their sum over all ranks, which must give equally many. The sum is in f32 in the order of
    /// the ranks, so all end with the same bytes, and repeated runs do.
    fn add_up(&mut self, values: &mut [f32]) -> Result<()>;

    /// What every rank gave, in the order of the ranks; the lengths may differ.
    fn gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Replaces `bytes` by those of rank `from`.
    fn broadcast(&mut self, from: usize, bytes: &mut Vec<u8>) -> Result<()>;

    /// Returns when every rank has called it.
    fn barrier(&mut self) -> Result<()>;

    /// Leaves the others in peace: the last call of a run that went well on every rank.
    fn finish(&mut self) -> Result<()>;

    /// Ends all ranks, soon, with this exit code; to be called when the reason has been told. Where it returns (a
    /// process that is alone; no answer from the launcher), the caller has to leave by itself, with the same code.
    fn abort(&self, code: u8);
}

/// What the environment says of a launcher that started this process as one of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// How many there are, where that is said.
    pub ranks: Option<usize>,
    /// The variable that says so, for messages.
    pub variable: String,
}

/// Meets the other ranks of a launch; without one this process is [`Alone`], and MPI is not touched.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::error::ErrorKind::Usage): there are other processes, but this program was built without
/// MPI, or the launcher is another MPI's, so that each process would train by itself, into the same folder.
pub fn join(launch: Option<Launch>) -> Result<Box<dyn Hosts>> {
    match launch {
        None => Ok(Box::new(Alone)),
        Some(launch) => launch.join(),
    }
}

impl Launch {
    #[cfg(feature = "mpi")]
    fn join(&self) -> Result<Box<dyn Hosts>> {
        Ok(Box::new(mpi::Mpi::join(self)?))
    }

    #[cfg(not(feature = "mpi"))]
    fn join(&self) -> Result<Box<dyn Hosts>> {
        Err(Error::usage(format!(
            "this is {}, but this program was built without MPI: each would train by itself, into the same folder",
            self.described()
        ))
        .hint("build it with MPI: cargo build --release --features mpi (see docs/mpi.md)")
        .hint(format!("or start it without mpirun or srun; if there is only one process, unset {}", self.variable)))
    }

    /// `one of 4 processes (OMPI_COMM_WORLD_SIZE)`.
    fn described(&self) -> String {
        match self.ranks {
            Some(ranks) => format!("one of {ranks} processes ({})", self.variable),
            None => format!("one of several processes ({})", self.variable),
        }
    }
}

/// The collective calls, by the names that messages have for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    AddUp,
    Gather,
    Broadcast,
    Barrier,
    Finish,
}

impl Call {
    #[cfg(feature = "mpi")]
    const ALL: [Self; 5] = [Self::AddUp, Self::Gather, Self::Broadcast, Self::Barrier, Self::Finish];

    fn name(self) -> &'static str {
        match self {
            Self::AddUp => "add_up",
            Self::Gather => "gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
            Self::Finish => "finish",
        }
    }
}

/// Whether all ranks are at the same call, and add up equally many values. Each has said its call and how many values
/// or bytes it brings.
fn at_the_same_call(rank: usize, said: &[(Option<Call>, u64)]) -> Result<()> {
    let Some(&(mine, values)) = said.get(rank) else { return Ok(()) };
    let told = |call: Option<Call>| call.map_or("something unknown", Call::name);
    if let Some(other) = said.iter().position(|&(call, _)| call != mine) {
        let (mine, theirs) = (told(mine), told(said[other].0));
        return Err(Error::failed(format!(
            "the ranks are not in step: rank {rank} calls {mine}, rank {other} {theirs}"
        )));
    }
    match said.iter().position(|&(call, count)| call == Some(Call::AddUp) && count != values) {
        Some(other) => Err(Error::failed(format!(
            "the ranks are not in step: rank {rank} adds up {values} values, rank {other} {}",
            said[other].1
        ))),
        None => Ok(()),
    }
}

/// `a`, `a and b`, `a, b and c`.
fn listed(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}
