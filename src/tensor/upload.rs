//! A tensor's content in pieces, as a file gives it.

use super::{Dtype, Tensor};

/// Smaller pieces are gathered up to this many bytes, so that each is not a submission of its own.
const GATHERED: usize = 1 << 20;

/// A tensor on its way to the device. The host holds a few staging buffers for all of them, whatever their size.
pub struct Upload {
    tensor: Tensor,
    /// Bytes on their way.
    sent: usize,
    /// What is too small to be sent alone, or ends inside a word.
    pending: Vec<u8>,
}

impl Upload {
    pub(super) fn new(tensor: Tensor) -> Self {
        Self { tensor, sent: 0, pending: Vec::new() }
    }

    /// Bytes that are still to come.
    pub fn missing(&self) -> usize {
        self.tensor.len() * self.tensor.dtype.bytes() - self.sent - self.pending.len()
    }

    pub fn dtype(&self) -> Dtype {
        self.tensor.dtype
    }

    /// Elements of the tensor.
    pub fn len(&self) -> usize {
        self.tensor.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tensor.is_empty()
    }

    /// The next bytes, in file order (little-endian); elements may be cut anywhere. Never more than are missing.
    pub fn push(&mut self, mut bytes: &[u8]) {
        assert!(
            bytes.len() <= self.missing(),
            "{} bytes for {:?}, which lacks {}",
            bytes.len(),
            self.tensor,
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
        assert_eq!(self.missing(), 0, "bytes that {:?} still lacks", self.tensor);
        self.pending.resize(self.pending.len().next_multiple_of(4), 0);
        self.send_pending();
        self.tensor
    }

    fn send_pending(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        self.send(&pending);
        self.pending = pending;
        self.pending.clear();
    }

    fn send(&mut self, bytes: &[u8]) {
        self.tensor.gpu.write(&self.tensor.buffer, self.tensor.byte_offset(0) + self.sent as u64, bytes);
        self.sent += bytes.len();
    }
}
