//! Reading safetensors: one file, a sharded folder, or bytes in memory. Files are mapped, never read whole.
//!
//! The header is checked here rather than by the safetensors crate, because the crate lets a repeated name pass and
//! does not say which tensor is wrong.

use std::{borrow::Cow, collections::BTreeMap, fmt, path::Path};

use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

pub use safetensors::{Dtype, tensor::TensorInfo};

use super::{
    host_tensor::HostTensor,
    mapped::Bytes,
    shards::{Shards, WeightsFile},
    stored::StoredTensor,
};
use crate::error::{Error, Result};

pub const SINGLE_FILE: &str = "model.safetensors";
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// The tensors of one or more safetensors files by the names they have there.
pub struct Checkpoint {
    shards: Shards<TensorFile>,
}

/// One tensor where it lies in its file.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    pub name: &'a str,
    /// The file as messages name it.
    pub file: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    /// Little-endian, row-major.
    pub bytes: &'a [u8],
}

impl Checkpoint {
    /// Opens a folder (model.safetensors, or shards with their index) or one file.
    pub fn open(path: &Path) -> Result<Self> {
        if let Some(shards) = Shards::open(path, SINGLE_FILE, INDEX_FILE)? {
            return Ok(Self { shards });
        }
        let error = Error::data(format!("{} holds neither {SINGLE_FILE} nor {INDEX_FILE}", path.display()));
        Err(error.hint("name the folder that holds the model's weights"))
    }

    /// `name` is what messages call the bytes.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        let file = TensorFile::parse(name.to_owned(), Bytes::Memory(bytes.into()))?;
        Ok(Self { shards: Shards::from_files(vec![file])? })
    }

    /// Names as in the files, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shards.names()
    }

    pub fn get(&self, name: &str) -> Option<TensorRef<'_>> {
        let (name, file, info) = self.shards.get(name)?;
        let (start, end) = info.data_offsets;
        let bytes = &file.bytes[file.data_start + start..file.data_start + end];
        Some(TensorRef { name, file: &file.name, dtype: info.dtype, shape: &info.shape, bytes })
    }

    /// Like [`Checkpoint::get`], with an error that names the nearest tensor there is.
    pub fn require(&self, name: &str) -> Result<TensorRef<'_>> {
        self.get(name).ok_or_else(|| self.shards.missing(name))
    }
}

impl TensorRef<'_> {
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values as f32: exact, since every F16 and BF16 number is one.
    pub fn to_f32(&self) -> Result<HostTensor> {
        StoredTensor::from(*self).to_f32()
    }
}

/// One file whose header has been checked: every range of `tensors` lies within the bytes after `data_start`.
struct TensorFile {
    name: String,
    bytes: Bytes,
    data_start: usize,
    tensors: BTreeMap<String, TensorInfo>,
}

impl TensorFile {
    fn parse(name: String, bytes: Bytes) -> Result<Self> {
        let (data_start, tensors) = read_header(&name, &bytes)?;
        Ok(Self { name, bytes, data_start, tensors })
    }
}

impl WeightsFile for TensorFile {
    type Info = TensorInfo;

    fn map(path: &Path) -> Result<Self> {
        Self::parse(path.display().to_string(), Bytes::map(path)?)
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }
}

/// Layout: u64 length N, N bytes of JSON, then the data that the JSON's ranges cover without hole or overlap.
fn read_header(file: &str, bytes: &[u8]) -> Result<(usize, BTreeMap<String, TensorInfo>)> {
    let truncated = "the file may be truncated, or not be safetensors at all";
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(
            Error::data(format!("{file} has {} bytes, too few for a safetensors file", bytes.len())).hint(truncated)
        );
    };
    let length = u64::from_le_bytes(*length);
    let header =
        match usize::try_from(length).ok().filter(|_| length <= MAX_HEADER).and_then(|length| rest.get(..length)) {
            Some(header) => header,
            None => {
                let message = format!("{file}: the header claims {length} bytes, and {} bytes follow", rest.len());
                return Err(Error::data(message).hint(truncated));
            }
        };
    let mut json = serde_json::Deserializer::from_slice(header);
    let tensors = json.deserialize_map(HeaderVisitor).and_then(|tensors| json.end().map(|()| tensors));
    let tensors = tensors.map_err(|source| {
        Error::data(format!("{file}: the safetensors header is broken")).caused_by(source).hint(truncated)
    })?;
    let data = &rest[header.len()..];
    check_ranges(file, &tensors, data.len())?;
    Ok((8 + header.len(), tensors))
}

