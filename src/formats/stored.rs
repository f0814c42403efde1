//! One tensor of any kind of file, read in rows: bytes as they lie there where that is possible, made where it is not.

use std::{borrow::Cow, ops::Range};

use half::{bf16, f16};

use super::{
    bitsandbytes::PackedTensor,
    gguf::{GgmlType, llama::LlamaTensor},
    host_tensor::HostTensor,
    random::RandomTensor,
    safetensors::{Dtype, TensorRef},
    torch_bin::TorchTensor,
};
use crate::error::{Error, Result};

/// A tensor where it is stored, row-major. A matrix or a convolution has rows along its first dimension; a vector is
/// one row.
#[derive(Clone, Debug)]
pub struct StoredTensor<'a> {
    /// As the file calls it.
    pub name: &'a str,
    /// The file as messages name it.
    pub file: &'a str,
    pub shape: Vec<usize>,
    values: Values<'a>,
}

#[derive(Clone, Debug)]
enum Values<'a> {
    /// Little-endian values that lie one after the other.
    Plain(Dtype, &'a [u8]),
    Torch(TorchTensor<'a>),
    Gguf(LlamaTensor<'a>),
    /// Codes of four bits, as bitsandbytes stores them.
    Packed(PackedTensor<'a>),
    Random(RandomTensor),
    /// Made in memory, such as position embeddings for another picture size.
    Host(&'a HostTensor),
    /// A tensor of fewer rows, and the rows that come after them.
    Grown(Box<StoredTensor<'a>>, &'a HostTensor),
}

impl<'a> From<TensorRef<'a>> for StoredTensor<'a> {
    fn from(tensor: TensorRef<'a>) -> Self {
        let TensorRef { name, file, dtype, shape, bytes } = tensor;
        Self { name, file, shape: shape.to_vec(), values: Values::Plain(dtype, bytes) }
    }
}

impl<'a> From<TorchTensor<'a>> for StoredTensor<'a> {
    fn from(tensor: TorchTensor<'a>) -> Self {
        Self { name: tensor.name, file: tensor.file, shape: tensor.shape.to_vec(), values: Values::Torch(tensor) }
    }
}

impl<'a> From<LlamaTensor<'a>> for StoredTensor<'a> {
    fn from(tensor: LlamaTensor<'a>) -> Self {
        let (name, file) = (tensor.tensor.name, tensor.tensor.file);
        Self { name, file, shape: tensor.shape().to_vec(), values: Values::Gguf(tensor) }
    }
}

impl<'a> From<PackedTensor<'a>> for StoredTensor<'a> {
    fn from(tensor: PackedTensor<'a>) -> Self {
        Self { name: tensor.name, file: tensor.file, shape: tensor.shape.clone(), values: Values::Packed(tensor) }
    }
}

impl<'a> StoredTensor<'a> {
    pub(super) fn random(name: &'a str, file: &'a str, shape: Vec<usize>, tensor: RandomTensor) -> Self {
        Self { name, file, shape, values: Values::Random(tensor) }
    }

    /// A tensor in memory.
    pub fn host(name: &'a str, file: &'a str, tensor: &'a HostTensor) -> Self {
        Self { name, file, shape: tensor.shape.clone(), values: Values::Host(tensor) }
    }

    /// The tensor with `rows` [R, columns] after its own.
    pub(super) fn grown(self, rows: &'a HostTensor) -> Self {
        let mut shape = self.shape.clone();
        shape[0] += rows.shape[0];
        Self { name: self.name, file: self.file, shape, values: Values::Grown(Box::new(self), rows) }
    }

    /// The tensor without the rows behind the first `rows`; a vector is left as it is.
    pub(super) fn first_rows(mut self, rows: usize) -> Self {
        if self.shape.len() > 1 {
            self.shape[0] = self.shape[0].min(rows);
        }
        self
    }

