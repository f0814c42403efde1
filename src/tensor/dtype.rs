//! What an element is on the device.

use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::ALIGNMENT;
use crate::quant::QuantType;

/// The type of a tensor's elements. 16-bit elements are packed, two to a word of the device, the first in the low
/// half: the bytes are those of a little-endian file. They are storage alone; arithmetic is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    U32,
    F16,
    Bf16,
    /// Codes of four bits, two to a byte, whose factors are the tensor's [`Scales`](super::Scales).
    Quantized(QuantType),
}

/// How products may round what they multiply, where that is faster: always to f16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// As PyTorch does in float16: what is beyond its range becomes infinite. Gradients alone are scaled.
    Half,
    /// For what PyTorch computes in bfloat16, which has the range of f32: both sides under powers of two of their own. A
    /// weight that is kept in 16 bits stays as it is.
    Scaled,
}

impl Rounding {
    /// Of a run that computes in a type.
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F16 => Some(Self::Half),
            Dtype::Bf16 => Some(Self::Scaled),
            Dtype::F32 | Dtype::U32 | Dtype::Quantized(_) => None,
        }
    }
}

impl Dtype {
    /// Bytes of an element.
    ///
    /// # Panics
    /// Where it is half a byte.
    pub fn bytes(self) -> usize {
        assert!(!self.is_quantized(), "an element of {self:?} is no whole byte");
        if self.is_packed() { 2 } else { 4 }
    }

    /// Whether elements are codes of four bits.
    pub fn is_quantized(self) -> bool {
        matches!(self, Self::Quantized(_))
    }

    /// Whether two elements share a word.
    pub fn is_packed(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16)
    }

    /// Bindings begin at multiples of this many elements.
    pub fn alignment(self) -> usize {
        ALIGNMENT * 4 / self.bytes()
    }

    /// Bytes that `elements` elements take on the device: whole words.
    pub(super) fn padded_bytes(self, elements: usize) -> u64 {
        let bytes = if self.is_quantized() { elements.div_ceil(2) } else { elements * self.bytes() };
        bytes.next_multiple_of(4) as u64
    }

    /// Elements as f32: exact for 16-bit floats. A `U32` keeps its bits. Codes mean nothing without their factors.
    pub fn widen(self, bytes: &[u8]) -> Vec<f32> {
        let halves = || bytes.chunks_exact(2).map(|half| u16::from_le_bytes([half[0], half[1]]));
        match self {
            // Not `bf16::to_f32`, which makes signalling NaNs quiet.
            Self::Bf16 => halves().map(|bits| f32::from_bits(u32::from(bits) << 16)).collect(),
            Self::F16 => {
                let halves: Vec<f16> = halves().map(f16::from_bits).collect();
                let mut wide = vec![0.0; halves.len()];
                halves.convert_to_f32_slice(&mut wide);
                wide
            }
            Self::Quantized(_) => panic!("{self:?} without factors"),
            Self::F32 | Self::U32 => {
                bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
            }
        }
    }

    /// The bytes of f32 values in this type, rounded to nearest, ties to even. A `U32` takes the bits.
    pub fn narrow(self, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * self.bytes()];
        self.narrow_into(values, &mut bytes);
        bytes
    }

    /// As [`Dtype::narrow`], into memory of that size.
    pub fn narrow_into(self, values: &[f32], bytes: &mut [u8]) {
        /// Values that are narrowed at a time, on the stack.
        const BLOCK: usize = 512;
        match self {
            Self::Bf16 => {
                let halves = bytes.as_chunks_mut().0.iter_mut();
                halves.zip(values).for_each(|(half, &x)| *half = bf16::from_f32(x).to_le_bytes());
            }
            Self::F16 => {
                let mut block = [f16::ZERO; BLOCK];
                for (bytes, values) in bytes.chunks_mut(2 * BLOCK).zip(values.chunks(BLOCK)) {
                    let halves = &mut block[..values.len()];
                    halves.convert_from_f32_slice(values);
                    bytes.copy_from_slice(bytemuck::cast_slice(halves));
                }
            }
            Self::Quantized(_) => panic!("{self:?} without factors"),
            Self::F32 | Self::U32 => bytes.copy_from_slice(bytemuck::cast_slice(values)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_pattern_survives_being_widened() {
        for bits in 0..=u16::MAX {
            let bytes = bits.to_le_bytes();
            for dtype in [Dtype::Bf16, Dtype::F16] {
                let wide = dtype.widen(&bytes);
                if !wide[0].is_nan() {
                    assert_eq!(dtype.narrow(&wide), bytes, "{dtype:?} {bits:04x}");
                }
            }
            assert_eq!(Dtype::Bf16.widen(&bytes)[0].to_bits(), u32::from(bits) << 16);
        }
    }

    #[test]
    fn odd_counts_take_whole_words() {
        assert_eq!(Dtype::Bf16.padded_bytes(3), 8);
        assert_eq!(Dtype::Bf16.padded_bytes(4), 8);
        assert_eq!(Dtype::F32.padded_bytes(3), 12);
        assert_eq!(Dtype::F16.padded_bytes(0), 0);
    }
}
