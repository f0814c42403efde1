//! Reading PyTorch's `.bin` and `.pt` checkpoints: one file, a sharded folder, or bytes in memory.
//!
//! Such a file is a zip archive of a pickle, which describes the tensors, and of their storages. A pickle is a program;
//! this reader does not run it: it knows the few operations and names that state dicts are made of and refuses all
//! others by name. Files are mapped, tensors lie in them where they are.

use std::{borrow::Cow, collections::BTreeMap, ops::Range, path::Path};

use super::{
    host_tensor::HostTensor,
    mapped::Bytes,
    safetensors::{Dtype, TensorRef},
    shards::{Shards, WeightsFile},
};
use crate::error::{Error, Result};

mod archive;
mod globals;
mod pickle;
mod state_dict;

use archive::Archive;
use state_dict::Stored;

pub const SINGLE_FILE: &str = "pytorch_model.bin";
pub const INDEX_FILE: &str = "pytorch_model.bin.index.json";

const RESAVE: &str = "load it in PyTorch (torch.load(path, weights_only=True)) and save it again, best as safetensors";

/// The tensors of one or more PyTorch files by the names they have there.
pub struct TorchFile {
    shards: Shards<OneFile>,
}

/// One tensor where it lies in its file. Several may share bytes.
#[derive(Clone, Copy, Debug)]
pub struct TorchTensor<'a> {
    pub name: &'a str,
    /// The file as messages name it.
    pub file: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    /// Elements from one index to the next, for each dimension; 0 where an expanded tensor repeats.
    pub strides: &'a [usize],
    /// Little-endian, from the first element to the last in memory; what lies between them is not always the tensor's.
    pub bytes: &'a [u8],
}

impl TorchFile {
    /// Opens a folder (pytorch_model.bin, or shards with their index) or one file.
    ///
    /// # Errors
    /// Data: unreadable, broken or old files, and any pickle that does more than hold tensors.
    pub fn open(path: &Path) -> Result<Self> {
        let shards = Shards::open(path, SINGLE_FILE, INDEX_FILE)?.ok_or_else(|| {
            Error::data(format!("{} holds neither {SINGLE_FILE} nor {INDEX_FILE}", path.display()))
                .hint("name the folder that holds the model's weights")
        })?;
        Ok(Self { shards })
    }

    /// `name` is what messages call the bytes.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        let file = OneFile::parse(name.to_owned(), Bytes::Memory(bytes.into()))?;
        Ok(Self { shards: Shards::from_files(vec![file])? })
    }

    /// Names as in the files, sorted. A model inside a training program's checkpoint has its names without the wrapper.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shards.names()
    }

    pub fn get(&self, name: &str) -> Option<TorchTensor<'_>> {
        let (name, file, Stored { dtype, shape, strides, span }) = self.shards.get(name)?;
        let bytes = &file.bytes[span.start..span.start + span.len];
        Some(TorchTensor { name, file: &file.name, dtype: *dtype, shape, strides, bytes })
    }

    /// Like [`TorchFile::get`], with an error that names the nearest tensor there is.
    pub fn require(&self, name: &str) -> Result<TorchTensor<'_>> {
        self.get(name).ok_or_else(|| self.shards.missing(name))
    }
}

