//! Reading PyTorch's `.bin` and `.pt` checkpoints: one file, a sharded folder, or bytes in memory.
//!
//! Such a file is a zip archive of a pickle, which describes the tensors, and of their storages. A pickle is a program;
//! this reader does not run it: it knows the few operations and names that state dicts are made of and refuses all
//! others by name. Files are mapped, tensors lie in them where they are.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::File,
    path::{Component, Path},
};

use memmap2::Mmap;

use super::{host_tensor::HostTensor, safetensors::Dtype};
use crate::error::{Error, Result, nearest};

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
    files: Vec<OneFile>,
    /// Name to the number of its file.
    tensors: BTreeMap<String, usize>,
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
        if !path.is_dir() {
            return Self::from_files(vec![OneFile::map(path)?]);
        }
        let (single, index) = (path.join(SINGLE_FILE), path.join(INDEX_FILE));
        if single.exists() {
            return Self::from_files(vec![OneFile::map(&single)?]);
        }
        if index.exists() {
            return Self::open_shards(path, &index);
        }
        Err(Error::data(format!("{} holds neither {SINGLE_FILE} nor {INDEX_FILE}", path.display()))
            .hint("name the folder that holds the model's weights"))
    }

    /// `name` is what messages call the bytes.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        Self::from_files(vec![OneFile::parse(name.to_owned(), Bytes::Memory(bytes.into()))?])
    }

    fn open_shards(folder: &Path, index: &Path) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let shown = index.display();
        let text = std::fs::read(index).map_err(|source| Error::reading(index, source))?;
        let parsed: Index = serde_json::from_slice(&text).map_err(|source| {
            Error::data(format!("{shown} is not an index of shards (weight_map: tensor name to file name)"))
                .caused_by(source)
        })?;
        let mut shards: BTreeMap<&str, usize> = BTreeMap::new();
        let mut files = Vec::new();
        for (tensor, file) in &parsed.weight_map {
            if shards.contains_key(file.as_str()) {
                continue;
            }
            // A shard lies beside its index: an index must not lead elsewhere on the disk.
            if !matches!(Path::new(file).components().collect::<Vec<_>>()[..], [Component::Normal(_)]) {
                return Err(Error::data(format!(
                    "{shown}: {tensor}: `{file}` is not the name of a file in this folder"
                )));
            }
            shards.insert(file, files.len());
            files.push(OneFile::map(&folder.join(file)).map_err(|error| {
                error.hint(format!("{shown} says that {tensor} is in there: the download may be incomplete"))
            })?);
        }
        for (tensor, file) in &parsed.weight_map {
            if !shards.get(file.as_str()).is_some_and(|&number| files[number].tensors.contains_key(tensor)) {
                return Err(Error::data(format!("{shown} says that {tensor} is in {file}, but it is not")));
            }
        }
        Self::from_files(files)
    }

    fn from_files(files: Vec<OneFile>) -> Result<Self> {
        let mut tensors: BTreeMap<String, usize> = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for name in file.tensors.keys() {
                if let Some(first) = tensors.insert(name.clone(), number) {
                    return Err(Error::data(format!("{name} is in both {} and {}", files[first].name, file.name)));
                }
            }
        }
        Ok(Self { files, tensors })
    }

    /// Names as in the files, sorted. A model inside a training program's checkpoint has its names without the wrapper.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn get(&self, name: &str) -> Option<TorchTensor<'_>> {
        let (name, &number) = self.tensors.get_key_value(name)?;
        let file = &self.files[number];
        let Stored { dtype, shape, strides, span } = file.tensors.get(name)?;
        let bytes = &file.bytes.as_slice()[span.start..span.start + span.len];
        Some(TorchTensor { name, file: &file.name, dtype: *dtype, shape, strides, bytes })
    }

    /// Like [`TorchFile::get`], with an error that names the nearest tensor there is.
    pub fn require(&self, name: &str) -> Result<TorchTensor<'_>> {
        self.get(name).ok_or_else(|| {
            let file = self.files.first().map_or("the checkpoint", |file| file.name.as_str());
            let error = Error::data(format!("{file} has no tensor {name}"));
            match nearest(name, self.names()) {
                Some(near) => error.hint(format!("the nearest name is {near}")),
                None => error,
            }
        })
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
        if self.is_contiguous() {
            return Cow::Borrowed(self.bytes);
        }
        let size = self.dtype.bitsize() / 8;
        let mut gathered = Vec::with_capacity(self.len() * size);
        // The innermost dimension is a loop of its own, the others count like an odometer.
        let Some((&columns, outer)) = self.shape.split_last() else { return Cow::Borrowed(self.bytes) };
        let step = self.strides[outer.len()];
        let mut index = vec![0; outer.len()];
        loop {
            let row: usize = index.iter().zip(self.strides).map(|(&at, &stride)| at * stride).sum();
            for column in 0..columns {
                let at = (row + column * step) * size;
                gathered.extend_from_slice(&self.bytes[at..at + size]);
            }
            let Some(dimension) = (0..outer.len()).rev().find(|&dimension| index[dimension] + 1 < outer[dimension])
            else {
                return Cow::Owned(gathered);
            };
            index[dimension] += 1;
            index[dimension + 1..].fill(0);
        }
    }

    /// The values as f32, row-major: exact, since every F16 and BF16 number is one.
    pub fn to_f32(&self) -> Result<HostTensor> {
        let bytes = self.row_major();
        let data = match self.dtype {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Dtype::F16 => bytes.as_chunks().0.iter().map(|&b| half::f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::BF16 => bytes.as_chunks().0.iter().map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect(),
            other => {
                return Err(Error::data(format!("{}: {} is of dtype {other:?}", self.file, self.name))
                    .hint("weights are read from F32, F16 and BF16"));
            }
        };
        Ok(HostTensor { shape: self.shape.to_vec(), data })
    }
}

enum Bytes {
    Mapped(Mmap),
    Memory(Cow<'static, [u8]>),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Memory(bytes) => bytes,
        }
    }
}

/// One file that has been checked: every tensor's span lies within the bytes.
struct OneFile {
    name: String,
    bytes: Bytes,
    tensors: BTreeMap<String, Stored>,
}

impl OneFile {
    fn map(path: &Path) -> Result<Self> {
        let failed = |source| Error::reading(path, source);
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.len() == 0 {
            return Err(Error::data(format!("{} is empty", path.display())));
        }
        // SAFETY: the map is only read. Like every program that maps checkpoints, this one relies on nobody cutting
        // the file short while it runs.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Self::parse(path.display().to_string(), Bytes::Mapped(map))
    }

    fn parse(name: String, bytes: Bytes) -> Result<Self> {
        let data = bytes.as_slice();
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
