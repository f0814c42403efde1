//! Asking the Hub: requests, redirects, and what its refusals mean.
//!
//! Redirects are followed here and not by the HTTP library, because the token may go to the endpoint alone: files
//! mostly come from other hosts.

use std::{collections::BTreeMap, time::Duration};

use serde_json::Value;
use ureq::{
    Agent, Body,
    http::{Response, Uri},
};

use super::{HubId, Settings, cache, id::is_commit};
use crate::error::{Error, ErrorKind, nearest};

const REDIRECTS: usize = 10;
/// Without an answer, or without a byte of one.
const SILENCE: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(20);
/// A list of files is smaller.
const LIST_LIMIT: u64 = 64 << 20;
/// Names in the cache that are as near as this are worth a hint.
const NEAR: f64 = 0.9;

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Failed {
    /// The network, or a server in trouble: the same request may succeed later.
    Passing(Error),
    /// The Hub said no, and will again.
    Refused(Error),
    /// The repository is there, the revision is not.
    NoRevision(Error),
}

impl Failed {
    pub fn error(self) -> Error {
        match self {
            Self::Passing(error) | Self::Refused(error) | Self::NoRevision(error) => error,
        }
    }
}

/// A repository at a commit.
pub(super) struct Listing {
    pub commit: String,
    /// By name, those in folders too.
    pub files: BTreeMap<String, Listed>,
}

/// What the list says about a file; mirrors may say less.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Listed {
    pub size: Option<u64>,
    /// Also the name of its blob: SHA-256 of a large file, Git's SHA-1 of a small one.
    pub etag: Option<String>,
}

pub(super) struct Client<'a> {
    agent: Agent,
    settings: &'a Settings,
    endpoint: Uri,
}

impl<'a> Client<'a> {
    pub fn new(settings: &'a Settings) -> Result<Self, Error> {
        let endpoint: Option<Uri> = settings.endpoint.parse().ok();
        let endpoint = endpoint.filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")));
        let Some(endpoint) = endpoint.filter(|uri| uri.host().is_some_and(|host| !host.is_empty())) else {
            return Err(Error::usage(format!("HF_ENDPOINT: {} is not the address of a server", settings.endpoint))
                .hint("write it as https://huggingface.co, or leave it out"));
        };
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")));
        if matches!(endpoint.host(), Some("localhost" | "127.0.0.1" | "[::1]")) {
            // No proxy reaches this machine.
            config = config.proxy(None);
        }
        Ok(Self { agent: config.build().into(), settings, endpoint })
    }

    /// The commit of the revision, and its files.
    pub fn list(&self, id: &HubId) -> Result<Listing, Failed> {
        let revision = escaped(id.revision());
        let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", self.settings.endpoint, id.repository());
        let mut response = self.request(id, &url, 0, Follow::Everywhere)?;
        let body = response.body_mut().with_config().limit(LIST_LIMIT).read_to_vec();
        let body = body.map_err(|error| Failed::Passing(unreachable(&url, error)))?;
        parse_listing(&body).ok_or_else(|| {
            let message = format!("{url} is not answered as the Hub does");
            Failed::Refused(Error::new(ErrorKind::Network, message).hint("look at HF_ENDPOINT, and at a proxy between"))
        })
    }

    /// Size and etag of a file that the list did not tell them of.
    pub fn about(&self, id: &HubId, commit: &str, file: &str) -> Result<Listed, Failed> {
        let response = self.request(id, &self.file_url(id, commit, file), 0, Follow::HeadOfEndpoint)?;
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let etag = header("x-linked-etag").or(header("etag"));
        let size = header("x-linked-size").or(header("content-length"));
        Ok(Listed { size: size.and_then(|size| size.trim().parse().ok()), etag: etag.map(plain_etag) })
    }

    /// A file's bytes from `from` on, where the server can do that: look at the status.
    pub fn file(&self, id: &HubId, commit: &str, file: &str, from: u64) -> Result<Response<Body>, Failed> {
        self.request(id, &self.file_url(id, commit, file), from, Follow::Everywhere)
    }

