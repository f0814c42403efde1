//! GGUF, the file of llama.cpp: typed metadata, then tensors, most of them in blocks of a few bits a value.
//!
//! Versions 2 and 3, little endian, are read; version 3 is written. Layout, type codes and names follow the `gguf`
//! Python package (0.19.0), which llama.cpp's own converter uses.

pub mod dequant;
pub mod export;
pub mod llama;
pub mod llama_config;
pub mod mmproj;
pub mod mmproj_read;
pub mod quantize;
pub mod read;
pub mod vocabulary;
pub mod write;

pub use read::{GgufFile, GgufTensor};

/// First bytes of every file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Where tensors begin, in bytes, unless `general.alignment` says otherwise.
pub const DEFAULT_ALIGNMENT: usize = 32;
/// Dimensions a tensor may have, at most.
pub const MAX_DIMENSIONS: usize = 4;

/// How the values of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(non_camel_case_types, reason = "the names that ggml gives them")]
#[rustfmt::skip]
pub enum GgmlType {
    F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K, IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S,
    IQ4_NL, IQ3_S, IQ2_S, IQ4_XS, I8, I16, I32, I64, F64, IQ1_M, BF16, TQ1_0, TQ2_0, MXFP4, NVFP4, Q1_0,
}

/// Type, code in the file, name, values in a block, bytes of a block.
#[rustfmt::skip]
const TYPES: [(GgmlType, u32, &str, usize, usize); 34] = {
    use GgmlType::*;
    [
        (F32, 0, "F32", 1, 4), (F16, 1, "F16", 1, 2), (Q4_0, 2, "Q4_0", 32, 18), (Q4_1, 3, "Q4_1", 32, 20),
        (Q5_0, 6, "Q5_0", 32, 22), (Q5_1, 7, "Q5_1", 32, 24), (Q8_0, 8, "Q8_0", 32, 34), (Q8_1, 9, "Q8_1", 32, 40),
        (Q2_K, 10, "Q2_K", 256, 84), (Q3_K, 11, "Q3_K", 256, 110), (Q4_K, 12, "Q4_K", 256, 144),
        (Q5_K, 13, "Q5_K", 256, 176), (Q6_K, 14, "Q6_K", 256, 210), (Q8_K, 15, "Q8_K", 256, 292),
        (IQ2_XXS, 16, "IQ2_XXS", 256, 66), (IQ2_XS, 17, "IQ2_XS", 256, 74), (IQ3_XXS, 18, "IQ3_XXS", 256, 98),
        (IQ1_S, 19, "IQ1_S", 256, 50), (IQ4_NL, 20, "IQ4_NL", 32, 18), (IQ3_S, 21, "IQ3_S", 256, 110),
        (IQ2_S, 22, "IQ2_S", 256, 82), (IQ4_XS, 23, "IQ4_XS", 256, 136), (I8, 24, "I8", 1, 1), (I16, 25, "I16", 1, 2),
        (I32, 26, "I32", 1, 4), (I64, 27, "I64", 1, 8), (F64, 28, "F64", 1, 8), (IQ1_M, 29, "IQ1_M", 256, 56),
        (BF16, 30, "BF16", 1, 2), (TQ1_0, 34, "TQ1_0", 256, 54), (TQ2_0, 35, "TQ2_0", 256, 66),
        (MXFP4, 39, "MXFP4", 32, 17), (NVFP4, 40, "NVFP4", 64, 36), (Q1_0, 41, "Q1_0", 128, 18),
    ]
};

impl GgmlType {
    pub fn from_code(code: u32) -> Option<Self> {
        TYPES.iter().find(|entry| entry.1 == code).map(|entry| entry.0)
    }

    /// The number that stands for it in a file.
    pub fn code(self) -> u32 {
        TYPES[self as usize].1
    }

    /// ggml's name, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        TYPES[self as usize].2
    }

    /// Values in one block; a row is a whole number of blocks.
    pub fn block_values(self) -> usize {
        TYPES[self as usize].3
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        TYPES[self as usize].4
    }

    /// Bytes of a row of `columns` values: none where they are no whole number of blocks.
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        columns
            .is_multiple_of(self.block_values())
            .then(|| columns / self.block_values())?
            .checked_mul(self.block_bytes())
    }
}

