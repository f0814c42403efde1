//! Weights in four bits as bitsandbytes stores them in safetensors, beside a `quantization_config`:
//!
//! | tensor | dtype, shape | what |
//! |---|---|---|
//! | W | u8 [ceil(n / 2), 1] | codes ([`crate::quant`]) |
//! | W.absmax | f32 [blocks], or u8 | factors, or their codes |
//! | W.quant_map | f32 [16] | what codes stand for |
//! | W.nested_absmax | f32 [ceil(blocks / 256)] | factors of the factors' codes |
//! | W.nested_quant_map | f32 [256] | what these codes stand for |
//! | W.quant_state.bitsandbytes__nf4 (or fp4) | u8, JSON | shape, block sizes, offset |

mod write;

use std::borrow::Cow;

use serde::Deserialize;

use super::safetensors::{Checkpoint, Dtype, TensorRef};
use crate::{
    error::{Error, Result},
    quant::{self, BLOCK, Factors, NESTED_BLOCK, Nested, QuantType},
};

pub use write::{Packing, quantization_config};

/// What follows a weight's name in that of its state, before the kind of codes.
const STATE: &str = ".quant_state.bitsandbytes__";
/// What else comes with a weight.
const PARTS: [&str; 4] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];

/// A weight in four bits where it lies in its file. Sizes are checked: all that its shape needs is there.
#[derive(Clone, Debug)]
pub struct PackedTensor<'a> {
    pub name: &'a str,
    /// The file as messages name it.
    pub file: &'a str,
    pub kind: QuantType,
    pub shape: Vec<usize>,
    pub codes: &'a [u8],
    /// f32, or codes.
    absmax: &'a [u8],
    nested: Option<NestedBytes<'a>>,
}

#[derive(Clone, Copy, Debug)]
struct NestedBytes<'a> {
    absmax: &'a [u8],
    map: &'a [u8],
    offset: f32,
}

/// The JSON of a state.
#[derive(Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

/// The names of a checkpoint's tensors, without those that belong to a weight in four bits.
pub fn names(checkpoint: &Checkpoint) -> Vec<String> {
    let packed: Vec<&str> = checkpoint.names().filter_map(|name| Some(name.split_once(STATE)?.0)).collect();
    // The names are sorted, and so are these.
    let belongs = |name: &str| {
        let weight = name.split_once(STATE).map(|(weight, _)| weight);
        let weight = weight.or_else(|| PARTS.iter().find_map(|part| name.strip_suffix(part)));
        weight.is_some_and(|weight| packed.binary_search(&weight).is_ok())
    };
    checkpoint.names().filter(|name| !belongs(name)).map(str::to_owned).collect()
}

/// The weight of a name, where it is stored in four bits.
///
/// # Errors
/// `Data`: a part of it is missing, of another size than its shape asks for, or of a kind that is not read.
pub fn packed<'a>(checkpoint: &'a Checkpoint, name: &str) -> Result<Option<PackedTensor<'a>>> {
    let state = QuantType::NAMES.iter().find_map(|kind| checkpoint.get(&format!("{name}{STATE}{kind}")));
    let Some(state) = state else { return Ok(None) };
    let weight = checkpoint.require(name)?;
    let wrong = |what: String| {
        Error::data(format!("{}: {name}: {what}", weight.file))
            .hint("weights in four bits are read as bitsandbytes writes them: blocks of 64, nested blocks of 256")
    };
    let parsed: State = serde_json::from_slice(state.bytes).map_err(|source| {
        Error::data(format!("{}: {} is not the JSON of a state", state.file, state.name)).caused_by(source)
    })?;
    let State { quant_type, blocksize, shape, nested_blocksize, nested_offset } = parsed;
    let kind = QuantType::parse(&quant_type).ok_or_else(|| wrong(format!("its codes are `{quant_type}`")))?;
    if blocksize != BLOCK {
        return Err(wrong(format!("its blocks are of {blocksize} values")));
    }
    let elements = shape.iter().try_fold(1usize, |all, &size| all.checked_mul(size));
    let elements = elements.ok_or_else(|| wrong(format!("there is no shape {shape:?}")))?;
    let part = |part: &str, dtype: Dtype, count: usize| -> Result<&'a [u8]> {
        let tensor: TensorRef = checkpoint.require(&format!("{name}{part}"))?;
        if tensor.dtype != dtype || tensor.len() != count {
            let (found, shape) = (tensor.dtype, tensor.shape);
            return Err(wrong(format!("{name}{part} is {found:?} {shape:?}, where {count} of {dtype:?} belong")));
        }
        Ok(tensor.bytes)
    };
    if weight.bytes.len() != elements.div_ceil(2) {
        let bytes = weight.bytes.len();
        return Err(wrong(format!("{bytes} bytes of codes for shape {shape:?}")));
    }
    let map = part(".quant_map", Dtype::F32, 16)?;
    let differs = |(found, value): (f32, &f32)| (found - value).abs().is_nan() || (found - value).abs() > 1e-4;
    if floats(map).zip(kind.values()).any(differs) {
        return Err(wrong(format!("its quant_map is not that of {quant_type}")));
    }
    let blocks = elements.div_ceil(BLOCK);
    let (absmax, nested) = match nested_offset {
        Some(offset) => {
            if nested_blocksize != Some(NESTED_BLOCK) {
                return Err(wrong(format!("its nested blocks are of {nested_blocksize:?} values")));
            }
            let nested = NestedBytes {
                absmax: part(".nested_absmax", Dtype::F32, blocks.div_ceil(NESTED_BLOCK))?,
                map: part(".nested_quant_map", Dtype::F32, 256)?,
                offset: offset as f32,
            };
            (part(".absmax", Dtype::U8, blocks)?, Some(nested))
        }
        None => (part(".absmax", Dtype::F32, blocks)?, None),
    };
    Ok(Some(PackedTensor { name: weight.name, file: weight.file, kind, shape, codes: weight.bytes, absmax, nested }))
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes))
}

impl PackedTensor<'_> {
    /// Whether its factors are codes themselves.
    pub fn is_nested(&self) -> bool {
        self.nested.is_some()
    }

    /// The factors of its blocks as they are stored.
    pub fn factors(&self) -> Factors {
        match self.nested {
            Some(NestedBytes { absmax, map, offset }) => Factors::Nested(Nested {
                codes: self.absmax.to_vec(),
                absmax: floats(absmax).collect(),
                map: floats(map).collect(),
                offset,
            }),
            None => Factors::Plain(floats(self.absmax).collect()),
        }
    }

    /// The values from `first` on, in f32.
    pub fn dequantize(&self, first: usize, out: &mut [f32]) {
        let factors = self.factors();
        let values: Cow<'_, [f32]> = factors.values();
        quant::dequantize(self.kind, self.codes, &values, first, out);
    }
}
