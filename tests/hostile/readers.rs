//! Each reader driven as far as a file can lead it. Broken bytes may be refused, and nothing else may come of them: no
//! panic, no size believed before it is checked. The hostile tests and the fuzz targets (fuzz/) share this.

#![allow(dead_code, reason = "each fuzz target uses one")]

use std::{path::Path, sync::LazyLock};

use serde_json::{Map, Value, json};
use tempfile::TempDir;
use wgpu_llava::{
    data::{
        Content, ImageProcessor, Template, Tokenizer, Turn,
        chat_template::ChatTemplate,
        image::decode,
        record::parse_records,
        sentencepiece::{SentencePieceModel, TokenizerFiles},
    },
    formats::{
        gguf::{GgufFile, dequant, llama_config, vocabulary},
        model_folder::ModelFolder,
        peft::{Adapter, CONFIG_FILE},
        safetensors::Checkpoint,
        stored::StoredTensor,
        torch_bin::TorchFile,
        weights::Weights,
    },
    models::{
        config::{ClipVisionConfig, ModelConfig},
        names, rotary,
    },
};

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a temporary folder"));

/// The header, every tensor whole and in rows, and a model's bytes as the weights of a folder. Whether it was read.
pub fn safetensors(data: &[u8]) -> bool {
    const CONFIG: &[u8] = include_bytes!("../../assets/tiny/config.json");
    let Ok(checkpoint) = Checkpoint::from_bytes("fuzz", data.to_vec()) else { return false };
    for name in checkpoint.names() {
        let tensor = checkpoint.require(name).expect("a name that was listed");
        let whole = tensor.to_f32();
        let stored = StoredTensor::from(tensor);
        if let Ok(values) = stored.to_f32() {
            assert_eq!(values.len(), stored.len());
            assert_eq!(values.len(), whole.expect("read once already").len());
            for rows in stored.row_chunks(64).take(100) {
                stored.rows_f32(rows).expect("rows of a tensor that was read whole");
            }
        }
    }
    let is_model = checkpoint.names().any(|name| name.contains("embed_tokens"));
    // Weights in four bits are several tensors, which may not fit each other.
    let weights = Weights::Safetensors(checkpoint);
    let names = weights.names().expect("names that were listed");
    let fits = names.iter().all(|name| match weights.require(name) {
        Ok(stored) => {
            if stored.packed().is_some() && stored.len() < 1 << 20 {
                assert_eq!(stored.to_f32().expect("a packed tensor whose sizes fit").len(), stored.len());
            }
            true
        }
        Err(_) => false,
    });
    assert_eq!(weights.dtype().is_ok(), fits);
    if is_model {
        let files = [("config.json", CONFIG.to_vec()), ("model.safetensors", data.to_vec())];
        let _ = ModelFolder::in_memory("fuzz", files.map(|(name, bytes)| (name.to_owned(), bytes.into())));
    }
    true
}

/// The header, every tensor's values, and the model and the tokenizer that the metadata stand for.
pub fn gguf(data: &[u8]) -> bool {
    let Ok(file) = GgufFile::from_bytes("fuzz", data.to_vec()) else { return false };
    for name in file.tensor_names() {
        let tensor = file.require(name).expect("a name that was listed");
        if let Ok(values) = dequant::dequantize(&tensor) {
            assert_eq!(values.len(), tensor.rows() * tensor.columns());
        }
    }
    if let Ok(Some(vocabulary)) = vocabulary::read(&file)
        && let Ok(tokenizer) = vocabulary.tokenizer()
    {
        encode(&tokenizer);
    }
    let config = llama_config::config_json(&file);
    let weights = Weights::Gguf(Box::new(file));
    for name in weights.names().unwrap_or_default() {
        if let Ok(tensor) = weights.require(&name)
            && let Ok(values) = tensor.to_f32()
        {
            assert_eq!(values.len(), tensor.len());
        }
    }
    let Ok(config) = config else { return true };
    let _ = ModelConfig::parse("fuzz", config.to_string().as_bytes());
    let path = FOLDER.path().join(format!("{:?}.gguf", std::thread::current().id()));
    if std::fs::write(&path, data).is_ok()
        && let Ok(model) = ModelFolder::open_base(&path)
        && let Ok(Some(bytes)) = model.file("tokenizer.json")
    {
        let _ = Tokenizer::from_bytes(&bytes, model.file("tokenizer_config.json").ok().flatten().as_deref());
    }
    true
}

/// The archive, the pickle, and every tensor whole and in rows, whatever its strides.
pub fn torch_bin(data: &[u8]) -> bool {
    let Ok(file) = TorchFile::from_bytes("fuzz", data.to_vec()) else { return false };
    for name in file.names() {
        let tensor = file.require(name).expect("a name that was listed");
        let size = tensor.dtype.bitsize() / 8;
        let whole = tensor.row_major();
        assert_eq!(whole.len(), tensor.len() * size);
        let stored = StoredTensor::from(tensor);
        let row = stored.columns() * size;
        for rows in stored.row_chunks(64).take(100) {
            let first = rows.start;
            if let Ok(bytes) = stored.bytes(rows) {
                assert_eq!(*bytes, whole[first * row..][..bytes.len()]);
            }
        }
        let _ = tensor.to_f32();
    }
    Weights::Torch(file).dtype().expect("dtypes of tensors that are there");
    true
}

