//! Ranks that MPI has started and carries bytes between: rsmpi over the system's Open MPI or MPICH.
//!
//! One thread speaks MPI: it initialises the library, owns the communicator and finalises, which is all that MPI asks
//! of a program with `MPI_THREAD_FUNNELED`, so every build of it will do. The others give it closures to run.
//!
//! MPI's own errors are fatal: the library writes its message and ends the job. Errors from here are the caller's.

use std::{
    collections::VecDeque,
    mem,
    os::raw::c_int,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use mpi::{
    Threading,
    datatype::PartitionMut,
    environment::{Universe, library_version, processor_name},
    request::{Request, Scope, scope},
    topology::SimpleCommunicator,
    traits::{Communicator, CommunicatorCollectives, Root},
};

use super::{Call, Hosts, Launch, at_the_same_call};
use crate::error::{Error, Result};

/// Bytes that go in one call of MPI, whose counts are 32-bit. Two pieces are copied and carried at a time.
const PIECE: usize = 16 << 20;

/// Waiting is without a break for so long, because the others are usually near, ...
const EAGER: Duration = Duration::from_micros(200);
/// ... then with breaks of a sixteenth of the time waited so far, within bounds: these while bytes are under way, which
/// only calls of MPI move (on two busy cores this moves no fewer than MPI's own waiting) ...
const BREAK: Duration = Duration::from_micros(20);
/// ... and up to this for slower ranks. MPI itself would keep a core busy all the while, which here may be the one that
/// a software adapter computes on.
const LONG_BREAK: Duration = Duration::from_millis(1);

/// How long the launcher has to end this process after it was asked to.
const PATIENCE: Duration = Duration::from_secs(5);

/// One rank of an MPI job.
pub struct Mpi {
    rank: usize,
    count: usize,
    name: String,
    sent: u64,
    orders: Sender<Order>,
    /// Buffers of pieces, to be used again.
    spare: Vec<Vec<f32>>,
}

type Order = Box<dyn FnOnce(&mut Speaker) + Send>;

/// What the speaking thread has to say for itself when it has met the others.
struct Met {
    rank: usize,
    count: usize,
    name: String,
    library: String,
    threads: bool,
}

impl Mpi {
    /// Initialises MPI, which waits for the other ranks.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`](crate::error::ErrorKind::Usage): the launcher has started several ranks, but the library
    /// sees one; [`ErrorKind::Failed`](crate::error::ErrorKind::Failed): the library allows one thread only, or was
    /// initialised before.
    pub fn join(launch: &Launch) -> Result<Self> {
        let (orders, to_do) = channel();
        let (tell, told) = channel();
        thread::Builder::new()
            .name("mpi".into())
            .spawn(move || speak(&to_do, &tell))
            .map_err(|error| Error::failed("cannot start a thread for MPI").caused_by(error))?;
        let met = told.recv().map_err(|_| Error::failed("MPI cannot be initialised twice in one process"))?;
        if !met.threads {
            return Err(Error::failed(format!("this MPI does not allow a program several threads: {}", met.library))
                .hint("use a build of it with thread support"));
        }
        if met.count == 1 && launch.ranks.is_some_and(|ranks| ranks > 1) {
            return Err(Error::usage(format!(
                "this is {}, but the MPI that this program was built with knows of one: {}",
                launch.described(),
                met.library
            ))
            .hint("start it with the mpirun of that MPI; under Slurm try srun --mpi=pmix, see srun --mpi=list"));
        }
        let Met { rank, count, name, .. } = met;
        Ok(Self { rank, count, name, sent: 0, orders, spare: Vec::new() })
    }

    /// Has the speaking thread do something; orders are done one after the other.
    fn order<T: Send + 'static>(&self, order: impl FnOnce(&mut Speaker) -> T + Send + 'static) -> Result<Receiver<T>> {
        let (tell, told) = channel();
        let order = Box::new(move |speaker: &mut Speaker| {
            // Whoever has stopped listening does not want to know.
            let _ = tell.send(order(speaker));
        });
        self.orders.send(order).map_err(|_| over())?;
        Ok(told)
    }

    fn ask<T: Send + 'static>(&self, order: impl FnOnce(&mut Speaker) -> T + Send + 'static) -> Result<T> {
        done(&self.order(order)?)
    }

    /// Waits until every rank has come to the same call; how many values or bytes each brings.
    fn meet(&mut self, call: Call, brings: usize) -> Result<Vec<usize>> {
        let mine = [call as u64, brings as u64];
        self.count_sent(size_of_val(&mine));
        let said = self.ask(move |speaker| speaker.meet(mine))?;
        let call = |number| usize::try_from(number).ok().and_then(|number| Call::ALL.get(number).copied());
        let said: Vec<_> = said.as_chunks::<2>().0.iter().map(|&[number, brings]| (call(number), brings)).collect();
        at_the_same_call(self.rank, &said)?;
        Ok(said.into_iter().map(|(_, brings)| usize::try_from(brings).unwrap_or(usize::MAX)).collect())
    }

    /// Notes bytes that have gone to each of the others.
    fn count_sent(&mut self, bytes: usize) {
        self.sent += bytes as u64 * (self.count as u64 - 1);
    }
}

