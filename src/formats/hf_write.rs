//! Writing a model folder that transformers loads as it is.

use std::path::Path;

use serde_json::Value;

use super::{
    atomic::{NewFolder, write_file},
    host_tensor::HostTensor,
    model_folder::ModelFolder,
    processor_files,
    safetensors_writer::{SHARD_BYTES, TensorData, TensorHead, write_sharded},
};
use crate::{
    error::{Error, Result},
    models::{
        config::ModelConfig,
        names::{self, NamedShape},
    },
};

/// Files taken over from the model that was trained, where it has them.
const CARRIED: [&str; 9] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// Writes `config`'s model into the folder `out`, which appears whole or not at all and replaces an older one.
///
/// `fetch` gives each tensor of [`names::expected_tensors`] by canonical name, one at a time, in the order of the file.
/// Everything else comes from `source`: tokenizer and processor files, and the vision tensors behind the selected layer
/// (zeros, and ones for norm weights, where `source` lacks them: nothing computes with them).
pub fn write_model(
    out: &Path,
    source: &ModelFolder,
    config: &ModelConfig,
    fetch: &mut dyn FnMut(&str) -> Result<HostTensor>,
) -> Result<()> {
    let folder = NewFolder::create(out)?;
    write_weights(folder.path(), source, config, SHARD_BYTES, fetch)?;
    let write_json =
        |name: &str, value: Value| write_file(&folder.path().join(name), format!("{value:#}\n").as_bytes());
    write_json("config.json", config.to_json("float32"))?;
    for name in CARRIED {
        if let Some(bytes) = source.file(name)? {
            write_file(&folder.path().join(name), &bytes)?;
        }
    }
    let generation = processor_files::generation_config(source.json("generation_config.json")?, config.text());
    write_json("generation_config.json", generation)?;
    if let Some(tokenizer) = source.json("tokenizer.json")? {
        let present = source.json("tokenizer_config.json")?;
        let made = processor_files::tokenizer_config(present, &Value::Object(tokenizer), config.text());
        write_json("tokenizer_config.json", made)?;
    }
    if let Some(llava) = config.llava() {
        let preprocessor = processor_files::preprocessor_config(source.preprocessor_config()?, &llava.vision_config);
        write_json("preprocessor_config.json", preprocessor)?;
        let processor = processor_files::processor_config(source.json("processor_config.json")?, llava);
        write_json("processor_config.json", processor)?;
    }
    folder.commit()
}

fn write_weights(
    folder: &Path,
    source: &ModelFolder,
    config: &ModelConfig,
    shard_bytes: u64,
    fetch: &mut dyn FnMut(&str) -> Result<HostTensor>,
) -> Result<()> {
    let identity = config.llava().map(names::projector_identity_tensors).unwrap_or_default();
    let unused = names::unused_vision_tensors(config);
    let all = names::expected_tensors(config).into_iter().chain(identity.clone()).chain(unused.clone());
    let heads = all.map(|(name, shape)| TensorHead::f32(names::on_disk(&name, config), shape)).collect();
    let is_among = |tensors: &[NamedShape], name: &str| tensors.iter().any(|(tensor, _)| tensor == name);
    write_sharded(folder, heads, shard_bytes, &mut |head| {
        let name = names::canonical(&head.name);
        let tensor = if is_among(&identity, &name) {
            identity_layer(&head.shape)
        } else if is_among(&unused, &name) {
            if source.has(&name) { source.tensor(&name)? } else { unused_default(&name, &head.shape) }
        } else {
            fetch(&name)?
        };
        if tensor.shape != head.shape {
            let (found, wanted) = (&tensor.shape, &head.shape);
            return Err(Error::failed(format!("{name} to be written is {found:?}, the config asks for {wanted:?}")));
        }
        Ok(TensorData::F32(tensor.data.into()))
    })
}

/// What stands on disk behind a `linear` projector: weight `[h, h]`, bias `[h]`.
pub(super) fn identity_layer(shape: &[usize]) -> HostTensor {
    match shape {
        &[size, _] => HostTensor::identity(size),
        _ => HostTensor::zeros(shape),
    }
}

fn unused_default(name: &str, shape: &[usize]) -> HostTensor {
    let norm_weight = shape.len() == 1 && name.ends_with(".weight");
    HostTensor::filled(shape, if norm_weight { 1.0 } else { 0.0 })
}
