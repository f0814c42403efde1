//! One value of one key: is it of the right kind and range, and what does it say in full (paths absolute)?

use super::{
    keys::{Key, Kind, Range},
    types::{EMBEDDED, Source, TargetModules, join},
};
use crate::error::nearest;
use std::path::Path;
use toml::{Table, Value};

/// The value in its resolved form: paths below `folder`, whole numbers as floats where floats are meant, data and
/// devices as lists.
///
/// # Errors
/// What is allowed instead, to follow "it must be".
pub fn resolve(key: &Key, value: Value, folder: &Path) -> Result<Value, String> {
    match (key.kind, value) {
        (Kind::Text, Value::String(text)) if !text.is_empty() => Ok(Value::String(text)),
        (Kind::Text, _) => Err("a text".into()),
        (Kind::Source, Value::String(text)) if !text.is_empty() => {
            Ok(Value::String(Source::parse(&text, folder).to_string()))
        }
        (Kind::Source, _) => Err("a path, a Hub id or an `embedded:` name".into()),
        (Kind::Path, Value::String(text)) if !text.is_empty() => Ok(absolute(folder, &text)),
        (Kind::Path, _) => Err("a path".into()),
        (Kind::Data, value) => data(value, folder),
        (Kind::Choice(names), value) => match value.as_str() {
            Some(name) if names.contains(&name) => Ok(value),
            _ => Err(one_of(names, value.as_str())),
        },
        (Kind::Choices(names), value) => choices(names, value),
        (Kind::Flag, Value::Boolean(flag)) => Ok(Value::Boolean(flag)),
        (Kind::Flag, _) => Err("true or false".into()),
        (Kind::Integer { least, most }, value) => match value.as_integer() {
            Some(number) if (least..=most).contains(&number) => Ok(value),
            _ if most == i64::MAX => Err(format!("a whole number of at least {least}")),
            _ => Err(format!("a whole number from {least} to {most}")),
        },
        (Kind::Number(range), value) => match number(&value) {
            Some(number) if range.holds(number) => Ok(Value::Float(number)),
            _ => Err(range.describe().into()),
        },
        (Kind::Modules, value) => modules(value),
        (Kind::Devices, value) => devices(value),
    }
}

fn number(value: &Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64))
}

fn absolute(folder: &Path, path: &str) -> Value {
    Value::String(join(folder, path).to_string_lossy().into_owned())
}

fn one_of(names: &[&str], given: Option<&str>) -> String {
    let list = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    match given.and_then(|given| nearest(given, names.iter().copied())) {
        Some(near) if names.len() > 1 => format!("one of {list}; the nearest is `{near}`"),
        _ => format!("one of {list}"),
    }
}

/// A name, or a list of names; the resolved form is a list.
fn choices(names: &[&str], value: Value) -> Result<Value, String> {
    let list = match value {
        Value::Array(list) => list,
        single => vec![single],
    };
    match list.iter().find(|item| !item.as_str().is_some_and(|name| names.contains(&name))) {
        Some(wrong) => Err(format!("a list of names, each {}", one_of(names, wrong.as_str()))),
        None => Ok(Value::Array(list)),
    }
}

fn modules(value: Value) -> Result<Value, String> {
    const ALLOWED: &str = "`all-linear`, a list of names or a regular expression";
    match &value {
        Value::String(text) if !text.is_empty() => match TargetModules::parse(text) {
            Ok(_) => Ok(value),
            Err(_) => Err(format!("{ALLOWED}, and this is none")),
        },
        Value::Array(names)
            if !names.is_empty() && names.iter().all(|name| name.as_str().is_some_and(|n| !n.is_empty())) =>
        {
            Ok(value)
        }
        _ => Err(ALLOWED.into()),
    }
}

fn devices(value: Value) -> Result<Value, String> {
    let list = match value {
        Value::Array(list) => list,
        single => vec![single],
    };
    let valid = |item: &Value| match item {
        Value::Integer(index) => *index >= 0,
        Value::String(name) => !name.is_empty(),
        _ => false,
    };
    if list.is_empty() || !list.iter().all(valid) {
        return Err("an index or a name as `wgpu-llava devices` lists them, or a list of them".into());
    }
    Ok(Value::Array(list))
}

const DATA_KEYS: &[&str] = &["path", "image_folder", "weight", "limit"];

