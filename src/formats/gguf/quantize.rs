//! From f32 to the types that are written, rounded as the `gguf` Python package's `quantize` rounds: equal bit for bit.

use half::{bf16, f16};

use super::GgmlType;

/// Types that [`quantize`] makes.
pub const WRITTEN: [GgmlType; 4] = [GgmlType::F32, GgmlType::F16, GgmlType::BF16, GgmlType::Q8_0];

/// What cannot be written as the type asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unfit {
    /// The type is none of [`WRITTEN`].
    Type,
    /// The values are no whole number of blocks.
    Length,
    /// This value is not finite, or beyond the type's range.
    Value(f32),
}

/// Appends `values`, whole blocks of them, to `out`.
pub fn quantize(ggml_type: GgmlType, values: &[f32], out: &mut Vec<u8>) -> Result<(), Unfit> {
    match ggml_type {
        GgmlType::F32 => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        GgmlType::BF16 => out.extend(values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes())),
        GgmlType::F16 => {
            for &value in values {
                let rounded = f16::from_f32(value);
                if rounded.is_infinite() && value.is_finite() {
                    return Err(Unfit::Value(value));
                }
                out.extend(rounded.to_le_bytes());
            }
        }
        GgmlType::Q8_0 => {
            let (blocks, rest) = values.as_chunks::<32>();
            if !rest.is_empty() {
                return Err(Unfit::Length);
            }
            for block in blocks {
                q8_0(block, out)?;
            }
        }
        _ => return Err(Unfit::Type),
    }
    Ok(())
}

/// The largest magnitude becomes 127; halves are rounded away from zero.
fn q8_0(block: &[f32; 32], out: &mut Vec<u8>) -> Result<(), Unfit> {
    if let Some(&value) = block.iter().find(|value| !value.is_finite()) {
        return Err(Unfit::Value(value));
    }
    let d = block.iter().fold(0f32, |largest, value| largest.max(value.abs())) / 127.0;
    let scale = f16::from_f32(d);
    if scale.is_infinite() {
        return Err(Unfit::Value(d * 127.0));
    }
    // A d too small to have a reciprocal is zero in f16 as well.
    let inverse = if d == 0.0 || (1.0 / d).is_infinite() { 0.0 } else { 1.0 / d };
    out.extend(scale.to_le_bytes());
    out.extend(block.iter().map(|value| (value * inverse).round() as i8 as u8));
    Ok(())
}
