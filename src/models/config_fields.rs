//! Typed look-ups in a JSON object whose errors name the file and the key.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Sizes beyond this are a broken file, not a model: it bounds every product of sizes computed from a config.
const MAX_SIZE: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 12;
const MAX_PIXELS: usize = 1 << 14;

/// A JSON object of a file. A key that is null counts as absent.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    /// The file as messages name it.
    pub file: &'a str,
    /// Where in the file the object stands, with a dot at the end: `text_config.`
    pub path: &'a str,
    pub map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub fn path_of(&self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    /// "FILE: KEY PROBLEM".
    pub fn bad(&self, key: &str, problem: &str) -> Error {
        Error::data(format!("{}: {}{key} {problem}", self.file, self.path))
    }

    /// "FILE: KEY: WHAT not built yet"; `what` ends with its verb.
    pub fn not_built(&self, key: &str, what: &str) -> Error {
        Error::data(format!("{}: {}{key}: {what} not built yet", self.file, self.path))
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        let mut found = value.to_string();
        if found.len() > 60 {
            found = format!("{}…", found.chars().take(60).collect::<String>());
        }
        self.bad(key, &format!("is {found}, but {expected} is expected"))
    }

    pub fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(self.wrong(key, other, "an object")),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, other, "a string")),
        }
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    /// A finite number above zero.
    pub fn positive(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        match value.as_f64() {
            Some(number) if number.is_finite() && number > 0.0 => Ok(number),
            _ => Err(self.wrong(key, value, "a number above zero")),
        }
    }

    /// A finite number of at least one, which must be there.
    pub fn number_at_least_one(&self, key: &str) -> Result<f64> {
        let Some(value) = self.get(key) else { return Err(self.bad(key, "is missing")) };
        match value.as_f64() {
            Some(number) if (1.0..=1e6).contains(&number) => Ok(number),
            _ => Err(self.wrong(key, value, "a number of at least 1")),
        }
    }

    fn whole(&self, key: &str, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|number| usize::try_from(number).ok()) {
            Some(number) if (1..=max).contains(&number) => Ok(Some(number)),
            _ => Err(self.wrong(key, value, &format!("a whole number from 1 to {max}"))),
        }
    }

    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.whole(key, MAX_SIZE)
    }

    pub fn size(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.whole(key, MAX_SIZE)?.unwrap_or(default))
    }

    pub fn layers(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.whole(key, MAX_LAYERS)?.unwrap_or(default))
    }

    pub fn pixels(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.whole(key, MAX_PIXELS)?.unwrap_or(default))
    }

    /// `whole / part`, which must come out even; both as (key, value).
    pub fn divided(&self, whole: (&str, usize), part: (&str, usize)) -> Result<usize> {
        if whole.1.is_multiple_of(part.1) {
            return Ok(whole.1 / part.1);
        }
        let problem = format!("is {}, which {}{} = {} does not divide", whole.1, self.path, part.0, part.1);
        Err(self.bad(whole.0, &problem))
    }

    /// One id or a list of ids; none where the key is absent and has no default. -1 means none, as some old files say.
    pub fn token_ids(&self, key: &str, default: Option<u32>) -> Result<Vec<u32>> {
        let id =
            |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| id <= i32::MAX as u32);
        let expected = "a token id or a list of them";
        match self.get(key) {
            None if self.map.contains_key(key) => Ok(Vec::new()),
            None => Ok(default.into_iter().collect()),
            Some(Value::Number(number)) if number.as_i64() == Some(-1) => Ok(Vec::new()),
            Some(Value::Array(values)) => {
                values.iter().map(|value| id(value).ok_or_else(|| self.wrong(key, value, expected))).collect()
            }
            Some(value) => id(value).map(|id| vec![id]).ok_or_else(|| self.wrong(key, value, expected)),
        }
    }

    /// A hidden state's number. A list of one is that one; features of several layers are refused.
    pub fn feature_layer(&self, key: &str, default: i64) -> Result<i64> {
        let value = match self.get(key) {
            None => return Ok(default),
            Some(Value::Array(values)) if values.len() == 1 => &values[0],
            Some(Value::Array(_)) => return Err(self.not_built(key, "features of several layers together are")),
            Some(value) => value,
        };
        value.as_i64().ok_or_else(|| self.wrong(key, value, "a whole number"))
    }

    /// Refuses every value but the `built` ones.
    pub fn only(&self, key: &str, built: &[&str], default: &str) -> Result<()> {
        let value = self.text(key)?.unwrap_or(default);
        if built.contains(&value) {
            return Ok(());
        }
        Err(self.not_built(key, &format!("`{value}` is")).hint(format!("`{}` is", built.join("` and `"))))
    }
}