impl<'a> TorchTensor<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        if self.shape.contains(&0) { 0 } else { self.shape.iter().product() }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the elements lie one after another in row-major order.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.is_empty()
            || self.shape.iter().zip(self.strides).rev().all(|(&size, &stride)| {
                let fits = size == 1 || stride == expected;
                expected *= size;
                fits
            })
    }

    /// The elements in row-major order: in place where they lie so, gathered where they do not.
    pub fn row_major(&self) -> Cow<'a, [u8]> {
        match self.shape.first() {
            Some(&rows) => self.rows_row_major(0..rows),
            None => Cow::Borrowed(self.bytes),
        }
    }

    /// As [`TorchTensor::row_major`], of a range of the first dimension.
    pub fn rows_row_major(&self, rows: Range<usize>) -> Cow<'a, [u8]> {
        let size = self.dtype.bitsize() / 8;
        let row_elements = self.len() / self.shape.first().copied().unwrap_or(1).max(1);
        if self.is_contiguous() {
            let row = row_elements * size;
            return Cow::Borrowed(&self.bytes[rows.start * row..rows.end * row]);
        }
        let mut gathered = Vec::with_capacity(rows.len() * row_elements * size);
        // The innermost dimension is a loop of its own, the others count like an odometer.
        let Some((&columns, outer)) = self.shape.split_last() else { return Cow::Borrowed(self.bytes) };
        if outer.is_empty() {
            let element = |at: usize| &self.bytes[at * self.strides[0] * size..][..size];
            rows.for_each(|at| gathered.extend_from_slice(element(at)));
            return Cow::Owned(gathered);
        }
        let step = self.strides[outer.len()];
        let mut index = vec![0; outer.len()];
        index[0] = rows.start;
        while index[0] < rows.end {
            let row: usize = index.iter().zip(self.strides).map(|(&at, &stride)| at * stride).sum();
            for column in 0..columns {
                let at = (row + column * step) * size;
                gathered.extend_from_slice(&self.bytes[at..at + size]);
            }
            let next = (1..outer.len()).rev().find(|&dimension| index[dimension] + 1 < outer[dimension]).unwrap_or(0);
            index[next] += 1;
            index[next + 1..].fill(0);
        }
        Cow::Owned(gathered)
    }

    /// The values as f32, row-major: exact, since every F16 and BF16 number is one.
    pub fn to_f32(&self) -> Result<HostTensor> {
        let Self { name, file, dtype, shape, .. } = *self;
        TensorRef { name, file, dtype, shape, bytes: &self.row_major() }.to_f32()
    }
}

/// One file that has been checked: every tensor's span lies within the bytes.
struct OneFile {
    name: String,
    bytes: Bytes,
    tensors: BTreeMap<String, Stored>,
}

impl OneFile {
    fn parse(name: String, bytes: Bytes) -> Result<Self> {
        let data: &[u8] = &bytes;
        if !Archive::recognises(data) {
            return Err(not_an_archive(&name, data));
        }
        let archive = Archive::parse(&name, data)?;
        // All entries lie in one folder, whose name is anything.
        let folder = |entry: &str| {
            entry.strip_suffix("data.pkl").filter(|f| f.find('/') == f.len().checked_sub(1)).map(str::to_owned)
        };
        let Some(prefix) = archive.names().find_map(folder) else {
            return Err(Error::data(format!("{name} is a zip archive, but not one of torch.save: it has no data.pkl")));
        };
        let contents = |entry: &str| {
            let span = archive.get(&format!("{prefix}{entry}"));
            span.map(|span| &data[span.start..span.start + span.len])
        };
        if let Some(order) = contents("byteorder").filter(|order| *order != b"little") {
            let order = String::from_utf8_lossy(&order[..order.len().min(20)]);
            return Err(Error::data(format!("{name}: its byte order is {order:?}, not little")).hint(RESAVE));
        }
        let described = pickle::unpickle(&name, contents("data.pkl").unwrap_or_default())?;
        let tensors = state_dict::tensors(&name, &described, &archive, &prefix)?;
        Ok(Self { name, bytes, tensors })
    }
}

impl WeightsFile for OneFile {
    type Info = Stored;

    fn map(path: &Path) -> Result<Self> {
        Self::parse(path.display().to_string(), Bytes::map(path)?)
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.tensors
    }
}

/// Says what a file is that is no zip archive, where that can be seen.
fn not_an_archive(name: &str, bytes: &[u8]) -> Error {
    // PyTorch's magic number 0x1950a86a20f9469cfc6c as a pickle of its own.
    let legacy = bytes.get(2..13) == Some(b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P");
    if legacy || bytes.get(257..262) == Some(b"ustar") {
        return Error::data(format!("{name} is in the format of PyTorch before 1.6, which is not read")).hint(RESAVE);
    }
    if bytes.starts_with(b"version https://git-lfs") {
        return Error::data(format!("{name} is a Git LFS pointer, not the weights"))
            .hint("fetch it with `git lfs pull`");
    }
    let error = Error::data(format!("{name} is not a checkpoint of torch.save (a zip archive)"));
    match bytes.get(8..10) == Some(b"{\"") {
        true => error.hint("it looks like safetensors: give it the ending .safetensors"),
        false => error.hint("the file may be truncated, or not be a checkpoint at all"),
    }
}