/// The resolved form is a list of tables, each with its `path`.
fn data(value: Value, folder: &Path) -> Result<Value, String> {
    const ALLOWED: &str = "a path, an `embedded:` name, or a list of {path, image_folder, weight, limit}";
    let list = match value {
        Value::Array(list) => list,
        single => vec![single],
    };
    if list.is_empty() {
        return Err(format!("{ALLOWED}, and not empty"));
    }
    let mut entries = Vec::with_capacity(list.len());
    for item in list {
        let given = match item {
            Value::Table(table) => table,
            Value::String(path) => Table::from_iter([("path".to_string(), Value::String(path))]),
            _ => return Err(ALLOWED.into()),
        };
        if let Some(unknown) = given.keys().find(|name| !DATA_KEYS.contains(&name.as_str())) {
            let near = nearest(unknown, DATA_KEYS.iter().copied()).unwrap_or_default();
            return Err(format!("{ALLOWED}; `{unknown}` is none of these keys, the nearest is `{near}`"));
        }
        let mut entry = Table::new();
        let Some(path) = given.get("path").and_then(Value::as_str).filter(|path| !path.is_empty()) else {
            return Err("a list whose every entry has a `path`".into());
        };
        let embedded = path.starts_with(EMBEDDED);
        entry.insert("path".into(), if embedded { Value::String(path.into()) } else { absolute(folder, path) });
        if let Some(value) = given.get("image_folder") {
            let Some(images) = value.as_str().filter(|images| !images.is_empty()) else {
                return Err("a list in which `image_folder` is a path".into());
            };
            entry.insert("image_folder".into(), absolute(folder, images));
        }
        if let Some(value) = given.get("weight") {
            match number(value) {
                Some(weight) if Range::Positive.holds(weight) => entry.insert("weight".into(), Value::Float(weight)),
                _ => return Err("a list in which `weight` is a number above 0".into()),
            };
        }
        if let Some(value) = given.get("limit") {
            match value.as_integer() {
                Some(1..) => entry.insert("limit".into(), value.clone()),
                _ => return Err("a list in which `limit` is a whole number of at least 1".into()),
            };
        }
        entries.push(Value::Table(entry));
    }
    Ok(Value::Array(entries))
}

/// The value that `--set KEY=RAW` means: TOML where it is TOML and the kind wants more than a text, else the text.
pub fn from_argument(key: &Key, raw: &str) -> Value {
    let parsed = format!("v = {raw}").parse::<Table>().ok().filter(|table| table.len() == 1);
    let parsed = parsed.and_then(|mut table| table.remove("v"));
    let textual = matches!(key.kind, Kind::Text | Kind::Source | Kind::Path | Kind::Choice(_));
    match parsed {
        Some(value) if !textual || value.is_str() => value,
        _ => match (key.kind, raw.parse::<f64>()) {
            // `.5` and `1.` are not TOML.
            (Kind::Number(_), Ok(number)) => Value::Float(number),
            _ => Value::String(raw.to_string()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::{super::keys::find, *};

    fn set(name: &str, raw: &str) -> Result<Value, String> {
        let key = find(name).unwrap();
        resolve(key, from_argument(key, raw), Path::new("/base"))
    }

    #[test]
    fn arguments_need_no_quotes() {
        assert_eq!(set("version", "v1"), Ok(Value::String("v1".into())));
        assert_eq!(set("version", "\"v1\""), Ok(Value::String("v1".into())));
        assert_eq!(set("data_path", "a.json"), set("data_path", "[{path = \"a.json\"}]"));
        assert_eq!(set("image_folder", "2024"), Ok(Value::String("/base/2024".into())));
        assert_eq!(set("r", "8"), Ok(Value::Integer(8)));
        assert_eq!(set("learning_rate", ".5"), Ok(Value::Float(0.5)));
        assert_eq!(set("learning_rate", "2e-5"), Ok(Value::Float(2e-5)));
        assert_eq!(set("lora_alpha", "16"), Ok(Value::Float(16.0)));
        assert_eq!(set("shuffle", "false"), Ok(Value::Boolean(false)));
        assert_eq!(set("target_modules", "all-linear"), Ok(Value::String("all-linear".into())));
        assert!(matches!(set("target_modules", "[\"q_proj\"]"), Ok(Value::Array(_))));
        assert_eq!(set("devices", "1"), Ok(Value::Array(vec![Value::Integer(1)])));
        assert_eq!(set("eval_after", "easy-vqa"), Ok(Value::Array(vec![Value::String("easy-vqa".into())])));
    }

    #[test]
    fn wrong_values_say_what_is_allowed() {
        for (name, raw, allowed) in [
            ("r", "0", "from 1 to 65536"),
            ("r", "8.0", "whole number"),
            ("max_steps", "-1", "at least 1"),
            ("learning_rate", "fast", "at least 0"),
            ("learning_rate", "nan", "at least 0"),
            ("learning_rate", "-1", "at least 0"),
            ("adam_beta1", "1", "below 1"),
            ("warmup_ratio", "1.5", "0 to 1"),
            ("shuffle", "yes", "true or false"),
            ("lr_scheduler_type", "cosin", "nearest is `cosine`"),
            ("target_modules", "(", "regular expression"),
            ("target_modules", "[]", "list of names"),
            ("data_path", "[]", "not empty"),
            ("data_path", "[{path=\"a\", wieght=1}]", "nearest is `weight`"),
            ("data_path", "[{limit=1}]", "`path`"),
            ("data_path", "[{path=\"a\", weight=0}]", "above 0"),
            ("data_path", "[{path=\"a\", limit=0}]", "at least 1"),
            ("devices", "[]", "index"),
            ("eval_after", "vqa", "`easy-vqa`"),
            ("output_dir", "", "path"),
        ] {
            let message = set(name, raw).unwrap_err();
            assert!(message.contains(allowed), "{name}: {message}");
        }
    }
}
