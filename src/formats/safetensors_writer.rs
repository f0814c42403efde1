//! Writing safetensors, one tensor at a time: a model is never held twice.

use std::{borrow::Cow, collections::BTreeMap, io::Write, path::Path};

use serde_json::{Map, Value, json};

use super::{
    atomic::{NewFile, write_file},
    safetensors::{Dtype, INDEX_FILE, SINGLE_FILE},
    stored::{StoredTensor, rounded},
};
use crate::error::{Error, Result};

/// Bytes of tensors in one file of a sharded model, as the Hub's tools cut them.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// What the header says of a tensor before its data comes.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorHead {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl TensorHead {
    pub fn f32(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), dtype: Dtype::F32, shape: shape.into() }
    }

    /// Of its data.
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

/// The data of one tensor, row-major.
pub enum TensorData<'a> {
    /// Values, rounded to nearest even where the head's dtype is narrower.
    F32(Cow<'a, [f32]>),
    /// Little-endian values of the head's dtype.
    Raw(Cow<'a, [u8]>),
    /// A tensor of another file: its bytes where the dtype is the same, rounded in parts where it is not.
    Stored(StoredTensor<'a>),
}

/// Gives the data of the tensor asked for; called once for each, in the order of the file.
pub type Fetch<'a, 'b> = &'a mut dyn FnMut(&TensorHead) -> Result<TensorData<'b>>;

/// Writes one file, whole or not at all: tensors by descending width of dtype, then by name, as the safetensors library
/// sorts them; metadata `{"format": "pt"}`, without which transformers refuses a file.
pub fn write_safetensors(path: &Path, mut heads: Vec<TensorHead>, fetch: Fetch) -> Result<()> {
    sort(&mut heads);
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut offset = 0;
    for head in &heads {
        let end = offset + head.bytes();
        let entry = json!({"dtype": head.dtype, "shape": head.shape, "data_offsets": [offset, end]});
        header.insert(head.name.clone(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let failed = |source| Error::writing(path, source);
    let mut file = NewFile::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    file.write_all(&header).map_err(failed)?;
    for head in &heads {
        let data = fetch(head)?;
        let (given, wanted) = (data.bytes(head.dtype), head.bytes());
        if given != wanted {
            let (dtype, shape) = (head.dtype, &head.shape);
            let message = format!("{}: {}: {given} bytes for shape {shape:?} of {dtype:?}", path.display(), head.name);
            return Err(Error::failed(message));
        }
        data.write(head, &mut |bytes| file.write_all(bytes).map_err(failed))?;
    }
    file.commit()
}

/// Into the order of a file.
pub fn sort(heads: &mut [TensorHead]) {
    heads.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
}

/// Bytes of a stored tensor that are rounded at a time.
const CHUNK: usize = 8 << 20;

impl TensorData<'_> {
    /// How many it will be in a file, as `dtype`.
    fn bytes(&self, dtype: Dtype) -> u64 {
        let of = |values: usize| (values * dtype.bitsize() / 8) as u64;
        match self {
            Self::F32(values) => of(values.len()),
            Self::Raw(bytes) => bytes.len() as u64,
            Self::Stored(tensor) => of(tensor.len()),
        }
    }

    fn write(&self, head: &TensorHead, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match self {
            Self::Raw(bytes) => write(bytes),
            Self::F32(values) => values.chunks(CHUNK / 4).try_for_each(|values| write(&narrowed(head, values)?)),
            Self::Stored(tensor) => tensor.row_chunks(CHUNK).try_for_each(|rows| match tensor.dtype() == head.dtype {
                true => write(&tensor.bytes(rows)?),
                false => write(&narrowed(head, &tensor.rows_f32(rows)?)?),
            }),
        }
    }
}

/// Values in the head's dtype. One that is finite and becomes infinite is an error.
fn narrowed(head: &TensorHead, values: &[f32]) -> Result<Vec<u8>> {
    let bytes = rounded(head.dtype, values);
    if head.dtype == Dtype::F16 {
        let halves = bytes.as_chunks().0.iter().map(|&bytes| half::f16::from_le_bytes(bytes));
        if let Some((_, value)) = halves.zip(values).find(|(half, value)| half.is_infinite() && value.is_finite()) {
            return Err(Error::data(format!("{} holds {value}, which float16 cannot", head.name))
                .hint("write the model as bfloat16 or float32"));
        }
    }
    Ok(bytes)
}

/// Writes model.safetensors into `folder`, or shards of at most `shard_bytes` with their index. A tensor larger than
/// that has a shard of its own.
pub fn write_sharded(folder: &Path, mut heads: Vec<TensorHead>, shard_bytes: u64, fetch: Fetch) -> Result<()> {
    heads.sort_by(|a, b| a.name.cmp(&b.name));
    let total: u64 = heads.iter().map(TensorHead::bytes).sum();
    if total <= shard_bytes {
        return write_safetensors(&folder.join(SINGLE_FILE), heads, fetch);
    }
    let mut shards: Vec<(u64, Vec<TensorHead>)> = Vec::new();
    for head in heads {
        let bytes = head.bytes();
        match shards.last_mut().filter(|(filled, _)| filled + bytes <= shard_bytes) {
            Some((filled, shard)) => {
                *filled += bytes;
                shard.push(head);
            }
            None => shards.push((bytes, vec![head])),
        }
    }
    let mut weight_map = BTreeMap::new();
    let count = shards.len();
    for (number, (_, shard)) in (1..).zip(shards) {
        let name = format!("model-{number:05}-of-{count:05}.safetensors");
        weight_map.extend(shard.iter().map(|head| (head.name.clone(), name.clone())));
        write_safetensors(&folder.join(name), shard, fetch)?;
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    write_file(&folder.join(INDEX_FILE), format!("{index:#}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::safetensors::Checkpoint;

    fn heads() -> Vec<TensorHead> {
        let half = TensorHead { name: "a".into(), dtype: Dtype::F16, shape: vec![3] };
        vec![half, TensorHead::f32("z", [2, 2]), TensorHead::f32("b", []), TensorHead::f32("empty", [0])]
    }

    fn values(head: &TensorHead) -> Result<TensorData<'static>> {
        Ok(match head.name.as_str() {
            "a" => TensorData::Raw(Cow::Borrowed(&[1, 2, 3, 4, 5, 6])),
            "z" => TensorData::F32(vec![1.0, 2.0, 3.0, f32::MIN].into()),
            "b" => TensorData::F32(vec![9.0].into()),
            _ => TensorData::F32(Vec::new().into()),
        })
    }

    /// The crate's own serialiser is the reference.
    #[test]
    fn the_bytes_are_those_of_the_safetensors_library() {
        use ::safetensors::tensor::{TensorView, serialize};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        write_safetensors(&path, heads(), &mut |head| values(head)).unwrap();
        let data: BTreeMap<String, Vec<u8>> = heads()
            .iter()
            .map(|head| {
                let mut bytes = Vec::new();
                let mut push = |part: &[u8]| {
                    bytes.extend(part);
                    Ok(())
                };
                values(head).unwrap().write(head, &mut push).unwrap();
                (head.name.clone(), bytes)
            })
            .collect();
        let views = heads().into_iter().map(|head| {
            let view = TensorView::new(head.dtype, head.shape, &data[&head.name]).unwrap();
            (head.name, view)
        });
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        assert_eq!(std::fs::read(&path).unwrap(), serialize(views, Some(metadata)).unwrap());
    }

    #[test]
    fn shards_hold_everything_once_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        write_sharded(dir.path(), heads(), 12, &mut |head| values(head)).unwrap();
        assert!(dir.path().join("model-00001-of-00002.safetensors").is_file());
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "empty", "z"]);
        assert_eq!(checkpoint.require("z").unwrap().to_f32().unwrap().data, [1.0, 2.0, 3.0, f32::MIN]);
        let index: Value = serde_json::from_slice(&std::fs::read(dir.path().join(INDEX_FILE)).unwrap()).unwrap();
        assert_eq!(index["metadata"]["total_size"], 26);
    }

    #[test]
    fn a_failing_source_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let error = write_safetensors(&path, heads(), &mut |_| Err(Error::device("lost"))).unwrap_err();
        assert_eq!(error.message, "lost");
        let wrong = write_safetensors(&path, heads(), &mut |_| Ok(TensorData::F32(vec![0.0; 7].into()))).unwrap_err();
        assert!(wrong.message.contains("28 bytes for shape"), "{wrong}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
