//! One file from the Hub into its blob: under a lock, resumed where it broke off, checked before it gets its name.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
    thread,
    time::Duration,
};

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use ureq::{Body, http::Response};

use super::{
    HubId,
    cache::{RepoCache, cannot_write},
    client::{Client, Failed},
};
use crate::error::{Error, ErrorKind, Result};

/// Tries in a row that bring nothing new.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(500);
const CHUNK: usize = 1 << 18;

/// A file of a commit, and what it must turn out to be.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    pub file: String,
    pub size: u64,
    pub etag: String,
}

/// What is told on the way.
pub(super) enum Told {
    /// Another process is at it.
    Waits,
    /// So many bytes of it are there.
    Bytes(u64),
}

pub(super) struct Download<'a> {
    pub client: &'a Client<'a>,
    pub cache: &'a RepoCache,
    pub id: &'a HubId,
    pub commit: &'a str,
}

impl Download<'_> {
    /// Sees to it that the blob is there, whole.
    pub fn blob(&self, remote: &Remote, told: &mut dyn FnMut(Told)) -> Result<()> {
        let lock = self.cache.lock(&remote.etag, || told(Told::Waits))?;
        if self.cache.has_blob(&remote.etag, remote.size) {
            return Ok(());
        }
        // Where the disk has no locks another process may be at it too: then no file is shared, and none resumed.
        let own = if lock.is_some() { String::new() } else { format!(".{}", std::process::id()) };
        let partial = self.cache.blob(&format!("{}{own}.incomplete", remote.etag));
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&partial);
        let mut file = file.map_err(|source| cannot_write(&partial, source))?;
        let whole = self.fill(remote, &mut file, &partial, told);
        if lock.is_none() && whole.is_err() {
            let _ = fs::remove_file(&partial);
        }
        whole?;
        let blob = self.cache.blob(&remote.etag);
        file.sync_all().map_err(|source| cannot_write(&blob, source))?;
        fs::rename(&partial, &blob).map_err(|source| cannot_write(&blob, source))
    }

    /// Tries until the file has its size and checksum.
    fn fill(&self, remote: &Remote, file: &mut File, partial: &Path, told: &mut dyn FnMut(Told)) -> Result<()> {
        let failed = |source| cannot_write(partial, source);
        let length = |file: &File| file.metadata().map(|about| about.len()).map_err(failed);
        let mut fresh = length(file)? == 0;
        let mut idle = 0;
        loop {
            let before = length(file)?;
            let error = match self.attempt(remote, file, partial, told)? {
                Ok(true) => return Ok(()),
                // What an earlier run had left may have been of another server, or never right.
                Ok(false) if !fresh => {
                    (fresh, idle) = (true, 0);
                    file.set_len(0).map_err(failed)?;
                    continue;
                }
                Ok(false) => {
                    file.set_len(0).map_err(failed)?;
                    let message = format!("{}: what came is not what the Hub lists: its checksum differs", remote.file);
                    return Err(Error::new(ErrorKind::Network, message)
                        .hint("try again; if it stays so, look at HF_ENDPOINT and at a proxy between"));
                }
                Err(Failed::Passing(error)) => error,
                Err(other) => return Err(other.error()),
            };
            idle = if length(file)? > before { 1 } else { idle + 1 };
            if idle >= TRIES {
                let kept = length(file)?;
                return Err(error.hint(format!(
                    "{}: {kept} of {} bytes are kept; the same command goes on from there",
                    remote.file, remote.size
                )));
            }
            thread::sleep(PAUSE * idle);
        }
    }

    /// One request: true where the file is whole and right, false where it is whole and wrong. The outer error is of
    /// the disk.
    fn attempt(
        &self,
        remote: &Remote,
        file: &mut File,
        partial: &Path,
        told: &mut dyn FnMut(Told),
    ) -> Result<std::result::Result<bool, Failed>> {
        let failed = |source| cannot_write(partial, source);
        let mut checksum = Checksum::new(remote);
        let mut done = file.metadata().map_err(failed)?.len();
        if done > remote.size {
            file.set_len(0).map_err(failed)?;
            done = 0;
        }
        file.rewind().map_err(failed)?;
        let mut buffer = vec![0; CHUNK];
        loop {
            let count = file.read(&mut buffer).map_err(failed)?;
            if count == 0 {
                break;
            }
            checksum.update(&buffer[..count]);
        }
        if done < remote.size || remote.size == 0 {
            let mut response = match self.client.file(self.id, self.commit, &remote.file, done) {
                Ok(response) => response,
                Err(error) => return Ok(Err(error)),
            };
            if !continues(&response, done) {
                file.set_len(0).map_err(failed)?;
                (done, checksum) = (0, Checksum::new(remote));
                if response.status().as_u16() == 416 {
                    return Ok(Err(broke_off(remote, 0, None)));
                }
            }
            file.seek(SeekFrom::Start(done)).map_err(failed)?;
            let mut body = response.body_mut().as_reader();
            loop {
                told(Told::Bytes(done));
                let count = match body.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => count,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(error) => return Ok(Err(broke_off(remote, done, Some(error)))),
                };
                done += count as u64;
                if done > remote.size {
                    file.set_len(0).map_err(failed)?;
                    return Ok(Ok(false));
                }
                file.write_all(&buffer[..count]).map_err(failed)?;
                checksum.update(&buffer[..count]);
            }
            if done < remote.size {
                return Ok(Err(broke_off(remote, done, None)));
            }
        } else {
            told(Told::Bytes(done));
        }
        Ok(Ok(checksum.fits(&remote.etag)))
    }
}