fn check_ranges(file: &str, tensors: &BTreeMap<String, TensorInfo>, data_len: usize) -> Result<()> {
    for (name, info) in tensors {
        let (start, end) = info.data_offsets;
        let wrong = |what: String| Err(Error::data(format!("{file}: {name}: {what}")));
        if end < start || end > data_len {
            return match wrong(format!("its bytes {start}..{end} are not within the {data_len} bytes of data")) {
                Err(error) if end > data_len => Err(error.hint("the file may be truncated: fetch it again")),
                other => other,
            };
        }
        // Sizes of 0 count last: no product of some of the sizes may overflow.
        let mut sizes = info.shape.iter().map(|&size| size.max(1));
        let bits = sizes.try_fold(info.dtype.bitsize(), |bits, size| bits.checked_mul(size));
        let bits = bits.map(|bits| if info.shape.contains(&0) { 0 } else { bits });
        if bits.is_none_or(|bits| bits % 8 != 0 || bits / 8 != end - start) {
            let (dtype, shape) = (info.dtype, &info.shape);
            return wrong(format!("shape {shape:?} of {dtype:?} does not fill its {} bytes", end - start));
        }
    }
    let mut order: Vec<_> = tensors.iter().map(|(name, info)| (info.data_offsets, name)).collect();
    order.sort();
    let (mut covered, mut last) = (0, "the header");
    for ((start, end), name) in order {
        if start < covered {
            return Err(Error::data(format!("{file}: {name} and {last} lie on the same bytes")));
        }
        if start > covered {
            return Err(Error::data(format!("{file}: the bytes {covered}..{start} before {name} belong to no tensor")));
        }
        (covered, last) = (end, name);
    }
    if covered != data_len {
        return Err(Error::data(format!("{file}: the bytes {covered}..{data_len} after {last} belong to no tensor")));
    }
    Ok(())
}

