//! A language model as a GGUF file of architecture `llama` or `qwen2`: keys, names and types of llama.cpp's own converter.

use std::path::Path;

use serde_json::Value as Json;

use super::{
    GgmlType, Metadata, Value, llama,
    llama_config::llama3_factors,
    write::{CHUNK_BYTES, GgufHead, Piece, Sink, write_gguf_pieces},
};
use crate::{
    error::{Error, Result},
    formats::stored::StoredTensor,
    models::{
        config::{Family, LlamaConfig},
        names,
    },
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

    /// As llama.cpp spells it in the names of files.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
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

/// Writes what was planned, whole or not at all, a few megabytes at a time. `fetch` gives each tensor by canonical
/// name, in the order of the plan.
pub fn write_planned<'a>(
    path: &Path,
    metadata: &[(String, Value)],
    plan: &[Planned],
    fetch: &mut dyn FnMut(&str) -> Result<StoredTensor<'a>>,
) -> Result<()> {
    let heads: Vec<GgufHead> = plan.iter().map(|planned| planned.head.clone()).collect();
    let mut sources = plan.iter().map(|planned| &planned.source);
    write_gguf_pieces(path, metadata, &heads, &mut |head, sink| {
        let mut fitting = |name: &str, shape: &[usize]| {
            let tensor = fetch(name)?;
            if tensor.shape == shape {
                return Ok(tensor);
            }
            Err(Error::failed(format!("{}: {name}: {:?} for {shape:?}", path.display(), tensor.shape)))
        };
        match sources.next() {
            Some(Source::Tensor(name)) => copy(&fitting(name, &head.shape)?, 1.0, sink),
            Some(Source::Rotary { name, head_dim }) => rotary(&fitting(name, &head.shape)?, *head_dim, sink),
            Some(Source::Mirrored(name)) => {
                let mut half = head.shape.clone();
                half[0] /= 2;
                let tensor = fitting(name, &half)?;
                copy(&tensor, 1.0, sink)?;
                copy(&tensor, -1.0, sink)
            }
            Some(Source::Difference) => difference(head.shape.first().copied().unwrap_or(0), sink),
            Some(Source::Values(values)) => sink(Piece::Values(values)),
            None => Ok(()),
        }
    })
}

fn copy(tensor: &StoredTensor, sign: f32, sink: Sink) -> Result<()> {
    for rows in tensor.row_chunks(CHUNK_BYTES) {
        let mut values = tensor.rows_f32(rows)?;
        if sign < 0.0 {
            values.iter_mut().for_each(|value| *value = -*value);
        }
        sink(Piece::Values(&values))?;
    }
    Ok(())
}

/// Whole heads at a time; a bias is one row whose values are reordered.
fn rotary(tensor: &StoredTensor, head_dim: usize, sink: Sink) -> Result<()> {
    let is_bias = tensor.shape.len() < 2;
    let columns = if is_bias { 1 } else { tensor.columns() };
    let heads = tensor.len() / (columns * head_dim).max(1);
    let step = if is_bias { heads } else { CHUNK_BYTES / (4 * columns * head_dim).max(1) }.max(1);
    for first in (0..heads).step_by(step) {
        let rows = first * head_dim..(first + step).min(heads) * head_dim;
        let values = tensor.rows_f32(if is_bias { 0..1 } else { rows.clone() })?;
        let row = |row: usize| &values[row * columns..(row + 1) * columns];
        let ordered: Vec<f32> =
            (0..rows.len()).flat_map(|number| row(llama::hf_row(number, head_dim))).copied().collect();
        sink(Piece::Values(&ordered))?;
    }
    Ok(())
}

fn difference(size: usize, sink: Sink) -> Result<()> {
    let step = (CHUNK_BYTES / (8 * size).max(1)).max(1);
    for first in (0..size).step_by(step) {
        let mut values = vec![0.0; size * 2 * step.min(size - first)];
        for (row, values) in (first..).zip(values.chunks_exact_mut(size * 2)) {
            (values[row], values[row + size]) = (1.0, -1.0);
        }
        sink(Piece::Values(&values))?;
    }
    Ok(())
}

