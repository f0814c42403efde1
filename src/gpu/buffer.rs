//! Device buffers, and the pool that hands them out again.

use std::{
    collections::BTreeMap,
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
            self.pool.free().entry(self.size).or_default().push((memory, self.id));
        }
    }
}

type FreeLists = BTreeMap<u64, Vec<(Memory, u64)>>;

/// Free buffers by size, and what the device holds in all.
pub(super) struct Pool {
    /// Bytes behind the end of every buffer, so that a uniform of fixed size can be bound at any place inside.
    padding: u64,
    free: Mutex<FreeLists>,
    next_id: AtomicU64,
    held: AtomicU64,
    ledger: Mutex<Ledger>,
}

impl Pool {
    pub fn new(padding: u64) -> Self {
        Self {
            padding,
            free: Mutex::default(),
            next_id: AtomicU64::new(0),
            held: AtomicU64::new(0),
            ledger: Mutex::default(),
        }
    }

    /// What is held for what.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self) -> MutexGuard<'_, FreeLists> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes allocated on the device, free buffers of the pool included.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Forgets the free buffers; the device takes their memory back once it has finished with them.
    pub fn trim(&self) {
        let freed = std::mem::take(&mut *self.free());
        let bytes: u64 = freed.iter().map(|(size, list)| (size + self.padding) * list.len() as u64).sum();
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// A buffer of at least `size` bytes, whose content is unspecified; without a device it is only counted.
    pub fn take(self: &Arc<Self>, device: Option<&wgpu::Device>, size: u64) -> Buffer {
        let size = rounded(size);
        let buffer = |memory, id, size| {
            let account = self.ledger().take(size + self.padding, self.held());
            Buffer { memory: Some(memory), id, size, account, pool: self.clone() }
        };
        // A somewhat larger free buffer will do; a much larger one would waste memory.
        let mut free = self.free();
        let found = free.range_mut(size..=size + size / 8).find(|(_, list)| !list.is_empty());
        if let Some((&size, list)) = found
            && let Some((memory, id)) = list.pop()
        {
            drop(free);
            return buffer(memory, id, size);
        }
        drop(free);
        let memory = device.map_or(Memory::Counted, |device| {
            Memory::Device(device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: size + self.padding,
                usage: wgpu::BufferUsages::STORAGE
                    | wgpu::BufferUsages::UNIFORM
                    | wgpu::BufferUsages::COPY_SRC
                    | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            }))
        });
        self.held.fetch_add(size + self.padding, Ordering::Relaxed);
        buffer(memory, self.next_id.fetch_add(1, Ordering::Relaxed), size)
    }
}

/// Sizes are rounded so that steps of slightly different length share buffers: to 256 bytes, and above 4 KiB
/// to a sixteenth of the power of two below.
fn rounded(size: u64) -> u64 {
    let size = size.max(256);
    let step = if size <= 4096 { 256 } else { 1 << (63 - size.leading_zeros() - 4) };
    size.div_ceil(step) * step
}

#[cfg(test)]
mod tests {
    use super::rounded;

    #[test]
    fn rounding_wastes_at_most_a_sixteenth() {
        for size in [1u64, 255, 256, 257, 4097, 5000, 65_537, 1_000_003, 524_288_000] {
            let r = rounded(size);
            assert!(r >= size && r.is_multiple_of(256), "{size} -> {r}");
            assert!(size < 4096 || r - size <= size / 16, "{size} -> {r}");
        }
    }
}