impl Hosts for Mpi {
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
        self.meet(Call::AddUp, values.len())?;
        if self.count == 1 {
            return Ok(());
        }
        // While one piece is under way the next is copied.
        let mut flying: VecDeque<(&mut [f32], Receiver<Vec<f32>>)> = VecDeque::new();
        for part in values.chunks_mut(PIECE / size_of::<f32>()) {
            if flying.len() == 2
                && let Some((part, told)) = flying.pop_front()
            {
                self.spare.push(landed(part, &told)?);
            }
            let mut piece = self.spare.pop().unwrap_or_default();
            piece.clear();
            piece.extend_from_slice(part);
            piece.resize(part.len().next_multiple_of(self.count), 0.0);
            self.count_sent(2 * size_of_val(&piece[..]) / self.count);
            let order = move |speaker: &mut Speaker| {
                speaker.add_up(&mut piece);
                piece
            };
            flying.push_back((part, self.order(order)?));
        }
        for (part, told) in flying {
            self.spare.push(landed(part, &told)?);
        }
        Ok(())
    }

    fn gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let lengths = self.meet(Call::Gather, mine.len())?;
        self.count_sent(mine.len());
        let mine = mine.to_vec();
        self.ask(move |speaker| speaker.gather(&mine, &lengths))
    }

    fn broadcast(&mut self, from: usize, bytes: &mut Vec<u8>) -> Result<()> {
        let lengths = self.meet(Call::Broadcast, bytes.len())?;
        let length = *lengths.get(from).ok_or_else(|| Error::failed(format!("there is no rank {from}")))?;
        if self.rank == from {
            self.count_sent(length);
        }
        let mut mine = mem::take(bytes);
        *bytes = self.ask(move |speaker| {
            speaker.broadcast(from, length, &mut mine);
            mine
        })?;
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        self.meet(Call::Barrier, 0).map(|_| ())
    }

    fn finish(&mut self) -> Result<()> {
        self.meet(Call::Finish, 0)?;
        self.ask(|speaker| speaker.universe = None)
    }

    fn abort(&self, code: u8) {
        let order: Order = Box::new(move |speaker| speaker.world.abort(code.into()));
        if self.orders.send(order).is_ok() {
            thread::sleep(PATIENCE);
        }
    }
}

fn over() -> Error {
    Error::failed("the thread that speaks MPI has ended")
}

fn done<T>(told: &Receiver<T>) -> Result<T> {
    told.recv().map_err(|_| over())
}

/// Takes a summed piece back to where it came from; its buffer.
fn landed(part: &mut [f32], told: &Receiver<Vec<f32>>) -> Result<Vec<f32>> {
    let piece = done(told)?;
    part.copy_from_slice(&piece[..part.len()]);
    Ok(piece)
}

/// What the speaking thread has; it never leaves it.
struct Speaker {
    /// None after the finish.
    universe: Option<Universe>,
    world: SimpleCommunicator,
    rank: usize,
    count: usize,
    received: Vec<f32>,
}

