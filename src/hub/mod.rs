//! Models and adapters of the Hugging Face Hub by their ids, in the cache that the Python tools share.
//!
//! [`locate`] is the way in: an id becomes a folder on disk, which is used as any other folder from then on. What goes
//! over the network is behind the feature `hub`; without it, [`locate`] says how to get it.

#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod choose;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod fetch;
mod id;

use std::{fmt, path::PathBuf};

use crate::error::Result;

pub use id::{HubId, id_or_path};

/// Where the Hub and its cache are. The command line reads it from the environment, by the names that the Python
/// tools use.
#[derive(Clone, Debug)]
pub struct Settings {
    /// HF_HUB_CACHE, or `hub` in HF_HOME: the folder of the `models--owner--name`.
    pub cache: PathBuf,
    /// HF_ENDPOINT, without a slash at its end.
    pub endpoint: String,
    pub token: Option<Token>,
    /// Where the token was looked for, and what was there; for messages.
    pub token_places: Vec<String>,
    /// HF_HUB_OFFLINE: use the cache, ask nobody.
    pub offline: bool,
}

/// An access token. It is sent to the endpoint alone, and never shown.
#[derive(Clone)]
#[cfg_attr(not(feature = "hub"), allow(dead_code, reason = "only the client sends it"))]
pub struct Token(String);

impl Token {
    /// None where the text cannot be one: it is empty, or has characters that no header may have.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())).then(|| Self(text.to_owned()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// What a repository is fetched for; it decides which of its files are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A language model or a LLaVA, with its tokenizer.
    Model,
    /// A vision tower: as a model, but it needs no tokenizer.
    Tower,
    /// A PEFT adapter, with a projector that was trained beside it.
    Adapter,
    /// A projector alone (`mm_projector.bin`), or a model that has one.
    Projector,
}

/// What is told while files are fetched.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// One line for people.
    Note(&'a str),
    /// Bytes of what is being fetched, over all its files; `file` is the one under way.
    Bytes { file: &'a str, done: u64, total: u64 },
}

/// The folder of a repository's snapshot on disk, with every file that is wanted in it. Files that the cache has are
/// not fetched again, whoever put them there; without a network, the cache alone has to do.
///
/// # Errors
/// `Network`: no network, no access, no such repository or revision, or a cache that lacks something offline.
/// `Data`: the repository has no weights that can be read. Built without the feature `hub`: `Data`, and how to get it.
#[cfg(feature = "hub")]
pub fn locate(id: &HubId, wanted: Wanted, settings: &Settings, watch: &mut dyn FnMut(Event<'_>)) -> Result<PathBuf> {
    fetch::fetch(id, wanted, settings, watch)
}

#[cfg(not(feature = "hub"))]
pub fn locate(id: &HubId, _: Wanted, _: &Settings, _: &mut dyn FnMut(Event<'_>)) -> Result<PathBuf> {
    Err(crate::error::Error::data(format!("there is no folder {id}, and this program was built without the Hub"))
        .hint(format!("if {id} is an id of the Hugging Face Hub, build with: cargo build --release --features hub"))
        .hint("otherwise name a folder that exists"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_checked_and_not_shown() {
        let token = Token::new(" hf_secret\n").unwrap();
        assert_eq!(token.0, "hf_secret");
        assert!(!format!("{token:?}").contains("secret"));
        for wrong in ["", " \n", "hf_a b", "hf_a\r\nX-Other: 1", "hf_é"] {
            assert!(Token::new(wrong).is_none(), "{wrong:?}");
        }
    }
}