/// One value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of the metadata: all its elements are of one type.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// The metadata of a file to be written, in its order.
pub type Metadata = Vec<(String, Value)>;

/// Names of the value types, by their code in the file.
pub(super) const VALUE_TYPES: [&str; 13] =
    ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"];

impl Value {
    /// The number that stands for the type in a file.
    pub fn code(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::String(_) => 8,
            Self::Array(_) => 9,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        }
    }

    /// The type in words, for messages.
    pub fn type_name(&self) -> String {
        match self {
            Self::Array(array) => format!("array of {}", VALUE_TYPES[array.code() as usize]),
            other => VALUE_TYPES[other.code() as usize].to_owned(),
        }
    }

    /// An integer of any type.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(value) => value.into(),
            Self::I8(value) => value.into(),
            Self::U16(value) => value.into(),
            Self::I16(value) => value.into(),
            Self::U32(value) => value.into(),
            Self::I32(value) => value.into(),
            Self::U64(value) => value.into(),
            Self::I64(value) => value.into(),
            _ => return None,
        })
    }

    /// A float as the decimal number it was written for: an f32 of 9.9999997e-6 is 1e-5.
    pub fn as_float(&self) -> Option<f64> {
        match *self {
            Self::F32(value) => value.to_string().parse().ok(),
            Self::F64(value) => Some(value),
            _ => None,
        }
    }
}

impl Array {
    /// The number that stands for the type of the elements.
    pub fn code(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::String(_) => 8,
            Self::Array(_) => 9,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::I8(values) => values.len(),
            Self::U16(values) => values.len(),
            Self::I16(values) => values.len(),
            Self::U32(values) => values.len(),
            Self::I32(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::Bool(values) => values.len(),
            Self::String(values) => values.len(),
            Self::Array(values) => values.len(),
            Self::U64(values) => values.len(),
            Self::I64(values) => values.len(),
            Self::F64(values) => values.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Integers of any type.
    pub fn as_integers(&self) -> Option<Vec<i128>> {
        fn widened<T: Copy + Into<i128>>(values: &[T]) -> Option<Vec<i128>> {
            Some(values.iter().map(|&value| value.into()).collect())
        }
        match self {
            Self::U8(values) => widened(values),
            Self::I8(values) => widened(values),
            Self::U16(values) => widened(values),
            Self::I16(values) => widened(values),
            Self::U32(values) => widened(values),
            Self::I32(values) => widened(values),
            Self::U64(values) => widened(values),
            Self::I64(values) => widened(values),
            _ => None,
        }
    }
}

macro_rules! value_from {
    ($($of:ty => $make:expr),* $(,)?) => {
        $(impl From<$of> for Value {
            fn from(value: $of) -> Self {
                ($make)(value)
            }
        })*
    };
}
value_from! {
    u32 => Value::U32,
    i32 => Value::I32,
    f32 => Value::F32,
    bool => Value::Bool,
    String => Value::String,
    &str => |value: &str| Value::String(value.to_owned()),
    Vec<i32> => |values| Value::Array(Array::I32(values)),
    Vec<f32> => |values| Value::Array(Array::F32(values)),
    Vec<String> => |values| Value::Array(Array::String(values)),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_types_is_in_the_order_of_the_type() {
        for (index, entry) in TYPES.iter().enumerate() {
            assert_eq!(entry.0 as usize, index);
            assert_eq!(format!("{:?}", entry.0), entry.2);
            assert_eq!(GgmlType::from_code(entry.1), Some(entry.0));
        }
        assert_eq!(GgmlType::from_code(4), None);
        assert_eq!((GgmlType::Q4_K.row_bytes(512), GgmlType::Q4_K.row_bytes(500)), (Some(288), None));
        assert_eq!(GgmlType::F32.row_bytes(usize::MAX), None);
    }

    #[test]
    fn floats_are_the_decimals_they_were_written_for() {
        assert_eq!(Value::F32(1e-5).as_float(), Some(1e-5));
        assert_eq!(Value::F32(500000.0).as_float(), Some(500000.0));
        assert_eq!(Value::U32(1).as_float(), None);
    }
}
