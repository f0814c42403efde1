//! The bytes of a weights file: mapped, or part of the program.

use std::{borrow::Cow, fs::File, ops::Deref, path::Path};

use memmap2::Mmap;

use crate::error::{Error, Result};

pub(super) enum Bytes {
    Mapped(Mmap),
    Memory(Cow<'static, [u8]>),
}

impl Bytes {
    /// Maps a file. Error (Data): it cannot be read, or is empty.
    pub fn map(path: &Path) -> Result<Self> {
        let failed = |source| Error::reading(path, source);
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.len() == 0 {
            return Err(Error::data(format!("{} is empty", path.display())));
        }
        // SAFETY: the map is only read. Like every program that maps checkpoints, this one relies on nobody cutting
        // the file short while it runs.
        Ok(Self::Mapped(unsafe { Mmap::map(&file) }.map_err(failed)?))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Memory(bytes) => bytes,
        }
    }
}
