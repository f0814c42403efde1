//! Weights in four bits as bitsandbytes packs them: NF4 and FP4 codes, one factor for 64 values, factors in turn in
//! eight bits.
//!
//! A matrix is taken as one row of values, so blocks go across rows. A block's factor is its largest magnitude
//! (`absmax`); each value becomes the code of the table's nearest value to value / absmax, ties to the lower one. Two
//! codes share a byte, the first in the high half. Bits are those of bitsandbytes 0.50 on a processor.

mod double;

use rayon::prelude::*;

pub use double::{Factors, Nested, dynamic_map};

/// Values that share a factor.
pub const BLOCK: usize = 64;
/// Factors that share one of their own.
pub const NESTED_BLOCK: usize = 256;

/// A table of sixteen values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// Quantiles of the normal distribution (Dettmers et al. 2023).
    Nf4,
    /// A sign, two bits of exponent, one of mantissa.
    Fp4,
}

impl QuantType {
    pub const NAMES: &'static [&'static str] = &["nf4", "fp4"];

    /// As configs and files call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "nf4" => Some(Self::Nf4),
            "fp4" => Some(Self::Fp4),
            _ => None,
        }
    }

    /// What each code stands for, times the block's absmax.
    pub fn values(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    /// Bounds between neighbours, and the codes from the lowest value to the highest.
    fn order(self) -> (&'static [f32; 15], &'static [u8; 16]) {
        match self {
            Self::Nf4 => (&NF4_BOUNDS, &NF4_ORDER),
            Self::Fp4 => (&FP4_BOUNDS, &FP4_ORDER),
        }
    }
}

const NF4: [f32; 16] = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.3949175,
    -0.28444138,
    -0.18477343,
    -0.091050036,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
];

/// Half of the sum of neighbours, rounded once each.
const NF4_BOUNDS: [f32; 15] = [
    -0.8480964,
    -0.6106329,
    -0.45999527,
    -0.33967942,
    -0.2346074,
    -0.13791174,
    -0.045525018,
    0.03979015,
    0.12025525,
    0.20352125,
    0.29201376,
    0.38931254,
    0.50166345,
    0.6427869,
    0.86147845,
];

const NF4_ORDER: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

const FP4: [f32; 16] = [
    0.0,
    0.0052083335,
    0.6666667,
    1.0,
    0.33333334,
    0.5,
    0.16666667,
    0.25,
    -0.0,
    -0.0052083335,
    -0.6666667,
    -1.0,
    -0.33333334,
    -0.5,
    -0.16666667,
    -0.25,
];

const FP4_BOUNDS: [f32; 15] = [
    -0.8333334,
    -0.5833334,
    -0.4166667,
    -0.2916667,
    -0.20833334,
    -0.0859375,
    -0.0026041667,
    0.0,
    0.0026041667,
    0.0859375,
    0.20833334,
    0.2916667,
    0.4166667,
    0.5833334,
    0.8333334,
];

/// Codes from the lowest value to the highest. Of the two zeros the lower is code 0, whatever its sign says: so
/// bitsandbytes sorts them.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

/// The least divisor of a block.
const LEAST: f32 = 1e-38;

/// The packed codes of a block, and its absmax. A block that is not whole can only be a tensor's last: the rest of its
/// bytes are codes of 0.
fn encode_block(kind: QuantType, values: &[f32]) -> ([u8; BLOCK / 2], f32) {
    let largest = |a: f32, b: f32| if a.is_nan() || a > b { a } else { b };
    let absmax = values.iter().fold(0.0, |most: f32, value| largest(value.abs(), most));
    let mut scaled = [0.0; BLOCK];
    let absmax = if values.len() == BLOCK {
        let factor = 1.0 / largest(absmax, LEAST);
        scaled.iter_mut().zip(values).for_each(|(scaled, value)| *scaled = value * factor);
        absmax
    } else {
        // The library divides here, and keeps the divisor.
        let absmax = largest(absmax, LEAST);
        scaled.iter_mut().zip(values).for_each(|(scaled, value)| *scaled = value / absmax);
        absmax
    };
    // No bound is beyond 1, so nothing need be clamped; a NaN is above every bound, as for torch.bucketize.
    scaled.iter_mut().filter(|value| value.is_nan()).for_each(|value| *value = f32::INFINITY);
    let (bounds, order) = kind.order();
    let mut ranks = [0u8; BLOCK];
    for bound in bounds {
        ranks.iter_mut().zip(&scaled).for_each(|(rank, value)| *rank += u8::from(value > bound));
    }
    let mut packed = [0; BLOCK / 2];
    for (byte, [high, low]) in packed.iter_mut().zip(ranks.as_chunks().0) {
        *byte = order[usize::from(*high)] << 4 | order[usize::from(*low)];
    }
    (packed, absmax)
}

