//! Device buffers, and the pool that hands them out again.
//!
//! The pool counts the bytes that are in use and remembers the most there were: what a step needed. It never holds much
//! more than that: before it makes a buffer that would not fit below, it lets free ones go.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::account::{Account, Ledger};

/// A device buffer. Dropping it gives it back to the pool: commands recorded later may use it again,
/// which is safe because the device runs commands in the order of their recording.
pub struct Buffer {
    memory: Option<Memory>,
    /// Unique for the life of the device; keys the bind-group cache.
    pub(super) id: u64,
    size: u64,
    account: Account,
    /// What was asked for, in whole units: what counts as in use.
    needed: u64,
    pool: Arc<Pool>,
}

/// What lies behind a buffer.
enum Memory {
    Device(wgpu::Buffer),
    /// Nothing: the device only counts ([`Gpu::counting`](super::Gpu::counting)).
    Counted,
}

impl Buffer {
    /// Bytes that may be used (the pool may have rounded the request up).
    pub fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn raw(&self) -> &wgpu::Buffer {
        match &self.memory {
            Some(Memory::Device(raw)) => raw,
            _ => unreachable!("a buffer of a real device has its wgpu buffer until it is dropped"),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.ledger().give_back(self.account, self.size + self.pool.padding);
            self.pool.shelf().put(self.needed, self.size, (memory, self.id));
        }
    }
}

/// What buffers may be used for.
pub(super) const USAGE: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE
    .union(wgpu::BufferUsages::UNIFORM)
    .union(wgpu::BufferUsages::COPY_SRC)
    .union(wgpu::BufferUsages::COPY_DST);

/// Requests are counted in units of this many bytes.
pub const UNIT: u64 = 256;
/// Free buffers may lie about up to this many bytes, or a quarter of what comes and goes: with a 16th, steps of 7B let
/// buffers go twenty times each, and the device had nothing to do meanwhile.
const SLACK: u64 = 4 << 20;

/// What is free and what is in use, whatever the buffers are.
struct Shelf<R> {
    /// By size; of each size the one that has been free for the longest time in front.
    free: BTreeMap<u64, VecDeque<(u64, R)>>,
    clock: u64,
    /// Bytes in use now; the most since [`Pool::begin_peak`], and the most ever.
    used: u64,
    peak: u64,
    highest: u64,
    /// In use when what was free was last forgotten: weights, which stay.
    floor: u64,
    /// Bytes of all buffers, and how many there are.
    held: u64,
    count: u64,
}

impl<R> Default for Shelf<R> {
    fn default() -> Self {
        Self { free: BTreeMap::new(), clock: 0, used: 0, peak: 0, highest: 0, floor: 0, held: 0, count: 0 }
    }
}

impl<R> Shelf<R> {
    /// Counts `needed` bytes as used, and gives a free buffer of `size` bytes or slightly more.
    fn take(&mut self, needed: u64, size: u64) -> Option<(u64, R)> {
        self.used += needed;
        self.peak = self.peak.max(self.used);
        self.highest = self.highest.max(self.used);
        let (&size, list) = self.free.range_mut(size..=size + size / 32).find(|(_, list)| !list.is_empty())?;
        let (_, buffer) = list.pop_back()?;
        if list.is_empty() {
            self.free.remove(&size);
        }
        Some((size, buffer))
    }

    fn put(&mut self, needed: u64, size: u64, buffer: R) {
        self.used -= needed;
        self.clock += 1;
        self.free.entry(size).or_default().push_back((self.clock, buffer));
    }

    /// What must go before a buffer of `size` bytes may be made: those that have been free for the longest time.
    fn make_room(&mut self, size: u64) -> Vec<R> {
        let moving = self.highest.saturating_sub(self.floor);
        let most = self.highest + SLACK.max(moving / 4);
        let mut gone = Vec::new();
        if self.held + size <= most {
            return gone;
        }
        // Somewhat more than must be, so that it need not be done for every buffer.
        let most = most - moving / 32;
        while self.held + size > most {
            let oldest = self.free.iter().min_by_key(|(_, list)| list.front().map_or(u64::MAX, |(since, _)| *since));
            let Some((&size, _)) = oldest else { break };
            if let Some((_, buffer)) = self.free.get_mut(&size).and_then(VecDeque::pop_front) {
                gone.push(buffer);
                self.held -= size;
                self.count -= 1;
            }
            if self.free.get(&size).is_some_and(VecDeque::is_empty) {
                self.free.remove(&size);
            }
        }
        gone
    }

    /// Forgets all that is free.
    fn clear(&mut self) {
        for (size, list) in std::mem::take(&mut self.free) {
            self.held -= size * list.len() as u64;
            self.count -= list.len() as u64;
        }
        (self.highest, self.floor) = (self.used, self.used);
    }
}

/// Free buffers by size, and what the device holds in all.
pub(super) struct Pool {
    /// Bytes behind the end of every buffer, so that a uniform of fixed size can be bound at any place inside.
    padding: u64,
    shelf: Mutex<Shelf<(Memory, u64)>>,
    next_id: AtomicU64,
    ledger: Mutex<Ledger>,
}

