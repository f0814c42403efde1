//! Opening a model folder in Hugging Face layout: config, weights checked against it, and the files beside them.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::{
    host_tensor::HostTensor,
    safetensors::{Checkpoint, Dtype, SINGLE_FILE, TensorRef},
};
use crate::{
    error::{Error, Result, nearest},
    models::{
        config::ModelConfig,
        names::{self, NamedShape},
    },
};

/// How many lines of each kind a report of wrong tensors shows.
const SHOWN: usize = 6;

/// Bytes of a file that is part of the program, or read.
pub type FileBytes = Cow<'static, [u8]>;

/// A model whose tensors fit its config. Weights stay on disk (or in the program) until asked for.
pub struct ModelFolder {
    name: String,
    place: Place,
    config: ModelConfig,
    checkpoint: Checkpoint,
    /// Canonical name to the checkpoint's.
    tensors: BTreeMap<String, String>,
    has_projector: bool,
}

enum Place {
    Disk(PathBuf),
    Memory(BTreeMap<String, FileBytes>),
}

impl Place {
    /// The file's bytes; none where it is not there.
    fn read(&self, file: &str) -> Result<Option<FileBytes>> {
        match self {
            Self::Memory(files) => Ok(files.get(file).cloned()),
            Self::Disk(folder) => {
                let path = folder.join(file);
                if !path.exists() {
                    return Ok(None);
                }
                std::fs::read(&path).map(|bytes| Some(bytes.into())).map_err(|source| Error::reading(&path, source))
            }
        }
    }
}

impl ModelFolder {
    /// A folder on disk. Every tensor of the config must be there in its shape, and no other.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::open_base(folder)?.with_projector()
    }

    /// Like [`ModelFolder::open`] for a model to be trained: a LLaVA may lack its projector.
    pub fn open_base(folder: &Path) -> Result<Self> {
        let name = folder.display().to_string();
        if !folder.is_dir() {
            return Err(
                Error::data(format!("there is no model folder {name}")).hint("a folder with config.json is expected")
            );
        }
        if !folder.join("config.json").exists() {
            return Err(Error::data(format!("{name} holds no config.json")).hint("name the folder of a model"));
        }
        let config = ModelConfig::load(folder)?;
        Self::checked(name, Place::Disk(folder.to_owned()), config, Checkpoint::open(folder)?)
    }

    /// A model whose files (`config.json`, `model.safetensors`, …) are in memory, opened as [`ModelFolder::open_base`]
    /// does. `name` is what messages call it.
    pub fn in_memory(name: &str, files: impl IntoIterator<Item = (String, FileBytes)>) -> Result<Self> {
        let mut files: BTreeMap<String, FileBytes> = files.into_iter().collect();
        let missing = |file: &str| Error::data(format!("{name} holds no {file}"));
        let config = files.get("config.json").ok_or_else(|| missing("config.json"))?;
        let config = ModelConfig::parse(&format!("{name}/config.json"), config)?;
        let weights = files.remove(SINGLE_FILE).ok_or_else(|| missing(SINGLE_FILE))?;
        let checkpoint = Checkpoint::from_bytes(&format!("{name}/{SINGLE_FILE}"), weights)?;
        Self::checked(name.to_owned(), Place::Memory(files), config, checkpoint)
    }

    /// Refuses a LLaVA without projector weights.
    pub fn with_projector(self) -> Result<Self> {
        if self.has_projector || self.config.llava().is_none() {
            return Ok(self);
        }
        Err(Error::data(format!("{} is a LLaVA without projector weights (multi_modal_projector.*)", self.name))
            .hint("train its projector first, or name a model that has one"))
    }

    fn checked(name: String, place: Place, mut config: ModelConfig, checkpoint: Checkpoint) -> Result<Self> {
        let mut tensors: BTreeMap<String, String> = BTreeMap::new();
        for stored in checkpoint.names().filter(|stored| !names::is_ignorable(stored)) {
            let canonical = names::canonical(stored);
            if let Some(other) = tensors.insert(canonical.clone(), stored.to_owned()) {
                return Err(Error::data(format!("{name}: {other} and {stored} are both {canonical}")));
            }
        }
        resolve_tied_head(&mut config, &checkpoint, &mut tensors);
        let is_projector = |tensor: &str| tensor.starts_with(names::PROJECTOR);
        let has_projector = config.llava().is_some() && tensors.keys().any(|tensor| is_projector(tensor));

        let mut needed = names::expected_tensors(&config);
        needed.extend(config.llava().map(names::projector_identity_tensors).unwrap_or_default());
        needed.retain(|(tensor, _)| has_projector || !is_projector(tensor));
        compare(&name, &checkpoint, &tensors, &needed, &names::unused_vision_tensors(&config))?;

        let folder = Self { name, place, config, checkpoint, tensors, has_projector };
        folder.check_identity()?;
        Ok(folder)
    }

    /// A `linear` projector on disk is the first layer followed by an identity; nothing else is one.
    fn check_identity(&self) -> Result<()> {
        let Some(llava) = self.config.llava().filter(|_| self.has_projector) else { return Ok(()) };
        for (name, shape) in names::projector_identity_tensors(llava) {
            let tensor = self.tensor(&name)?;
            if !(tensor.is_identity() || shape.len() == 1 && tensor.data.iter().all(|&value| value == 0.0)) {
                let message = format!("{}: projector_hidden_act is `linear`, but {name} is not an identity", self.name);
                return Err(
                    Error::data(message).hint("a linear projector is linear_1 followed by an identity without bias")
                );
            }
        }
        Ok(())
    }

    /// The path or name given when it was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder, where it is one on disk.
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::Disk(folder) => Some(folder),
            Place::Memory(_) => None,
        }
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The dtype most weights are kept in.
    pub fn dtype(&self) -> Dtype {
        self.checkpoint.dtype()
    }

    pub fn has_projector(&self) -> bool {
        self.has_projector
    }

    /// Whether there is a tensor of this canonical name: an unused vision tensor may be absent.
    pub fn has(&self, canonical: &str) -> bool {
        self.tensors.contains_key(canonical)
    }

    /// A tensor as it lies in its file, by canonical name.
    pub fn raw(&self, canonical: &str) -> Result<TensorRef<'_>> {
        let known = self.tensors.get(canonical).and_then(|stored| self.checkpoint.get(stored));
        known.ok_or_else(|| {
            let error = Error::data(format!("{} has no tensor {canonical}", self.name));
            match nearest(canonical, self.tensors.keys().map(String::as_str)) {
                Some(near) => error.hint(format!("the nearest name is {near}")),
                None => error,
            }
        })
    }

    /// A tensor's values, by canonical name; exact whatever the dtype on disk.
    pub fn tensor(&self, canonical: &str) -> Result<HostTensor> {
        self.raw(canonical)?.to_f32()
    }

    /// The bytes of a file beside the weights, where there is one: `tokenizer.json`, `chat_template.jinja`, …
    pub fn file(&self, name: &str) -> Result<Option<FileBytes>> {
        self.place.read(name)
    }

    /// Like [`ModelFolder::file`], for a file that must be there.
    pub fn require_file(&self, name: &str) -> Result<FileBytes> {
        self.file(name)?.ok_or_else(|| Error::data(format!("{} holds no {name}", self.name)))
    }

    /// A JSON object beside the weights, where there is one.
    pub fn json(&self, name: &str) -> Result<Option<Map<String, Value>>> {
        let Some(bytes) = self.file(name)? else { return Ok(None) };
        let object = serde_json::from_slice(&bytes);
        object.map(Some).map_err(|source| {
            Error::data(format!("{}/{name} does not hold a JSON object", self.name)).caused_by(source)
        })
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
}

