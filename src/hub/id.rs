//! `owner/name`, or `owner/name@revision`: what a repository is called.

use std::{fmt, path::Path};

/// The branch where none is named.
const MAIN: &str = "main";
const PREFIX: &str = "models--";
const SNAPSHOTS: &str = "snapshots";

/// A model repository of the Hub, at a branch, tag or commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    owner: String,
    name: String,
    revision: Option<String>,
}

impl HubId {
    /// None where the text can be no id, by the Hub's own rules.
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = match text.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (text, None),
        };
        let (owner, name) = repository.split_once('/')?;
        let whole = [owner, name].into_iter().all(is_part) && revision.is_none_or(is_revision);
        whole.then(|| Self { owner: owner.into(), name: name.into(), revision: revision.map(str::to_owned) })
    }

    /// `owner/name`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// A branch, a tag or a commit; `main` where none was named.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(MAIN)
    }

    /// Whether the revision is a commit, whose files never change.
    pub fn is_pinned(&self) -> bool {
        is_commit(self.revision())
    }

    /// The repository's folder in the cache.
    pub fn cache_folder(&self) -> String {
        format!("{PREFIX}{}--{}", self.owner, self.name)
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)?;
        self.revision.as_ref().map_or(Ok(()), |revision| write!(f, "@{revision}"))
    }
}

/// A whole SHA-1 in hexadecimal.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The repository (`owner/name`) of a folder of the cache, by the folder's name.
pub(super) fn repository_of(folder: &str) -> Option<String> {
    let (owner, name) = folder.strip_prefix(PREFIX)?.split_once("--")?;
    Some(HubId::parse(&format!("{owner}/{name}"))?.repository())
}

/// The repository (`owner/name`) that a folder is a snapshot of, by its path.
fn id_of_snapshot(path: &Path) -> Option<String> {
    let mut parts = path.components().rev().map(|part| part.as_os_str().to_str());
    let (commit, snapshots, folder) = (parts.next()??, parts.next()??, parts.next()??);
    (is_commit(commit) && snapshots == SNAPSHOTS).then(|| repository_of(folder)).flatten()
}

/// What to call a model in files that go elsewhere: its id where the path is of a snapshot, else the path itself.
pub fn id_or_path(path: &str) -> String {
    id_of_snapshot(Path::new(path)).unwrap_or_else(|| path.to_owned())
}

fn is_part(part: &str) -> bool {
    // Two dashes separate owner and name in the cache.
    (1..=96).contains(&part.len())
        && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
        && !part.starts_with(['.', '-'])
        && !part.ends_with(['.', '-'])
        && !part.contains("--")
        && !part.contains("..")
}

/// A revision becomes a path below `refs`: it must not lead out of there.
fn is_revision(revision: &str) -> bool {
    revision.len() <= 255
        && revision.split('/').all(|part| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'+'))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_other_texts() {
        let id = HubId::parse("llava-hf/llava-1.5-7b-hf").unwrap();
        assert_eq!((id.repository().as_str(), id.revision()), ("llava-hf/llava-1.5-7b-hf", "main"));
        assert_eq!(id.cache_folder(), "models--llava-hf--llava-1.5-7b-hf");
        let id = HubId::parse("a/b@refs/pr/1").unwrap();
        assert_eq!((id.revision(), id.to_string().as_str()), ("refs/pr/1", "a/b@refs/pr/1"));
        assert!(HubId::parse(&format!("a/b@{}", "0f".repeat(20))).unwrap().is_pinned());
        for wrong in [
            "", "gpt2", "a/b/c", "./a", "a/../b", "a/.b", "a--b/c", "/a/b", "a/", "a/b@", "a/b@../x", "a/b@/etc",
            "a/b@x//y", "a/b@x y", "C:\\a/b", "a b/c",
        ] {
            assert_eq!(HubId::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_snapshot_is_called_by_its_repository() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let path = format!("/cache/models--a--b.c/snapshots/{commit}");
        assert_eq!(id_or_path(&path), "a/b.c");
        for other in [
            "/cache/models--a--b/snapshots/main".to_owned(),
            format!("/cache/a/snapshots/{commit}"),
            format!("/cache/models--a/snapshots/{commit}"),
            "models/x".into(),
        ] {
            assert_eq!(id_or_path(&other), other);
        }
    }
}