impl Pool {
    pub fn new(padding: u64) -> Self {
        Self { padding, shelf: Mutex::default(), next_id: AtomicU64::new(0), ledger: Mutex::default() }
    }

    /// What is held for what.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf<(Memory, u64)>> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes allocated on the device, free buffers of the pool included.
    pub fn held(&self) -> u64 {
        let shelf = self.shelf();
        shelf.held + self.padding * shelf.count
    }

    /// The most bytes that were in use at once since [`Pool::begin_peak`], each request in whole [`UNIT`]s.
    pub fn peak(&self) -> u64 {
        self.shelf().peak
    }

    pub fn begin_peak(&self) {
        let mut shelf = self.shelf();
        shelf.peak = shelf.used;
    }

    /// Forgets the free buffers; the device takes their memory back once it has finished with them.
    pub fn trim(&self) {
        self.shelf().clear();
    }

    /// A buffer of at least `size` bytes, whose content is unspecified. One that is not free is asked of `make`, which gives
    /// none where there is no device: then it is only counted. `let_go` must forget the buffers of these ids before.
    pub fn take(
        self: &Arc<Self>,
        size: u64,
        make: impl FnOnce(u64) -> Option<wgpu::Buffer>,
        let_go: impl FnOnce(&[u64]),
    ) -> Buffer {
        let needed = size.max(1).next_multiple_of(UNIT);
        let size = rounded(size);
        let buffer = |memory, id, size| {
            let account = self.ledger().take(size + self.padding, self.held());
            Buffer { memory: Some(memory), id, size, needed, account, pool: self.clone() }
        };
        let mut shelf = self.shelf();
        if let Some((size, (raw, id))) = shelf.take(needed, size) {
            drop(shelf);
            return buffer(raw, id, size);
        }
        let gone = shelf.make_room(size);
        shelf.held += size;
        shelf.count += 1;
        drop(shelf);
        if !gone.is_empty() {
            let ids: Vec<u64> = gone.iter().map(|(_, id)| *id).collect();
            drop(gone);
            let_go(&ids);
        }
        let memory = make(size + self.padding).map_or(Memory::Counted, Memory::Device);
        buffer(memory, self.next_id.fetch_add(1, Ordering::Relaxed), size)
    }
}

/// Sizes are rounded so that steps of slightly different length share buffers: to [`UNIT`]s, and above 16 KiB to a
/// 64th of the power of two below.
fn rounded(size: u64) -> u64 {
    let size = size.max(UNIT);
    let step = if size <= 64 * UNIT { UNIT } else { 1 << (63 - size.leading_zeros() - 6) };
    size.next_multiple_of(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_wastes_at_most_a_64th() {
        for size in [1u64, 255, 256, 257, 4097, 16_385, 65_537, 1_000_003, 524_288_000] {
            let r = rounded(size);
            assert!(r >= size && r.is_multiple_of(UNIT), "{size} -> {r}");
            assert!(size <= 64 * UNIT || r - size <= size / 64, "{size} -> {r}");
        }
    }

    /// Takes a buffer, made if none is free; how many had to go for it.
    fn take(shelf: &mut Shelf<()>, size: u64) -> usize {
        if shelf.take(size, size).is_some() {
            return 0;
        }
        let gone = shelf.make_room(size).len();
        shelf.held += size;
        shelf.count += 1;
        gone
    }

    #[test]
    fn free_buffers_go_before_more_is_held_than_was_ever_used() {
        const MIB: u64 = 1 << 20;
        let mut shelf = Shelf::default();
        for _ in 0..10 {
            take(&mut shelf, 100 * MIB);
        }
        assert_eq!((shelf.used, shelf.peak, shelf.held), (1000 * MIB, 1000 * MIB, 1000 * MIB));
        for _ in 0..10 {
            shelf.put(100 * MIB, 100 * MIB, ());
        }
        // Another size, of which nothing is free: the first two lie beside what is there.
        let gone: usize = (0..9).map(|_| take(&mut shelf, 110 * MIB)).sum();
        assert!((7..=8).contains(&gone), "{gone}");
        assert_eq!((shelf.used, shelf.peak), (990 * MIB, 1000 * MIB));
        assert!(shelf.held <= 1000 * MIB + 1000 * MIB / 4, "{}", shelf.held);
        // The same again finds what it needs.
        (0..9).for_each(|_| shelf.put(110 * MIB, 110 * MIB, ()));
        assert_eq!((0..9).map(|_| take(&mut shelf, 110 * MIB)).sum::<usize>(), 0);
        shelf.clear();
        assert_eq!((shelf.held, shelf.highest), (990 * MIB, 990 * MIB));
    }

    #[test]
    fn the_oldest_free_buffer_goes_first() {
        let mut shelf = Shelf::default();
        let size = SLACK;
        (shelf.used, shelf.highest, shelf.held, shelf.count) = (2 * size, 2 * size, 2 * size, 2);
        shelf.put(size, size, "first");
        shelf.put(size, size / 2, "second");
        shelf.held -= size / 2;
        assert_eq!(shelf.make_room(size), [""; 0]);
        assert_eq!(shelf.make_room(2 * size), ["first"]);
        assert_eq!(shelf.make_room(4 * size), ["second"]);
    }
}
