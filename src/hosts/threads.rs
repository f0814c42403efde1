//! Hosts that are threads of one process, so that what runs on several of them can be tested without MPI.
//!
//! They keep the promises of [`Hosts`] and hold their callers to them: a rank that leaves, or calls something else than
//! the others, is an error on all, where MPI would hang or end the job.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use super::{Call, Hosts, at_the_same_call};
use crate::error::{Error, Result};

/// What a rank lays down for the others: which call, how many values or bytes it says it brings, and these.
#[derive(Clone)]
struct Given {
    call: Call,
    brings: usize,
    bytes: Arc<Vec<u8>>,
}

struct State {
    given: Vec<Option<Given>>,
    /// Ranks that have taken what lies there; when all have, it is cleared away.
    taken: usize,
    gone: Vec<bool>,
    aborted: Option<(usize, u8)>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// One rank.
pub struct ThreadHost {
    rank: usize,
    count: usize,
    name: String,
    sent: u64,
    shared: Arc<Shared>,
}

/// As many ranks, to be given to as many threads.
pub fn hosts(count: usize) -> Vec<ThreadHost> {
    let state = State { given: vec![None; count], taken: 0, gone: vec![false; count], aborted: None };
    let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
    let host = |rank| ThreadHost { rank, count, name: format!("thread {rank}"), sent: 0, shared: Arc::clone(&shared) };
    (0..count).map(host).collect()
}

/// Runs the same on each of `count` ranks; the answers in the order of the ranks.
///
/// # Panics
/// Where a rank does.
pub fn on<T: Send>(count: usize, run: impl Fn(&mut dyn Hosts) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let run = &run;
        let start = |mut host: ThreadHost| scope.spawn(move || run(&mut host));
        let ranks: Vec<_> = hosts(count).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

impl ThreadHost {
    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready`.
    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        ready: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'a, State>> {
        loop {
            if let Some((rank, code)) = state.aborted {
                return Err(Error::failed(format!("rank {rank} ended the run with code {code}")));
            }
            if ready(&state) {
                return Ok(state);
            }
            let missing = |rank: &usize| state.gone[*rank] && state.given[*rank].is_none();
            if let Some(rank) = (0..self.count).find(missing) {
                return Err(Error::failed(format!("rank {rank} has left the run")));
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What every rank gave to the same call.
    fn exchange(&mut self, call: Call, brings: usize, bytes: Vec<u8>) -> Result<Vec<Arc<Vec<u8>>>> {
        self.sent += (bytes.len() * (self.count - 1)) as u64;
        // The last round may not be over for a slower rank.
        let mut state = self.wait(self.state(), |state| state.given[self.rank].is_none())?;
        state.given[self.rank] = Some(Given { call, brings, bytes: Arc::new(bytes) });
        self.shared.changed.notify_all();
        let mut state = self.wait(state, |state| state.given.iter().all(Option::is_some))?;
        let all: Vec<Given> = state.given.iter().flatten().cloned().collect();
        state.taken += 1;
        if state.taken == self.count {
            state.taken = 0;
            state.given.fill(None);
            self.shared.changed.notify_all();
        }
        drop(state);
        let said: Vec<_> = all.iter().map(|given| (Some(given.call), given.brings as u64)).collect();
        at_the_same_call(self.rank, &said)?;
        Ok(all.into_iter().map(|given| given.bytes).collect())
    }
}

impl Drop for ThreadHost {
    fn drop(&mut self) {
        self.state().gone[self.rank] = true;
        self.shared.changed.notify_all();
    }
}

impl Hosts for ThreadHost {
    fn rank(&self) -> usize {
        self.rank
    }
    fn count(&self) -> usize {
        self.count
    }
    fn name(&self) -> &str {
        &self.name
    }
    fn sent(&self) -> u64 {
        self.sent
    }

    fn add_up(&mut self, values: &mut [f32]) -> Result<()> {
        let all = self.exchange(Call::AddUp, values.len(), bytemuck::cast_slice(values).to_vec())?;
        for (rank, given) in all.iter().enumerate() {
            for (value, bytes) in values.iter_mut().zip(given.as_chunks::<4>().0) {
                let other = f32::from_ne_bytes(*bytes);
                *value = if rank == 0 { other } else { *value + other };
            }
        }
        Ok(())
    }

    fn gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(self.exchange(Call::Gather, mine.len(), mine.to_vec())?.into_iter().map(Arc::unwrap_or_clone).collect())
    }

    fn broadcast(&mut self, from: usize, bytes: &mut Vec<u8>) -> Result<()> {
        let mine = if self.rank == from { bytes.clone() } else { Vec::new() };
        let all = self.exchange(Call::Broadcast, mine.len(), mine)?;
        let given = all.into_iter().nth(from).ok_or_else(|| Error::failed(format!("there is no rank {from}")))?;
        *bytes = Arc::unwrap_or_clone(given);
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        self.exchange(Call::Barrier, 0, Vec::new()).map(|_| ())
    }

    fn finish(&mut self) -> Result<()> {
        self.exchange(Call::Finish, 0, Vec::new()).map(|_| ())
    }

    fn abort(&self, code: u8) {
        self.state().aborted.get_or_insert((self.rank, code));
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_in_the_order_of_the_ranks_and_the_same_everywhere() {
        // In any other order the result is another one.
        let parts = [1e8_f32, 1.0, -1e8, 3.0];
        let expected = ((parts[0] + parts[1]) + parts[2]) + parts[3];
        for _ in 0..20 {
            let sums = on(4, |hosts| {
                let mut values = vec![parts[hosts.rank()]; 5];
                hosts.add_up(&mut values).unwrap();
                hosts.finish().unwrap();
                values
            });
            assert!(sums.iter().flatten().all(|sum| sum.to_bits() == expected.to_bits()), "{sums:?}");
        }
    }

    #[test]
    fn what_is_gathered_and_told_is_in_order() {
        let answers = on(3, |hosts| {
            let mine = vec![hosts.rank() as u8; hosts.rank()];
            let gathered = hosts.gather(&mine).unwrap();
            hosts.barrier().unwrap();
            let mut told = mine.clone();
            hosts.broadcast(2, &mut told).unwrap();
            hosts.finish().unwrap();
            (gathered, told)
        });
        for (gathered, told) in answers {
            assert_eq!(gathered, [vec![], vec![1], vec![2, 2]]);
            assert_eq!(told, [2, 2]);
        }
    }

    #[test]
    fn nobody_waits_for_a_rank_that_is_gone() {
        let answers = on(3, |hosts| if hosts.rank() == 1 { Ok(()) } else { hosts.barrier() });
        for error in [&answers[0], &answers[2]] {
            assert_eq!(error.as_ref().unwrap_err().message, "rank 1 has left the run");
        }
        let answers = on(2, |hosts| {
            if hosts.rank() == 1 {
                hosts.abort(3);
            }
            hosts.barrier()
        });
        assert_eq!(answers[0].as_ref().unwrap_err().message, "rank 1 ended the run with code 3");
    }

    #[test]
    fn ranks_that_call_different_things_are_told() {
        let answers = on(2, |hosts| match hosts.rank() {
            0 => hosts.add_up(&mut [1.0]),
            _ => hosts.barrier(),
        });
        assert_eq!(
            answers[0].as_ref().unwrap_err().message,
            "the ranks are not in step: rank 0 calls add_up, rank 1 barrier"
        );
        let answers = on(2, |hosts| hosts.add_up(&mut vec![1.0; hosts.rank() + 1]));
        assert_eq!(
            answers[1].as_ref().unwrap_err().message,
            "the ranks are not in step: rank 1 adds up 2 values, rank 0 1"
        );
    }
}