/// Whether the answer's first byte is the file's byte `from`.
fn continues(response: &Response<Body>, from: u64) -> bool {
    match response.status().as_u16() {
        206 => {
            let range = response.headers().get("content-range").and_then(|range| range.to_str().ok());
            let start = range.and_then(|range| range.trim().strip_prefix("bytes ")?.split('-').next()?.parse().ok());
            start == Some(from)
        }
        416 => false,
        _ => from == 0,
    }
}

fn broke_off(remote: &Remote, done: u64, source: Option<std::io::Error>) -> Failed {
    let message = format!("{} broke off at {done} of {} bytes", remote.file, remote.size);
    let error = Error::new(ErrorKind::Network, message);
    Failed::Passing(match source {
        Some(source) => error.caused_by(source),
        None => error,
    })
}

/// The checksum that an etag is, where it is one.
struct Checksum(Option<Context>);

impl Checksum {
    fn new(remote: &Remote) -> Self {
        let hexadecimal = remote.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        Self(match remote.etag.len() {
            64 if hexadecimal => Some(Context::new(&SHA256)),
            40 if hexadecimal => {
                // As Git names a file.
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {}\0", remote.size).as_bytes());
                Some(context)
            }
            _ => None,
        })
    }

    fn update(&mut self, bytes: &[u8]) {
        if let Some(context) = &mut self.0 {
            context.update(bytes);
        }
    }

    fn fits(self, etag: &str) -> bool {
        let Some(context) = self.0 else { return true };
        let digest = context.finish();
        let text: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        text.eq_ignore_ascii_case(etag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_that_are_checksums_are_checked() {
        let fits = |etag: &str, bytes: &[u8]| {
            let remote = Remote { file: "x".into(), size: bytes.len() as u64, etag: etag.into() };
            let mut checksum = Checksum::new(&remote);
            bytes.chunks(2).for_each(|bytes| checksum.update(bytes));
            checksum.fits(etag)
        };
        // `git hash-object` and `sha256sum` of "hello\n".
        for etag in [
            "ce013625030ba8dba906f756967f9e9ca394464a",
            "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
        ] {
            assert!(fits(etag, b"hello\n") && !fits(etag, b"hellO\n"), "{etag}");
        }
        assert!(fits("anything-else", b"x"));
    }
}
