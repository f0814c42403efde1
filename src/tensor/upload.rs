//! A tensor's content in pieces, as a file gives it.

use std::sync::Arc;

use super::{Dtype, Tensor};
use crate::gpu::{Arriving, Gpu};

/// Smaller pieces are gathered up to this many bytes, so that each is not a submission of its own.
const GATHERED: usize = 1 << 20;

/// A tensor on its way to the device. The host holds a few staging buffers for all of them, whatever their size.
pub struct Upload {
    gpu: Gpu,
    dtype: Dtype,
    shape: Vec<usize>,
    buffer: Arriving,
    /// Bytes on their way.
    sent: usize,
    /// What is too small to be sent alone, or ends inside a word.
    pending: Vec<u8>,
}

impl Upload {
    pub(super) fn new(gpu: &Gpu, dtype: Dtype, shape: &[usize]) -> Self {
        let buffer = gpu.arriving(dtype.padded_bytes(shape.iter().product()));
        Self { gpu: gpu.clone(), dtype, shape: shape.to_vec(), buffer, sent: 0, pending: Vec::new() }
    }

    /// Bytes that are still to come.
    pub fn missing(&self) -> usize {
        self.len() * self.dtype.bytes() - self.sent - self.pending.len()
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Elements of the tensor.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next bytes, in file order (little-endian); elements may be cut anywhere. Never more than are missing.
    pub fn push(&mut self, mut bytes: &[u8]) {
        assert!(
            bytes.len() <= self.missing(),
            "{} bytes for a tensor of shape {:?}, which lacks {}",
            bytes.len(),
            self.shape,
            self.missing()
        );
        while !bytes.is_empty() {
            if self.pending.is_empty() && bytes.len() >= GATHERED {
                let (whole, rest) = bytes.split_at(bytes.len() / 4 * 4);
                self.send(whole);
                bytes = rest;
            } else {
                let (now, rest) = bytes.split_at(bytes.len().min(GATHERED - self.pending.len()));
                self.pending.extend_from_slice(now);
                bytes = rest;
                if self.pending.len() == GATHERED {
                    self.send_pending();
                }
            }
        }
    }

    /// The tensor, all of whose bytes have been pushed. Failures are told as everywhere, at the next readback.
    pub fn finish(mut self) -> Tensor {
        assert_eq!(self.missing(), 0, "bytes that a tensor of shape {:?} still lacks", self.shape);
        self.pending.resize(self.pending.len().next_multiple_of(4), 0);
        self.send_pending();
        Tensor {
            gpu: self.gpu,
            buffer: Arc::new(self.buffer.finish()),
            dtype: self.dtype,
            offset: 0,
            shape: self.shape,
            scales: None,
            rounding: None,
        }
    }

    fn send_pending(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        self.send(&pending);
        self.pending = pending;
        self.pending.clear();
    }

    fn send(&mut self, bytes: &[u8]) {
        self.buffer.write(self.sent as u64, bytes);
        self.sent += bytes.len();
    }
}