    fn file_url(&self, id: &HubId, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.settings.endpoint, id.repository(), escaped(file))
    }

    fn request(&self, id: &HubId, url: &str, from: u64, follow: Follow) -> Result<Response<Body>, Failed> {
        let refused = |message: String| Failed::Refused(Error::new(ErrorKind::Network, message));
        let mut place = url.to_owned();
        for _ in 0..=REDIRECTS {
            let uri: Uri =
                place.parse().map_err(|_| refused(format!("{url} leads to {place}, which is no address")))?;
            if self.endpoint.scheme_str() == Some("https") && uri.scheme_str() != Some("https") {
                return Err(refused(format!("{url} leads to {place}, which is not encrypted")));
            }
            let own = same_server(&self.endpoint, &uri);
            if follow == Follow::HeadOfEndpoint && !own {
                return Err(refused(format!("{url} leads elsewhere without telling size and etag")));
            }
            let mut request =
                if follow == Follow::HeadOfEndpoint { self.agent.head(&uri) } else { self.agent.get(&uri) }
                    .header("Accept-Encoding", "identity");
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            if let Some(token) = self.settings.token.as_ref().filter(|_| own) {
                request = request.header("Authorization", format!("Bearer {}", token.0));
            }
            let response = request.call().map_err(|error| Failed::Passing(unreachable(&place, error)))?;
            let status = response.status();
            if status.is_success() || status.as_u16() == 416 {
                return Ok(response);
            }
            if !status.is_redirection() {
                return Err(self.refusal(id, &place, &response));
            }
            let location = response.headers().get("location").and_then(|location| location.to_str().ok());
            let Some(location) = location else { return Err(refused(format!("{place} leads nowhere ({status})"))) };
            let next = joined(&uri, location);
            // What the endpoint says of a file stands in the answer that leads away from it.
            let leaves = next.parse().is_ok_and(|next: Uri| !same_server(&self.endpoint, &next));
            if follow == Follow::HeadOfEndpoint && leaves {
                return Ok(response);
            }
            place = next;
        }
        Err(refused(format!("{url} leads in a circle")))
    }

    /// What an answer that is no success means.
    fn refusal(&self, id: &HubId, place: &str, response: &Response<Body>) -> Failed {
        let status = response.status();
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let own = place.parse().is_ok_and(|uri: Uri| same_server(&self.endpoint, &uri));
        let error = |message: String| {
            let error = Error::new(ErrorKind::Network, message);
            match header("x-error-message") {
                Some(said) => error.caused_by(said.chars().take(300).collect::<String>()),
                None => error,
            }
        };
        let page = format!("{}/{}", self.settings.endpoint, id.repository());
        match (status.as_u16(), header("x-error-code")) {
            (404, Some("RevisionNotFound")) => Failed::NoRevision(
                error(format!("{} has no revision {}", id.repository(), id.revision()))
                    .hint(format!("its branches and tags are listed at {page}/tree/main")),
            ),
            (404, Some("EntryNotFound")) => Failed::Refused(error(format!("{place}: there is no such file"))),
            (404, _) | (401, Some("RepoNotFound")) if own => Failed::Refused(self.not_found(id, &page, error)),
            (401 | 403, _) if own => {
                let message = format!("the Hub gives no access to {} ({})", id.repository(), status.as_u16());
                let mut error = error(message);
                error = error.hint(format!("{page} says whether it is gated: ask for access there, if need be"));
                Failed::Refused(self.about_token(error))
            }
            (408 | 429 | 500..=599, _) => Failed::Passing(error(format!("{place} is not answered now ({status})"))),
            _ => Failed::Refused(error(format!("{place} is refused ({status})"))),
        }
    }

    fn not_found(&self, id: &HubId, page: &str, mut error: impl FnMut(String) -> Error) -> Error {
        let wanted = id.repository();
        let mut error = error(format!("the Hub has no model {wanted}, or does not show it to everybody"));
        let cached = cache::repositories(&self.settings.cache);
        if let Some(near) = nearest(&wanted, cached.iter().map(String::as_str))
            && near != wanted
            && strsim::jaro_winkler(&wanted, near) >= NEAR
        {
            error = error.hint(format!("the cache has a name like it: {near}"));
        }
        error =
            error.hint(format!("look at {page}: owner and name are written exactly so, in small and capital letters"));
        self.about_token(error.hint("a private repository is found with a token alone"))
    }

    /// Where a token would be, without showing any.
    fn about_token(&self, error: Error) -> Error {
        let looked = self.settings.token_places.join("; ");
        if self.settings.token.is_some() {
            error.hint(format!(
                "a token was sent, and it may lack the right to this repository. Looked for in: {looked}"
            ))
        } else {
            error
                .hint(format!("no token was sent. Looked for in: {looked}"))
                .hint(format!("make one at {}/settings/tokens and set HF_TOKEN", self.settings.endpoint))
        }
    }
}

