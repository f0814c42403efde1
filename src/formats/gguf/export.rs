//! A language model as a GGUF file of architecture `llama`: keys, names and types of llama.cpp's own converter.

use std::path::Path;

use serde_json::Value as Json;

use super::{
    GgmlType, Metadata, Value, llama,
    llama_config::llama3_factors,
    write::{GgufHead, write_gguf},
};
use crate::{
    error::{Error, Result},
    formats::{HostTensor, safetensors_writer::TensorData},
    models::{config::LlamaConfig, names},
};

/// How the matrices of a file are stored; vectors are F32 in every file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    F32,
    F16,
    Bf16,
    Q8_0,
}

impl FileType {
    /// `general.file_type`.
    pub fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::Bf16 => 32,
        }
    }

    /// The type of a tensor of this shape: rows that are no whole number of Q8_0 blocks become F16.
    pub fn stored(self, shape: &[usize]) -> GgmlType {
        let wanted = match self {
            Self::F32 => GgmlType::F32,
            Self::F16 => GgmlType::F16,
            Self::Bf16 => GgmlType::BF16,
            Self::Q8_0 => GgmlType::Q8_0,
        };
        match shape {
            [] | [_] => GgmlType::F32,
            [.., columns] if columns.is_multiple_of(wanted.block_values()) => wanted,
            _ => GgmlType::F16,
        }
    }
}

/// One tensor of a file to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    pub head: GgufHead,
    pub source: Source,
}

/// Where a tensor's values come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// The tensor of this canonical name.
    Tensor(String),
    /// Its rows brought into the order in which llama.cpp rotates them, within each head.
    Rotary { name: String, head_dim: usize },
    /// The tensor, then the same negated: `[2n, …]`.
    Mirrored(String),
    /// The identity matrix beside its negative, `[n, 2n]`: takes a mirrored tensor together again.
    Difference,
    /// These values.
    Values(Vec<f32>),
}

/// Writes what was planned, whole or not at all. `fetch` gives each tensor by canonical name, in the order of the plan.
pub fn write_planned(
    path: &Path,
    metadata: &[(String, Value)],
    plan: &[Planned],
    fetch: &mut dyn FnMut(&str) -> Result<HostTensor>,
) -> Result<()> {
    let heads: Vec<GgufHead> = plan.iter().map(|planned| planned.head.clone()).collect();
    let mut sources = plan.iter().map(|planned| &planned.source);
    write_gguf(path, metadata, &heads, &mut |head| {
        let values = match sources.next() {
            Some(Source::Tensor(name)) => fetch(name)?.data,
            Some(Source::Rotary { name, head_dim }) => rotary(fetch(name)?, *head_dim),
            Some(Source::Mirrored(name)) => {
                let mut values = fetch(name)?.data;
                values.extend_from_within(..);
                let half = values.len() / 2;
                values[half..].iter_mut().for_each(|value| *value = -*value);
                values
            }
            Some(Source::Difference) => difference(head.shape.first().copied().unwrap_or(0)),
            Some(Source::Values(values)) => values.clone(),
            None => Vec::new(),
        };
        Ok(TensorData::F32(values.into()))
    })
}

fn rotary(tensor: HostTensor, head_dim: usize) -> Vec<f32> {
    let rows = tensor.shape.first().copied().unwrap_or(1).max(1);
    let columns = tensor.data.len() / rows;
    let row = |row: usize| &tensor.data[row * columns..(row + 1) * columns];
    (0..rows).flat_map(|number| row(llama::hf_row(number, head_dim))).copied().collect()
}

fn difference(size: usize) -> Vec<f32> {
    let mut values = vec![0.0; size * size * 2];
    for (row, values) in values.chunks_exact_mut(size * 2).enumerate() {
        (values[row], values[row + size]) = (1.0, -1.0);
    }
    values
}