/// Quantises a tensor whose values come in pieces of any size.
pub struct Quantizer {
    kind: QuantType,
    /// Values still to come.
    missing: usize,
    /// Of a block that has come in part.
    pending: Vec<f32>,
    absmax: Vec<f32>,
}

impl Quantizer {
    /// For a tensor of so many values.
    pub fn new(kind: QuantType, elements: usize) -> Self {
        Self { kind, missing: elements, pending: Vec::new(), absmax: Vec::with_capacity(elements.div_ceil(BLOCK)) }
    }

    /// The next values, no more than are missing; the bytes of every block that is complete go to `packed`.
    pub fn push(&mut self, mut values: &[f32], packed: &mut Vec<u8>) {
        assert!(values.len() <= self.missing, "{} values where {} are missing", values.len(), self.missing);
        self.missing -= values.len();
        packed.reserve(values.len() / 2);
        while !values.is_empty() {
            if self.pending.is_empty() && values.len() >= BLOCK {
                let (whole, rest) = values.split_at(values.len() / BLOCK * BLOCK);
                let kind = self.kind;
                let blocks: Vec<_> =
                    whole.par_chunks(BLOCK).with_min_len(64).map(|block| encode_block(kind, block)).collect();
                for (codes, absmax) in blocks {
                    packed.extend(codes);
                    self.absmax.push(absmax);
                }
                values = rest;
                continue;
            }
            let (now, rest) = values.split_at(values.len().min(BLOCK - self.pending.len()));
            self.pending.extend_from_slice(now);
            values = rest;
            if self.pending.len() == BLOCK || self.missing == 0 && values.is_empty() {
                let (codes, absmax) = encode_block(self.kind, &self.pending);
                packed.extend(&codes[..self.pending.len().div_ceil(2)]);
                self.absmax.push(absmax);
                self.pending.clear();
            }
        }
    }

    /// The factors of all blocks.
    pub fn finish(self) -> Vec<f32> {
        assert_eq!(self.missing, 0, "values that are still missing");
        self.absmax
    }
}

/// Packed codes and absmax of a whole tensor.
pub fn quantize(kind: QuantType, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let (mut quantizer, mut packed) = (Quantizer::new(kind, values.len()), Vec::new());
    quantizer.push(values, &mut packed);
    (packed, quantizer.finish())
}

/// The values `first..first + out.len()` of a tensor. `packed` and `absmax` are the whole tensor's.
///
/// # Panics
/// When these hold fewer: whoever reads them from a file has compared the sizes.
pub fn dequantize(kind: QuantType, packed: &[u8], absmax: &[f32], first: usize, out: &mut [f32]) {
    let values = kind.values();
    for (at, out) in (first..).zip(out) {
        let code = packed[at / 2] >> (4 * (1 - at % 2)) & 15;
        *out = values[usize::from(code)] * absmax[at / BLOCK];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_no_difference() {
        let values: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.7).sin() * (1.0 + i as f32)).collect();
        for kind in [QuantType::Nf4, QuantType::Fp4] {
            for count in [1, 63, 64, 65, 999, 1000] {
                let whole = quantize(kind, &values[..count]);
                let (mut quantizer, mut packed) = (Quantizer::new(kind, count), Vec::new());
                values[..count].chunks(7).for_each(|part| quantizer.push(part, &mut packed));
                assert_eq!((packed, quantizer.finish()), whole);
                assert_eq!(whole.0.len(), count.div_ceil(2));
                assert_eq!(whole.1.len(), count.div_ceil(BLOCK));
            }
        }
    }

    #[test]
    fn bounds_are_halfway_between_neighbours() {
        for (kind, bounds, order) in [(QuantType::Nf4, NF4_BOUNDS, NF4_ORDER), (QuantType::Fp4, FP4_BOUNDS, FP4_ORDER)]
        {
            let value = |rank: usize| kind.values()[usize::from(order[rank])];
            for (rank, bound) in bounds.iter().enumerate() {
                assert_eq!(*bound, (value(rank) + value(rank + 1)) / 2.0, "{kind:?} {rank}");
                let mut block = [0.0; BLOCK];
                block[..3].copy_from_slice(&[1.0, *bound, bound.next_up()]);
                let (packed, absmax) = encode_block(kind, &block);
                let codes = [packed[0] & 15, packed[1] >> 4];
                assert_eq!((codes, absmax), ([order[rank], order[rank + 1]], 1.0), "{kind:?} {rank}");
            }
        }
    }
}
