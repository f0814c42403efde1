//! Writing GGUF version 3, one tensor at a time: a model is never held twice.

use std::{collections::BTreeSet, io::Write, path::Path};

use rayon::prelude::*;

use super::{
    Array, DEFAULT_ALIGNMENT, GgmlType, MAGIC, MAX_DIMENSIONS, Value,
    quantize::{Unfit, WRITTEN, quantize},
};
use crate::{
    error::{Error, Result},
    formats::{atomic::NewFile, safetensors_writer::TensorData},
};

/// ggml keeps names in 64 bytes, the last of them zero.
const MAX_NAME: usize = 63;
/// Values rounded at a time; a whole number of blocks of every written type.
const CHUNK: usize = 1 << 16;
/// Bytes of a stored tensor that are read at a time.
pub(super) const CHUNK_BYTES: usize = 16 << 20;

/// What the file says of a tensor before its data comes.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufHead {
    pub name: String,
    /// One of [`WRITTEN`], or any type whose data is given raw.
    pub ggml_type: GgmlType,
    /// Row-major, outermost first.
    pub shape: Vec<usize>,
}

impl GgufHead {
    /// Bytes of its data; none where a row is no whole number of blocks.
    pub fn bytes(&self) -> Option<usize> {
        let (&columns, rows) = self.shape.split_last()?;
        rows.iter().try_fold(self.ggml_type.row_bytes(columns)?, |bytes, &size| bytes.checked_mul(size))
    }
}

/// Gives the data of the tensor asked for, f32 values or raw bytes of the head's type; called once for each, in order.
pub type Fetch<'a, 'b> = &'a mut dyn FnMut(&GgufHead) -> Result<TensorData<'b>>;

