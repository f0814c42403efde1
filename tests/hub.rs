//! Ids of the Hugging Face Hub: what is fetched, what the cache looks like afterwards, and every way it can go wrong.
//! The Hub is a server in this file's own process.

#![cfg(feature = "hub")]

mod common;
#[path = "common/hub_server.rs"]
mod hub_server;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use common::{golden, program, read_json, stderr};
use hub_server::{Reply, Repository, Request, Server};
use wgpu_llava::{
    error::{Error, ErrorKind},
    hub::{Event, HubId, Settings, Token, Wanted, locate},
};

const ID: &str = "owner/name";
const SECRET: &str = "hf_secretsecret";

/// A cache, and a Hub it is filled from.
struct Place {
    dir: tempfile::TempDir,
    settings: Settings,
}

impl Place {
    fn new(server: &Server) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings {
            cache: dir.path().join("hub"),
            endpoint: server.url.clone(),
            token: None,
            token_places: vec!["HF_TOKEN (not set)".into(), "/somewhere/token (no such file)".into()],
            offline: false,
        };
        Self { dir, settings }
    }

    fn with_token(mut self) -> Self {
        self.settings.token = Token::new(SECRET);
        self
    }

    fn offline(&self) -> Self {
        let settings = Settings { offline: true, ..self.settings.clone() };
        Self { dir: tempfile::tempdir().unwrap(), settings }
    }

    fn locate(&self, id: &str, wanted: Wanted) -> (Result<PathBuf, Error>, Vec<String>) {
        let mut notes = Vec::new();
        let folder = locate(&HubId::parse(id).unwrap(), wanted, &self.settings, &mut |event| {
            if let Event::Note(text) = event {
                notes.push(text.to_owned());
            }
        });
        (folder, notes)
    }

    fn model(&self, id: &str) -> PathBuf {
        self.locate(id, Wanted::Model).0.unwrap()
    }

    fn refusal(&self, id: &str) -> String {
        let error = self.locate(id, Wanted::Model).0.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Network, "{error:?}");
        shown(&error)
    }

    fn repository(&self) -> PathBuf {
        self.settings.cache.join("models--owner--name")
    }

    /// The names in `blobs`, those of unfinished files too.
    fn blobs(&self) -> Vec<String> {
        names(&self.repository().join("blobs"))
    }
}

/// All that a person would read of an error.
fn shown(error: &Error) -> String {
    let mut text = format!("{error}\n{}", error.hints.join("\n"));
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        text += &format!("\n{source}");
        cause = source.source();
    }
    assert!(!text.contains(SECRET), "{text}");
    text
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in:\n{text}");
    }
}

fn paths(requests: &[Request]) -> Vec<&str> {
    requests.iter().map(|request| request.path.as_str()).collect()
}

