//! Reading GGUF: the file is mapped and everything in it checked before anything is handed out.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use super::{Array, DEFAULT_ALIGNMENT, GgmlType, MAGIC, MAX_DIMENSIONS, VALUE_TYPES, Value};
use crate::error::{Error, Result, nearest};
use crate::formats::mapped::Bytes;

/// Arrays within arrays, at most.
const MAX_NESTING: usize = 8;
/// Fewest bytes of a key with its value, and of what is said of a tensor.
const MIN_PAIR: usize = 8 + 1 + 4 + 1;
const MIN_TENSOR: usize = 8 + 1 + 4 + 4 + 8;

/// A GGUF file whose header has been checked: every tensor lies within the file, and no two share a byte.
pub struct GgufFile {
    name: String,
    bytes: Bytes,
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// One tensor where it lies in its file.
#[derive(Clone, Copy, Debug)]
pub struct GgufTensor<'a> {
    pub name: &'a str,
    /// The file as messages name it.
    pub file: &'a str,
    pub ggml_type: GgmlType,
    /// Row-major, outermost first: the reverse of ggml's own order.
    pub shape: &'a [usize],
    /// Rows of `shape`'s last dimension, one after the other.
    pub bytes: &'a [u8],
}

impl GgufTensor<'_> {
    /// Values in a row: the last dimension, 1 for a scalar.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// All dimensions but the last; 1 for a vector or a scalar.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, rows)| rows.iter().product())
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.bytes.len() / self.rows().max(1)
    }
}

struct TensorInfo {
    ggml_type: GgmlType,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

impl GgufFile {
    /// Maps the file and checks its header. Errors are bad data and name the file, with the key or the tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let about = std::fs::metadata(path).map_err(|source| Error::reading(path, source))?;
        if !about.is_file() || about.len() == 0 {
            return Err(Error::data(format!(
                "{} is {}",
                path.display(),
                if about.is_dir() { "a folder" } else { "empty" }
            ))
            .hint("name a .gguf file"));
        }
        Self::parse(path.display().to_string(), Bytes::map(path)?)
    }

    /// `name` is what messages call the bytes.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        Self::parse(name.to_owned(), Bytes::Memory(bytes.into()))
    }

    fn parse(name: String, bytes: Bytes) -> Result<Self> {
        let mut cursor = Cursor { bytes: &bytes, at: 0 };
        let (version, tensor_count, pair_count) = read_counts(&name, &mut cursor)?;
        let metadata = read_metadata(&name, &mut cursor, pair_count)?;
        let alignment = alignment(&name, &metadata)?;
        refuse_split(&name, &metadata)?;
        let tensors = read_tensors(&name, &mut cursor, tensor_count, alignment)?;
        check_overlap(&name, &tensors)?;
        Ok(Self { name, bytes, version, metadata, tensors })
    }

    /// The file as messages name it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All metadata, sorted by key.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A string, or an error where the key holds something else.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// An integer of any type that is not negative.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number", |value| value.as_integer().and_then(|number| number.try_into().ok()))
    }

    /// A float of either width, or an integer.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |value| value.as_float().or_else(|| value.as_integer().map(|number| number as f64)))
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(strings)) => Some(strings.as_slice()),
            _ => None,
        })
    }

    /// Integers of any type.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.typed(key, "an array of whole numbers", |value| match value {
            Value::Array(array) => array.as_integers()?.into_iter().map(|number| number.try_into().ok()).collect(),
            _ => None,
        })
    }

    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "an array of f32", |value| match value {
            Value::Array(Array::F32(floats)) => Some(floats.as_slice()),
            _ => None,
        })
    }

    fn typed<'a, T>(&'a self, key: &str, wanted: &str, take: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        take(value).map(Some).ok_or_else(|| {
            let shown = match value {
                Value::Array(array) => format!("an {} of {} elements", value.type_name(), array.len()),
                Value::String(_) => "a string".to_owned(),
                other => format!("{other:?}"),
            };
            Error::data(format!("{}: {key} is {shown}, where {wanted} is expected", self.name))
        })
    }

    /// The error for a key that must be there.
    pub fn missing(&self, key: &str) -> Error {
        let error = Error::data(format!("{} has no metadata {key}", self.name));
        match nearest(key, self.metadata.keys().map(String::as_str)) {
            Some(near) => error.hint(format!("the nearest key is {near}")),
            None => error,
        }
    }

    /// Names of all tensors, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn tensor(&self, name: &str) -> Option<GgufTensor<'_>> {
        let (name, info) = self.tensors.get_key_value(name)?;
        let bytes = &self.bytes[info.start..info.end];
        Some(GgufTensor { name, file: &self.name, ggml_type: info.ggml_type, shape: &info.shape, bytes })
    }

    /// Like [`GgufFile::tensor`], with an error that names the nearest tensor there is.
    pub fn require(&self, name: &str) -> Result<GgufTensor<'_>> {
        self.tensor(name).ok_or_else(|| {
            let error = Error::data(format!("{} has no tensor {name}", self.name));
            match nearest(name, self.tensor_names()) {
                Some(near) => error.hint(format!("the nearest name is {near}")),
                None => error,
            }
        })
    }
}

