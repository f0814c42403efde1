//! The keys `tokenizer.ggml.*` of a GGUF file as a vocabulary.

use super::{Array, GgufFile, Metadata, Value};
use crate::{
    data::gguf_tokenizer::{GgufVocabulary, LEGACY_KEY},
    error::Result,
};

const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// The vocabulary of a file; none where it has no tokenizer.
///
/// # Errors
/// `Data`: a key of the wrong type, an id that is no token's.
pub fn read(file: &GgufFile) -> Result<Option<GgufVocabulary>> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let Some(model) = file.text(&key("model"))? else { return Ok(None) };
    let strings = |name: &str| Ok(file.strings(&key(name))?.map(<[String]>::to_vec).unwrap_or_default());
    // -1, as some converters write, is none.
    let id = |name: &str| -> Result<Option<u32>> {
        match file.value(&key(&format!("{name}_token_id"))) {
            Some(Value::I32(-1) | Value::I64(-1)) => Ok(None),
            _ => Ok(file.size(&key(&format!("{name}_token_id")))?.and_then(|id| u32::try_from(id).ok())),
        }
    };
    let token_types = file.integers(&key("token_type"))?.unwrap_or_default();
    Ok(Some(GgufVocabulary {
        name: file.name().to_owned(),
        model: model.to_owned(),
        pre: file.text(&key("pre"))?.map(str::to_owned),
        tokens: strings("tokens")?,
        scores: file.floats(&key("scores"))?.map(<[f32]>::to_vec).unwrap_or_default(),
        token_types: token_types.into_iter().map(|kind| i32::try_from(kind).unwrap_or(0)).collect(),
        merges: strings("merges")?,
        bos_token_id: id("bos")?,
        eos_token_id: id("eos")?,
        unknown_token_id: id("unknown")?,
        padding_token_id: id("padding")?,
        add_bos_token: file.flag(&key("add_bos_token"))?,
        add_eos_token: file.flag(&key("add_eos_token"))?,
        add_space_prefix: file.flag(&key("add_space_prefix"))?,
        chat_template: file.text(CHAT_TEMPLATE)?.map(str::to_owned),
        legacy: file.flag(LEGACY_KEY)?,
    }))
}

/// The keys of a vocabulary, in the order of llama.cpp's converter.
pub fn metadata(vocabulary: &GgufVocabulary) -> Metadata {
    let mut metadata = Metadata::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            metadata.push((format!("tokenizer.ggml.{name}"), value));
        }
    };
    let listed = |values: &[String]| Value::Array(Array::String(values.to_vec()));
    let unless_empty = |is_empty: bool, value: Value| (!is_empty).then_some(value);
    put("add_space_prefix", vocabulary.add_space_prefix.map(Value::Bool));
    put("add_bos_token", vocabulary.add_bos_token.map(Value::Bool));
    put("add_eos_token", vocabulary.add_eos_token.map(Value::Bool));
    put("model", Some(vocabulary.model.as_str().into()));
    put("pre", vocabulary.pre.as_deref().map(Value::from));
    put("tokens", Some(listed(&vocabulary.tokens)));
    put("scores", unless_empty(vocabulary.scores.is_empty(), vocabulary.scores.clone().into()));
    put("token_type", Some(vocabulary.token_types.clone().into()));
    put("merges", unless_empty(vocabulary.merges.is_empty(), listed(&vocabulary.merges)));
    for (name, id) in [
        ("bos", vocabulary.bos_token_id),
        ("eos", vocabulary.eos_token_id),
        ("unknown", vocabulary.unknown_token_id),
        ("padding", vocabulary.padding_token_id),
    ] {
        put(&format!("{name}_token_id"), id.map(Value::U32));
    }
    if let Some(template) = &vocabulary.chat_template {
        metadata.push((CHAT_TEMPLATE.to_owned(), template.as_str().into()));
    }
    if let Some(legacy) = vocabulary.legacy {
        metadata.push((LEGACY_KEY.to_owned(), legacy.into()));
    }
    metadata
}
