//! From ggml's blocks to f32, in the arithmetic of the `gguf` Python package's `dequantize`: equal bit for bit.
//!
//! Layouts: ggml-common.h of llama.cpp; `d` is a block's scale, `m` its minimum, both f16.

use std::ops::Range;

use half::{bf16, f16};

use super::{GgmlType, GgufTensor};
use crate::error::{Error, Result};

/// Writes the f32 values of `rows` to `out`, which holds exactly them, row-major.
///
/// Errors: a type that is not read, named with the tensor; rows beyond the tensor's.
pub fn dequantize_rows(tensor: &GgufTensor, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
    let (columns, row_bytes) = (tensor.columns(), tensor.row_bytes());
    let wanted = rows.end.checked_sub(rows.start).and_then(|count| count.checked_mul(columns));
    if rows.end > tensor.rows() || wanted != Some(out.len()) {
        let (file, name, shape) = (tensor.file, tensor.name, tensor.shape);
        return Err(Error::failed(format!(
            "{file}: {name}: rows {rows:?} of shape {shape:?} for {} values",
            out.len()
        )));
    }
    dequantize_bytes(tensor, &tensor.bytes[rows.start * row_bytes..rows.end * row_bytes], out)
}

/// The values of some blocks of `tensor`.
pub(super) fn dequantize_bytes(tensor: &GgufTensor, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    match tensor.ggml_type {
        GgmlType::F32 => blocks(bytes, out, |block, out: &mut [f32; 1]| out[0] = f32::from_le_bytes(*block)),
        GgmlType::F16 => blocks(bytes, out, |block, out: &mut [f32; 1]| out[0] = f16::from_le_bytes(*block).to_f32()),
        GgmlType::BF16 => blocks(bytes, out, |block, out: &mut [f32; 1]| out[0] = bf16::from_le_bytes(*block).to_f32()),
        GgmlType::Q4_0 => blocks(bytes, out, q4_0),
        GgmlType::Q4_1 => blocks(bytes, out, q4_1),
        GgmlType::Q5_0 => blocks(bytes, out, q5_0),
        GgmlType::Q5_1 => blocks(bytes, out, q5_1),
        GgmlType::Q8_0 => blocks(bytes, out, q8_0),
        GgmlType::Q2_K => blocks(bytes, out, q2_k),
        GgmlType::Q3_K => blocks(bytes, out, q3_k),
        GgmlType::Q4_K => blocks(bytes, out, q4_k),
        GgmlType::Q5_K => blocks(bytes, out, q5_k),
        GgmlType::Q6_K => blocks(bytes, out, q6_k),
        _ => return Err(unreadable(tensor)),
    }
    Ok(())
}

/// All values of a tensor that fits in memory.
pub fn dequantize(tensor: &GgufTensor) -> Result<Vec<f32>> {
    if !is_readable(tensor.ggml_type) {
        return Err(unreadable(tensor));
    }
    let mut values = vec![0.0; tensor.rows() * tensor.columns()];
    dequantize_rows(tensor, 0..tensor.rows(), &mut values)?;
    Ok(values)
}

/// Whether [`dequantize_rows`] knows the type.
pub fn is_readable(ggml_type: GgmlType) -> bool {
    use GgmlType::*;
    matches!(ggml_type, F32 | F16 | BF16 | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q2_K | Q3_K | Q4_K | Q5_K | Q6_K)
}

pub(super) fn unreadable(tensor: &GgufTensor) -> Error {
    let message = format!("{}: {} is of type {}, which is not read", tensor.file, tensor.name, tensor.ggml_type.name());
    Error::data(message).hint("take the model as F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K or another type of the Q family")
}

fn blocks<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    expand: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    for (block, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        expand(block, out);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// d, 16 bytes of two values: the low halves come first.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (index, &byte) in block[2..].iter().enumerate() {
        out[index] = d * f32::from((byte & 15) as i8 - 8);
        out[index + 16] = d * f32::from((byte >> 4) as i8 - 8);
    }
}

/// d, m, 16 bytes of two values.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (index, &byte) in block[4..].iter().enumerate() {
        out[index] = d * f32::from(byte & 15) + m;
        out[index + 16] = d * f32::from(byte >> 4) + m;
    }
}

