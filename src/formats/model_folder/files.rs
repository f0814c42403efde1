//! The files beside a model's weights: on disk, in the program, or made from what another format says.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Bytes of a file that is part of the program, or read.
pub type FileBytes = Cow<'static, [u8]>;

/// Files by name; those in memory come before those of the folder.
#[derive(Clone, Default)]
pub(super) struct Files {
    pub folder: Option<PathBuf>,
    made: BTreeMap<String, FileBytes>,
}

impl Files {
    pub fn on_disk(folder: &Path) -> Self {
        Self { folder: Some(folder.to_owned()), made: BTreeMap::new() }
    }

    pub fn in_memory(files: BTreeMap<String, FileBytes>) -> Self {
        Self { folder: None, made: files }
    }

    /// Puts a JSON file in the place of whatever has its name.
    pub fn put_json(&mut self, name: &str, value: &Value) {
        self.made.insert(name.to_owned(), value.to_string().into_bytes().into());
    }

    /// The file's bytes; none where it is not there.
    pub fn read(&self, name: &str) -> Result<Option<FileBytes>> {
        if let Some(bytes) = self.made.get(name) {
            return Ok(Some(bytes.clone()));
        }
        let Some(path) = self.folder.as_ref().map(|folder| folder.join(name)).filter(|path| path.exists()) else {
            return Ok(None);
        };
        std::fs::read(&path).map(|bytes| Some(bytes.into())).map_err(|source| Error::reading(&path, source))
    }

    /// A JSON object, where there is one; `model` is what messages call the model.
    pub fn json(&self, model: &str, name: &str) -> Result<Option<Map<String, Value>>> {
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        let object = serde_json::from_slice(&bytes);
        object
            .map(Some)
            .map_err(|source| Error::data(format!("{model}/{name} does not hold a JSON object")).caused_by(source))
    }
}