/// Collects the header's entries, refusing a name that comes twice.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = BTreeMap<String, TensorInfo>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut tensors = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<Option<BTreeMap<String, String>>>()?;
                continue;
            }
            let info = map.next_value::<TensorInfo>().map_err(|error| A::Error::custom(format!("{name}: {error}")))?;
            if tensors.contains_key(&name) {
                return Err(A::Error::custom(format!("{name} is there twice")));
            }
            tensors.insert(name, info);
        }
        Ok(tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn refusal(bytes: Vec<u8>) -> String {
        let error = Checkpoint::from_bytes("x.safetensors", bytes).err().expect("a broken file was accepted");
        assert_eq!(error.kind, crate::error::ErrorKind::Data);
        let cause = error.source.map(|source| source.to_string()).unwrap_or_default();
        format!("{} {cause} {}", error.message, error.hints.join(" "))
    }

    const ONE: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

    #[test]
    fn lying_and_truncated_files_are_refused_by_name() {
        let whole = file(ONE, &[0; 8]);
        assert!(Checkpoint::from_bytes("x", whole.clone()).is_ok());
        for length in 0..whole.len() {
            let message = refusal(whole[..length].to_vec());
            assert!(message.contains("x.safetensors") && message.contains("truncated"), "{message}");
        }
        let entry =
            |shape: &str, offsets: &str| format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#);
        let two = |first: &str, second: &str| {
            let (first, second) = (entry("[1]", first), entry("[1]", second));
            format!(r#"{{"a":{first},"b":{second}}}"#)
        };
        let rows = [
            (file(ONE, &[0; 9]), "after a belong to no tensor"),
            (file(&two("[0,4]", "[2,6]"), &[0; 6]), "b and a lie on the same bytes"),
            (file(&two("[0,4]", "[0,4]"), &[0; 4]), "same bytes"),
            (file(&two("[0,4]", "[6,10]"), &[0; 10]), "before b belong to no tensor"),
            (file(&two("[0,4]", "[4,2]"), &[0; 4]), "b: its bytes 4..2"),
            (file(&two("[0,4]", "[4,999999999999]"), &[0; 8]), "b: its bytes"),
            (
                file(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,8]}}"#, &[0; 8]),
                "a: shape",
            ),
            (file(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}"#, &[0; 8]), "a: "),
            (file(r#"{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}"#, &[0; 8]), "F33"),
            (file(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, &[0; 8]), "a: shape [3] of F32"),
            (
                file(&ONE.replace("}}", r#"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#), &[0; 8]),
                "a is there twice",
            ),
            (file(&ONE[..20], &[0; 8]), "header is broken"),
            (file(&"[".repeat(100_000), &[]), "header is broken"),
            (file(&format!(r#"{{"a":{}"#, "[".repeat(100_000)), &[]), "header is broken"),
            (u64::MAX.to_le_bytes().to_vec(), "claims 18446744073709551615 bytes"),
            (50_000_000u64.to_le_bytes().to_vec(), "claims 50000000 bytes, and 0 bytes follow"),
        ];
        for (bytes, expected) in rows {
            let message = refusal(bytes);
            assert!(message.contains(expected) && message.contains("x.safetensors"), "{expected}: {message}");
        }
    }

    #[test]
    fn half_precision_is_read_exactly_at_any_alignment() {
        let f16: Vec<u8> = [0x3c00u16, 0x0001, 0xfbff].iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let bf16: Vec<u8> = [0x3f80u16, 0x0001].iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let header = r#"{"__metadata__":{"format":"pt"},"h":{"dtype":"F16","shape":[3],"data_offsets":[0,6]},
            "b":{"dtype":"BF16","shape":[2,1],"data_offsets":[6,10]},"i":{"dtype":"I64","shape":[],"data_offsets":[10,18]}}"#;
        let checkpoint = Checkpoint::from_bytes("x", file(header, &[f16, bf16, vec![0; 8]].concat())).unwrap();
        assert_eq!(checkpoint.require("h").unwrap().to_f32().unwrap().data, [1.0, 2f32.powi(-24), -65504.0]);
        let tensor = checkpoint.require("b").unwrap().to_f32().unwrap();
        assert_eq!(
            (tensor.shape.as_slice(), tensor.data.as_slice()),
            (&[2, 1][..], &[1.0, f32::from_bits(0x10000)][..])
        );
        let error = checkpoint.require("i").unwrap().to_f32().unwrap_err();
        assert!(error.message.contains("i is of dtype I64"), "{error}");
        assert!(checkpoint.require("bb").unwrap_err().hints[0].contains("nearest name is b"));
    }

    #[test]
    fn shards_must_hold_what_the_index_says() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        let refusal = |index: &str| {
            write(INDEX_FILE, index.as_bytes());
            let error = Checkpoint::open(dir.path()).err().expect("a broken index was accepted");
            format!("{} {}", error.message, error.hints.join(" "))
        };
        write("1.safetensors", &file(ONE, &[0; 8]));
        write("2.safetensors", &file(&ONE.replace("\"a\"", "\"b\""), &[1; 8]));
        assert!(refusal("{").contains("not an index of shards"));
        assert!(refusal(r#"{"weight_map":{"a":"1.safetensors","b":"3.safetensors"}}"#).contains("b is in there"));
        assert!(refusal(r#"{"weight_map":{"a":"../1.safetensors"}}"#).contains("not the name of a file"));
        assert!(refusal(r#"{"weight_map":{"a":"/etc/passwd"}}"#).contains("not the name of a file"));
        assert!(
            refusal(r#"{"weight_map":{"a":"1.safetensors","c":"2.safetensors"}}"#).contains("c is in 2.safetensors")
        );
        write("3.safetensors", &file(ONE, &[0; 8]));
        assert!(
            refusal(r#"{"weight_map":{"a":"3.safetensors","b":"2.safetensors","a2":"1.safetensors"}}"#).contains("a2")
        );
        write(INDEX_FILE, br#"{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(checkpoint.require("b").unwrap().bytes, [1; 8]);
    }
}
