//! Which kind of model lies at a path, and opening it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{FileBytes, Files, ModelFolder, canonical_of_model, original};
use crate::{
    data::{
        IMAGE_PLACEHOLDER,
        sentencepiece::{SentencePieceModel, TokenizerFiles},
    },
    error::{Error, Result},
    formats::{
        gguf::{self, GgufFile},
        random::RandomWeights,
        safetensors::{Checkpoint, Dtype, SINGLE_FILE},
        weights::Weights,
    },
    models::{config::ModelConfig, names},
};

impl ModelFolder {
    /// A complete model: as [`ModelFolder::open_base`], and a LLaVA has its projector.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_base(path)?.with_projector()
    }

    /// A folder in Hugging Face's layout or that of the original LLaVA authors, or a GGUF file. Every tensor of the
    /// config must be there in its shape, and no other; a LLaVA may lack its projector.
    pub fn open_base(path: &Path) -> Result<Self> {
        Self::open_with_tower(path, None)
    }

    /// As [`ModelFolder::open_base`], with the vision tower: a folder, for a model in the original layout that names one
    /// elsewhere, or the mmproj file of a GGUF file.
    pub fn open_with_tower(path: &Path, tower: Option<&Path>) -> Result<Self> {
        let name = path.display().to_string();
        if path.is_file() {
            return match Weights::open(path)? {
                Weights::Gguf(file) => Self::from_gguf(*file, tower.map(GgufFile::open).transpose()?),
                _ => Err(Error::data(format!("{name} is a file of weights without a config.json"))
                    .hint("name the folder that it is in, or a .gguf file, which says all of a model")),
            };
        }
        if !path.is_dir() {
            return Err(Error::data(format!("there is no model folder {name}"))
                .hint("a folder with config.json is expected, or a .gguf file"));
        }
        let files = Files::on_disk(path);
        // Repositories of GGUF files often have a config.json beside them.
        let Some(config) = files.read("config.json")?.filter(|_| Weights::is_in(path) || !has_gguf(path)) else {
            let (seeing, language): (Vec<PathBuf>, Vec<PathBuf>) = gguf_files(path)?.into_iter().partition(is_mmproj);
            return match (language.as_slice(), seeing.as_slice()) {
                ([one], []) => Self::from_gguf(GgufFile::open(one)?, None),
                ([one], [mmproj]) => Self::from_gguf(GgufFile::open(one)?, Some(GgufFile::open(mmproj)?)),
                ([], []) => Err(Error::data(format!("{name} holds no config.json")).hint("name the folder of a model")),
                ([_], several) => Err(Error::data(format!("{name} holds {} mmproj files", several.len()))
                    .hint("leave one of them beside the language model")),
                (several, _) => {
                    Err(Error::data(format!("{name} holds no config.json, and {} GGUF files", several.len()))
                        .hint("name one of the GGUF files"))
                }
            };
        };
        let file = format!("{name}/config.json");
        if let Some(named) = ModelConfig::original_tower(&config) {
            return original::open(name, files, &file, &config, &named, tower);
        }
        let config = ModelConfig::parse(&file, &config)?;
        if config.llava().is_some() && tower.is_some() {
            return Err(Error::usage(format!("{name} has its vision tower inside")).hint("leave the vision tower out"));
        }
        Self::new(name, files, config, Weights::open(path)?)
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
        Self::new(name.to_owned(), Files::in_memory(files), config, Weights::Safetensors(checkpoint))
    }

    /// A model of a config with random weights, which are made as they are asked for. It has no tokenizer.
    pub fn random(config: &ModelConfig, dtype: Dtype, seed: u64) -> Result<Self> {
        let weights = Weights::Random(RandomWeights::new(config, dtype, seed));
        Self::new("random weights".to_owned(), Files::default(), config.clone(), weights)
    }

    /// A language model, and what sees where it is in a file of its own.
    fn from_gguf(file: GgufFile, mmproj: Option<GgufFile>) -> Result<Self> {
        let name = file.name().to_owned();
        let mut json = gguf::llama_config::config_json(&file)?;
        let vocabulary = gguf::vocabulary::read(&file)?;
        if let Some(mmproj) = &mmproj {
            let tokens = vocabulary.as_ref().map(|vocabulary| vocabulary.tokens.as_slice()).unwrap_or_default();
            let image = tokens.iter().position(|token| token == IMAGE_PLACEHOLDER);
            json = gguf::mmproj_read::config_json(mmproj, json, image)?;
        }
        let config = ModelConfig::parse(&name, json.to_string().as_bytes())?;
        let mut files = Files::default();
        if let Some(vocabulary) = vocabulary {
            files.put_json("tokenizer.json", &vocabulary.tokenizer_json()?);
            let mut tokenizer = vocabulary.tokenizer_config()?;
            tokenizer["model_max_length"] = json!(config.text().max_position_embeddings);
            files.put_json("tokenizer_config.json", &tokenizer);
        }
        let mut folder = Self::empty(name, files, config);
        folder.add_part(Weights::Gguf(Box::new(file)), canonical_of_model)?;
        if let Some(mmproj) = mmproj {
            folder.files.put_json("preprocessor_config.json", &gguf::mmproj_read::preprocessor_json(&mmproj)?);
            folder.replaced.extend(gguf::mmproj_read::linear_projector(&mmproj)?.into_iter().flatten());
            folder.add_part(Weights::Mmproj(Box::new(mmproj)), |name| Some(name.to_owned()))?;
        }
        folder.checked()
    }

    fn new(name: String, files: Files, config: ModelConfig, weights: Weights) -> Result<Self> {
        let mut folder = Self::empty(name, files, config);
        folder.add_part(weights, canonical_of_model)?;
        folder.checked()
    }

    pub(super) fn empty(name: String, files: Files, config: ModelConfig) -> Self {
        Self {
            name,
            files,
            config,
            parts: Vec::new(),
            tensors: BTreeMap::new(),
            grown: BTreeMap::new(),
            replaced: BTreeMap::new(),
            has_projector: false,
            original: false,
        }
    }

    /// The last step of every opener, once all parts are in.
    pub(super) fn checked(mut self) -> Result<Self> {
        self.resolve_tied_head()?;
        let mut tensors = self.tensors.keys();
        self.has_projector =
            self.config.llava().is_some() && tensors.any(|tensor| tensor.starts_with(names::PROJECTOR));
        self.check_fit()?;
        self.check_identity()?;
        self.complete_tokenizer()?;
        Ok(self)
    }

    /// Tied embeddings need no head on disk. One that is there may be dropped if it is the embeddings once more; one
    /// that differs says that the config is wrong, and the weights win, as they do in transformers 5.
    fn resolve_tied_head(&mut self) -> Result<()> {
        let has_both = self.has(names::LM_HEAD) && self.has(names::EMBED_TOKENS);
        if !self.config.text().tie_word_embeddings || !self.has(names::LM_HEAD) {
            return Ok(());
        }
        let same = has_both && {
            let (head, embeddings) = (self.stored(names::LM_HEAD)?, self.stored(names::EMBED_TOKENS)?);
            let mut same = head.dtype() == embeddings.dtype() && head.shape == embeddings.shape;
            for rows in head.row_chunks(1 << 24) {
                same = same && head.bytes(rows.clone())? == embeddings.bytes(rows)?;
            }
            same
        };
        if same {
            self.tensors.remove(names::LM_HEAD);
        } else {
            self.config.text_mut().tie_word_embeddings = false;
        }
        Ok(())
    }

    /// Where there is a sentencepiece model and no tokenizer.json, makes the latter of the former.
    fn complete_tokenizer(&mut self) -> Result<()> {
        if self.file("tokenizer.json")?.is_some() {
            return Ok(());
        }
        let Some(model) = self.file("tokenizer.model")? else { return Ok(()) };
        let model = SentencePieceModel::parse(&format!("{}/tokenizer.model", self.name), &model)?;
        let object = |file: &str| Ok(self.json(file)?.unwrap_or_default());
        let (special, added) = (object("special_tokens_map.json")?, object("added_tokens.json")?);
        let TokenizerFiles { tokenizer, config } =
            TokenizerFiles::new(&model, object("tokenizer_config.json")?, &special, &added)?;
        self.files.put_json("tokenizer.json", &tokenizer);
        self.files.put_json("tokenizer_config.json", &config);
        Ok(())
    }

    /// A JSON file beside the weights, changed in memory.
    pub(super) fn edit_json(&mut self, name: &str, edit: impl FnOnce(&mut Value)) -> Result<()> {
        if let Some(map) = self.json(name)? {
            let mut value = Value::Object(map);
            edit(&mut value);
            self.files.put_json(name, &value);
        }
        Ok(())
    }
}

fn has_gguf(folder: &Path) -> bool {
    gguf_files(folder).is_ok_and(|files| !files.is_empty())
}

/// The GGUF files of a folder, sorted.
fn gguf_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|source| Error::reading(folder, source))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf")))
        .collect();
    found.sort();
    Ok(found)
}

/// Whether a file is, by its name, a tower and a projector.
#[expect(clippy::ptr_arg, reason = "partition hands it so")]
fn is_mmproj(path: &PathBuf) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().to_ascii_lowercase().contains("mmproj"))
}