/// sentencepiece's `tokenizer.model`, and the tokenizer that is made of it.
pub fn sentencepiece(data: &[u8]) -> bool {
    let Ok(model) = SentencePieceModel::parse("fuzz", data) else { return false };
    if let Ok(files) = TokenizerFiles::new(&model, Map::new(), &Map::new(), &Map::new()) {
        tokenizer_json(files.tokenizer.to_string().as_bytes(), files.config.to_string().as_bytes());
    }
    true
}

pub fn tokenizer_json(json: &[u8], config: &[u8]) -> bool {
    let Ok(tokenizer) = Tokenizer::from_bytes(json, Some(config)) else { return false };
    tokenizer.vocabulary_size();
    encode(&tokenizer);
    true
}

fn encode(tokenizer: &Tokenizer) {
    if let Ok(ids) = tokenizer.encode("USER: <image>\nWhat is 12 + 30?  Größe 大 🙂</s>", true) {
        let _ = tokenizer.decode(&ids);
    }
}

/// A chat template's source, rendered for a question and for training.
pub fn chat_template(source: &str) -> bool {
    let tokens = Map::from_iter([("bos_token".to_owned(), json!("<s>")), ("eos_token".to_owned(), json!("</s>"))]);
    let Ok(template) = ChatTemplate::new("fuzz", source, &tokens) else { return false };
    let turns = [Turn::human("What is this?", 1), Turn::assistant("A bus."), Turn::human("Why?", 0)];
    let prompt = template.prompt(&turns, Some("Be brief."));
    let _ = template.training(&turns[..2], None);
    prompt.is_ok()
}

/// A picture of any format, and CLIP's processing of it.
pub fn picture(data: &[u8]) -> bool {
    let Ok(picture) = decode(data, "fuzz") else { return false };
    if u64::from(picture.width()) * u64::from(picture.height()) <= 1 << 20 {
        for pad in [false, true] {
            if let Ok(pixels) = ImageProcessor::clip(28).with_pad(pad).process(&picture) {
                assert_eq!(pixels.data.len(), 3 * 28 * 28);
            }
        }
    }
    true
}

/// The JSON configs of a folder: of models and towers, of the original authors, of adapters and of pictures.
pub fn configs(data: &[u8]) -> bool {
    let tower = ClipVisionConfig::parse("fuzz", data);
    let original = tower.ok().or_else(|| ClipVisionConfig::released("clip-vit-large-patch14"));
    let original = original.and_then(|tower| ModelConfig::parse_original("fuzz", data, tower).ok());
    ModelConfig::original_tower(data);
    let model = ModelConfig::parse("fuzz", data).ok();
    let is_model = model.is_some();
    if let Some(config) = &model {
        let again = ModelConfig::parse("again", config.to_json("float32").to_string().as_bytes());
        again.expect("a config that was written is read");
    }
    for config in [model, original].into_iter().flatten() {
        if config.text().num_hidden_layers <= 64 {
            names::expected_tensors(&config);
            names::unused_vision_tensors(&config);
        }
        rotary::frequencies(config.text(), 10);
        config.text().positions();
        if let Some(llava) = config.llava() {
            llava.vision_layers_used();
            llava.image_seq_length();
        }
    }
    if let Ok(json) = serde_json::from_slice::<Value>(data)
        && let Ok(processor) = ImageProcessor::from_config(&json, "fuzz", 336)
    {
        let again = ImageProcessor::from_config(&processor.to_config(), "again", 336);
        again.expect("a config that was written is read");
    }
    // adapter_config.json is read from a folder alone; this one has no weights beside it.
    if let Ok(config) = ModelConfig::parse("llama", br#"{"model_type": "llama"}"#) {
        let folder = FOLDER.path().join(format!("{:?}", std::thread::current().id()));
        let written = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(folder.join(CONFIG_FILE), data));
        if written.is_ok() {
            Adapter::read(&folder, &config).expect_err("an adapter without weights");
        }
    }
    is_model
}

/// A JSON array or JSON Lines of records, and what the templates make of them.
pub fn records(data: &[u8]) -> bool {
    let folder = Path::new("/pictures");
    let Ok(records) = parse_records(data, "fuzz", folder, None) else { return false };
    let first = parse_records(data, "fuzz", folder, Some(1));
    assert_eq!(first.expect("the first of several that were read").len(), 1);
    for record in &records {
        record.modality_length();
        if let Content::Conversation(turns) = &record.content {
            for template in ["plain", "v0", "v1", "mpt", "llama_2"] {
                let template = Template::named(template).expect("a template of that name");
                template.training(turns, record.system.as_deref());
            }
        }
    }
    true
}
