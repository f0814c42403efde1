//! The cache on disk, as huggingface_hub lays it out:
//!
//! ```text
//! models--OWNER--NAME/refs/REVISION               the commit a branch or tag was last seen at
//!                     blobs/ETAG                  contents, each once
//!                     snapshots/COMMIT/FILE       a link to its blob
//! .locks/models--OWNER--NAME/ETAG.lock            held while the blob is written
//! ```

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io::Write,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use super::id::{HubId, is_commit, repository_of};
use crate::error::{Error, Result};

const LOCK_POLL: Duration = Duration::from_millis(100);

/// One repository's part of the cache.
pub(super) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub fn new(cache: &Path, id: &HubId) -> Self {
        let name = id.cache_folder();
        Self { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// The commit of a revision, as far as the cache knows.
    pub fn commit_of(&self, id: &HubId) -> Option<String> {
        if id.is_pinned() {
            return Some(id.revision().to_owned());
        }
        let text = fs::read_to_string(self.folder.join("refs").join(id.revision())).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Remembers where a branch or tag is.
    pub fn write_ref(&self, id: &HubId, commit: &str) -> Result<()> {
        if id.is_pinned() || self.commit_of(id).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(id.revision());
        let folder = path.parent().unwrap_or(&self.folder);
        make_folder(folder)?;
        // A name of its own: another process may be writing the same ref.
        let failed = |source| cannot_write(&path, source);
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        file.write_all(commit.as_bytes()).map_err(failed)?;
        file.persist(&path).map(|_| ()).map_err(|error| failed(error.error))
    }

    /// The files right in a snapshot that are really there, with their sizes.
    pub fn files(&self, commit: &str) -> BTreeMap<String, u64> {
        let entries = fs::read_dir(self.snapshot(commit)).into_iter().flatten().flatten();
        let known = entries.filter_map(|entry| {
            // Through the link: one whose blob is gone is no file.
            let about = fs::metadata(entry.path()).ok().filter(fs::Metadata::is_file)?;
            Some((entry.file_name().into_string().ok()?, about.len()))
        });
        known.collect()
    }

    /// Whether the blob is there and has its size.
    pub fn has_blob(&self, etag: &str, size: u64) -> bool {
        fs::metadata(self.blob(etag)).is_ok_and(|about| about.is_file() && about.len() == size)
    }

    /// Lets a snapshot's file be this blob; what was there under the name is replaced.
    pub fn link(&self, etag: &str, commit: &str, file: &str) -> Result<()> {
        let folder = self.snapshot(commit);
        make_folder(&folder)?;
        let target = folder.join(file);
        let failed = |source| cannot_write(&target, source);
        // Made under another name and renamed: at no moment is the file missing.
        let beside = tempfile::Builder::new().prefix(".link-").tempdir_in(&self.folder).map_err(failed)?;
        let new = beside.path().join(file);
        // Relative, so that the cache may be moved. Where there are no links (Windows forbids them to most people, some
        // disks have none), a second name or a copy does as well.
        symlink(&Path::new("../../blobs").join(etag), &new)
            .or_else(|_| fs::hard_link(self.blob(etag), &new))
            .or_else(|_| fs::copy(self.blob(etag), &new).map(|_| ()))
            .map_err(failed)?;
        fs::rename(&new, &target).map_err(failed)
    }

    /// Waits until no other process writes this blob; the lock lasts as long as the file that comes back. None where
    /// the disk knows no locks.
    pub fn lock(&self, etag: &str, mut waits: impl FnMut()) -> Result<Option<File>> {
        make_folder(&self.locks)?;
        make_folder(&self.folder.join("blobs"))?;
        let path = self.locks.join(format!("{etag}.lock"));
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|source| cannot_write(&path, source))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::WouldBlock) => {
                    if !told {
                        waits();
                        told = true;
                    }
                    thread::sleep(LOCK_POLL);
                }
                Err(TryLockError::Error(_)) => return Ok(None),
            }
        }
    }
}

/// The repositories that the cache holds, as `owner/name`.
pub(super) fn repositories(cache: &Path) -> Vec<String> {
    let entries = fs::read_dir(cache).into_iter().flatten().flatten();
    entries.filter_map(|entry| repository_of(entry.file_name().to_str()?)).collect()
}

fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|source| cannot_write(path, source))
}

/// The cache cannot be written to.
pub(super) fn cannot_write(path: &Path, source: std::io::Error) -> Error {
    let full = source.kind() == std::io::ErrorKind::StorageFull;
    let error = Error::failed(format!("cannot write {}", path.display())).caused_by(source);
    let way_out = "set HF_HUB_CACHE to a folder on another disk";
    error.hint(if full { format!("the disk is full: free some space, or {way_out}") } else { way_out.to_owned() })
}

#[cfg(unix)]
fn symlink(original: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(original, link)
}

#[cfg(windows)]
fn symlink(original: &Path, link: &Path) -> std::io::Result<()> {
    // Windows takes a link's text literally.
    let original: PathBuf = original.components().collect();
    std::os::windows::fs::symlink_file(original, link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refs_and_links_are_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let id = HubId::parse("a/b@refs/pr/1").unwrap();
        let cache = RepoCache::new(dir.path(), &id);
        assert_eq!(cache.commit_of(&id), None);
        let (old, new) = ("0".repeat(40), "1".repeat(40));
        for commit in [&old, &new] {
            cache.write_ref(&id, commit).unwrap();
            assert_eq!(cache.commit_of(&id).as_ref(), Some(commit));
        }
        drop(cache.lock("e1", || ()).unwrap());
        for (etag, text) in [("e1", "one"), ("e2", "two")] {
            fs::write(cache.blob(etag), text).unwrap();
            cache.link(etag, &new, "config.json").unwrap();
            assert_eq!(fs::read_to_string(cache.snapshot(&new).join("config.json")).unwrap(), text);
        }
        assert_eq!(cache.files(&new), BTreeMap::from([("config.json".to_owned(), 3)]));
        fs::remove_file(cache.blob("e2")).unwrap();
        assert!(cache.files(&new).is_empty());
        assert_eq!(repositories(dir.path()), ["a/b"]);
        // Nothing is left of the work.
        let names: Vec<_> =
            fs::read_dir(dir.path().join("models--a--b")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 3, "{names:?}");
    }

    #[test]
    fn a_ref_that_is_no_commit_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let id = HubId::parse("a/b").unwrap();
        let cache = RepoCache::new(dir.path(), &id);
        fs::create_dir_all(dir.path().join("models--a--b/refs")).unwrap();
        for text in ["", "../../etc", "main"] {
            fs::write(dir.path().join("models--a--b/refs/main"), text).unwrap();
            assert_eq!(cache.commit_of(&id), None);
        }
    }
}