/// The speaking thread.
fn speak(orders: &Receiver<Order>, tell: &Sender<Met>) {
    let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Funneled) else { return };
    let world = universe.world();
    let (rank, count) = (world.rank() as usize, world.size() as usize);
    let met = Met {
        rank,
        count,
        name: processor_name().unwrap_or_else(|_| format!("host of rank {rank}")),
        library: library_version().map_or_else(|_| "?".into(), |text| text.lines().next().unwrap_or("?").into()),
        threads: threading >= Threading::Funneled,
    };
    let mut speaker = Speaker { universe: Some(universe), world, rank, count, received: Vec::new() };
    if tell.send(met).is_ok() {
        for order in orders {
            order(&mut speaker);
        }
    }
    // Not finished, so something went wrong. Finalising would wait for the others, who wait for this rank; without it
    // the launcher ends them when this process exits.
    mem::forget(speaker.universe);
}

/// Waits until a call of MPI is done.
fn complete<'a, D: ?Sized>(longest_break: Duration, mut request: Request<'a, D, impl Scope<'a>>) {
    let start = Instant::now();
    while let Err(unfinished) = request.test() {
        request = unfinished;
        match start.elapsed() {
            waited if waited < EAGER => thread::yield_now(),
            waited => thread::sleep((waited / 16).clamp(BREAK, longest_break)),
        }
    }
}

impl Speaker {
    fn meet(&mut self, mine: [u64; 2]) -> Vec<u64> {
        let mut said = vec![0; 2 * self.count];
        scope(|scope| complete(LONG_BREAK, self.world.immediate_all_gather_into(scope, &mine[..], &mut said[..])));
        said
    }

    /// The sum over all ranks of a piece that is equally long everywhere, a multiple of their number.
    ///
    /// MPI_Allreduce would do it in one call, but how it sums is the library's choice: by the algorithm that it takes
    /// for this size, number of ranks and network, parts are added in other orders, and the standard only recommends
    /// that a repeated call gives the same result. Here each rank gets one slice from all, adds it in the order of the
    /// ranks, and hands it out: as many bytes on the wire as the best reduction, every element added in one place.
    fn add_up(&mut self, piece: &mut [f32]) {
        let mut received = mem::take(&mut self.received);
        received.resize(piece.len(), 0.0);
        scope(|scope| complete(BREAK, self.world.immediate_all_to_all_into(scope, &*piece, &mut received[..])));
        let (sum, others) = received.split_at_mut(piece.len() / self.count);
        for other in others.chunks_exact(sum.len().max(1)) {
            for (sum, value) in sum.iter_mut().zip(other) {
                *sum += value;
            }
        }
        scope(|scope| complete(BREAK, self.world.immediate_all_gather_into(scope, &*sum, piece)));
        self.received = received;
    }

    fn gather(&mut self, mine: &[u8], lengths: &[usize]) -> Vec<Vec<u8>> {
        let mut all: Vec<Vec<u8>> = lengths.iter().map(|&length| Vec::with_capacity(length)).collect();
        let share = PIECE / self.count;
        let longest = lengths.iter().copied().max().unwrap_or(0);
        for start in (0..longest).step_by(share) {
            let part = |length: usize| length.saturating_sub(start).min(share);
            let counts: Vec<c_int> = lengths.iter().map(|&length| part(length) as c_int).collect();
            let begins = |places: &mut c_int, count: &c_int| Some(mem::replace(places, *places + count));
            let places: Vec<c_int> = counts.iter().scan(0, begins).collect();
            let mine = &mine[start.min(mine.len())..][..part(mine.len())];
            let mut received = vec![0_u8; counts.iter().sum::<c_int>() as usize];
            let mut parts = PartitionMut::new(&mut received[..], &counts[..], &places[..]);
            scope(|scope| complete(BREAK, self.world.immediate_all_gather_varcount_into(scope, mine, &mut parts)));
            for (all, (&place, &count)) in all.iter_mut().zip(places.iter().zip(&counts)) {
                all.extend_from_slice(&received[place as usize..][..count as usize]);
            }
        }
        all
    }

    fn broadcast(&mut self, from: usize, length: usize, bytes: &mut Vec<u8>) {
        if self.rank != from {
            bytes.clear();
            bytes.resize(length, 0);
        }
        let root = self.world.process_at_rank(from as c_int);
        for part in bytes.chunks_mut(PIECE) {
            scope(|scope| complete(BREAK, root.immediate_broadcast_into(scope, part)));
        }
    }
}