/// Keys of architecture `llama` for this config, without those of the tokenizer. `name` is shown to people.
///
/// Errors: scaling of rotary positions that GGUF has no keys for.
pub fn llama_metadata(config: &LlamaConfig, name: &str, file_type: FileType) -> Result<Metadata> {
    let size = |value: usize| Value::U32(u32::try_from(value).unwrap_or(u32::MAX));
    let mut metadata: Metadata = Vec::new();
    let mut put = |key: &str, value: Value| metadata.push((key.to_owned(), value));
    put("general.architecture", llama::ARCHITECTURE.into());
    put("general.type", "model".into());
    put("general.name", name.into());
    put("llama.block_count", size(config.num_hidden_layers));
    put("llama.context_length", size(config.max_position_embeddings));
    put("llama.embedding_length", size(config.hidden_size));
    put("llama.feed_forward_length", size(config.intermediate_size));
    put("llama.attention.head_count", size(config.num_attention_heads));
    put("llama.attention.head_count_kv", size(config.num_key_value_heads));
    if let Some((kind, rope)) = rope_scaling(config) {
        let number = |key: &str| rope.get(key).and_then(Json::as_f64).map(|value| value as f32);
        let needed = |key: &str| {
            number(key).ok_or_else(|| Error::data(format!("{name}: config.json: rope_scaling.{key} is missing")))
        };
        match kind {
            // llama3: in a tensor. dynamic: beyond the context that the file names, where llama.cpp does not go.
            "llama3" | "dynamic" => {}
            "linear" | "yarn" => {
                put("llama.rope.scaling.type", kind.into());
                put("llama.rope.scaling.factor", needed("factor")?.into());
                if kind == "yarn" {
                    let context = needed("original_max_position_embeddings")? as usize;
                    put("llama.rope.scaling.original_context_length", size(context));
                }
                for (hf, key) in [
                    ("attention_factor", "yarn_attn_factor"),
                    ("beta_fast", "yarn_beta_fast"),
                    ("beta_slow", "yarn_beta_slow"),
                ] {
                    if let Some(value) = number(hf).filter(|_| kind == "yarn") {
                        put(&format!("llama.rope.scaling.{key}"), value.into());
                    }
                }
            }
            other => {
                let message = format!("{name}: rotary scaling of type `{other}` has no place in a GGUF file");
                return Err(Error::data(message).hint("write a Hugging Face folder instead"));
            }
        }
    }
    put("llama.rope.freq_base", (config.rope_theta as f32).into());
    put("llama.attention.layer_norm_rms_epsilon", (config.rms_norm_eps as f32).into());
    if config.head_dim * config.num_attention_heads != config.hidden_size {
        put("llama.attention.key_length", size(config.head_dim));
        put("llama.attention.value_length", size(config.head_dim));
    }
    put("general.file_type", file_type.code().into());
    put("llama.vocab_size", size(config.vocab_size));
    put("llama.rope.dimension_count", size(config.head_dim));
    put("general.quantization_version", 2u32.into());
    Ok(metadata)
}

/// Type and parameters of the scaling, where there is one: `rope_parameters` or `rope_scaling` of config.json.
fn rope_scaling(config: &LlamaConfig) -> Option<(&str, &serde_json::Map<String, Json>)> {
    ["rope_parameters", "rope_scaling"].iter().find_map(|key| {
        let map = config.raw.get(*key)?.as_object()?;
        let kind = ["rope_type", "type"].iter().find_map(|key| map.get(*key)?.as_str())?;
        (kind != "default").then_some((kind, map))
    })
}

/// Every tensor of the language model, and the factors of `llama3` scaling where the config asks for it.
pub fn llama_plan(config: &LlamaConfig, file_type: FileType) -> Result<Vec<Planned>> {
    let mut plan = Vec::new();
    let factors = rope_scaling(config).filter(|(kind, _)| *kind == "llama3").map(|(_, rope)| {
        let number = |key: &str, default| rope.get(key).and_then(Json::as_f64).unwrap_or(default);
        let (low, high) = (number("low_freq_factor", 1.0), number("high_freq_factor", 4.0));
        let parameters = [number("factor", 8.0), low, high, number("original_max_position_embeddings", 8192.0)];
        llama3_factors(config.rope_theta, config.head_dim, parameters)
    });
    if let Some(factors) = factors {
        let head = GgufHead { name: llama::ROPE_FREQS.into(), ggml_type: GgmlType::F32, shape: vec![factors.len()] };
        plan.push(Planned { head, source: Source::Values(factors) });
    }
    for (canonical, shape) in names::language_tensors(config) {
        let hf = canonical.strip_prefix("language_model.").unwrap_or(&canonical);
        let Some(name) = llama::gguf_name(hf) else {
            return Err(Error::failed(format!("{canonical} has no name in a GGUF file")));
        };
        let head_dim = config.head_dim;
        let source = if name.contains(".attn_q.") || name.contains(".attn_k.") {
            Source::Rotary { name: canonical, head_dim }
        } else {
            Source::Tensor(canonical)
        };
        plan.push(Planned { head: GgufHead { name, ggml_type: file_type.stored(&shape), shape }, source });
    }
    Ok(plan)
}
