//! The layers a config is made of: recipe < file < `--set`. Each is read and checked on its own, so that a mistake is
//! reported where it was made.

use super::{
    keys::{self, KEYS, Key, Scope},
    value,
};
use crate::error::{Error, Result, nearest};
use std::{
    fmt,
    path::{Path, PathBuf},
};
use toml::{Table, Value, de::DeTable};

/// Where a value was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Default,
    Recipe(String),
    File(PathBuf),
    /// `--set`, `--output-dir`.
    CommandLine,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Recipe(name) => write!(f, "recipe {name}"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::CommandLine => f.write_str("command line"),
        }
    }
}

pub(super) type Entries = Vec<(&'static Key, Value)>;

/// What one layer says.
#[derive(Debug)]
pub(super) struct Layer {
    pub origin: Origin,
    pub top: Entries,
    /// By name, in order. The command line's name no new stages.
    pub stages: Vec<(String, Entries)>,
}

impl Layer {
    fn stage(&self, stage: &str) -> Option<&Entries> {
        self.stages.iter().find(|(name, _)| name == stage).map(|(_, entries)| entries)
    }

    /// The value of `key` for the stage, the stage's own before the one at the top. What a stage starts from is taken
    /// from the top by the first stage alone.
    pub fn get(&self, key: &Key, stage: &str, first: bool) -> Option<&Value> {
        let in_stage = self.stage(stage).and_then(|entries| lookup(entries, key));
        let at_top = if key.scope == Scope::Start && !first { None } else { lookup(&self.top, key) };
        in_stage.or(at_top)
    }
}

fn lookup<'a>(entries: &'a Entries, key: &Key) -> Option<&'a Value> {
    // The last one: a `--set` given twice is meant as the second.
    entries.iter().rev().find(|(known, _)| known.name == key.name).map(|(_, value)| value)
}

/// The key of that name.
///
/// # Errors
/// None is: the nearest one is named. `place` says where it stood.
fn known_key(name: &str, place: &str) -> Result<&'static Key> {
    keys::find(name).ok_or_else(|| {
        let near = nearest(name, KEYS.iter().map(|key| key.name)).unwrap_or_default();
        Error::usage(format!("{place}: unknown key `{name}`; did you mean `{near}`?"))
            .hint(format!("the nearest known key is `{near}`; `wgpu-llava train --dry-run` shows all that are set"))
    })
}

fn checked(key: &'static Key, value: Value, folder: &Path, place: &str) -> Result<(&'static Key, Value)> {
    let text = value.to_string();
    let value = value::resolve(key, value, folder).map_err(|allowed| {
        Error::usage(format!("{place}: {} = {text} is not allowed; it must be {allowed}", key.name))
    })?;
    match keys::not_built(key, &value) {
        None => Ok((key, value)),
        Some(instead) => Err(Error::usage(format!("{place}: {} = {text} is known, but not built yet", key.name))
            .hint(format!("{}: {instead}", key.name))),
    }
}