/// Tied embeddings need no head on disk. One that is there may be dropped if it is the embeddings once more; one that
/// differs says that the config is wrong, and the weights win, as they do in transformers 5.
fn resolve_tied_head(config: &mut ModelConfig, checkpoint: &Checkpoint, tensors: &mut BTreeMap<String, String>) {
    if !config.text().tie_word_embeddings {
        return;
    }
    let tensor = |name| checkpoint.get(tensors.get(name)?);
    let (Some(head), embeddings) = (tensor(names::LM_HEAD), tensor(names::EMBED_TOKENS)) else { return };
    if embeddings.is_some_and(|embeddings| head.dtype == embeddings.dtype && head.bytes == embeddings.bytes) {
        tensors.remove(names::LM_HEAD);
    } else {
        config.text_mut().tie_word_embeddings = false;
    }
}

/// One error that lists what is missing, what is of another shape and what belongs to nothing.
fn compare(
    name: &str,
    checkpoint: &Checkpoint,
    tensors: &BTreeMap<String, String>,
    needed: &[NamedShape],
    optional: &[NamedShape],
) -> Result<()> {
    let (mut missing, mut misshapen) = (Vec::new(), Vec::new());
    for (number, (tensor, shape)) in needed.iter().chain(optional).enumerate() {
        let stored = tensors.get(tensor).and_then(|stored| checkpoint.get(stored));
        match stored {
            Some(stored) if stored.shape != shape => misshapen.push((tensor, shape, stored)),
            None if number < needed.len() => missing.push((tensor, shape)),
            _ => {}
        }
    }
    let known: BTreeSet<&str> = needed.iter().chain(optional).map(|(tensor, _)| tensor.as_str()).collect();
    let extra: Vec<&str> = tensors.keys().map(String::as_str).filter(|tensor| !known.contains(tensor)).collect();
    if missing.is_empty() && misshapen.is_empty() && extra.is_empty() {
        return Ok(());
    }
    let mut lines = vec![format!("{name}: the weights do not fit config.json")];
    let more = |lines: &mut Vec<String>, count: usize, what: &str| {
        if count > SHOWN {
            lines.push(format!("  … {} more {what}", count - SHOWN));
        }
    };
    for (tensor, shape) in missing.iter().take(SHOWN) {
        let near = nearest(tensor, extra.iter().copied()).map(|near| format!("; the nearest unknown one is {near}"));
        lines.push(format!("  missing: {tensor} {shape:?}{}", near.unwrap_or_default()));
    }
    more(&mut lines, missing.len(), "are missing");
    for (tensor, shape, stored) in misshapen.iter().take(SHOWN) {
        let (file, found) = (stored.file, stored.shape);
        lines.push(format!("  another shape: {tensor} is {found:?} in {file}, config.json asks for {shape:?}"));
    }
    more(&mut lines, misshapen.len(), "are of another shape");
    for tensor in extra.iter().take(SHOWN) {
        let near = nearest(tensor, known.iter().copied()).map(|near| format!("; the nearest known one is {near}"));
        let stored = tensors.get(*tensor).map_or(*tensor, String::as_str);
        lines.push(format!("  unknown: {stored}{}", near.unwrap_or_default()));
    }
    more(&mut lines, extra.len(), "are unknown");
    Err(Error::data(lines.join("\n")))
}
