//! A Hub on 127.0.0.1: it lists files, hands them out, and misbehaves as it is told.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use serde_json::{Value, json};

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// Names in small letters.
    pub headers: BTreeMap<String, String>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What is answered.
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Only so many bytes of the body are sent before the connection closes.
    pub cut: Option<usize>,
    /// Without a Content-Length: the end of the connection is the end of the body.
    pub unsized_body: bool,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), cut: None, unsized_body: false }
    }

    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
}

/// A server that answers with a closure and remembers what it was asked.
pub struct Server {
    pub url: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, answer) = (seen.clone(), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer) = (log.clone(), answer.clone());
                thread::spawn(move || {
                    // A client may hang up whenever it likes.
                    let _ = serve(stream, &log, &*answer);
                });
            }
        });
        Self { url, seen }
    }

    /// The requests since the last call.
    pub fn take(&self) -> Vec<Request> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

fn serve(stream: TcpStream, log: &Mutex<Vec<Request>>, answer: &dyn Fn(&Request) -> Reply) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let request = Request { method, path, headers };
    log.lock().unwrap().push(request.clone());
    let reply = answer(&request);
    let mut head = format!("HTTP/1.1 {} Said\r\nConnection: close\r\n", reply.status);
    if !reply.unsized_body && !reply.headers.iter().any(|(name, _)| name == "Content-Length") {
        head += &format!("Content-Length: {}\r\n", reply.body.len());
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let mut stream = stream;
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method != "HEAD" {
        stream.write_all(&reply.body[..reply.cut.unwrap_or(reply.body.len()).min(reply.body.len())])?;
    }
    stream.flush()
}

/// A repository at one commit.
#[derive(Clone)]
pub struct Repository {
    pub name: String,
    pub commit: String,
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Repository {
    pub fn new(name: &str, files: &[(&str, &[u8])]) -> Self {
        let files = files.iter().map(|(name, bytes)| (name.to_string(), bytes.to_vec())).collect();
        Self { name: name.into(), commit: "0123456789abcdef0123456789abcdef01234567".into(), files }
    }

    /// The files of a folder.
    pub fn of_folder(name: &str, folder: &std::path::Path) -> Self {
        let mut repository = Self::new(name, &[]);
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_str().unwrap().to_owned();
            repository.files.insert(file, std::fs::read(path).unwrap());
        }
        repository
    }

    /// As the Hub does it: weights are large files, known by their SHA-256, others by Git's SHA-1.
    pub fn etag(&self, file: &str) -> String {
        let bytes = &self.files[file];
        let mut context = if large(file) {
            Context::new(&SHA256)
        } else {
            let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            context.update(format!("blob {}\0", bytes.len()).as_bytes());
            context
        };
        context.update(bytes);
        context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub fn listing(&self) -> Value {
        let siblings: Vec<Value> = self
            .files
            .iter()
            .map(|(name, bytes)| match large(name) {
                true => json!({"rfilename": name, "size": bytes.len(), "blobId": "0".repeat(40),
                    "lfs": {"sha256": self.etag(name), "size": bytes.len(), "pointerSize": 134}}),
                false => json!({"rfilename": name, "size": bytes.len(), "blobId": self.etag(name)}),
            })
            .collect();
        json!({"id": self.name, "sha": self.commit, "siblings": siblings})
    }

    /// The answer of a Hub that has this repository and no other.
    pub fn answer(&self, request: &Request) -> Reply {
        let path = request.path.split('?').next().unwrap_or_default();
        let list = format!("/api/models/{}/revision/", self.name);
        if let Some(revision) = path.strip_prefix(&list) {
            return if revision == "main" || revision == self.commit {
                Reply::new(200, self.listing().to_string())
            } else {
                Reply::new(404, "").with("X-Error-Code", "RevisionNotFound")
            };
        }
        let file = path.strip_prefix(&format!("/{}/resolve/{}/", self.name, self.commit));
        let Some(bytes) = file.and_then(|file| self.files.get(file)) else {
            return Reply::new(404, "")
                .with("X-Error-Code", "RepoNotFound")
                .with("X-Error-Message", "Repository not found");
        };
        let etag = format!("\"{}\"", self.etag(file.unwrap_or_default()));
        let from =
            request.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        match from {
            Some(from) if from < bytes.len() => Reply::new(206, &bytes[from..])
                .with("Content-Range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len())),
            Some(_) => Reply::new(416, ""),
            None => Reply::new(200, bytes.as_slice()),
        }
        .with("ETag", etag)
        .with("X-Repo-Commit", &self.commit)
    }

    /// Starts a Hub with this repository alone.
    pub fn serve(self) -> Server {
        Server::start(move |request| self.answer(request))
    }
}

fn large(file: &str) -> bool {
    file.ends_with(".safetensors") || file.ends_with(".bin")
}