/// Reads a recipe or a config file. `name` is what errors call it; relative paths are below `folder`.
pub(super) fn read(origin: Origin, name: &str, text: &str, folder: &Path) -> Result<Layer> {
    let not_toml = |error| Error::usage(format!("{name}: not a TOML file")).caused_by(error);
    let table: Table = text.parse().map_err(not_toml)?;
    // The same text once more with positions, for the line numbers of errors.
    let positions = DeTable::parse(text).map_err(not_toml)?;
    let positions = positions.get_ref();
    let line = |table: Option<&DeTable<'_>>, key: &str| -> String {
        let span = table.and_then(|table| table.get_key_value(key)).map(|(key, _)| key.span());
        span.map_or_else(String::new, |span| {
            let before = text.as_bytes().get(..span.start).unwrap_or_default();
            format!(", line {}", before.iter().filter(|byte| **byte == b'\n').count() + 1)
        })
    };
    let mut layer = Layer { origin, top: Vec::new(), stages: Vec::new() };
    for (key, value) in table {
        let place = format!("{name}{}", line(Some(positions), &key));
        if key != "stage" {
            layer.top.push(checked(known_key(&key, &place)?, value, folder, &place)?);
            continue;
        }
        let wrong = || {
            Error::usage(format!("{place}: `stage` must be a list of tables"))
                .hint("write [[stage]], with two brackets, before the keys of each stage")
        };
        let Value::Array(stages) = value else { return Err(wrong()) };
        let stage_positions = positions.get("stage").and_then(|value| value.get_ref().as_array());
        for (index, stage) in stages.into_iter().enumerate() {
            let Value::Table(stage) = stage else { return Err(wrong()) };
            let here = stage_positions.and_then(|list| list.get(index)).and_then(|table| table.get_ref().as_table());
            let stage_name = stage_name(&layer, &stage, index, &format!("{name}{}", line(here, "name")))?;
            let mut entries = Vec::new();
            for (key, value) in stage.into_iter().filter(|(key, _)| key != "name") {
                let place = format!("{name}{}, stage `{stage_name}`", line(here, &key));
                entries.push(checked(stage_key(&key, &place)?, value, folder, &place)?);
            }
            layer.stages.push((stage_name, entries));
        }
    }
    Ok(layer)
}

fn stage_key(name: &str, place: &str) -> Result<&'static Key> {
    let key = known_key(name, place)?;
    if key.scope == Scope::Run {
        return Err(Error::usage(format!("{place}: `{name}` is of the whole run, not of a stage"))
            .hint(format!("move `{name}` to the top of the file, before the first [[stage]]")));
    }
    Ok(key)
}

/// The name of a `[[stage]]`: that of a folder, and unlike those that a run folder holds.
fn stage_name(layer: &Layer, stage: &Table, index: usize, place: &str) -> Result<String> {
    let Some(name) = stage.get("name").and_then(Value::as_str) else {
        return Err(Error::usage(format!("{place}: stage {} has no `name`", index + 1))
            .hint("give each [[stage]] a name, such as name = \"pretrain\""));
    };
    let letters = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    if !letters || name.is_empty() || name.starts_with("checkpoint-") {
        return Err(Error::usage(format!("{place}: a stage cannot be named {name:?}"))
            .hint("it becomes a folder: use letters, digits, `-` and `_`, and do not begin with `checkpoint-`"));
    }
    if layer.stage(name).is_some() {
        return Err(Error::usage(format!("{place}: there are two stages named `{name}`")));
    }
    Ok(name.to_string())
}

/// Reads the `--set [STAGE.]KEY=VALUE` arguments. Relative paths are below `folder`.
pub(super) fn read_arguments(arguments: &[String], folder: &Path) -> Result<Layer> {
    let mut layer = Layer { origin: Origin::CommandLine, top: Vec::new(), stages: Vec::new() };
    for argument in arguments {
        let place = format!("--set {argument}");
        let Some((left, raw)) = argument.split_once('=') else {
            return Err(Error::usage(format!("{place}: there is no `=`"))
                .hint("write --set KEY=VALUE, or --set STAGE.KEY=VALUE for one stage"));
        };
        let (left, raw) = (left.trim(), raw.trim());
        match left.split_once('.') {
            None => {
                let key = known_key(left, &place)?;
                layer.top.push(checked(key, value::from_argument(key, raw), folder, &place)?);
            }
            Some((stage, name)) => {
                let key = stage_key(name, &place)?;
                let entry = checked(key, value::from_argument(key, raw), folder, &place)?;
                match layer.stages.iter_mut().find(|(known, _)| known == stage) {
                    Some((_, entries)) => entries.push(entry),
                    None => layer.stages.push((stage.to_string(), vec![entry])),
                }
            }
        }
    }
    Ok(layer)
}
