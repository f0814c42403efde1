//! The one error type of the library: a kind, what failed, its cause, and the way out.
//!
//! Nothing here prints. `cli::report` turns a kind into an exit code and writes message, causes and hints.

use std::{error::Error as StdError, fmt, path::Path};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, by whom it can be mended; each kind has one exit code (cli::report).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The work itself failed (a loss that became NaN, a full disk).
    Failed,
    /// Wrong use or wrong config.
    Usage,
    /// Bad data or a bad file.
    Data,
    /// No device, or a lost one.
    Device,
    /// The device has not enough memory.
    Memory,
    /// Network or Hub.
    Network,
    /// Stopped by the user, after a checkpoint was saved.
    Interrupted,
}

#[derive(Debug)]
pub struct Error {
    pub kind: ErrorKind,
    pub message: String,
    /// Ways out, one sentence each.
    pub hints: Vec<String>,
    pub source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hints: Vec::new(), source: None }
    }
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Data, message)
    }
    pub fn device(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Device, message)
    }
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Interrupted, message)
    }
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }
    pub fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
    /// A file that could not be read: missing or unreadable files are bad data.
    pub fn reading(path: &Path, source: std::io::Error) -> Self {
        Self::data(format!("cannot read {}", path.display())).caused_by(source)
    }
    /// A file that could not be written: the work failed (full disk, no permission).
    pub fn writing(path: &Path, source: std::io::Error) -> Self {
        let full = source.kind() == std::io::ErrorKind::StorageFull;
        let error = Self::failed(format!("cannot write {}", path.display())).caused_by(source);
        if full { error.hint("the disk is full: free some space, or choose another place") } else { error }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// The known name nearest to `name`, for "did you mean".
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known.into_iter().max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)))
}