/// A part of a tensor's data; the parts follow each other.
pub enum Piece<'a> {
    /// Values to be rounded to the head's type: whole rows, or as many as there are.
    Values(&'a [f32]),
    /// Bytes of the head's type.
    Raw(&'a [u8]),
}

/// Takes a tensor's data piece by piece.
pub type Sink<'a> = &'a mut dyn FnMut(Piece<'_>) -> Result<()>;

/// Writes one file, whole or not at all: metadata and tensors in the given order, each tensor at a multiple of 32.
///
/// Errors: a name that is there twice or too long for ggml, data that does not fill its shape, a value that the type
/// cannot hold (named with the tensor), and what the disk refuses.
pub fn write_gguf(path: &Path, metadata: &[(String, Value)], heads: &[GgufHead], fetch: Fetch) -> Result<()> {
    write_gguf_pieces(path, metadata, heads, &mut |head, sink| {
        let wrong = |what: String| Error::failed(format!("{}: {}: {what}", path.display(), head.name));
        match fetch(head)? {
            TensorData::Raw(bytes) => sink(Piece::Raw(&bytes)),
            TensorData::F32(values) if values.len() == head.shape.iter().product::<usize>() => {
                sink(Piece::Values(&values))
            }
            TensorData::F32(values) => Err(wrong(format!("{} values for {:?}", values.len(), head.shape))),
            TensorData::Stored(tensor) if tensor.shape == head.shape => {
                tensor.row_chunks(CHUNK_BYTES).try_for_each(|rows| sink(Piece::Values(&tensor.rows_f32(rows)?)))
            }
            TensorData::Stored(tensor) => Err(wrong(format!("{:?} for {:?}", tensor.shape, head.shape))),
        }
    })
}

/// As [`write_gguf`], with tensors that are never whole in memory: `fill` hands the data of each to the sink in pieces.
pub fn write_gguf_pieces(
    path: &Path,
    metadata: &[(String, Value)],
    heads: &[GgufHead],
    fill: &mut dyn FnMut(&GgufHead, Sink) -> Result<()>,
) -> Result<()> {
    let header = header(path, metadata, heads)?;
    let failed = |source| Error::writing(path, source);
    let mut file = NewFile::create(path)?;
    file.write_all(&header).map_err(failed)?;
    for head in heads {
        let (wanted, mut given) = (head.bytes().unwrap_or(0), 0);
        fill(head, &mut |piece| match piece {
            Piece::Raw(bytes) => {
                given += bytes.len();
                file.write_all(bytes).map_err(failed)
            }
            Piece::Values(values) => {
                let parts: Result<Vec<Vec<u8>>, Unfit> = values
                    .par_chunks(CHUNK)
                    .map(|values| {
                        let mut rounded = Vec::new();
                        quantize(head.ggml_type, values, &mut rounded).map(|()| rounded)
                    })
                    .collect();
                for rounded in parts.map_err(|unfit| refusal(path, head, unfit))? {
                    given += rounded.len();
                    file.write_all(&rounded).map_err(failed)?;
                }
                Ok(())
            }
        })?;
        if given != wanted {
            return Err(Error::failed(format!("{}: {}: {given} bytes for {wanted}", path.display(), head.name)));
        }
        file.write_all(&vec![0; wanted.next_multiple_of(DEFAULT_ALIGNMENT) - wanted]).map_err(failed)?;
    }
    file.commit()
}

fn refusal(path: &Path, head: &GgufHead, unfit: Unfit) -> Error {
    let (path, name, ggml_type) = (path.display(), &head.name, head.ggml_type.name());
    match unfit {
        Unfit::Value(value) => {
            Error::data(format!("{path}: {name} holds {value}, which {ggml_type} cannot")).hint(if value.is_finite() {
                "write the model as BF16 or F32"
            } else {
                "the weights are broken: look where they come from"
            })
        }
        Unfit::Type | Unfit::Length => {
            let types = WRITTEN.map(GgmlType::name).join(", ");
            Error::failed(format!("{path}: {name} cannot be rounded to {ggml_type}"))
                .hint(format!("{types} are written"))
        }
    }
}

/// Everything before the first tensor's data, with its padding.
fn header(path: &Path, metadata: &[(String, Value)], heads: &[GgufHead]) -> Result<Vec<u8>> {
    let wrong = |what: String| Error::failed(format!("{}: {what}", path.display()));
    let mut out = MAGIC.to_vec();
    out.extend(3u32.to_le_bytes());
    put_length(&mut out, heads.len());
    put_length(&mut out, metadata.len());
    let mut keys = BTreeSet::new();
    for (key, value) in metadata {
        if !keys.insert(key) || key.is_empty() {
            return Err(wrong(format!("the metadata key `{key}` is there twice, or empty")));
        }
        put_string(&mut out, key);
        out.extend(value.code().to_le_bytes());
        put_value(&mut out, value);
    }
    let (mut names, mut offset) = (BTreeSet::new(), 0usize);
    for head in heads {
        let (name, shape) = (&head.name, &head.shape);
        if !names.insert(name) || name.is_empty() || name.len() > MAX_NAME {
            return Err(wrong(format!(
                "the tensor name `{name}` is there twice, empty or longer than {MAX_NAME} bytes"
            )));
        }
        let bytes = head.bytes().filter(|&bytes| bytes > 0 && shape.len() <= MAX_DIMENSIONS);
        let Some(bytes) = bytes else {
            return Err(wrong(format!("{name}: shape {shape:?} cannot be written as {}", head.ggml_type.name())));
        };
        put_string(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&size| put_length(&mut out, size));
        out.extend(head.ggml_type.code().to_le_bytes());
        put_length(&mut out, offset);
        offset += bytes.next_multiple_of(DEFAULT_ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
    Ok(out)
}

fn put_length(out: &mut Vec<u8>, length: usize) {
    out.extend((length as u64).to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    put_length(out, text.len());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(value) => out.extend(value.to_le_bytes()),
        Value::I8(value) => out.extend(value.to_le_bytes()),
        Value::U16(value) => out.extend(value.to_le_bytes()),
        Value::I16(value) => out.extend(value.to_le_bytes()),
        Value::U32(value) => out.extend(value.to_le_bytes()),
        Value::I32(value) => out.extend(value.to_le_bytes()),
        Value::F32(value) => out.extend(value.to_le_bytes()),
        Value::Bool(value) => out.push((*value).into()),
        Value::String(value) => put_string(out, value),
        Value::Array(value) => put_array(out, value),
        Value::U64(value) => out.extend(value.to_le_bytes()),
        Value::I64(value) => out.extend(value.to_le_bytes()),
        Value::F64(value) => out.extend(value.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.code().to_le_bytes());
    put_length(out, array.len());
    match array {
        Array::U8(values) => out.extend(values),
        Array::I8(values) => out.extend(values.iter().map(|&value| value as u8)),
        Array::U16(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I16(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::Bool(values) => out.extend(values.iter().map(|&value| u8::from(value))),
        Array::String(values) => values.iter().for_each(|text| put_string(out, text)),
        Array::Array(values) => values.iter().for_each(|array| put_array(out, array)),
        Array::U64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
    }
}
