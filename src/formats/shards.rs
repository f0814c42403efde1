//! Weights in one file or in several with an index beside them, as safetensors and PyTorch folders have them.

use std::{
    collections::BTreeMap,
    path::{Component, Path},
};

use crate::error::{Error, Result, nearest};

/// One file of weights, checked when it is opened.
pub(super) trait WeightsFile: Sized {
    /// What is kept of a tensor: where it lies, and what it is.
    type Info;

    fn map(path: &Path) -> Result<Self>;
    /// The file as messages name it.
    fn name(&self) -> &str;
    fn tensors(&self) -> &BTreeMap<String, Self::Info>;
}

/// The files of a checkpoint; no two hold a tensor of the same name.
pub(super) struct Shards<F> {
    files: Vec<F>,
    /// Name to the number of its file.
    tensors: BTreeMap<String, usize>,
}

impl<F: WeightsFile> Shards<F> {
    /// Opens one file, or of a folder the file `single` or what `index` lists; `None` where the folder has neither.
    pub fn open(path: &Path, single: &str, index: &str) -> Result<Option<Self>> {
        let (single, index) = (path.join(single), path.join(index));
        Ok(Some(if !path.is_dir() {
            Self::from_files(vec![F::map(path)?])?
        } else if single.exists() {
            Self::from_files(vec![F::map(&single)?])?
        } else if index.exists() {
            Self::open_index(path, &index)?
        } else {
            return Ok(None);
        }))
    }

    fn open_index(folder: &Path, index: &Path) -> Result<Self> {
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
        let mut files: Vec<F> = Vec::new();
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
            files.push(F::map(&folder.join(file)).map_err(|error| {
                error.hint(format!("{shown} says that {tensor} is in there: the download may be incomplete"))
            })?);
        }
        for (tensor, file) in &parsed.weight_map {
            if !shards.get(file.as_str()).is_some_and(|&number| files[number].tensors().contains_key(tensor)) {
                return Err(Error::data(format!("{shown} says that {tensor} is in {file}, but it is not")));
            }
        }
        Self::from_files(files)
    }

    pub fn from_files(files: Vec<F>) -> Result<Self> {
        let mut tensors: BTreeMap<String, usize> = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for name in file.tensors().keys() {
                if let Some(first) = tensors.insert(name.clone(), number) {
                    let first = files[first].name();
                    return Err(Error::data(format!("{name} is in both {first} and {}", file.name())));
                }
            }
        }
        Ok(Self { files, tensors })
    }

    /// Names as in the files, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor's name, its file, and what that knows of it.
    pub fn get(&self, name: &str) -> Option<(&str, &F, &F::Info)> {
        let (name, &number) = self.tensors.get_key_value(name)?;
        let file = &self.files[number];
        Some((name, file, file.tensors().get(name)?))
    }

    /// The error of a tensor that is not there; it names the nearest that is.
    pub fn missing(&self, name: &str) -> Error {
        let file = self.files.first().map_or("the checkpoint", |file| file.name());
        let error = Error::data(format!("{file} has no tensor {name}"));
        match nearest(name, self.names()) {
            Some(near) => error.hint(format!("the nearest name is {near}")),
            None => error,
        }
    }
}