fn read_counts(file: &str, cursor: &mut Cursor) -> Result<(u32, usize, usize)> {
    let short = |_: String| {
        Error::data(format!("{file} has {} bytes, too few for a GGUF file", cursor.bytes.len())).hint(TRUNCATED)
    };
    let mut head = Cursor { ..*cursor };
    let mut counts = || -> Part<_> { Ok((head.array::<4>()?, head.u32()?, head.u64()?, head.u64()?)) };
    let (magic, version, tensors, pairs) = counts().map_err(short)?;
    if magic != MAGIC {
        let error =
            Error::data(format!("{file} is not a GGUF file: it begins with {:?}", magic.escape_ascii().to_string()));
        return Err(error.hint("`GGUF` is expected there"));
    }
    match version {
        2 | 3 => {}
        1 => {
            return Err(Error::data(format!("{file} is of GGUF version 1, which is read no longer"))
                .hint("convert the model again: version 3 has been written since 2023"));
        }
        _ if version & 0xffff == 0 => {
            return Err(Error::data(format!("{file} is a GGUF file in big-endian order"))
                .hint("fetch the little-endian file, or turn it with the gguf package's gguf-convert-endian"));
        }
        other => {
            return Err(Error::data(format!("{file} is of GGUF version {other}")).hint("versions 2 and 3 are read"));
        }
    }
    let left = head.left();
    let counted = |what: &str, count: u64, least: usize| match usize::try_from(count) {
        Ok(count) if count <= left / least => Ok(count),
        _ => Err(Error::data(format!("{file} claims {count} {what}, and {left} bytes follow")).hint(TRUNCATED)),
    };
    let counts = (version, counted("tensors", tensors, MIN_TENSOR)?, counted("metadata keys", pairs, MIN_PAIR)?);
    cursor.at = head.at;
    Ok(counts)
}

fn read_metadata(file: &str, cursor: &mut Cursor, count: usize) -> Result<BTreeMap<String, Value>> {
    let mut metadata = BTreeMap::new();
    for number in 1..=count {
        let failed = |key: &str, problem: String| Error::data(format!("{file}: {key} {problem}")).hint(TRUNCATED);
        let key = cursor.string().map_err(|problem| failed(&format!("metadata key {number} of {count}"), problem))?;
        if key.is_empty() {
            return Err(Error::data(format!("{file}: metadata key {number} of {count} is empty")));
        }
        let value = cursor.value().map_err(|problem| failed(key, problem))?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return Err(Error::data(format!("{file}: the metadata key {key} is there twice")));
        }
    }
    Ok(metadata)
}

fn alignment(file: &str, metadata: &BTreeMap<String, Value>) -> Result<usize> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::U32(alignment)) if alignment.is_power_of_two() => Ok(*alignment as usize),
        Some(other) => {
            let message = format!("{file}: general.alignment is {}", shown(other));
            Err(Error::data(message).hint("a power of two of type u32 is expected"))
        }
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Array(_) | Value::String(_) => value.type_name(),
        other => format!("{other:?}"),
    }
}

