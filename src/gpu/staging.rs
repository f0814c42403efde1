//! Staging memory of large writes: a few mapped buffers, filled in turn and mapped again once the device has read
//! them. It bounds what the host holds whatever is written, and no write pays for a fresh, zeroed allocation.

use std::{collections::VecDeque, sync::mpsc};

use super::waiting;

/// Bytes of one staging buffer.
pub(super) const SLOT_BYTES: usize = 16 << 20;
const SLOTS: usize = 3;
/// Bytes of all of them.
pub const STAGING_BYTES: u64 = (SLOTS * SLOT_BYTES) as u64;

/// Staging buffers, the one that was filled first in front.
#[derive(Default)]
pub(super) struct Staging {
    slots: VecDeque<Slot>,
}

struct Slot {
    buffer: wgpu::Buffer,
    submission: wgpu::SubmissionIndex,
    mapped: mpsc::Receiver<Result<(), wgpu::BufferAsyncError>>,
}

impl Staging {
    /// A mapped buffer of [`SLOT_BYTES`]; waits where all are still being read, unless the device is `lost`.
    pub fn take(&mut self, device: &wgpu::Device, lost: &dyn Fn() -> bool) -> Result<wgpu::Buffer, String> {
        let mapped_again = match self.slots.front() {
            Some(slot) => match slot.mapped.try_recv() {
                Ok(result) => Some(result),
                Err(_) if self.slots.len() < SLOTS => None,
                Err(_) => Some(waiting::answer(device, Some(&slot.submission), &slot.mapped, lost)?),
            },
            None => None,
        };
        match mapped_again {
            Some(result) => {
                let slot = self.slots.pop_front().ok_or("no staging memory")?;
                result.map(|()| slot.buffer).map_err(|error| format!("staging memory cannot be mapped: {error}"))
            }
            None => Ok(device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: SLOT_BYTES as u64,
                usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: true,
            })),
        }
    }

    /// Takes a buffer back that `submission` reads.
    pub fn give_back(&mut self, buffer: wgpu::Buffer, submission: wgpu::SubmissionIndex) {
        let (sender, mapped) = mpsc::channel();
        buffer.slice(..).map_async(wgpu::MapMode::Write, move |result| {
            let _ = sender.send(result);
        });
        self.slots.push_back(Slot { buffer, submission, mapped });
    }

    /// Frees the buffers once the device has read them.
    pub fn clear(&mut self) {
        self.slots.clear();
    }
}