/// 32 values of five bits: a bit each in the first four bytes, then the low four as in Q4_0.
fn five_bits(bytes: &[u8], mut put: impl FnMut(usize, u8)) {
    for index in 0..16 {
        let high = |index: usize| (bytes[index / 8] >> (index % 8) & 1) << 4;
        put(index, bytes[4 + index] & 15 | high(index));
        put(index + 16, bytes[4 + index] >> 4 | high(index + 16));
    }
}

/// d, fifth bits, low bits.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    five_bits(&block[2..], |index, value| out[index] = d * f32::from(value as i8 - 16));
}

/// d, m, fifth bits, low bits.
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    five_bits(&block[4..], |index, value| out[index] = d * f32::from(value) + m);
}

/// d, 32 signed bytes.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (out, &byte) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(byte as i8) * d;
    }
}

/// Two bits of each of 256 values out of 64 bytes: value `index` of group `group` of 32.
fn two_bits(bytes: &[u8], group: usize, index: usize) -> u8 {
    bytes[group / 4 * 32 + index] >> (group % 4 * 2) & 3
}

/// 16 scales and minima of four bits, values of two bits, d, dmin.
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, values) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (number, out) in out.chunks_exact_mut(16).enumerate() {
        let (scale, min) = (d * f32::from(scales[number] & 15), dmin * f32::from(scales[number] >> 4));
        for (index, out) in out.iter_mut().enumerate() {
            *out = scale * f32::from(two_bits(values, number / 2, number % 2 * 16 + index)) - min;
        }
    }
}

/// Third bits (0 means minus four), values of two bits, 16 scales of six bits, d.
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let (high, values, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    for (number, out) in out.chunks_exact_mut(16).enumerate() {
        let low = scales[number % 8] >> (number / 8 * 4) & 15;
        let top = scales[8 + number % 4] >> (number / 4 * 2) & 3;
        let scale = d * f32::from((low | top << 4) as i8 - 32);
        let group = number / 2;
        for (index, out) in out.iter_mut().enumerate() {
            let index = number % 2 * 16 + index;
            let below = if high[index] >> group & 1 == 0 { 4 } else { 0 };
            *out = scale * f32::from(two_bits(values, group, index) as i8 - below);
        }
    }
}

/// Scale and minimum of group `group` of eight, six bits each, out of 12 bytes.
fn scale_and_min(scales: &[u8], group: usize) -> (f32, f32) {
    let (scale, min) = match group {
        0..4 => (scales[group] & 63, scales[group + 4] & 63),
        _ => {
            let (first, second, both) = (scales[group - 4], scales[group], scales[group + 4]);
            (both & 15 | first >> 2 & 0x30, both >> 4 | second >> 2 & 0x30)
        }
    };
    (f32::from(scale), f32::from(min))
}

/// d, dmin, eight scales and minima, values of four bits: 32 low halves, then 32 high ones, of every 32 bytes.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, values) = (&block[4..16], &block[16..]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(scales, group);
        let (scale, min) = (d * scale, dmin * min);
        for (out, byte) in out.iter_mut().zip(&values[group / 2 * 32..]) {
            *out = scale * f32::from(byte >> (group % 2 * 4) & 15) - min;
        }
    }
}

/// As Q4_K, with fifth bits before the values: bit `group` of 32 bytes.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, high, values) = (&block[4..16], &block[16..48], &block[48..]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(scales, group);
        let (scale, min) = (d * scale, dmin * min);
        for ((out, byte), high) in out.iter_mut().zip(&values[group / 2 * 32..]).zip(high) {
            let value = byte >> (group % 2 * 4) & 15 | (high >> group & 1) << 4;
            *out = scale * f32::from(value) - min;
        }
    }
}

/// Low four bits, high two bits, 16 signed scales, d.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (number, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[number] as i8);
        let group = number / 2;
        let (half, quarter) = (group / 4, group % 4);
        for (index, out) in out.iter_mut().enumerate() {
            let index = number % 2 * 16 + index;
            let value = low[half * 64 + quarter % 2 * 32 + index] >> (quarter / 2 * 4) & 15;
            let top = two_bits(high, group, index) << 4;
            *out = scale * f32::from((value | top) as i8 - 32);
        }
    }
}
