//! The Hub as the environment describes it, by the names of the Python tools; and ids that become folders.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
};

use regex::{Captures, Regex};

use super::ui::Ui;
use crate::{
    error::{Error, Result},
    hub::{Event, HubId, Settings, Token, Wanted, locate},
    train::{
        config::{RunConfig, Source, StageConfig},
        events::{self, Observer},
    },
};

const ENDPOINT: &str = "https://huggingface.co";
/// The older names still count.
const CACHE: [&str; 2] = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"];
const TOKEN: [&str; 2] = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"];
const OFFLINE: [&str; 2] = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"];

/// A source on disk or in the program: what is on the Hub is fetched, unless the cache has it.
///
/// # Errors
/// As [`locate`].
pub fn local(source: Source, wanted: Wanted, ui: &mut Ui) -> Result<Source> {
    let Source::Hub(text) = source else { return Ok(source) };
    let settings = settings(|name| env::var_os(name).filter(|value| !value.is_empty()), env::home_dir())?;
    let Some(id) = HubId::parse(&text) else { return Ok(Source::Hub(text)) };
    let folder = locate(&id, wanted, &settings, &mut |event| match event {
        Event::Note(text) => ui.event(events::Event::Note(text)),
        Event::Bytes { file, done, total } => ui.bytes(file, done, total),
    });
    ui.end_bytes();
    let folder = folder?;
    if let Some(commit) = folder.file_name() {
        ui.line(&format!("{id}: commit {}", commit.to_string_lossy()));
    }
    Ok(Source::Local(folder))
}

/// What is typed after `--model` or `--adapter`, as it is, or the folder of what it names on the Hub.
///
/// # Errors
/// As [`locate`].
pub fn local_path(given: &Path, wanted: Wanted, ui: &mut Ui) -> Result<PathBuf> {
    let here = env::current_dir().map_err(|error| Error::failed("the current folder is gone").caused_by(error))?;
    match given.to_str().map(|text| Source::parse(text, &here)) {
        Some(source @ Source::Hub(_)) => match local(source, wanted, ui)? {
            Source::Local(folder) => Ok(folder),
            _ => Ok(given.to_owned()),
        },
        _ => Ok(given.to_owned()),
    }
}

/// Lets every stage start from folders. The config's `values`, which config.toml is written from, keep the ids.
///
/// # Errors
/// As [`locate`].
pub fn localize(run: &mut RunConfig, ui: &mut Ui) -> Result<()> {
    for stage in &mut run.stages {
        for (source, wanted) in [
            (&mut stage.model_name_or_path, Wanted::Model),
            (&mut stage.vision_tower, Wanted::Tower),
            (&mut stage.pretrain_mm_mlp_adapter, Wanted::Projector),
            (&mut stage.adapter_name_or_path, Wanted::Adapter),
        ] {
            if let Some(given) = source.take() {
                *source = Some(local(given, wanted, ui)?);
            }
        }
    }
    Ok(())
}

/// What a stage starts from, as the config has it: of what was fetched, the id.
pub fn written_model(stage: &StageConfig) -> Option<&str> {
    stage.values.iter().find(|setting| setting.key == "model_name_or_path")?.value.as_str()
}

/// The id that a config gave for a model, where it was fetched.
pub fn id_of<'a>(config: &'a RunConfig, model: &Source) -> Option<&'a str> {
    let stage = config.stages.iter().find(|stage| stage.model_name_or_path.as_ref() == Some(model))?;
    written_model(stage).filter(|text| HubId::parse(text).is_some())
}

/// Reads the settings from variables that are set and not empty.
fn settings(get: impl Fn(&str) -> Option<OsString>, home: Option<PathBuf>) -> Result<Settings> {
    let first = |names: [&str; 2]| names.into_iter().find_map(&get);
    let path = |value: OsString| expanded(value, &get, home.as_deref());
    let hugging_face = match (get("HF_HOME"), get("XDG_CACHE_HOME")) {
        (Some(own), _) => path(own),
        (None, Some(caches)) => path(caches).join("huggingface"),
        (None, None) => home.clone().unwrap_or_default().join(".cache").join("huggingface"),
    };
    let text = |value: OsString| value.to_string_lossy().into_owned();
    let is_true = |value: OsString| ["1", "ON", "YES", "TRUE"].contains(&text(value).to_uppercase().as_str());
    let (token, token_places) = token(
        TOKEN.into_iter().find_map(|name| Some((name, text(get(name)?)))),
        get("HF_TOKEN_PATH").map_or_else(|| hugging_face.join("token"), path),
    )?;
    Ok(Settings {
        cache: first(CACHE).map_or_else(|| hugging_face.join("hub"), path),
        endpoint: get("HF_ENDPOINT").map_or_else(|| ENDPOINT.to_owned(), text).trim_end_matches('/').to_owned(),
        token,
        token_places,
        offline: first(OFFLINE).is_some_and(is_true),
    })
}