fn weights() -> Vec<u8> {
    (0..1_000_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

fn repository() -> Repository {
    Repository::new(
        ID,
        &[
            (".gitattributes", b"x"),
            ("README.md", b"about"),
            ("config.json", b"{}"),
            ("tokenizer.json", b"{\"a\": 1}"),
            ("chat_template.jinja", b"{{ messages }}"),
            ("model.safetensors", &weights()),
            ("pytorch_model.bin", b"the same again"),
            ("tf_model.h5", b"and again"),
            ("onnx/model.onnx", b"and again"),
        ],
    )
}

const FETCHED: [&str; 4] = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"];

#[test]
fn a_first_fetch_lays_the_cache_out_as_python_does_and_a_second_asks_for_the_commit_alone() {
    let repository = repository();
    let server = repository.clone().serve();
    let place = Place::new(&server);
    let mut bytes = Vec::new();
    let folder = locate(&HubId::parse(ID).unwrap(), Wanted::Model, &place.settings, &mut |event| {
        if let Event::Bytes { file: "model.safetensors", done, total } = event {
            bytes.push((done, total));
        }
    })
    .unwrap();
    assert_eq!(folder, place.repository().join("snapshots").join(&repository.commit));
    assert_eq!(names(&folder), FETCHED);
    assert_eq!(fs::read_to_string(place.repository().join("refs/main")).unwrap(), repository.commit);
    for file in FETCHED {
        assert_eq!(fs::read(folder.join(file)).unwrap(), repository.files[file]);
        #[cfg(unix)]
        assert_eq!(fs::read_link(folder.join(file)).unwrap(), Path::new("../../blobs").join(repository.etag(file)));
    }
    let mut etags: Vec<String> = FETCHED.iter().map(|file| repository.etag(file)).collect();
    etags.sort();
    assert_eq!(place.blobs(), etags);
    assert_eq!(names(&place.settings.cache), [".locks", "models--owner--name"]);
    assert_eq!(names(&place.repository()), ["blobs", "refs", "snapshots"]);
    assert_eq!(bytes.first().map(|at| at.0), Some(0));
    assert_eq!(bytes.last(), Some(&(4_000_000, 4_000_000)));
    assert!(bytes.windows(2).all(|pair| pair[0].0 <= pair[1].0));

    assert_eq!(server.take().len(), 1 + FETCHED.len());
    assert_eq!(place.model(ID), folder);
    assert_eq!(paths(&server.take()), ["/api/models/owner/name/revision/main?blobs=true"]);
    // A commit that is there whole needs no question at all.
    assert_eq!(place.model(&format!("{ID}@{}", repository.commit)), folder);
    assert!(server.take().is_empty());
}

#[test]
fn a_branch_that_moved_brings_only_what_changed() {
    let mut repository = repository();
    let server = repository.clone().serve();
    let mut place = Place::new(&server);
    let old = place.model(ID);
    repository.commit = "f".repeat(40);
    repository.files.insert("config.json".into(), b"{\"new\": 1}".to_vec());
    let moved = repository.clone().serve();
    place.settings.endpoint.clone_from(&moved.url);
    let new = place.model(ID);
    assert_eq!(moved.take().len(), 2);
    assert_eq!(fs::read(new.join("config.json")).unwrap(), b"{\"new\": 1}");
    assert_eq!(fs::read(old.join("config.json")).unwrap(), b"{}");
    assert_eq!(names(&new), FETCHED);
    assert_eq!(place.offline().model(ID), new);
}

#[test]
fn offline_the_cache_has_to_do_and_says_what_it_lacks() {
    let server = repository().serve();
    let place = Place::new(&server);
    let text = place.offline().refusal(ID);
    assert_says(&text, &["owner/name is not in the cache", "HF_HUB_OFFLINE", "no models"]);
    assert!(server.take().is_empty());
    let folder = place.model(ID);
    server.take();
    assert_eq!(place.offline().model(ID), folder);
    assert_says(&place.offline().refusal("owner/nane"), &["not in the cache", "owner/name"]);
    // A blob that was cleared away leaves a link to nothing.
    fs::remove_file(place.repository().join("blobs").join(repository().etag("model.safetensors"))).unwrap();
    let text = place.offline().refusal(ID);
    assert_says(&text, &["not whole", "has: chat_template.jinja, config.json, tokenizer.json", "missing: weights"]);
    assert!(server.take().is_empty());
    // With a network it is mended.
    assert_eq!(place.model(ID), folder);
    assert_eq!(server.take().len(), 2);
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn without_a_network_the_cache_is_used_and_that_is_told() {
    let server = repository().serve();
    let mut place = Place::new(&server);
    let folder = place.model(ID);
    // A port where nobody listens.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    place.settings.endpoint = format!("http://{closed}");
    let (found, notes) = place.locate(ID, Wanted::Model);
    assert_eq!(found.unwrap(), folder);
    assert_says(&notes.join("\n"), &["owner/name", "127.0.0.1 cannot be reached", "using what the cache has"]);
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    assert_says(&place.refusal(ID), &["cannot be reached", "missing: tokenizer.json", "HF_HUB_OFFLINE"]);
    assert_says(&place.refusal("other/one"), &["cannot be reached", "HF_ENDPOINT"]);
}

#[test]
fn a_refusal_names_the_page_and_where_the_token_was_looked_for() {
    for status in [401, 403] {
        let server = Server::start(move |_| {
            Reply::new(status, "no").with("X-Error-Code", "GatedRepo").with("X-Error-Message", "Access is restricted")
        });
        let text = Place::new(&server).refusal(ID);
        let page = format!("{}/owner/name", server.url);
        assert_says(&text, &[&page, "no token was sent", "set HF_TOKEN", "/somewhere/token (no such file)"]);
        assert_says(&text, &["Access is restricted", &status.to_string()]);
        assert!(server.take()[0].header("authorization").is_none());
        let text = Place::new(&server).with_token().refusal(ID);
        assert_says(&text, &[&page, "a token was sent", "HF_TOKEN (not set)"]);
        assert_eq!(server.take()[0].header("authorization"), Some("Bearer hf_secretsecret"));
    }
}

#[test]
fn what_is_not_there_is_told_with_what_is_near() {
    let server = repository().serve();
    let place = Place::new(&server);
    place.model(ID);
    let text = place.refusal("owner/nmae");
    assert_says(&text, &["no model owner/nmae", "the cache has a name like it: owner/name", "private", "HF_TOKEN"]);
    assert!(!place.refusal("someone/else").contains("like it"));
    assert_says(&place.refusal("owner/name@v9"), &["no revision v9", "/owner/name/tree/main"]);
    // What the Hub answers to strangers where there is nothing.
    let stern = Server::start(|_| Reply::new(401, "").with("X-Error-Code", "RepoNotFound"));
    assert_says(&Place::new(&stern).refusal(ID), &["no model owner/name"]);
}

#[test]
fn what_breaks_off_is_kept_aside_and_gone_on_with() {
    let healthy = Arc::new(AtomicBool::new(false));
    let (now, repository) = (healthy.clone(), repository());
    let server = Server::start({
        let repository = repository.clone();
        move |request| {
            let mut reply = repository.answer(request);
            if request.path.ends_with(".safetensors") && !now.load(Ordering::SeqCst) {
                // It forgets what it was asked for, and hangs up.
                reply =
                    Reply { cut: Some(1_500_000), ..Reply::new(200, repository.files["model.safetensors"].clone()) };
                // Every other time without having said how much it would be.
                reply.unsized_body = request.header("range").is_some();
            }
            reply
        }
    });
    let place = Place::new(&server);
    let text = place.refusal(ID);
    assert_says(&text, &["model.safetensors broke off at 1500000 of 4000000 bytes", "goes on from there"]);
    let etag = repository.etag("model.safetensors");
    assert!(!place.repository().join("blobs").join(&etag).exists());
    assert!(!place.repository().join("snapshots").join(&repository.commit).join("model.safetensors").exists());
    // A snapshot that is not whole is not what the branch is at.
    assert!(!place.repository().join("refs/main").exists());
    assert!(place.blobs().contains(&format!("{etag}.incomplete")));

    healthy.store(true, Ordering::SeqCst);
    server.take();
    let folder = place.model(ID);
    let requests = server.take();
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert_eq!(requests[1].header("range"), Some("bytes=1500000-"));
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    assert!(place.blobs().iter().all(|name| !name.contains("incomplete")));
}

#[test]
fn leftovers_that_are_wrong_or_too_long_do_no_harm() {
    let repository = repository();
    let server = repository.clone().serve();
    for leftover in [vec![7; 1000], vec![7; 4_000_000], vec![7; 5_000_000]] {
        let place = Place::new(&server);
        let partial = place.repository().join("blobs").join(repository.etag("model.safetensors") + ".incomplete");
        fs::create_dir_all(partial.parent().unwrap()).unwrap();
        fs::write(&partial, leftover).unwrap();
        assert_eq!(fs::read(place.model(ID).join("model.safetensors")).unwrap(), weights());
        assert!(!partial.exists());
    }
}

#[test]
fn what_is_not_what_was_listed_gets_no_name() {
    for wrong in [vec![1; 4_000_000], vec![1; 4_000_001]] {
        let repository = repository();
        let listed = repository.clone();
        let server = Server::start(move |request| match request.path.ends_with(".safetensors") {
            true => Reply { unsized_body: wrong.len() > 4_000_000, ..Reply::new(200, wrong.clone()) },
            false => listed.answer(request),
        });
        let place = Place::new(&server);
        assert_says(&place.refusal(ID), &["model.safetensors", "not what the Hub lists", "checksum"]);
        assert!(!place.blobs().contains(&repository.etag("model.safetensors")));
    }
}

#[test]
fn the_token_goes_to_the_endpoint_and_not_where_a_redirect_leads() {
    let repository = repository();
    let files = repository.clone();
    let elsewhere = Server::start(move |_| Reply::new(200, files.files["model.safetensors"].clone()));
    let cdn = elsewhere.url.clone();
    // Relative redirects stay here and keep it; those to another port do not.
    let files = repository.clone();
    let server = Server::start(move |request| match request.path.as_str() {
        path if path.starts_with("/here/") => Reply::new(302, "").with("Location", format!("{cdn}/there?signed=1")),
        path if path.ends_with(".safetensors") => Reply::new(307, "").with("Location", "/here/now"),
        _ => files.answer(request),
    });
    let place = Place::new(&server).with_token();
    let folder = place.model(ID);
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    let own = server.take();
    assert!(own.iter().any(|request| request.path == "/here/now"));
    assert!(own.iter().all(|request| request.header("authorization") == Some("Bearer hf_secretsecret")));
    let other = elsewhere.take();
    assert_eq!(paths(&other), ["/there?signed=1"]);
    assert!(other[0].header("authorization").is_none());
}

#[test]
fn redirects_in_a_circle_end() {
    let server = Server::start(|request| Reply::new(302, "").with("Location", request.path.clone()));
    assert_says(&Place::new(&server).refusal(ID), &["circle"]);
    assert_eq!(server.take().len(), 11);
}

#[test]
fn two_at_once_fetch_each_file_once() {
    let repository = repository();
    let server = repository.clone().serve();
    let place = Place::new(&server);
    let folders: Vec<PathBuf> = thread::scope(|scope| {
        let tasks: Vec<_> = (0..4).map(|_| scope.spawn(|| place.model(ID))).collect();
        tasks.into_iter().map(|task| task.join().unwrap()).collect()
    });
    assert!(folders.iter().all(|folder| fs::read(folder.join("model.safetensors")).unwrap() == weights()));
    let requests = server.take();
    for file in FETCHED {
        let times = requests.iter().filter(|request| request.path.ends_with(&format!("/{file}"))).count();
        assert_eq!(times, 1, "{file}");
    }
    assert_eq!(place.blobs().len(), FETCHED.len());
    assert_eq!(names(&place.repository().join("refs")), ["main"]);
}

/// Lays a repository out as Python's huggingface_hub does.
#[cfg(unix)]
fn as_python_lays_it_out(repository: &Repository, cache: &Path, files: &[&str]) -> PathBuf {
    let root = cache.join(format!("models--{}", repository.name.replace('/', "--")));
    let snapshot = root.join("snapshots").join(&repository.commit);
    for folder in [&root.join("blobs"), &root.join("refs"), &snapshot, &root.join(".no_exist").join(&repository.commit)]
    {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(root.join("refs/main"), &repository.commit).unwrap();
    fs::write(cache.join("CACHEDIR.TAG"), "Signature: 8a477f597d28d172789f06886806bc55\n").unwrap();
    for file in files {
        let etag = repository.etag(file);
        fs::write(root.join("blobs").join(&etag), &repository.files[*file]).unwrap();
        std::os::unix::fs::symlink(Path::new("../../blobs").join(&etag), snapshot.join(file)).unwrap();
    }
    snapshot
}

#[cfg(unix)]
#[test]
fn a_cache_that_python_filled_is_used() {
    let repository = repository();
    let server = repository.clone().serve();
    let place = Place::new(&server);
    let all: Vec<&str> = repository.files.keys().map(String::as_str).filter(|name| !name.contains('/')).collect();
    let snapshot = as_python_lays_it_out(&repository, &place.settings.cache, &all);
    assert_eq!(place.offline().model(ID), snapshot);
    assert!(server.take().is_empty());
    assert_eq!(place.model(ID), snapshot);
    assert_eq!(server.take().len(), 1);
    // Where it fetched a part, the rest is fetched.
    let place = Place::new(&server);
    as_python_lays_it_out(&repository, &place.settings.cache, &["config.json", "tokenizer.json"]);
    assert_says(&place.offline().refusal(ID), &["missing: weights"]);
    let folder = place.model(ID);
    assert_eq!(names(&folder), FETCHED);
    assert_eq!(server.take().len(), 3);
}

#[test]
fn shards_adapters_and_mirrors_that_tell_less() {
    let index =
        br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    let files: [(&str, &[u8]); 6] = [
        ("config.json", b"{}"),
        ("tokenizer.model", b"t"),
        ("model.safetensors.index.json", index),
        ("model-00001-of-00002.safetensors", b"one"),
        ("model-00002-of-00002.safetensors", b"two"),
        ("consolidated.safetensors", b"not these"),
    ];
    let whole = Repository::new(ID, &files);
    let listed = whole.clone();
    // Sizes and etags are only told with each file.
    let server = Server::start(move |request| {
        let reply = listed.answer(request);
        if request.path.starts_with("/api/") && reply.status == 200 {
            let mut list = listed.listing();
            for file in list["siblings"].as_array_mut().unwrap() {
                *file = serde_json::json!({"rfilename": file["rfilename"]});
            }
            return Reply::new(200, list.to_string());
        }
        reply
    });
    let place = Place::new(&server);
    let folder = place.model(ID);
    assert_eq!(names(&folder).len(), 5);
    assert_eq!(fs::read(folder.join("model-00002-of-00002.safetensors")).unwrap(), b"two");
    fs::remove_file(folder.join("model-00002-of-00002.safetensors")).unwrap();
    assert_says(&place.offline().refusal(ID), &["missing: model-00002-of-00002.safetensors"]);

    let mut short = whole;
    short.files.remove("model-00002-of-00002.safetensors");
    let error = Place::new(&short.serve()).locate(ID, Wanted::Model).0.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Data);
    assert_says(&shown(&error), &["names model-00002-of-00002.safetensors, which is not there"]);

    let adapter = Repository::new(
        ID,
        &[("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"a"), ("non_lora_trainables.bin", b"n")],
    );
    let server = adapter.serve();
    let place = Place::new(&server);
    assert_eq!(names(&place.locate(ID, Wanted::Adapter).0.unwrap()).len(), 3);
    let error = place.locate(ID, Wanted::Model).0.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Data);
    assert_says(&shown(&error), &["lacks weights", "config.json", "it has: adapter_config.json"]);
}

#[test]
fn a_hostile_server_writes_nowhere_else() {
    let mut repository = Repository::new(ID, &[("config.json", b"{}"), ("tokenizer.json", b"{}")]);
    repository.files.insert("model.safetensors.index.json".into(), br#"{"weight_map": {"a": "../../x"}}"#.to_vec());
    let error = Place::new(&repository.clone().serve()).locate(ID, Wanted::Model).0.unwrap_err();
    assert_says(&shown(&error), &["../../x", "not the name of a file"]);

    for (name, etag) in [("config.json", "../../../escaped"), ("..\\escaped.json", "aa"), ("config.json", ".lock")] {
        let commit = repository.commit.clone();
        let server = Server::start(move |request| match request.path.starts_with("/api/") {
            true => {
                let weights = serde_json::json!({"rfilename": "model.safetensors", "size": 1, "blobId": "bb"});
                let file = |name: &str, etag: &str| serde_json::json!({"rfilename": name, "size": 2, "blobId": etag});
                let files = [file(name, etag), file("tokenizer.json", "cc"), weights, file("config.json", etag)];
                Reply::new(200, serde_json::json!({"sha": commit, "siblings": files}).to_string())
            }
            false => Reply::new(200, "{}"),
        });
        let place = Place::new(&server);
        place.refusal(ID);
        assert!(names(place.dir.path()).iter().all(|name| name == "hub"));
        assert!(names(&place.settings.cache).iter().all(|name| name == ".locks" || name == "models--owner--name"));
    }
    for list in [r#"{"sha": "../../x", "siblings": []}"#, "<html>Log in to the hotel</html>", ""] {
        let server = Server::start(move |_| Reply::new(200, list));
        assert_says(&Place::new(&server).refusal(ID), &["not answered as the Hub does", "HF_ENDPOINT"]);
    }
}

/// The program, with nothing of the Hub in its environment but this.
fn child(arguments: &[&str], server: &Server, home: &Path) -> Command {
    let mut command = program(arguments);
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        command.env_remove(name);
    }
    command.env("HF_HOME", home).env("HF_ENDPOINT", &server.url).env("HF_TOKEN", SECRET).current_dir(home);
    command
}

const QUESTION: [&str; 4] = ["--prompt", "What is this?", "--max-new-tokens", "8"];

#[test]
fn generate_runs_a_model_and_an_adapter_by_their_ids() {
    let case = golden("parity/mha_untied_linear");
    let model = Repository::of_folder(ID, &case.join("model"));
    let adapter = Repository::of_folder("owner/adapter", &case.join("adapter-lora"));
    let server = Server::start(move |request| match request.path.contains("owner/adapter") {
        true => adapter.answer(request),
        false => model.answer(request),
    });
    let home = tempfile::tempdir().unwrap();
    let (model, adapter) = (case.join("model"), case.join("adapter-lora"));
    let [model, adapter] = [&model, &adapter].map(|path| path.to_str().unwrap());
    let ask = |given: [&str; 2], offline: bool| {
        let arguments = [&["generate", "--model", given[0], "--adapter", given[1]], &QUESTION[..]].concat();
        let mut command = child(&arguments, &server, home.path());
        if offline {
            command.env("HF_HUB_OFFLINE", "1");
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(!stderr(&output).contains(SECRET));
        (String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output))
    };
    let (expected, _) = ask([model, adapter], false);
    assert!(server.take().is_empty());
    let (answer, told) = ask([ID, "owner/adapter"], false);
    assert_eq!(answer, expected);
    assert_says(&told, &["fetching", "model.safetensors", "adapter_model.safetensors", "owner/name: commit 0123"]);
    server.take();
    assert_eq!(ask([ID, "owner/adapter"], true).0, expected);
    assert!(server.take().is_empty());

    let arguments = [&["generate", "--model", "owner/nmae"], &QUESTION[..]].concat();
    let output = child(&arguments, &server, home.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert_says(&stderr(&output), &["no model owner/nmae", "a name like it: owner/name"]);
    assert!(!stderr(&output).contains(SECRET));
}

#[test]
fn train_takes_ids_and_keeps_them_as_written() {
    let case = golden("parity/mha_untied_linear");
    let server = Repository::of_folder(ID, &case.join("model")).serve();
    let home = tempfile::tempdir().unwrap();
    let (config, out) = (case.join("lora.toml"), home.path().join("out"));
    let pinned = format!("model_name_or_path={ID}@0123456789abcdef0123456789abcdef01234567");
    let train = |more: &[&str]| {
        let arguments =
            [&["train", config.to_str().unwrap(), "--output-dir", out.to_str().unwrap(), "--set", "max_steps=1"], more]
                .concat();
        let output = child(&arguments, &server, home.path()).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let dry = train(&["--dry-run", "--set", &pinned]);
    assert_says(&dry, &["model_name_or_path = \"owner/name@0123"]);
    assert!(!out.exists());
    train(&["--set", "model_name_or_path=owner/name"]);
    let saved = fs::read_to_string(out.join("config.toml")).unwrap();
    assert_says(&saved, &["model_name_or_path = \"owner/name\"\n"]);
    let written = read_json(&out.join("adapter/adapter_config.json"));
    assert_eq!(written["base_model_name_or_path"], ID);
    // Repeating the saved config needs nothing but the id.
    let arguments = ["train", "--resume", "--output-dir", out.to_str().unwrap()];
    let output = child(&arguments, &server, home.path()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}
