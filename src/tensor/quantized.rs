//! Weights in four bits: the codes are a tensor's content, their factors lie beside it.

use super::{Dtype, Tensor};
use crate::{
    error::Result,
    gpu::Gpu,
    quant::{self, BLOCK, Factors, Nested, QuantType},
};

/// The factors of a quantised tensor's blocks, on the device.
#[derive(Clone)]
pub enum Scales {
    /// f32 [blocks]
    Plain(Tensor),
    /// `map[code] * absmax[block / 256] + offset`.
    Nested {
        /// Four to a u32, the first in the low byte: [blocks / 4].
        codes: Tensor,
        /// f32 [blocks / 256]
        absmax: Tensor,
        /// f32 [256]
        map: Tensor,
        offset: f32,
    },
}

impl Scales {
    pub fn new(gpu: &Gpu, factors: &Factors) -> Self {
        let floats = |values: &[f32]| Tensor::from_f32(gpu, values, &[values.len()]);
        match factors {
            Factors::Plain(absmax) => Self::Plain(floats(absmax)),
            Factors::Nested(Nested { codes, absmax, map, offset }) => {
                Self::Nested { codes: bytes(gpu, codes), absmax: floats(absmax), map: floats(map), offset: *offset }
            }
        }
    }

    /// Waits for the device and copies them back.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn to_host(&self, blocks: usize) -> Result<Factors> {
        Ok(match self {
            Self::Plain(absmax) => Factors::Plain(absmax.to_vec()?),
            Self::Nested { codes, absmax, map, offset } => {
                let mut codes = codes.to_bytes()?;
                codes.truncate(blocks);
                Factors::Nested(Nested { codes, absmax: absmax.to_vec()?, map: map.to_vec()?, offset: *offset })
            }
        })
    }
}

/// Bytes in words, the last one filled up with zeros.
fn bytes(gpu: &Gpu, bytes: &[u8]) -> Tensor {
    let mut upload = Tensor::upload(gpu, Dtype::U32, &[bytes.len().div_ceil(4)]);
    upload.push(bytes);
    upload.push(&[0; 3][..upload.missing()]);
    upload.finish()
}

impl Tensor {
    /// A quantised tensor from its codes: words of a u32 tensor of its own, whose bytes are those of [`crate::quant`].
    pub fn quantized(kind: QuantType, shape: &[usize], codes: Tensor, scales: Scales) -> Self {
        let elements: usize = shape.iter().product();
        assert!(codes.dtype == Dtype::U32 && codes.offset == 0, "codes in words: {codes:?}");
        assert_eq!(codes.len(), elements.div_ceil(8), "words of codes for {shape:?}");
        let scales = Some(std::sync::Arc::new(scales));
        Self { dtype: Dtype::Quantized(kind), shape: shape.to_vec(), scales, ..codes }
    }

    /// A quantised tensor with unspecified content.
    pub fn empty_quantized(gpu: &Gpu, kind: QuantType, double: bool, shape: &[usize]) -> Self {
        let elements: usize = shape.iter().product();
        let (blocks, words) = (elements.div_ceil(BLOCK), |count: usize| Self::empty_of(gpu, Dtype::U32, &[count]));
        let floats = |count: usize| Self::empty(gpu, &[count]);
        let scales = if double {
            let absmax = floats(blocks.div_ceil(quant::NESTED_BLOCK));
            Scales::Nested { codes: words(blocks.div_ceil(4)), absmax, map: floats(256), offset: 0.0 }
        } else {
            Scales::Plain(floats(blocks))
        };
        Self::quantized(kind, shape, words(elements.div_ceil(8)), scales)
    }

    /// The parts of the device's memory that hold the content: a tensor that is not quantised by itself, or codes and
    /// what differs of their factors.
    pub fn contents(&self) -> Vec<Self> {
        match self.scales() {
            None => vec![self.clone()],
            Some(Scales::Plain(absmax)) => vec![self.words(), absmax.clone()],
            Some(Scales::Nested { codes, absmax, .. }) => vec![self.words(), codes.clone(), absmax.clone()],
        }
    }

    /// What is added to nested factors; 0 where there are none.
    pub fn factors_offset(&self) -> f32 {
        if let Some(Scales::Nested { offset, .. }) = self.scales() { *offset } else { 0.0 }
    }

    /// The same memory, with another offset of nested factors.
    pub fn with_factors_offset(self, offset: f32) -> Self {
        let Some(Scales::Nested { codes, absmax, map, .. }) = self.scales().cloned() else { return self };
        let scales = Some(std::sync::Arc::new(Scales::Nested { codes, absmax, map, offset }));
        Self { scales, ..self }
    }

    /// As [`Tensor::quantized`], from bytes of the host.
    pub fn from_codes(gpu: &Gpu, kind: QuantType, shape: &[usize], codes: &[u8], factors: &Factors) -> Self {
        Self::quantized(kind, shape, bytes(gpu, codes), Scales::new(gpu, factors))
    }

    /// The factors of a quantised tensor.
    pub fn scales(&self) -> Option<&Scales> {
        self.scales.as_deref()
    }

    /// The codes of a quantised tensor, eight to a word.
    pub fn words(&self) -> Self {
        assert!(self.dtype.is_quantized(), "{self:?} has no codes");
        Self { dtype: Dtype::U32, shape: vec![self.len().div_ceil(8)], scales: None, ..self.clone() }
    }

    /// A quantised tensor's values on the host; none for every other.
    pub(super) fn dequantized(&self) -> Result<Option<Vec<f32>>> {
        let (Dtype::Quantized(kind), Some(scales)) = (self.dtype, self.scales()) else { return Ok(None) };
        let (codes, factors) = (self.words().to_bytes()?, scales.to_host(self.len().div_ceil(BLOCK))?);
        let mut values = vec![0.0; self.len()];
        quant::dequantize(kind, &codes, &factors.values(), 0, &mut values);
        Ok(Some(values))
    }
}