/// The architecture that llama.cpp computes such a model as, which is also what its keys begin with.
///
/// Errors: a sliding window, which llama.cpp has for neither `llama` nor `qwen2`.
pub fn architecture(config: &LlamaConfig, name: &str) -> Result<&'static str> {
    if let Some(window) = config.sliding_window.filter(|&window| window < config.max_position_embeddings) {
        let message = format!(
            "{name}: sliding_window is {window} of {} positions, and llama.cpp would attend to all of them",
            config.max_position_embeddings
        );
        return Err(Error::data(message).hint(format!(
            "max_position_embeddings = {window} in config.json gives a file that is right up to there"
        )));
    }
    Ok(match config.family {
        Family::Llama | Family::Mistral => llama::ARCHITECTURE,
        Family::Qwen2 => llama::QWEN2,
    })
}

/// Keys of [`architecture`] for this config, without those of the tokenizer. `name` is shown to people.
///
/// Errors: those of [`architecture`], and scaling of rotary positions that GGUF has no keys for.
pub fn llama_metadata(config: &LlamaConfig, name: &str, file_type: FileType) -> Result<Metadata> {
    let size = |value: usize| Value::U32(u32::try_from(value).unwrap_or(u32::MAX));
    let mut metadata: Metadata = Vec::new();
    let architecture = architecture(config, name)?;
    let mut put = |key: &str, value: Value| {
        let key = match key.starts_with("general.") {
            true => key.to_owned(),
            false => format!("{architecture}.{key}"),
        };
        metadata.push((key, value));
    };
    put("general.architecture", architecture.into());
    put("general.type", "model".into());
    put("general.name", name.into());
    put("block_count", size(config.num_hidden_layers));
    put("context_length", size(config.max_position_embeddings));
    put("embedding_length", size(config.hidden_size));
    put("feed_forward_length", size(config.intermediate_size));
    put("attention.head_count", size(config.num_attention_heads));
    put("attention.head_count_kv", size(config.num_key_value_heads));
    if let Some((kind, rope)) = rope_scaling(config) {
        let number = |key: &str| rope.get(key).and_then(Json::as_f64).map(|value| value as f32);
        let needed = |key: &str| {
            number(key).ok_or_else(|| Error::data(format!("{name}: config.json: rope_scaling.{key} is missing")))
        };
        match kind {
            // llama3: in a tensor. dynamic: beyond the context that the file names, where llama.cpp does not go.
            "llama3" if architecture != llama::ARCHITECTURE => {
                let message = format!("{name}: llama.cpp has no rotary scaling of type `llama3` for `{architecture}`");
                return Err(Error::data(message).hint("write a Hugging Face folder instead"));
            }
            "llama3" | "dynamic" => {}
            "linear" | "yarn" => {
                put("rope.scaling.type", kind.into());
                put("rope.scaling.factor", needed("factor")?.into());
                if kind == "yarn" {
                    let context = needed("original_max_position_embeddings")? as usize;
                    put("rope.scaling.original_context_length", size(context));
                }
                for (hf, key) in [
                    ("attention_factor", "yarn_attn_factor"),
                    ("beta_fast", "yarn_beta_fast"),
                    ("beta_slow", "yarn_beta_slow"),
                ] {
                    if let Some(value) = number(hf).filter(|_| kind == "yarn") {
                        put(&format!("rope.scaling.{key}"), value.into());
                    }
                }
            }
            other => {
                let message = format!("{name}: rotary scaling of type `{other}` has no place in a GGUF file");
                return Err(Error::data(message).hint("write a Hugging Face folder instead"));
            }
        }
    }
    put("rope.freq_base", (config.rope_theta as f32).into());
    put("attention.layer_norm_rms_epsilon", (config.rms_norm_eps as f32).into());
    if config.head_dim * config.num_attention_heads != config.hidden_size {
        put("attention.key_length", size(config.head_dim));
        put("attention.value_length", size(config.head_dim));
    }
    put("general.file_type", file_type.code().into());
    put("vocab_size", size(config.vocab_size));
    put("rope.dimension_count", size(config.head_dim));
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
        let rotated = config.family != Family::Qwen2 && (name.contains(".attn_q.") || name.contains(".attn_k."));
        let source = if rotated { Source::Rotary { name: canonical, head_dim } } else { Source::Tensor(canonical) };
        plan.push(Planned { head: GgufHead { name, ggml_type: file_type.stored(&shape), shape }, source });
    }
    Ok(plan)
}