/// Which redirects are followed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Follow {
    Everywhere,
    /// HEAD, and only to the endpoint.
    HeadOfEndpoint,
}

fn unreachable(url: &str, error: ureq::Error) -> Error {
    let host = url.parse().ok().and_then(|uri: Uri| uri.host().map(str::to_owned)).unwrap_or_else(|| url.to_owned());
    Error::new(ErrorKind::Network, format!("{host} cannot be reached")).caused_by(error)
}

/// Scheme, host and port are those of the endpoint.
fn same_server(endpoint: &Uri, other: &Uri) -> bool {
    let port = |uri: &Uri| uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    endpoint.scheme_str() == other.scheme_str() && host(endpoint) == host(other) && port(endpoint) == port(other)
}

/// Where a `Location` leads from here.
fn joined(from: &Uri, location: &str) -> String {
    let scheme = from.scheme_str().unwrap_or("https");
    let server = from.authority().map(ToString::to_string).unwrap_or_default();
    if location.contains("://") {
        location.to_owned()
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{server}{location}")
    } else {
        let folder = from.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{server}{folder}/{location}")
    }
}

/// One part of a path in a URL.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

/// Without quotes and the mark of a weak one.
fn plain_etag(etag: &str) -> String {
    let etag = etag.trim();
    etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"').to_owned()
}

fn parse_listing(body: &[u8]) -> Option<Listing> {
    let parsed: Value = serde_json::from_slice(body).ok()?;
    let commit = parsed.get("sha")?.as_str().filter(|commit| is_commit(commit))?.to_owned();
    let mut files = BTreeMap::new();
    for file in parsed.get("siblings")?.as_array()? {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
        let lfs = file.get("lfs").filter(|lfs| lfs.is_object());
        let listed = Listed {
            size: lfs.and_then(|lfs| lfs.get("size")).or(file.get("size")).and_then(Value::as_u64),
            etag: match lfs {
                Some(lfs) => text(lfs.get("sha256").or(lfs.get("oid"))),
                None => text(file.get("blobId")),
            },
        };
        files.insert(text(file.get("rfilename"))?, listed);
    }
    Some(Listing { commit, files })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_endpoint_is_one_scheme_host_and_port() {
        let endpoint: Uri = "https://Hub.example".parse().unwrap();
        for (other, same) in [
            ("https://hub.example:443/a", true),
            ("https://hub.example/a?b", true),
            ("http://hub.example/a", false),
            ("https://hub.example:8443/a", false),
            ("https://cdn.hub.example/a", false),
            ("https://hub.example.evil/a", false),
        ] {
            assert_eq!(same_server(&endpoint, &other.parse().unwrap()), same, "{other}");
        }
    }

    #[test]
    fn locations_are_joined() {
        let from: Uri = "https://h:1/a/b?c".parse().unwrap();
        for (location, to) in [
            ("https://x/y", "https://x/y"),
            ("//x/y", "https://x/y"),
            ("/y?z", "https://h:1/y?z"),
            ("y", "https://h:1/a/y"),
        ] {
            assert_eq!(joined(&from, location), to);
        }
        assert_eq!(escaped("refs/pr/1 é.json"), "refs%2Fpr%2F1%20%C3%A9.json");
        assert_eq!((plain_etag("W/\"ab\""), plain_etag("\"ab\"")), ("ab".to_owned(), "ab".to_owned()));
    }

    #[test]
    fn lists_are_read_with_and_without_sizes() {
        let commit = "0".repeat(40);
        let list = serde_json::json!({"sha": commit, "siblings": [
            {"rfilename": "a.json", "size": 3, "blobId": "b1"},
            {"rfilename": "w", "size": 130, "blobId": "b2", "lfs": {"sha256": "s", "size": 9, "pointerSize": 130}},
            {"rfilename": "c/d"},
        ]});
        let listing = parse_listing(list.to_string().as_bytes()).unwrap();
        let of = |name: &str| listing.files[name].clone();
        assert_eq!(of("a.json"), Listed { size: Some(3), etag: Some("b1".into()) });
        assert_eq!(of("w"), Listed { size: Some(9), etag: Some("s".into()) });
        assert_eq!(of("c/d"), Listed::default());
        for wrong in ["<html>", "{}", r#"{"sha": "../x", "siblings": []}"#] {
            assert!(parse_listing(wrong.as_bytes()).is_none(), "{wrong}");
        }
    }
}
