//! The keys `tokenizer.ggml.*` of a GGUF file as a vocabulary.

use super::{GgufFile, Value};
use crate::{data::gguf_tokenizer::GgufVocabulary, error::Result};

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
        chat_template: file.text("tokenizer.chat_template")?.map(str::to_owned),
    }))
}
