//! Several processes that train together, one on each host: what one of them needs of the others.
//!
//! A rank is one process. Its devices are summed within it first (`train`); only that sum goes between hosts. MPI does
//! the carrying (cargo feature `mpi`); there is no transport of our own.

mod agree;
mod alone;
pub mod threads;

use crate::error::Result;

pub use agree::{Alike, Digest, same_on_all};
pub use alone::Alone;

/// One rank's view of all of them.
///
/// What takes `&mut self` is collective: every rank must call it, in the same order, and waits until the others do. An
/// error from one of them means that the run is over on this rank: [`Hosts::abort`] then ends it on the others.
///
/// A value that is dropped without [`Hosts::finish`] ends the job too, as a process does that exits: the others would
/// wait for it forever.
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

/// `a`, `a and b`, `a, b and c`.
fn listed(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}