    /// The codes it is stored as, where these are bitsandbytes' and all of it is there.
    pub fn packed(&self) -> Option<&PackedTensor<'a>> {
        match &self.values {
            Values::Packed(tensor) if tensor.shape == self.shape => Some(tensor),
            _ => None,
        }
    }

    /// The dtype that holds its values exactly: that of the file, F32 for blocks of a few bits.
    pub fn dtype(&self) -> Dtype {
        match &self.values {
            Values::Plain(dtype, _) => *dtype,
            Values::Torch(tensor) => tensor.dtype,
            Values::Gguf(tensor) => match tensor.ggml_type() {
                GgmlType::F16 => Dtype::F16,
                GgmlType::BF16 => Dtype::BF16,
                _ => Dtype::F32,
            },
            Values::Random(tensor) => tensor.dtype,
            Values::Packed(_) | Values::Host(_) => Dtype::F32,
            Values::Grown(tensor, _) => tensor.dtype(),
        }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    pub fn rows(&self) -> usize {
        if self.shape.len() < 2 { 1 } else { self.shape[0] }
    }

    /// Values in a row.
    pub fn columns(&self) -> usize {
        if self.shape.len() < 2 { self.len() } else { self.shape[1..].iter().product() }
    }

    /// The bytes of some rows in [`StoredTensor::dtype`], little-endian.
    ///
    /// # Errors
    /// `Data`: the values are of a type that is not read.
    pub fn bytes(&self, rows: Range<usize>) -> Result<Cow<'a, [u8]>> {
        if rows.start > rows.end || rows.end > self.rows() {
            let (file, name, shape) = (self.file, self.name, &self.shape);
            return Err(Error::failed(format!("{file}: {name}: rows {rows:?} of shape {shape:?}")));
        }
        let columns = self.columns();
        Ok(match &self.values {
            Values::Plain(dtype, bytes) => {
                let row = columns * self.width(*dtype)?;
                Cow::Borrowed(&bytes[rows.start * row..rows.end * row])
            }
            Values::Torch(tensor) => {
                self.width(tensor.dtype)?;
                if self.shape.len() < 2 { tensor.row_major() } else { tensor.rows_row_major(rows) }
            }
            Values::Gguf(tensor) => self.gguf_bytes(tensor, rows)?,
            Values::Packed(tensor) => {
                let mut values = vec![0f32; rows.len() * columns];
                tensor.dequantize(rows.start * columns, &mut values);
                Cow::Owned(bytemuck::cast_slice(&values).to_vec())
            }
            Values::Random(tensor) => Cow::Owned(tensor.bytes(rows, columns)),
            Values::Host(tensor) => {
                Cow::Borrowed(bytemuck::cast_slice(&tensor.data[rows.start * columns..rows.end * columns]))
            }
            Values::Grown(tensor, added) => {
                let own = tensor.rows();
                let mut bytes = tensor.bytes(rows.start.min(own)..rows.end.min(own))?;
                let added = &added.data[(rows.start.max(own) - own) * columns..(rows.end.max(own) - own) * columns];
                if !added.is_empty() {
                    append_rounded(tensor.dtype(), added, bytes.to_mut());
                }
                bytes
            }
        })
    }

    /// Bytes of one value of a dtype that weights are kept in.
    fn width(&self, dtype: Dtype) -> Result<usize> {
        match dtype {
            Dtype::F32 => Ok(4),
            Dtype::F16 | Dtype::BF16 => Ok(2),
            other => Err(Error::data(format!("{}: {} is of dtype {other:?}", self.file, self.name))
                .hint("weights are read from F32, F16 and BF16")),
        }
    }

    fn gguf_bytes(&self, tensor: &LlamaTensor<'a>, rows: Range<usize>) -> Result<Cow<'a, [u8]>> {
        // A vector is one row here; there each of its values may be one.
        let rows = if self.shape.len() < 2 { 0..tensor.rows() } else { rows };
        if matches!(tensor.ggml_type(), GgmlType::F32 | GgmlType::F16 | GgmlType::BF16) {
            if let Some(bytes) = tensor.raw_in_place(rows.clone()) {
                return Ok(Cow::Borrowed(bytes));
            }
            let mut bytes = Vec::new();
            tensor.raw_rows(rows, &mut bytes)?;
            return Ok(Cow::Owned(bytes));
        }
        let mut values = vec![0f32; rows.len() * tensor.columns()];
        tensor.read_rows(rows, &mut values)?;
        Ok(Cow::Owned(bytemuck::cast_slice(&values).to_vec()))
    }

    /// The values of some rows as f32: exact, since every F16 and BF16 number is one.
    pub fn rows_f32(&self, rows: Range<usize>) -> Result<Vec<f32>> {
        let bytes = self.bytes(rows)?;
        Ok(match self.dtype() {
            Dtype::F16 => bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::BF16 => bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            _ => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        })
    }

    /// All values.
    pub fn to_f32(&self) -> Result<HostTensor> {
        Ok(HostTensor { data: self.rows_f32(0..self.rows())?, shape: self.shape.clone() })
    }

    /// Ranges of rows of at most `bytes` each (a row that is larger comes alone), in order.
    pub fn row_chunks(&self, bytes: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let row = self.columns() * self.dtype().bitsize() / 8;
        let (rows, step) = (self.rows(), (bytes / row.max(1)).max(1));
        (0..rows).step_by(step).map(move |first| first..(first + step).min(rows))
    }
}

/// Appends `values`, rounded to nearest even, in a dtype that weights are kept in.
fn append_rounded(dtype: Dtype, values: &[f32], out: &mut Vec<u8>) {
    match dtype {
        Dtype::F16 => out.extend(values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes())),
        Dtype::BF16 => out.extend(values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes())),
        _ => out.extend(values.iter().flat_map(|&value| value.to_le_bytes())),
    }
}

/// `values` in `dtype` (F32, F16 or BF16), rounded to nearest even, little-endian.
pub fn rounded(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * dtype.bitsize() / 8);
    append_rounded(dtype, values, &mut bytes);
    bytes
}
