//! Memory that the host fills in place.
//!
//! Where the device is the host's processor its memory is the process's own, fresh from the system, and a write through
//! staging memory is two copies there, the second by one thread, which spends most of its time waiting for the system to make
//! pages (docs/kernels.md, Loading). Here several threads make them, and copy once.

use rayon::prelude::*;

use super::{buffer::Buffer, context::Gpu};

/// In smaller buffers nothing is gained.
pub(super) const LEAST_BYTES: u64 = 1 << 20;
/// Bytes that a thread copies at a time.
const PIECE: usize = 1 << 20;

/// A buffer whose content is on its way, and which no command names before it is there.
pub struct Arriving {
    gpu: Gpu,
    buffer: Buffer,
    place: Option<Place>,
}

impl Arriving {
    pub(super) fn new(gpu: &Gpu, buffer: Buffer, place: Option<Place>) -> Self {
        Self { gpu: gpu.clone(), buffer, place }
    }

    /// Puts `bytes` at a byte offset, both multiples of 4; the same place never twice.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        match &mut self.place {
            // The memory goes when the device is lost, and no earlier.
            Some(place) => self.gpu.while_alive(|| place.write(offset as usize, bytes)),
            None => self.gpu.write(&self.buffer, offset, bytes),
        }
    }

    /// The buffer. Failures are told as everywhere, at the next readback.
    pub fn finish(self) -> Buffer {
        self.buffer
    }
}

/// Where the content of a new buffer lies. Alive as long as the buffer, with which it stays in an [`Arriving`].
pub(super) struct Place {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the memory belongs to no thread, and is only reached through `&mut self`.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset <= self.bytes && bytes.len() <= self.bytes - offset, "{} bytes at {offset}", bytes.len());
        // SAFETY: the range lies inside the buffer, which lives and which no command names; bytes from the system are initialised.
        let to = unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), bytes.len()) };
        to.par_chunks_mut(PIECE).zip(bytes.par_chunks(PIECE)).for_each(|(to, from)| {
            make_pages(from, Pages::Read);
            make_pages(to, Pages::Write);
            to.copy_from_slice(from);
        });
    }
}

/// What pages are wanted for.
enum Pages {
    Read,
    Write,
}

/// Asks the system for the pages of some memory at once, which takes half the time of one by one. A system that does not know
/// this (Linux before 5.14) refuses, and makes them as they are reached.
#[cfg(target_os = "linux")]
fn make_pages(memory: &[u8], wanted: Pages) {
    const PAGE: usize = 4096;
    let (start, end) = (memory.as_ptr() as usize, memory.as_ptr() as usize + memory.len());
    let start = start / PAGE * PAGE;
    let advice = match wanted {
        Pages::Read => libc::MADV_POPULATE_READ,
        Pages::Write => libc::MADV_POPULATE_WRITE,
    };
    // SAFETY: no content changes.
    unsafe { libc::madvise(start as *mut libc::c_void, end - start, advice) };
}

#[cfg(not(target_os = "linux"))]
fn make_pages(_: &[u8], _: Pages) {}

/// A buffer in memory that the host can write, and where; none where the device is not Vulkan's, or its memory needs more
/// than writing to be seen by the device. It also is none where memory is short, which the usual way of making it then tells.
#[cfg(any(target_os = "linux", target_os = "windows"))]
pub(super) fn make(device: &wgpu::Device, size: u64, usage: wgpu::BufferUsages) -> Option<(wgpu::Buffer, Place)> {
    use wgpu::{
        hal::{BufferDescriptor, Device, MemoryFlags, api::Vulkan},
        wgt::BufferUses,
    };
    let descriptor = BufferDescriptor {
        label: None,
        size,
        usage: BufferUses::MAP_WRITE
            | BufferUses::STORAGE_READ_WRITE
            | BufferUses::UNIFORM
            | BufferUses::COPY_SRC
            | BufferUses::COPY_DST,
        memory_flags: MemoryFlags::PREFER_COHERENT,
    };
    // SAFETY: the buffer is made by this device with what `usage` asks for (and for being mapped, which wgpu need not know),
    // and stays mapped as long as its memory lives. Its content is unspecified, as the pool's buffers are to their users.
    unsafe {
        let vulkan = device.as_hal::<Vulkan>()?;
        let buffer = vulkan.create_buffer(&descriptor).ok()?;
        let mapping = match vulkan.map_buffer(&buffer, 0..size) {
            Ok(mapping) if mapping.is_coherent => mapping,
            _ => {
                vulkan.destroy_buffer(buffer);
                return None;
            }
        };
        drop(vulkan);
        let place = Place { start: mapping.ptr.as_ptr(), bytes: size as usize };
        let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
        Some((device.create_buffer_from_hal::<Vulkan>(buffer, &descriptor), place))
    }
}

#[cfg(not(any(target_os = "linux", target_os = "windows")))]
pub(super) fn make(_: &wgpu::Device, _: u64, _: wgpu::BufferUsages) -> Option<(wgpu::Buffer, Place)> {
    None
}
