//! Tensors: a shape over a part of a device buffer. No arithmetic lives here.
//!
//! Elements are four bytes, `f32` or `u32`, or two bytes, `f16` or `bf16`, packed two to a word ([`Dtype`]); layout is
//! row-major. Kernels take four-byte tensors by [`Tensor::range`] and its kin, packed ones by [`Tensor::packed_range`]:
//! each refuses the other kind, so an op that knows nothing of packed weights fails instead of reading garbage.
//!
//! Shape letters, here and in every shader: B batch, T tokens, D hidden size, F intermediate size, H heads,
//! K key/value heads, E head size, V vocabulary, P patches, R LoRA rank; M, N, K in products.

mod dtype;
mod offloaded;
mod quantized;
mod upload;

use std::{fmt, sync::Arc};

pub use dtype::{Dtype, Rounding};
pub use offloaded::{Downloading, Offloaded};
pub use quantized::Scales;
pub use upload::Upload;

use crate::{
    error::Result,
    gpu::{Binding, Buffer, Gpu, UNIFORM_BYTES},
};

/// A handle; clones share the memory.
#[derive(Clone)]
pub struct Tensor {
    gpu: Gpu,
    buffer: Arc<Buffer>,
    dtype: Dtype,
    /// In elements.
    offset: usize,
    shape: Vec<usize>,
    /// Of a quantised tensor.
    scales: Option<Arc<Scales>>,
    /// See [`Tensor::rounding`].
    rounding: Option<Rounding>,
}

/// Parts of an arena start at multiples of this many elements, so that they can be bound on every device.
pub const ALIGNMENT: usize = 64;

impl Tensor {
    /// An f32 (or u32) tensor with unspecified content.
    pub fn empty(gpu: &Gpu, shape: &[usize]) -> Self {
        Self::empty_of(gpu, Dtype::F32, shape)
    }

    /// A tensor with unspecified content.
    pub fn empty_of(gpu: &Gpu, dtype: Dtype, shape: &[usize]) -> Self {
        let bytes = dtype.padded_bytes(shape.iter().product());
        Self {
            gpu: gpu.clone(),
            buffer: Arc::new(gpu.buffer(bytes)),
            dtype,
            offset: 0,
            shape: shape.to_vec(),
            scales: None,
            rounding: None,
        }
    }

    pub fn from_f32(gpu: &Gpu, data: &[f32], shape: &[usize]) -> Self {
        Self::from_bytes(gpu, Dtype::F32, bytemuck::cast_slice(data), shape)
    }

    pub fn from_u32(gpu: &Gpu, data: &[u32], shape: &[usize]) -> Self {
        Self::from_bytes(gpu, Dtype::U32, bytemuck::cast_slice(data), shape)
    }

    /// A tensor of little-endian elements. [`Tensor::upload`] takes them piece by piece.
    pub fn from_bytes(gpu: &Gpu, dtype: Dtype, bytes: &[u8], shape: &[usize]) -> Self {
        let mut upload = Self::upload(gpu, dtype, shape);
        upload.push(bytes);
        upload.finish()
    }

    /// A tensor whose content follows, in pieces of any size.
    pub fn upload(gpu: &Gpu, dtype: Dtype, shape: &[usize]) -> Upload {
        Upload::new(gpu, dtype, shape)
    }

    /// Replaces the content of an f32 tensor.
    pub fn write(&self, data: &[f32]) {
        assert!(data.len() == self.len() && self.dtype == Dtype::F32, "{} values for {self:?}", data.len());
        self.gpu.write(&self.buffer, self.byte_offset(0), bytemuck::cast_slice(data));
    }

