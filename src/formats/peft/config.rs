//! adapter_config.json as PEFT writes it, as far as it bears on what an adapter computes.

use std::path::Path;

use serde_json::{Map, Value};

use super::Pattern;
use crate::{
    error::{Error, Result},
    models::config_fields::Fields,
};

pub const CONFIG_FILE: &str = "adapter_config.json";

/// Fields that make another thing of an adapter than W + scale·B·A and DoRA, and what messages call that.
const VARIANTS: [(&str, &str); 10] = [
    ("use_qalora", "QALoRA is"),
    ("use_bdlora", "block-diagonal LoRA is"),
    ("layer_replication", "replicated layers are"),
    ("target_parameters", "adapters of parameters that no linear holds are"),
    ("trainable_token_indices", "single trained tokens are"),
    ("alora_invocation_tokens", "aLoRA, which starts at an invocation, is"),
    ("arrow_config", "Arrow, which routes between adapters, is"),
    ("kasa_config", "KaSA is"),
    ("monteclora_config", "MonteCLoRA is"),
    ("megatron_config", "an adapter for Megatron is"),
];

/// Fields that are not named here are bookkeeping, and are tolerated.
pub(super) struct AdapterConfig {
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub use_rslora: bool,
    pub use_dora: bool,
    pub modules_to_save: Vec<String>,
    /// The names that target_modules lists; none where it is a pattern.
    pub target_modules: Vec<String>,
    /// Whether some modules that target_modules matches were left out.
    pub excludes: bool,
    /// What is done to one of tied embeddings and head is done to both.
    pub ensure_weight_tying: bool,
    rank_pattern: Vec<(Pattern, usize)>,
    alpha_pattern: Vec<(Pattern, f64)>,
}

impl AdapterConfig {
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        if !path.exists() {
            return Err(Error::data(format!("{} holds no {CONFIG_FILE}", folder.display()))
                .hint("name the folder of a LoRA adapter in PEFT layout"));
        }
        let text = std::fs::read(&path).map_err(|source| Error::reading(&path, source))?;
        Self::parse(&path.display().to_string(), &text)
    }

    pub fn parse(file: &str, text: &[u8]) -> Result<Self> {
        let map: Map<String, Value> = serde_json::from_slice(text)
            .map_err(|source| Error::data(format!("{file} does not hold a JSON object")).caused_by(source))?;
        let fields = Fields { file, path: "", map: &map };
        fields.only("peft_type", &["LORA"], "LORA")?;
        // These change what is computed; leaving them out would be silently wrong.
        for (key, what) in VARIANTS {
            if map.get(key).is_some_and(asks) {
                return Err(fields.not_built(key, what));
            }
        }
        fields.only("bias", &["none", "all", "lora_only"], "none")?;
        let init = map.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default().to_lowercase();
        if let Some(init) = ["pissa", "olora", "corda", "loftq", "lora_ga"].iter().find(|name| init.starts_with(**name))
        {
            let what = format!("`{init}`, which changes the base weights, is");
            return Err(fields.not_built("init_lora_weights", &what).hint(
                "convert it in PEFT: save_pretrained(path, path_initial_model_for_weight_conversion=...) writes plain LoRA",
            ));
        }
        let target_modules = match map.get("target_modules") {
            Some(Value::String(_)) => Vec::new(),
            _ => names(&fields, "target_modules")?,
        };
        let lora_dropout = match map.get("lora_dropout").and_then(Value::as_f64) {
            Some(dropout) if !(0.0..1.0).contains(&dropout) => {
                return Err(fields.bad("lora_dropout", "must be at least 0 and below 1"));
            }
            dropout => dropout.unwrap_or(0.0),
        };
        Ok(Self {
            r: fields.size("r", 8)?,
            lora_alpha: fields.positive("lora_alpha", 8.0)?,
            lora_dropout,
            use_rslora: fields.flag("use_rslora", false)?,
            use_dora: fields.flag("use_dora", false)?,
            modules_to_save: names(&fields, "modules_to_save")?,
            target_modules,
            excludes: map.get("exclude_modules").is_some_and(asks),
            ensure_weight_tying: fields.flag("ensure_weight_tying", false)?,
            rank_pattern: patterns(&fields, "rank_pattern", |fields, key| fields.size(key, 1))?,
            alpha_pattern: patterns(&fields, "alpha_pattern", |fields, key| fields.positive(key, 1.0))?,
        })
    }

    /// The rank of the module at this path in the adapted model.
    ///
    /// # Errors
    /// `Data`: a pattern that takes too long to match.
    pub fn rank_of(&self, path: &str) -> Result<usize> {
        Ok(first_match("rank_pattern", &self.rank_pattern, path)?.unwrap_or(self.r))
    }

    /// As [`AdapterConfig::rank_of`].
    pub fn alpha_of(&self, path: &str) -> Result<f64> {
        Ok(first_match("alpha_pattern", &self.alpha_pattern, path)?.unwrap_or(self.lora_alpha))
    }
}

/// Whether a field's value is more than nothing.
fn asks(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(values) => !values.is_empty(),
        Value::Object(values) => !values.is_empty(),
        Value::String(value) => !value.is_empty(),
        _ => true,
    }
}

/// A list of module names, or one name.
fn names(fields: &Fields, key: &str) -> Result<Vec<String>> {
    let expected = || fields.bad(key, "must be a list of module names");
    match fields.map.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(name)) => Ok(vec![name.clone()]),
        Some(Value::Array(names)) => {
            names.iter().map(|name| name.as_str().map(str::to_owned).ok_or_else(expected)).collect()
        }
        Some(_) => Err(expected()),
    }
}

fn first_match<T: Copy>(key: &str, patterns: &[(Pattern, T)], path: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        let endless = |source| {
            Error::data(format!("{key}: `{}` takes too long to match {path}", pattern.text())).caused_by(source)
        };
        if pattern.matches(path).map_err(endless)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// Each key is a regular expression for the end of a module's path, from a dot on; the first that matches counts.
fn patterns<T>(fields: &Fields, key: &str, value: impl Fn(&Fields, &str) -> Result<T>) -> Result<Vec<(Pattern, T)>> {
    let Some(map) = fields.object(key)? else { return Ok(Vec::new()) };
    let path = format!("{key}.");
    let inner = Fields { path: &path, map, ..*fields };
    let compile = |pattern: &String| {
        let compiled = Pattern::end(pattern)
            .map_err(|source| inner.bad(pattern, "is not a pattern that can be read").caused_by(source))?;
        Ok((compiled, value(&inner, pattern)?))
    };
    map.keys().map(compile).collect()
}
