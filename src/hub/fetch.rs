//! From an id to a snapshot on disk: ask for the commit, fetch what the cache lacks, or do with what it has.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

use super::{
    Event, HubId, Settings, Wanted,
    cache::{self, RepoCache},
    choose::{self, Plan},
    client::{Client, Failed, Listed, Listing},
    download::{Download, Remote, Told},
};
use crate::error::{Error, ErrorKind, Result};

type Watch<'a> = &'a mut dyn FnMut(Event<'_>);

/// See [`super::locate`].
pub(super) fn fetch(id: &HubId, wanted: Wanted, settings: &Settings, watch: Watch<'_>) -> Result<PathBuf> {
    let cache = RepoCache::new(&settings.cache, id);
    let cached = Cached::look(&cache, id, wanted);
    if settings.offline {
        return cached.map_err(|lacks| lacks.offline(id, settings));
    }
    if id.is_pinned()
        && let Ok(folder) = cached
    {
        // A commit never changes: there is nothing to ask.
        return Ok(folder);
    }
    let client = Client::new(settings)?;
    let listing = match (client.list(id), cached) {
        (Ok(listing), _) => listing,
        (Err(Failed::NoRevision(error)), _) => return Err(error),
        (Err(failed), Ok(folder)) => {
            let why = failed.error();
            watch(Event::Note(&format!("{id}: {why}; using what the cache has")));
            return Ok(folder);
        }
        (Err(Failed::Passing(error)), Err(lacks)) => {
            let offline = "without a network, name a local folder or an id that the cache has whole; \
                           HF_HUB_OFFLINE=1 then asks nobody";
            return Err(lacks.hint(error.hint("check the network, HF_ENDPOINT and proxies")).hint(offline));
        }
        (Err(failed), Err(_)) => return Err(failed.error()),
    };
    let snapshot = Fetching { id, wanted, client: &client, cache: &cache, listing: &listing }.run(watch)?;
    cache.write_ref(id, &listing.commit)?;
    Ok(snapshot)
}

/// What the cache lacks of a revision.
struct Lacks {
    /// None: it does not know the revision at all.
    snapshot: Option<PathBuf>,
    there: Vec<String>,
    missing: Vec<String>,
}

struct Cached;

impl Cached {
    /// The snapshot of the revision as the cache knows it, if it has all that is wanted.
    fn look(cache: &RepoCache, id: &HubId, wanted: Wanted) -> std::result::Result<PathBuf, Lacks> {
        let nothing = Lacks { snapshot: None, there: Vec::new(), missing: Vec::new() };
        let Some(commit) = cache.commit_of(id) else { return Err(nothing) };
        let snapshot = cache.snapshot(&commit);
        if !snapshot.is_dir() {
            return Err(nothing);
        }
        let there: BTreeSet<String> = cache.files(&commit).into_keys().collect();
        let missing = match choose::plan(&there, wanted) {
            Err(lacking) => lacking,
            Ok(Plan { index: Some(index), .. }) => {
                let path = snapshot.join(&index);
                let shards = fs::read(&path)
                    .map_err(|source| Error::reading(&path, source))
                    .and_then(|bytes| choose::shards(&index, &bytes));
                match shards {
                    Ok(shards) => shards.into_iter().filter(|shard| !there.contains(shard)).collect(),
                    Err(error) => vec![format!("{index} as it should be ({error})")],
                }
            }
            Ok(_) => Vec::new(),
        };
        if missing.is_empty() {
            return Ok(snapshot);
        }
        Err(Lacks { snapshot: Some(snapshot), there: there.into_iter().collect(), missing })
    }
}

impl Lacks {
    /// The error of a cache that has to do alone.
    fn offline(self, id: &HubId, settings: &Settings) -> Error {
        let message = match &self.snapshot {
            Some(_) => format!("{id} is not whole in the cache, and HF_HUB_OFFLINE forbids to fetch the rest"),
            None => format!("{id} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"),
        };
        let mut error = self.hint(Error::new(ErrorKind::Network, message));
        if self.snapshot.is_none() {
            let held = cache::repositories(&settings.cache);
            let held = if held.is_empty() { "no models".into() } else { held.join(", ") };
            error = error.hint(format!("the cache {} has {held}", settings.cache.display()));
        }
        error.hint("unset HF_HUB_OFFLINE, with a network, to fetch it")
    }

    /// Adds what is there and what is missing, where some is there.
    fn hint(&self, error: Error) -> Error {
        let Some(snapshot) = &self.snapshot else { return error };
        let there = if self.there.is_empty() { "nothing".into() } else { self.there.join(", ") };
        error.hint(format!("{} has: {there}", snapshot.display())).hint(format!("missing: {}", self.missing.join(", ")))
    }
}

/// Brings a snapshot up to what the list says.
struct Fetching<'a> {
    id: &'a HubId,
    wanted: Wanted,
    client: &'a Client<'a>,
    cache: &'a RepoCache,
    listing: &'a Listing,
}