    /// Replaces the content by little-endian elements. A packed tensor of an odd length gets a zero behind it.
    pub fn write_bytes(&self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len() * self.dtype.bytes(), "bytes for {self:?}");
        let whole = bytes.len() / 4 * 4;
        self.gpu.write(&self.buffer, self.byte_offset(0), &bytes[..whole]);
        if whole < bytes.len() {
            let last = [bytes[whole], bytes[whole + 1], 0, 0];
            self.gpu.write(&self.buffer, self.byte_offset(0) + whole as u64, &last);
        }
    }

    /// Waits for the device and copies the content back, 16-bit floats widened (exactly).
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        if let Some(values) = self.dequantized()? {
            return Ok(values);
        }
        Ok(self.dtype.widen(&self.to_bytes()?))
    }

    /// Waits for the device and copies the elements back as they are.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = self.gpu.read(&self.buffer, self.byte_offset(0), self.dtype.padded_bytes(self.len()))?;
        bytes.truncate(if self.dtype.is_quantized() {
            self.len().div_ceil(2)
        } else {
            self.len() * self.dtype.bytes()
        });
        Ok(bytes)
    }

    /// Sends the content to the host, without waiting for it.
    pub fn offload(&self) -> Offloaded {
        Offloaded::new(self)
    }

    /// Copies the content of `from`, which is another buffer.
    pub fn copy_from(&self, from: &Tensor) {
        assert_eq!(self.len(), from.len(), "{self:?} from {from:?}");
        self.copy_elements(0, from, 0, self.len());
    }

    /// Copies `rows` rows of `from`, starting at its row `from_row`, to the rows of `self` from `to_row` on. Rows of
    /// packed tensors must begin and end with whole words.
    pub fn copy_rows(&self, to_row: usize, from: &Tensor, from_row: usize, rows: usize) {
        let width = self.cols();
        assert!(
            width == from.cols() && to_row + rows <= self.rows() && from_row + rows <= from.rows(),
            "rows in range"
        );
        self.copy_elements(to_row * width, from, from_row * width, rows * width);
    }

    /// Makes every element zero.
    pub fn clear(&self) {
        assert!(!self.dtype.is_quantized(), "{self:?} is cleared");
        self.gpu.clear(&self.buffer, self.byte_offset(0), self.dtype.padded_bytes(self.len()));
    }

    /// Copies `count` elements of `from`, from element `start` on, to those of `self` from `to` on: whole words.
    pub fn copy_elements(&self, to: usize, from: &Tensor, start: usize, count: usize) {
        assert_eq!(self.dtype, from.dtype, "a copy does not convert: {self:?} from {from:?}");
        let whole = |elements: usize| (elements * self.dtype.bytes()).is_multiple_of(4);
        // A tensor that ends inside a word has the rest of it for itself (see `part`).
        let ends = to + count == self.len() || whole(count);
        let starts = whole(self.offset + to) && whole(from.offset + start);
        assert!(starts && ends, "{self:?} from {from:?}: half words");
        let size = self.dtype.padded_bytes(count);
        self.gpu.copy(&from.buffer, from.byte_offset(start), &self.buffer, self.byte_offset(to), size);
    }

    fn byte_offset(&self, element: usize) -> u64 {
        if self.dtype.is_quantized() && self.offset + element == 0 {
            return 0;
        }
        ((self.offset + element) * self.dtype.bytes()) as u64
    }

    /// The same elements under another shape.
    pub fn reshape(&self, shape: &[usize]) -> Self {
        assert_eq!(self.len(), shape.iter().product::<usize>(), "{:?} as {shape:?}", self.shape);
        Self { shape: shape.to_vec(), ..self.clone() }
    }

    /// A part that starts `offset` elements in, a multiple of [`ALIGNMENT`]; of a packed tensor it ends with a whole
    /// word, or where the tensor ends.
    pub fn part(&self, offset: usize, shape: &[usize]) -> Self {
        assert!(!self.dtype.is_quantized(), "a part of {self:?}, whose blocks go across rows");
        let end = offset + shape.iter().product::<usize>();
        assert!(offset.is_multiple_of(ALIGNMENT) && end <= self.len(), "a part inside");
        assert!(!self.dtype.is_packed() || end.is_multiple_of(2) || end == self.len(), "a part of whole words");
        Self { offset: self.offset + offset, shape: shape.to_vec(), ..self.clone() }
    }

    /// A part of an arena, whose parts all begin at multiples of [`ALIGNMENT`]: the rest of its last word is its own.
    pub fn arena_part(&self, offset: usize, shape: &[usize]) -> Self {
        let end = offset + shape.iter().product::<usize>();
        assert!(offset.is_multiple_of(ALIGNMENT) && end <= self.len(), "a part inside");
        Self { offset: self.offset + offset, shape: shape.to_vec(), ..self.clone() }
    }

    /// The same words as elements of another type, flat.
    pub fn reinterpreted(&self, dtype: Dtype) -> Self {
        assert!(!self.dtype.is_packed(), "{self:?} as {dtype:?}: whole words");
        let per_word = 4 / dtype.bytes();
        Self { dtype, offset: self.offset * per_word, shape: vec![self.len() * per_word], ..self.clone() }
    }

    /// Rows `first..first + rows`; `first` is a multiple of [`ALIGNMENT`].
    pub fn row_part(&self, first: usize, rows: usize) -> Self {
        self.part(first * self.cols(), &[rows, self.cols()])
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The weight, for a run whose products may round what they multiply.
    pub fn with_rounding(self, rounding: Option<Rounding>) -> Self {
        Self { rounding, ..self }
    }

    /// What products with this weight may round what they multiply to: what was said, else by the type that it is kept in.
    pub fn rounding(&self) -> Option<Rounding> {
        self.rounding.or_else(|| Rounding::of(self.dtype))
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
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

    /// All of a four-byte tensor, for a kernel.
    pub fn binding(&self) -> Binding<'_> {
        self.range(0, self.len())
    }

    fn is_wide(&self) -> bool {
        !self.dtype.is_packed() && !self.dtype.is_quantized()
    }

    /// `count` four-byte elements from `start` on, a multiple of [`ALIGNMENT`].
    pub fn range(&self, start: usize, count: usize) -> Binding<'_> {
        assert!(self.is_wide(), "{self:?} goes to a kernel that takes four-byte elements");
        debug_assert!((self.offset + start).is_multiple_of(ALIGNMENT), "binding at element {}", self.offset + start);
        let offset = self.byte_offset(start);
        // Whole vec4s: every buffer, and every part of an arena, ends in padding.
        Binding { buffer: &self.buffer, offset, size: count.max(1).next_multiple_of(4) as u64 * 4, uniform: false }
    }

    /// `count` elements from any `start` on: a binding that begins up to [`ALIGNMENT`] elements earlier, and how many.
    pub fn range_from(&self, start: usize, count: usize) -> (Binding<'_>, usize) {
        let before = (self.offset + start) % ALIGNMENT;
        (self.range(start - before, count + before), before)
    }

    /// The words that hold `count` packed elements from any `start` on: a binding that may begin earlier, and how many
    /// elements earlier.
    pub fn packed_range(&self, start: usize, count: usize) -> (Binding<'_>, usize) {
        assert!(self.dtype.is_packed(), "{self:?} goes to a kernel that takes 16-bit elements");
        let at = self.offset + start;
        let before = at % self.dtype.alignment();
        let offset = ((at - before) * 2) as u64;
        let size = ((before + count.max(1)) * 2).next_multiple_of(16) as u64;
        (Binding { buffer: &self.buffer, offset, size, uniform: false }, before)
    }

    /// How many elements earlier than `start` a binding of [`Self::range`] or [`Self::packed_range`] begins.
    pub fn binding_before(&self, start: usize) -> usize {
        if self.dtype.is_packed() { (self.offset + start) % self.dtype.alignment() } else { 0 }
    }

    /// The four-byte elements from `start` on as a uniform of fixed size, and how many elements before `start` it
    /// begins (offsets of uniforms are aligned). For devices that run on the host's processor.
    pub fn uniform(&self, start: usize) -> (Binding<'_>, usize) {
        assert!(self.is_wide(), "{self:?} goes to a kernel that takes four-byte elements");
        self.any_uniform(start)
    }

    /// The same of packed elements.
    pub fn packed_uniform(&self, start: usize) -> (Binding<'_>, usize) {
        assert!(self.dtype.is_packed(), "{self:?} goes to a kernel that takes 16-bit elements");
        self.any_uniform(start)
    }

    fn any_uniform(&self, start: usize) -> (Binding<'_>, usize) {
        let before = (self.offset + start) % self.dtype.alignment();
        let offset = ((self.offset + start - before) * self.dtype.bytes()) as u64;
        (Binding { buffer: &self.buffer, offset, size: UNIFORM_BYTES, uniform: true }, before)
    }

    /// Whether another handle or part of the same buffer is alive.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.buffer) > 1
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.dtype {
            Dtype::F32 => write!(f, "Tensor{:?}", self.shape),
            dtype => write!(f, "Tensor{:?} of {dtype:?}", self.shape),
        }
    }
}