/// The token of the environment, else of the file that logging in writes; and where it was looked for.
fn token(variable: Option<(&str, String)>, file: PathBuf) -> Result<(Option<Token>, Vec<String>)> {
    let wrong = |place: &str| Error::usage(format!("{place} holds no token: it must be one word of plain characters"));
    if let Some((name, value)) = variable {
        let token = Token::new(&value).ok_or_else(|| wrong(name))?;
        return Ok((Some(token), vec![format!("{name} (set)")]));
    }
    let unset = format!("{} (not set)", TOKEN[0]);
    let shown = file.display();
    match std::fs::read_to_string(&file) {
        Ok(text) if text.trim().is_empty() => Ok((None, vec![unset, format!("{shown} (empty)")])),
        Ok(text) => {
            let token = Token::new(&text).ok_or_else(|| wrong(&shown.to_string()))?;
            Ok((Some(token), vec![unset, format!("{shown} (found)")]))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok((None, vec![unset, format!("{shown} (no such file)")]))
        }
        Err(error) => Ok((None, vec![unset, format!("{shown} ({error})")])),
    }
}

/// A path with `~` and `$NAME` written out, as the Python tools do where no shell has.
fn expanded(value: OsString, get: impl Fn(&str) -> Option<OsString>, home: Option<&Path>) -> PathBuf {
    let Some(text) = value.to_str() else { return value.into() };
    let variable = Regex::new(r"\$(?:(\w+)|\{(\w+)\})");
    let text = variable.map_or(text.into(), |variable| {
        variable.replace_all(text, |found: &Captures<'_>| {
            let name = found.get(1).or(found.get(2)).map_or("", |name| name.as_str());
            get(name).map_or_else(|| found[0].to_owned(), |value| value.to_string_lossy().into_owned())
        })
    });
    match (text.strip_prefix('~'), home) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with(['/', '\\']) => {
            home.join(rest.trim_start_matches(['/', '\\']))
        }
        _ => text.as_ref().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Settings> {
        let get = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into());
        settings(get, Some("/home/x".into()))
    }

    #[test]
    fn places_are_those_of_the_python_tools() {
        let cache = |variables: &[(&str, &str)]| of(variables).unwrap().cache;
        assert_eq!(cache(&[]), Path::new("/home/x/.cache/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/c")]), Path::new("/c/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/c"), ("HF_HOME", "~/hf")]), Path::new("/home/x/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")]), Path::new("/old"));
        assert_eq!(
            cache(&[("HF_HUB_CACHE", "$D/${E}x$F"), ("HUGGINGFACE_HUB_CACHE", "/old"), ("D", "/d"), ("E", "e")]),
            Path::new("/d/ex$F")
        );
        assert_eq!(of(&[]).unwrap().endpoint, "https://huggingface.co");
        assert_eq!(of(&[("HF_ENDPOINT", "http://h:1/")]).unwrap().endpoint, "http://h:1");
        for (value, offline) in [("1", true), ("yes", true), ("True", true), ("0", false), ("false", false)] {
            assert_eq!(of(&[("HF_HUB_OFFLINE", value)]).unwrap().offline, offline, "{value}");
        }
        assert!(of(&[("TRANSFORMERS_OFFLINE", "1")]).unwrap().offline);
    }

    #[test]
    fn the_token_is_of_the_variable_else_of_the_file_and_places_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let file = path.to_str().unwrap();
        let settings = of(&[("HF_TOKEN_PATH", file)]).unwrap();
        assert!(settings.token.is_none() && settings.token_places[1].contains("no such file"));
        std::fs::write(&path, "hf_file\n").unwrap();
        let settings = of(&[("HF_TOKEN_PATH", file)]).unwrap();
        assert!(settings.token.is_some() && settings.token_places[1].contains("found"));
        let settings = of(&[("HF_TOKEN_PATH", file), ("HF_TOKEN", "hf_variable")]).unwrap();
        assert_eq!(settings.token_places, ["HF_TOKEN (set)"]);
        let error = of(&[("HF_TOKEN", "hf secret")]).unwrap_err();
        assert!(!error.message.contains("secret"), "{}", error.message);
    }
}
