//! Bytes on their way to the host beside other work: a few buffers take turns between device and host, so that what
//! waits there is bounded whatever is sent, and the host waits only for the oldest of them.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
};

use super::waiting;

/// Bytes of one buffer between device and host.
pub(super) const SLOT_BYTES: usize = 16 << 20;
const SLOTS: usize = 3;

/// The host's copy of a part of a buffer, once it is there.
pub struct Download {
    arrived: Arc<Mutex<Arrived>>,
}

#[derive(Default)]
struct Arrived {
    bytes: Vec<u8>,
    missing: usize,
}

impl Download {
    /// Of `size` bytes.
    pub(super) fn new(size: usize) -> Self {
        Self { arrived: Arc::new(Mutex::new(Arrived { bytes: vec![0; size], missing: size })) }
    }

    fn arrived(&self) -> MutexGuard<'_, Arrived> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the bytes; all of them must have arrived.
    pub(super) fn take(self) -> Vec<u8> {
        std::mem::take(&mut self.arrived().bytes)
    }
}

struct Slot {
    buffer: wgpu::Buffer,
    submission: wgpu::SubmissionIndex,
    mapped: mpsc::Receiver<Result<(), wgpu::BufferAsyncError>>,
    to: Arc<Mutex<Arrived>>,
    offset: usize,
    size: usize,
}

/// Buffers between device and host: those on their way, the oldest in front, and those at rest.
#[derive(Default)]
pub(super) struct Downloads {
    moving: VecDeque<Slot>,
    resting: Vec<wgpu::Buffer>,
}

impl Downloads {
    /// A buffer of [`SLOT_BYTES`]; waits for the oldest where all are on their way. `failed` tells that the device
    /// will answer no more.
    pub fn buffer(&mut self, device: &wgpu::Device, failed: &dyn Fn() -> bool) -> Result<wgpu::Buffer, String> {
        if self.moving.len() >= SLOTS {
            self.land(device, failed)?;
        }
        Ok(self.resting.pop().unwrap_or_else(|| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: SLOT_BYTES as u64,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        }))
    }

    /// Takes a buffer that `submission` fills with `size` bytes for `to`, `offset` bytes in.
    pub fn send(
        &mut self,
        buffer: wgpu::Buffer,
        submission: wgpu::SubmissionIndex,
        to: &Download,
        offset: usize,
        size: usize,
    ) {
        let (sender, mapped) = mpsc::channel();
        buffer.slice(..size as u64).map_async(wgpu::MapMode::Read, move |result| {
            let _ = sender.send(result);
        });
        self.moving.push_back(Slot { buffer, submission, mapped, to: to.arrived.clone(), offset, size });
    }

    /// Waits until all of `download` is there.
    pub fn finish(
        &mut self,
        device: &wgpu::Device,
        download: &Download,
        failed: &dyn Fn() -> bool,
    ) -> Result<(), String> {
        while download.arrived().missing > 0 {
            self.land(device, failed)?;
        }
        Ok(())
    }

    /// Whether all of `download` is there; does not wait.
    pub fn has_arrived(&mut self, device: &wgpu::Device, download: &Download) -> Result<bool, String> {
        waiting::look(device)?;
        while download.arrived().missing > 0 {
            let Some(result) = self.moving.front().and_then(|slot| slot.mapped.try_recv().ok()) else {
                return Ok(false);
            };
            self.moving.pop_front().map_or(Ok(()), |slot| self.empty(slot, result))?;
        }
        Ok(true)
    }

    /// Waits for the oldest buffer and empties it.
    fn land(&mut self, device: &wgpu::Device, failed: &dyn Fn() -> bool) -> Result<(), String> {
        let slot = self.moving.pop_front().ok_or("a download was never sent")?;
        let result = waiting::answer(device, Some(&slot.submission), &slot.mapped, failed)?;
        self.empty(slot, result)
    }

    /// Takes what has been `mapped` out of a buffer, which is at rest then.
    fn empty(&mut self, slot: Slot, mapped: Result<(), wgpu::BufferAsyncError>) -> Result<(), String> {
        mapped.map_err(|error| format!("memory of the host cannot be mapped: {error}"))?;
        {
            let range = slot.buffer.slice(..slot.size as u64).get_mapped_range().map_err(|error| error.to_string())?;
            let arrived = &mut *slot.to.lock().unwrap_or_else(PoisonError::into_inner);
            arrived.bytes[slot.offset..slot.offset + slot.size].copy_from_slice(&range);
            arrived.missing -= slot.size;
        }
        slot.buffer.unmap();
        self.resting.push(slot.buffer);
        Ok(())
    }

    /// Frees the buffers at rest.
    pub fn clear(&mut self) {
        self.resting.clear();
    }
}