fn refuse_split(file: &str, metadata: &BTreeMap<String, Value>) -> Result<()> {
    match metadata.get("split.count").and_then(Value::as_integer) {
        Some(count) if count > 1 => Err(Error::data(format!("{file} is one of {count} parts of a model"))
            .hint("join the parts first: llama-gguf-split --merge FIRST-PART WHOLE.gguf")),
        _ => Ok(()),
    }
}

fn read_tensors(file: &str, cursor: &mut Cursor, count: usize, align: usize) -> Result<BTreeMap<String, TensorInfo>> {
    struct Head {
        ggml_type: GgmlType,
        shape: Vec<usize>,
        size: usize,
        offset: u64,
    }
    let mut heads = BTreeMap::new();
    for number in 1..=count {
        let name = cursor.string().map_err(|problem| {
            Error::data(format!("{file}: the name of tensor {number} of {count} {problem}")).hint(TRUNCATED)
        })?;
        let named = |problem: String| Error::data(format!("{file}: tensor {name}: {problem}"));
        let cut = |problem: String| named(format!("its description {problem}")).hint(TRUNCATED);
        let dimensions = cursor.u32().map_err(cut)?;
        if dimensions as usize > MAX_DIMENSIONS {
            return Err(named(format!("{dimensions} dimensions, where at most {MAX_DIMENSIONS} are possible")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(cursor.u64().map_err(cut)?);
        }
        shape.reverse();
        let (code, offset) = (cursor.u32().map_err(cut)?, cursor.u64().map_err(cut)?);
        let Some(ggml_type) = GgmlType::from_code(code) else {
            return Err(named(format!("type {code} is not known"))
                .hint("the file may be newer than this program, or of a type that ggml has given up"));
        };
        let sized: Option<Vec<usize>> = shape.iter().map(|&size| usize::try_from(size).ok()).collect();
        let Some(sized) = sized.filter(|sizes| !sizes.contains(&0)) else {
            return Err(named(format!("shape {shape:?} is not possible")));
        };
        let columns = sized.last().copied().unwrap_or(1);
        if !columns.is_multiple_of(ggml_type.block_values()) {
            let (name, block) = (ggml_type.name(), ggml_type.block_values());
            return Err(named(format!("rows of {columns} values are no whole number of {name} blocks of {block}")));
        }
        let rows = sized.iter().rev().skip(1).try_fold(1usize, |rows, &size| rows.checked_mul(size));
        let size = rows.and_then(|rows| ggml_type.row_bytes(columns)?.checked_mul(rows));
        let Some(size) = size else { return Err(named(format!("shape {shape:?} is larger than any file"))) };
        if heads.insert(name.to_owned(), Head { ggml_type, shape: sized, size, offset }).is_some() {
            return Err(Error::data(format!("{file}: the tensor {name} is there twice")));
        }
    }

    let data_start = cursor.at.checked_next_multiple_of(align);
    let mut tensors = BTreeMap::new();
    for (name, Head { ggml_type, shape, size, offset }) in heads {
        let named = |problem: String| Error::data(format!("{file}: tensor {name}: {problem}"));
        if !offset.is_multiple_of(align as u64) {
            return Err(named(format!("its offset {offset} is no multiple of the alignment {align}")));
        }
        let range = usize::try_from(offset).ok().and_then(|offset| {
            let start = data_start?.checked_add(offset)?;
            Some((start, start.checked_add(size)?))
        });
        match range.filter(|&(_, end)| end <= cursor.bytes.len()) {
            Some((start, end)) => tensors.insert(name, TensorInfo { ggml_type, shape, start, end }),
            None => {
                let held = cursor.bytes.len().saturating_sub(data_start.unwrap_or(usize::MAX));
                return Err(named(format!("its {size} bytes at {offset} are not within the {held} bytes of data"))
                    .hint(TRUNCATED));
            }
        };
    }
    Ok(tensors)
}

fn check_overlap(file: &str, tensors: &BTreeMap<String, TensorInfo>) -> Result<()> {
    let mut ranges: Vec<_> = tensors.iter().map(|(name, info)| (info.start, info.end, name)).collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if pair[1].0 < pair[0].1 {
            return Err(Error::data(format!("{file}: {} and {} lie on the same bytes", pair[1].2, pair[0].2)));
        }
    }
    Ok(())
}

const TRUNCATED: &str = "the file may be truncated or damaged: fetch it again";

/// A result whose error is what is wrong, without what it is wrong with.
type Part<T> = std::result::Result<T, String>;

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, count: u64) -> Part<&'a [u8]> {
        let end = usize::try_from(count).ok().and_then(|count| self.at.checked_add(count));
        match end.and_then(|end| self.bytes.get(self.at..end)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => Err(format!("wants {count} bytes at byte {}, and {} are left", self.at, self.left())),
        }
    }

    fn array<const N: usize>(&mut self) -> Part<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    fn u32(&mut self) -> Part<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Part<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn string(&mut self) -> Part<&'a str> {
        let length = self.u64()?;
        let at = self.at;
        std::str::from_utf8(self.take(length)?).map_err(|_| format!("holds text at byte {at} that is not UTF-8"))
    }

    fn value(&mut self) -> Part<Value> {
        Ok(match self.u32()? {
            0 => Value::U8(u8::from_le_bytes(self.array()?)),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(u32::from_le_bytes(self.array()?)),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => Value::Bool(bool_of(self.array::<1>()?[0])?),
            8 => Value::String(self.string()?.to_owned()),
            9 => Value::Array(self.values(MAX_NESTING)?),
            10 => Value::U64(u64::from_le_bytes(self.array()?)),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            other => return Err(unknown_type(other)),
        })
    }

    fn values(&mut self, nesting: usize) -> Part<Array> {
        let code = self.u32()?;
        let count = self.u64()?;
        Ok(match code {
            0 => Array::U8(self.take(count)?.to_vec()),
            1 => Array::I8(self.scalars(count, i8::from_le_bytes)?),
            2 => Array::U16(self.scalars(count, u16::from_le_bytes)?),
            3 => Array::I16(self.scalars(count, i16::from_le_bytes)?),
            4 => Array::U32(self.scalars(count, u32::from_le_bytes)?),
            5 => Array::I32(self.scalars(count, i32::from_le_bytes)?),
            6 => Array::F32(self.scalars(count, f32::from_le_bytes)?),
            7 => Array::Bool(self.take(count)?.iter().map(|&byte| bool_of(byte)).collect::<Part<_>>()?),
            8 => Array::String(self.each(count, 8, |cursor| cursor.string().map(str::to_owned))?),
            9 if nesting == 0 => return Err(format!("holds arrays more than {MAX_NESTING} deep")),
            9 => Array::Array(self.each(count, 12, |cursor| cursor.values(nesting - 1))?),
            10 => Array::U64(self.scalars(count, u64::from_le_bytes)?),
            11 => Array::I64(self.scalars(count, i64::from_le_bytes)?),
            12 => Array::F64(self.scalars(count, f64::from_le_bytes)?),
            other => return Err(unknown_type(other)),
        })
    }

    fn scalars<const N: usize, T>(&mut self, count: u64, parse: fn([u8; N]) -> T) -> Part<Vec<T>> {
        let bytes = count.checked_mul(N as u64).ok_or_else(|| format!("claims {count} elements"))?;
        Ok(self.take(bytes)?.as_chunks::<N>().0.iter().map(|&bytes| parse(bytes)).collect())
    }

    /// Elements of `least` bytes and more.
    fn each<T>(&mut self, count: u64, least: u64, parse: impl Fn(&mut Self) -> Part<T>) -> Part<Vec<T>> {
        if count > self.left() as u64 / least {
            return Err(format!("claims {count} elements, and {} bytes are left", self.left()));
        }
        let mut elements = Vec::new();
        for number in 0..count {
            elements.push(parse(self).map_err(|problem| format!("[{number}] {problem}"))?);
        }
        Ok(elements)
    }
}

fn bool_of(byte: u8) -> Part<bool> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(format!("holds the byte {other} for a bool")),
    }
}

fn unknown_type(code: u32) -> String {
    format!("is of type {code}, and types go from 0 to {}", VALUE_TYPES.len() - 1)
}
