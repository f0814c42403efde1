//! Files and folders that appear whole or not at all: written beside their final place, synced, then renamed.
//!
//! The name beside is fixed (`.NAME.partial`), so that what a killed process left is swept away by the next try.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use crate::error::{Error, Result};

const PARTIAL: &str = ".partial";
const OLD: &str = ".partial.old";

/// Writes a whole file at once: the old file or the new one is there at any moment, never half of one.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = NewFile::create(path)?;
    file.write_all(bytes).map_err(|source| Error::writing(path, source))?;
    file.commit()
}

/// A file being written; [`NewFile::commit`] puts it in its place, dropping it leaves no trace.
pub struct NewFile {
    writer: Option<BufWriter<File>>,
    partial: PathBuf,
    target: PathBuf,
}

impl NewFile {
    /// The folder of `target` must exist.
    pub fn create(target: &Path) -> Result<Self> {
        let partial = partial_path(target)?;
        let file = File::create(&partial).map_err(|source| Error::writing(target, source))?;
        Ok(Self { writer: Some(BufWriter::with_capacity(1 << 20, file)), partial, target: target.to_owned() })
    }

    pub fn commit(mut self) -> Result<()> {
        let failed = |source| Error::writing(&self.target, source);
        if let Some(mut writer) = self.writer.take() {
            writer.flush().map_err(failed)?;
            writer.get_ref().sync_all().map_err(failed)?;
        }
        fs::rename(&self.partial, &self.target).map_err(failed)?;
        sync_folder_of(&self.target).map_err(failed)
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.as_mut().map_or(Ok(0), |writer| writer.write(bytes))
    }
    fn flush(&mut self) -> io::Result<()> {
        self.writer.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.partial);
    }
}

/// A folder being filled; [`NewFolder::commit`] puts it in its place, dropping it leaves no trace.
pub struct NewFolder {
    partial: PathBuf,
    target: PathBuf,
}

impl NewFolder {
    /// Makes the missing parents of `target` too.
    pub fn create(target: &Path) -> Result<Self> {
        let partial = partial_path(target)?;
        let failed = |source| Error::writing(target, source);
        if target.exists() && !target.is_dir() {
            return Err(Error::usage(format!("{} is a file, and a folder is to be written there", target.display())));
        }
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(failed)?;
        }
        fs::create_dir_all(&partial).map_err(failed)?;
        Ok(Self { partial, target: target.to_owned() })
    }

    /// Where to write for now.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Syncs every file, then takes the place of `target`. An older folder there is moved aside first and removed
    /// afterwards: a kill between leaves no folder rather than a mixture.
    pub fn commit(self) -> Result<()> {
        let failed = |source| Error::writing(&self.target, source);
        sync_tree(&self.partial).map_err(failed)?;
        let mut old = self.partial.clone().into_os_string();
        old.push(".old");
        let old = PathBuf::from(old);
        if old.exists() {
            fs::remove_dir_all(&old).map_err(failed)?;
        }
        if self.target.exists() {
            fs::rename(&self.target, &old).map_err(failed)?;
        }
        fs::rename(&self.partial, &self.target).map_err(failed)?;
        sync_folder_of(&self.target).map_err(failed)?;
        if old.exists() { fs::remove_dir_all(&old).map_err(failed) } else { Ok(()) }
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.partial);
    }
}

/// Removes a folder by its name first: a kill while its files are being deleted leaves no half of it under that name.
pub fn remove_folder(folder: &Path) -> Result<()> {
    let doomed = partial_path(folder)?;
    fs::rename(folder, &doomed)
        .and_then(|()| fs::remove_dir_all(&doomed))
        .map_err(|error| Error::failed(format!("cannot remove {}", folder.display())).caused_by(error))
}

/// Whether a path is what a killed process left on the way to something whole.
pub fn is_leftover(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with('.') && (name.ends_with(PARTIAL) || name.ends_with(OLD))
}

fn partial_path(target: &Path) -> Result<PathBuf> {
    let Some(name) = target.file_name() else {
        return Err(Error::usage(format!("{} does not name a file or a folder to write", target.display())));
    };
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    partial.push(PARTIAL);
    Ok(target.with_file_name(partial))
}

fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { sync_tree(&path)? } else { File::options().write(true).open(&path)?.sync_all()? }
    }
    sync_folder(folder)
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_folder(parent),
        _ => sync_folder(Path::new(".")),
    }
}

/// A rename is on disk once its folder is. Windows has no such call and needs none.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_of_what_was_not_committed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a/model");
        let folder = NewFolder::create(&target).unwrap();
        fs::write(folder.path().join("x"), "1").unwrap();
        drop(folder);
        let mut file = NewFile::create(&dir.path().join("f")).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        assert!(!target.exists());
        assert_eq!(fs::read_dir(dir.path().join("a")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_is_replaced_and_a_missing_folder_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_file(&path, b"old").unwrap();
        write_file(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let error = write_file(&dir.path().join("missing/a.json"), b"x").unwrap_err();
        assert_eq!(error.kind, crate::error::ErrorKind::Failed);
    }

    #[test]
    fn leftovers_are_known_by_their_names() {
        for (name, leftover) in [
            (".model.partial", true),
            (".model.partial.old", true),
            ("model", false),
            (".git", false),
            ("a.partial", false),
        ] {
            assert_eq!(is_leftover(&Path::new("x").join(name)), leftover, "{name}");
        }
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("gone")).unwrap();
        remove_folder(&dir.path().join("gone")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_new_folder_replaces_an_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        for name in ["first", "second"] {
            let folder = NewFolder::create(&target).unwrap();
            write_file(&folder.path().join(name), name.as_bytes()).unwrap();
            folder.commit().unwrap();
        }
        assert!(!target.join("first").exists());
        assert_eq!(fs::read(target.join("second")).unwrap(), b"second");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn leftovers_of_a_killed_process_do_not_stand_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        fs::create_dir_all(dir.path().join(".model.partial/sub")).unwrap();
        let folder = NewFolder::create(&target).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        folder.commit().unwrap();
        assert!(target.is_dir());
    }
}
