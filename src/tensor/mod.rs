//! Tensors: a shape over a part of a device buffer. No arithmetic lives here.
//!
//! Elements are four bytes, `f32` unless an op says `u32`; layout is row-major.
//!
//! Shape letters, here and in every shader: B batch, T tokens, D hidden size, F intermediate size, H heads,
//! K key/value heads, E head size, V vocabulary, P patches, R LoRA rank; M, N, K in products.

use std::{fmt, sync::Arc};

use crate::{
    error::Result,
    gpu::{Binding, Buffer, Gpu, UNIFORM_BYTES},
};

/// A handle; clones share the memory.
#[derive(Clone)]
pub struct Tensor {
    gpu: Gpu,
    buffer: Arc<Buffer>,
    /// In elements.
    offset: usize,
    shape: Vec<usize>,
}

/// Parts of an arena start at multiples of this many elements, so that they can be bound on every device.
pub const ALIGNMENT: usize = 64;

impl Tensor {
    /// A tensor with unspecified content.
    pub fn empty(gpu: &Gpu, shape: &[usize]) -> Self {
        let elements: usize = shape.iter().product();
        Self { gpu: gpu.clone(), buffer: Arc::new(gpu.buffer(elements as u64 * 4)), offset: 0, shape: shape.to_vec() }
    }

    pub fn from_f32(gpu: &Gpu, data: &[f32], shape: &[usize]) -> Self {
        Self::from_bytes(gpu, bytemuck::cast_slice(data), shape)
    }

    pub fn from_u32(gpu: &Gpu, data: &[u32], shape: &[usize]) -> Self {
        Self::from_bytes(gpu, bytemuck::cast_slice(data), shape)
    }

    fn from_bytes(gpu: &Gpu, bytes: &[u8], shape: &[usize]) -> Self {
        assert_eq!(bytes.len(), shape.iter().product::<usize>() * 4, "data for shape {shape:?}");
        let tensor = Self::empty(gpu, shape);
        gpu.write(&tensor.buffer, 0, bytes);
        tensor
    }

    /// Replaces the content.
    pub fn write(&self, data: &[f32]) {
        assert_eq!(data.len(), self.len(), "data for shape {:?}", self.shape);
        self.gpu.write(&self.buffer, self.offset as u64 * 4, bytemuck::cast_slice(data));
    }

    /// Waits for the device and copies the content back.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let bytes = self.gpu.read(&self.buffer, self.offset as u64 * 4, self.len() as u64 * 4)?;
        Ok(bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
    }

    /// Copies the content of `from`, which is another buffer.
    pub fn copy_from(&self, from: &Tensor) {
        assert_eq!(self.len(), from.len(), "{:?} from {:?}", self.shape, from.shape);
        let bytes = self.len() as u64 * 4;
        self.gpu.copy(&from.buffer, from.offset as u64 * 4, &self.buffer, self.offset as u64 * 4, bytes);
    }

    /// Copies `rows` rows of `from`, starting at its row `from_row`, to the rows of `self` from `to_row` on.
    pub fn copy_rows(&self, to_row: usize, from: &Tensor, from_row: usize, rows: usize) {
        let width = self.cols();
        assert!(
            width == from.cols() && to_row + rows <= self.rows() && from_row + rows <= from.rows(),
            "rows in range"
        );
        let at = |tensor: &Tensor, row: usize| (tensor.offset + row * width) as u64 * 4;
        let size = (rows * width) as u64 * 4;
        self.gpu.copy(&from.buffer, at(from, from_row), &self.buffer, at(self, to_row), size);
    }

    /// The same elements under another shape.
    pub fn reshape(&self, shape: &[usize]) -> Self {
        assert_eq!(self.len(), shape.iter().product::<usize>(), "{:?} as {shape:?}", self.shape);
        Self { shape: shape.to_vec(), ..self.clone() }
    }

    /// A part that starts `offset` elements in, a multiple of [`ALIGNMENT`].
    pub fn part(&self, offset: usize, shape: &[usize]) -> Self {
        assert!(
            offset.is_multiple_of(ALIGNMENT) && offset + shape.iter().product::<usize>() <= self.len(),
            "a part inside"
        );
        Self { offset: self.offset + offset, shape: shape.to_vec(), ..self.clone() }
    }

    /// Rows `first..first + rows`; `first` is a multiple of [`ALIGNMENT`].
    pub fn row_part(&self, first: usize, rows: usize) -> Self {
        self.part(first * self.cols(), &[rows, self.cols()])
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The last dimension.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// All dimensions but the last, flattened.
    pub fn rows(&self) -> usize {
        self.shape[..self.shape.len().saturating_sub(1)].iter().product()
    }

    /// All of it, for a kernel.
    pub fn binding(&self) -> Binding<'_> {
        self.range(0, self.len())
    }

    /// `count` elements from `start` on, a multiple of [`ALIGNMENT`].
    pub fn range(&self, start: usize, count: usize) -> Binding<'_> {
        debug_assert!((self.offset + start).is_multiple_of(ALIGNMENT), "binding at element {}", self.offset + start);
        let offset = (self.offset + start) as u64 * 4;
        // Whole vec4s: every buffer, and every part of an arena, ends in padding.
        Binding { buffer: &self.buffer, offset, size: count.max(1).next_multiple_of(4) as u64 * 4, uniform: false }
    }

    /// `count` elements from any `start` on: a binding that begins up to [`ALIGNMENT`] elements earlier, and how many.
    pub fn range_from(&self, start: usize, count: usize) -> (Binding<'_>, usize) {
        let before = (self.offset + start) % ALIGNMENT;
        (self.range(start - before, count + before), before)
    }

    /// The elements from `start` on as a uniform of fixed size, and how many elements before `start` it begins
    /// (offsets of uniforms are aligned). For devices that run on the host's processor.
    pub fn uniform(&self, start: usize) -> (Binding<'_>, usize) {
        let at = self.offset + start;
        let before = at % ALIGNMENT;
        let offset = (at - before) as u64 * 4;
        (Binding { buffer: &self.buffer, offset, size: UNIFORM_BYTES, uniform: true }, before)
    }

    /// Whether another handle or part of the same buffer is alive.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.buffer) > 1
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor{:?}", self.shape)
    }
}
