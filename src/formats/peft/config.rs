//! adapter_config.json as PEFT writes it, as far as it bears on what an adapter computes.

use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    models::config_fields::Fields,
};

pub const CONFIG_FILE: &str = "adapter_config.json";

/// Fields that are not named here are bookkeeping, and are tolerated.
pub(super) struct AdapterConfig {
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub use_rslora: bool,
    pub modules_to_save: Vec<String>,
    rank_pattern: Vec<(Regex, usize)>,
    alpha_pattern: Vec<(Regex, f64)>,
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
        for (key, what) in [
            ("use_dora", "DoRA is"),
            ("lora_bias", "biases of adapters are"),
            ("fan_in_fan_out", "transposed linears are"),
            ("use_qalora", "QALoRA is"),
        ] {
            if fields.flag(key, false)? {
                return Err(fields.not_built(key, what));
            }
        }
        fields.only("bias", &["none"], "none")?;
        if map.get("layer_replication").is_some_and(|value| !value.is_null()) {
            return Err(fields.not_built("layer_replication", "replicated layers are"));
        }
        if let Some(init @ ("pissa" | "olora" | "corda" | "loftq")) =
            map.get("init_lora_weights").and_then(Value::as_str).map(|init| init.split('_').next().unwrap_or(init))
        {
            return Err(fields.not_built("init_lora_weights", &format!("`{init}`, which changes the base weights, is")));
        }
        let modules_to_save = match map.get("modules_to_save") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(modules)) => modules.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            Some(_) => return Err(fields.bad("modules_to_save", "must be a list of module names")),
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
            modules_to_save,
            rank_pattern: patterns(&fields, "rank_pattern", |fields, key| fields.size(key, 1))?,
            alpha_pattern: patterns(&fields, "alpha_pattern", |fields, key| fields.positive(key, 1.0))?,
        })
    }

    /// The rank of the module at this path in the adapted model.
    pub fn rank_of(&self, path: &str) -> usize {
        first_match(&self.rank_pattern, path).unwrap_or(self.r)
    }

    pub fn alpha_of(&self, path: &str) -> f64 {
        first_match(&self.alpha_pattern, path).unwrap_or(self.lora_alpha)
    }
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], path: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(path)).map(|&(_, value)| value)
}

/// Each key is a regular expression for the end of a module's path, from a dot on; the first that matches counts.
fn patterns<T>(fields: &Fields, key: &str, value: impl Fn(&Fields, &str) -> Result<T>) -> Result<Vec<(Regex, T)>> {
    let Some(map) = fields.object(key)? else { return Ok(Vec::new()) };
    let path = format!("{key}.");
    let inner = Fields { path: &path, map, ..*fields };
    let compile = |pattern: &String| {
        let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"))
            .map_err(|source| inner.bad(pattern, "is not a pattern that can be read").caused_by(source))?;
        Ok((regex, value(&inner, pattern)?))
    };
    map.keys().map(compile).collect()
}
