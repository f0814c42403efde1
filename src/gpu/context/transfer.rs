//! What goes to the device and comes back: recorded in the stream like dispatches, through staging memory.

use std::sync::mpsc;

use super::{Device, Gpu, LARGE_WRITE, Stream};
use crate::{
    error::Result,
    gpu::{
        buffer::Buffer,
        download::{self, Download},
        pace,
        staging::{SLOT_BYTES, Staging},
        waiting,
    },
};

impl Gpu {
    /// Records a copy of `bytes` into `buffer` at a byte offset, both multiples of 4. A large one waits until the
    /// device has taken earlier ones, so that the host holds no more than a few staging buffers.
    pub fn write(&self, buffer: &Buffer, offset: u64, bytes: &[u8]) {
        let Some(Device { device, .. }) = self.inner.device.as_ref().filter(|_| !bytes.is_empty()) else { return };
        if bytes.len() >= LARGE_WRITE {
            let staging = &mut *self.staging();
            for (index, part) in bytes.chunks(SLOT_BYTES).enumerate() {
                if let Err(error) =
                    self.write_staged(device, staging, buffer, offset + (index * SLOT_BYTES) as u64, part)
                {
                    self.failure().get_or_insert(error);
                    return;
                }
            }
            return;
        }
        let staging = device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: (bytes.len() as u64).next_multiple_of(8),
            usage: wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        });
        self.fill(&staging, bytes);
        staging.unmap();
        let stream = &mut *self.stream();
        self.record_copy(device, stream, (&staging, 0), (buffer.raw(), offset), bytes.len() as u64);
        if stream.recorded >= pace::DISPATCHES {
            self.submit(stream);
        }
    }

    fn write_staged(
        &self,
        device: &wgpu::Device,
        staging: &mut Staging,
        to: &Buffer,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), String> {
        let buffer = staging.take(device, &|| self.is_lost())?;
        self.fill(&buffer, bytes);
        buffer.unmap();
        let stream = &mut *self.stream();
        self.record_copy(device, stream, (&buffer, 0), (to.raw(), offset), bytes.len() as u64);
        if let Some(submission) = self.submit(stream) {
            staging.give_back(buffer, submission);
        }
        Ok(())
    }

    /// From and to are a buffer and a byte offset.
    fn record_copy(
        &self,
        device: &wgpu::Device,
        stream: &mut Stream,
        from: (&wgpu::Buffer, u64),
        to: (&wgpu::Buffer, u64),
        size: u64,
    ) {
        let encoder = outside_passes(device, stream);
        encoder.copy_buffer_to_buffer(from.0, from.1, to.0, to.1, size);
        stream.recorded += 1;
    }

    /// Records a copy of `size` bytes between two different buffers; offsets and size are multiples of 4.
    pub fn copy(&self, from: &Buffer, from_offset: u64, to: &Buffer, to_offset: u64, size: u64) {
        let Some(Device { device, .. }) = &self.inner.device else { return };
        self.record_copy(device, &mut self.stream(), (from.raw(), from_offset), (to.raw(), to_offset), size);
    }

    /// Records that `size` bytes become zero; offset and size are multiples of 4.
    pub fn clear(&self, buffer: &Buffer, offset: u64, size: u64) {
        let Some(Device { device, .. }) = &self.inner.device else { return };
        let stream = &mut *self.stream();
        let encoder = outside_passes(device, stream);
        encoder.clear_buffer(buffer.raw(), offset, Some(size));
        stream.recorded += 1;
    }

    /// Records that parts of buffers go to the host, one behind the other, and does not wait for them: only where three
    /// pieces are on their way already, for the oldest. A part is a byte offset and a size, multiples of 4.
    pub fn download(&self, parts: &[(&Buffer, (u64, u64))]) -> Download {
        let total = parts.iter().map(|(_, (_, size))| *size as usize).sum();
        let download = Download::new(total);
        let Some(Device { device, .. }) = &self.inner.device else { return download };
        let downloads = &mut *self.downloads();
        let mut parts = parts.iter().copied();
        let mut part = parts.next();
        for start in (0..total).step_by(download::SLOT_BYTES) {
            let piece = (total - start).min(download::SLOT_BYTES);
            let slot = match downloads.buffer(device, &|| self.has_failed()) {
                Ok(slot) => slot,
                Err(error) => {
                    self.failure().get_or_insert(error);
                    break;
                }
            };
            let stream = &mut *self.stream();
            let mut filled = 0;
            while let Some((buffer, (offset, size))) = part.filter(|_| filled < piece as u64) {
                let count = size.min(piece as u64 - filled);
                self.record_copy(device, stream, (buffer.raw(), offset), (&slot, filled), count);
                filled += count;
                part = if count < size { Some((buffer, (offset + count, size - count))) } else { parts.next() };
            }
            if let Some(submission) = self.submit(stream) {
                downloads.send(slot, submission, &download, start, piece);
            }
        }
        download
    }

    /// Whether nothing has to be waited for any more to have a download's bytes, or to be told what has failed.
    pub fn has_arrived(&self, download: &Download) -> bool {
        let Some(Device { device, .. }) = &self.inner.device else { return true };
        let arrived = self.downloads().has_arrived(device, download);
        arrived.unwrap_or_else(|error| {
            self.failure().get_or_insert(error);
            true
        })
    }

    /// The bytes of a download, waited for if need be. After a failure, which is told as everywhere, they are zeros.
    pub fn downloaded(&self, download: Download) -> Vec<u8> {
        if let Some(Device { device, .. }) = &self.inner.device
            && let Err(error) = self.downloads().finish(device, &download, &|| self.has_failed())
        {
            self.failure().get_or_insert(error);
        }
        download.take()
    }

    /// Submits what is recorded, waits for it and copies `size` bytes of `buffer` back.
    ///
    /// # Errors
    /// `Memory` or `Device` for anything that has failed on the device since the last call.
    pub fn read(&self, buffer: &Buffer, offset: u64, size: u64) -> Result<Vec<u8>> {
        let Some(Device { device, .. }) = &self.inner.device else {
            self.wait()?;
            return Ok(vec![0; size as usize]);
        };
        let staging = device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: size.max(4).next_multiple_of(4),
            usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
            mapped_at_creation: false,
        });
        {
            let stream = &mut *self.stream();
            self.record_copy(device, stream, (buffer.raw(), offset), (&staging, 0), size);
            self.submit(stream);
        }
        let (sender, receiver) = mpsc::channel();
        staging.slice(..).map_async(wgpu::MapMode::Read, move |result| {
            let _ = sender.send(result);
        });
        self.wait()?;
        waiting::answer(device, None, &receiver, &|| self.is_lost())
            .map_err(|error| self.device_error(error))?
            .map_err(|error| self.device_error(error.to_string()))?;
        let range = staging.slice(..).get_mapped_range().map_err(|error| self.device_error(error.to_string()))?;
        let mut bytes = range.to_vec();
        bytes.truncate(size as usize);
        Ok(bytes)
    }
}

/// The stream's encoder, behind its last pass.
fn outside_passes<'s>(device: &wgpu::Device, stream: &'s mut Stream) -> &'s mut wgpu::CommandEncoder {
    stream.pass = None;
    stream.encoder.get_or_insert_with(|| device.create_command_encoder(&Default::default()))
}
