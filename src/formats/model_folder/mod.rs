//! A model as it comes: a Hugging Face folder, one of the original LLaVA authors, a GGUF file, or parts of several,
//! with its weights checked against its config and the files beside them at hand.

mod files;
mod fit;
mod growth;
pub(super) mod joined;
mod open;
mod original;
mod position_embeddings;
mod tower;

use std::{collections::BTreeMap, path::Path};

use serde_json::{Map, Value};

pub use files::FileBytes;
use files::Files;
pub use tower::Tower;

use super::{host_tensor::HostTensor, safetensors::Dtype, stored::StoredTensor, weights::Weights};
use crate::{
    error::{Error, Result, nearest},
    models::{config::ModelConfig, names},
};

/// A model whose tensors fit its config. Weights stay on disk (or in the program) until asked for.
pub struct ModelFolder {
    name: String,
    files: Files,
    config: ModelConfig,
    parts: Vec<Weights>,
    /// Canonical name to where it is.
    tensors: BTreeMap<String, At>,
    /// Rows that come after a stored tensor's own: embeddings of tokens that the model did not have.
    grown: BTreeMap<String, HostTensor>,
    /// Tensors that take the place of stored ones.
    replaced: BTreeMap<String, HostTensor>,
    has_projector: bool,
    /// In the layout of the original LLaVA authors.
    original: bool,
}

/// Where a tensor is: the number of its part, and its name there.
#[derive(Clone)]
struct At {
    part: usize,
    name: String,
}

impl ModelFolder {
    /// The path or name given when it was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder, where it is one on disk.
    pub fn path(&self) -> Option<&Path> {
        self.files.folder.as_deref()
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The dtype that most weights of the language model are kept in.
    pub fn dtype(&self) -> Result<Dtype> {
        self.parts.first().map_or(Ok(Dtype::F32), Weights::dtype)
    }

    /// Whether it is in the layout of the original LLaVA authors.
    pub fn is_original(&self) -> bool {
        self.original
    }

    /// Whether it takes pictures of another size than its tower's weights were made for.
    pub fn is_resized(&self) -> bool {
        self.replaced.contains_key(names::POSITION_EMBEDDING)
    }

    pub fn has_projector(&self) -> bool {
        self.has_projector
    }

    /// Whether there is a tensor of this canonical name: an unused vision tensor may be absent.
    pub fn has(&self, canonical: &str) -> bool {
        self.tensors.contains_key(canonical)
    }

    /// A tensor where it is stored, by canonical name.
    pub fn stored(&self, canonical: &str) -> Result<StoredTensor<'_>> {
        if let Some((name, tensor)) = self.replaced.get_key_value(canonical) {
            return Ok(StoredTensor::host(name, &self.name, tensor));
        }
        let Some(at) = self.tensors.get(canonical) else {
            let error = Error::data(format!("{} has no tensor {canonical}", self.name));
            return Err(match nearest(canonical, self.tensors.keys().map(String::as_str)) {
                Some(near) => error.hint(format!("the nearest name is {near}")),
                None => error,
            });
        };
        let stored = self.parts[at.part].require(&at.name)?;
        Ok(match self.grown.get(canonical) {
            Some(rows) => stored.grown(rows),
            None => stored,
        })
    }

    /// A tensor's values, by canonical name; exact whatever the dtype on disk.
    pub fn tensor(&self, canonical: &str) -> Result<HostTensor> {
        self.stored(canonical)?.to_f32()
    }

    /// The bytes of a file beside the weights, where there is one: `tokenizer.json`, `chat_template.jinja`, …
    pub fn file(&self, name: &str) -> Result<Option<FileBytes>> {
        self.files.read(name)
    }

    /// Like [`ModelFolder::file`], for a file that must be there.
    pub fn require_file(&self, name: &str) -> Result<FileBytes> {
        self.file(name)?.ok_or_else(|| Error::data(format!("{} holds no {name}", self.name)))
    }

    /// A JSON object beside the weights, where there is one.
    pub fn json(&self, name: &str) -> Result<Option<Map<String, Value>>> {
        self.files.json(&self.name, name)
    }

    /// preprocessor_config.json, or what transformers 5 writes in its stead: `image_processor` in processor_config.json.
    pub fn preprocessor_config(&self) -> Result<Option<Map<String, Value>>> {
        if let Some(config) = self.json("preprocessor_config.json")? {
            return Ok(Some(config));
        }
        Ok(match self.json("processor_config.json")?.and_then(|mut config| config.remove("image_processor")) {
            Some(Value::Object(config)) => Some(config),
            _ => None,
        })
    }

    /// The tokens that end an answer: those of generation_config.json where it has any, else the config's.
    pub fn eos_token_ids(&self) -> Result<Vec<u32>> {
        let ids = match self.json("generation_config.json")?.and_then(|mut config| config.remove("eos_token_id")) {
            Some(Value::Array(ids)) => ids,
            Some(id) => vec![id],
            None => Vec::new(),
        };
        let ids: Vec<u32> = ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect();
        Ok(if ids.is_empty() { self.config.text().eos_token_ids.clone() } else { ids })
    }

    /// Refuses a LLaVA without projector weights.
    pub fn with_projector(self) -> Result<Self> {
        if self.has_projector || self.config.llava().is_none() {
            return Ok(self);
        }
        Err(Error::data(format!("{} is a LLaVA without projector weights (multi_modal_projector.*)", self.name))
            .hint("train its projector first, or name a model that has one"))
    }

    /// Adds the tensors of a part under their canonical names; `canonical` gives none for what is passed over.
    fn add_part(&mut self, weights: Weights, canonical: impl Fn(&str) -> Option<String>) -> Result<()> {
        let part = self.parts.len();
        for stored in weights.names()? {
            let Some(name) = canonical(&stored) else { continue };
            if let Some(other) = self.tensors.insert(name.clone(), At { part, name: stored.clone() }) {
                return Err(Error::data(format!("{}: {} and {stored} are both {name}", self.name, other.name)));
            }
        }
        self.parts.push(weights);
        Ok(())
    }
}

/// The canonical name of a model's tensor; none for buffers that are computed here.
fn canonical_of_model(stored: &str) -> Option<String> {
    (!names::is_ignorable(stored)).then(|| names::canonical(stored))
}