impl Fetching<'_> {
    fn run(&self, watch: Watch<'_>) -> Result<PathBuf> {
        let names: BTreeSet<String> = self.listing.files.keys().cloned().collect();
        let plan = choose::plan(&names, self.wanted).map_err(|lacking| {
            let shown: Vec<&str> = names.iter().take(20).map(String::as_str).collect();
            Error::data(format!("{} lacks {}", self.id, lacking.join(", and "))).hint(format!(
                "it has: {}{}",
                shown.join(", "),
                if names.len() > 20 { ", …" } else { "" }
            ))
        })?;
        self.get(&plan.first, watch)?;
        let snapshot = self.cache.snapshot(&self.listing.commit);
        let mut weights = plan.weights;
        if let Some(index) = &plan.index {
            let path = snapshot.join(index);
            let bytes = fs::read(&path).map_err(|source| Error::reading(&path, source))?;
            let shards = choose::shards(&format!("{}: {index}", self.id), &bytes)?;
            if let Some(missing) = shards.iter().find(|shard| !names.contains(*shard)) {
                return Err(Error::data(format!("{}: {index} names {missing}, which is not there", self.id)));
            }
            weights.extend(shards);
        }
        self.get(&weights, watch)?;
        Ok(snapshot)
    }

    /// Gets files, those that the snapshot lacks.
    fn get(&self, files: &[String], watch: Watch<'_>) -> Result<()> {
        let commit = &self.listing.commit;
        let have: BTreeMap<String, u64> = self.cache.files(commit);
        let mut remotes = Vec::new();
        for file in files {
            let listed = self.listing.files.get(file).cloned().unwrap_or_default();
            let whole = match (have.get(file), listed.size) {
                (Some(have), Some(size)) => *have == size,
                (Some(_), None) => true,
                (None, _) => false,
            };
            if !whole {
                remotes.push(self.remote(file, listed)?);
            }
        }
        let new: Vec<&Remote> = remotes.iter().filter(|file| !self.cache.has_blob(&file.etag, file.size)).collect();
        let total = new.iter().map(|file| file.size).sum();
        let download = Download { client: self.client, cache: self.cache, id: self.id, commit };
        let mut before = 0;
        for remote in &remotes {
            if !self.cache.has_blob(&remote.etag, remote.size) {
                download.blob(remote, &mut |told| match told {
                    Told::Waits => {
                        watch(Event::Note(&format!("waiting for another process that fetches {}", remote.file)));
                    }
                    Told::Bytes(done) => watch(Event::Bytes { file: &remote.file, done: before + done, total }),
                })?;
                before += remote.size;
            }
            self.cache.link(&remote.etag, commit, &remote.file)?;
        }
        Ok(())
    }

    /// What the Hub says of a file.
    fn remote(&self, file: &str, listed: Listed) -> Result<Remote> {
        let listed = match listed {
            Listed { size: Some(_), etag: Some(_) } => listed,
            _ => self.client.about(self.id, &self.listing.commit, file).map_err(Failed::error)?,
        };
        // Both become names of files.
        match listed {
            Listed { size: Some(size), etag: Some(etag) } if choose::is_plain(file) && choose::is_plain(&etag) => {
                Ok(Remote { file: file.to_owned(), size, etag })
            }
            _ => Err(Error::new(ErrorKind::Network, format!("{}: the Hub tells no size and etag of {file}", self.id))
                .hint("look at HF_ENDPOINT, and at a proxy between")),
        }
    }
}
