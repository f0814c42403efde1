//! Writing a model as GGUF files: one for the language model, and for a LLaVA one (`mmproj`) for what sees.

use std::path::Path;

use serde_json::Value as Json;

use super::{
    atomic::NewFolder,
    gguf::{
        Metadata, Value,
        export::{FileType, Planned, architecture, llama_metadata, llama_plan, write_planned},
        mmproj::{ASPECT_RATIO_KEY, mmproj_metadata, mmproj_plan},
        vocabulary,
    },
    model_folder::ModelFolder,
    safetensors::Dtype,
};
use crate::{
    data::{
        ImageProcessor, Tokenizer,
        chat_template::ChatTemplate,
        gguf_vocabulary::{Parts, Written},
        sentencepiece::SentencePieceModel,
    },
    error::Result,
    models::config::{LlavaConfig, ModelConfig},
};

/// What a person is told after writing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Names of the files, the language model's first.
    pub files: Vec<String>,
    /// What llama.cpp will do otherwise than this program.
    pub notes: Vec<String>,
}

/// Writes `source` into the folder `out`, which appears whole or not at all, as `NAME-TYPE.gguf` and, for a LLaVA,
/// `mmproj-NAME-TYPE.gguf`. Weights pass through memory a few megabytes at a time. `progress` gets a line when a file
/// is begun.
///
/// Without `file_type` matrices are F16, and BF16 where the source keeps them so.
///
/// # Errors
/// `Data`: something that llama.cpp has no keys for, such as a sliding window; a value that the type cannot hold.
/// `Usage`: a LLaVA that uses the class token. `Failed`: what the disk refuses.
pub fn write_gguf_model(
    out: &Path,
    source: &ModelFolder,
    name: &str,
    file_type: Option<FileType>,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let file_type = match file_type {
        Some(file_type) => file_type,
        None if source.dtype()? == Dtype::BF16 => FileType::Bf16,
        None => FileType::F16,
    };
    let text = source.config().text();
    architecture(text, source.name())?;
    let mut report = Report::default();
    let mut metadata = llama_metadata(text, name, file_type)?;
    metadata.extend(tokenizer_metadata(source, &mut report.notes)?);
    let mut files = vec![(format!("{name}-{}.gguf", file_type.name()), metadata, llama_plan(text, file_type)?)];
    if let ModelConfig::Llava(llava) = source.config() {
        let metadata = seeing_metadata(source, llava, name, file_type, &mut report.notes)?;
        files.push((format!("mmproj-{name}-{}.gguf", file_type.name()), metadata, mmproj_plan(llava, file_type)?));
    }
    let folder = NewFolder::create(out)?;
    for (file, metadata, plan) in files {
        let bytes: usize = plan.iter().filter_map(|planned: &Planned| planned.head.bytes()).sum();
        progress(&format!("writing {file}: {} tensors, {} MB", plan.len(), bytes.div_ceil(1_000_000)));
        write_planned(&folder.path().join(&file), &metadata, &plan, &mut |tensor| source.stored(tensor))?;
        report.files.push(file);
    }
    folder.commit()?;
    Ok(report)
}

/// The keys `tokenizer.*`; none for a model without a tokenizer.
fn tokenizer_metadata(source: &ModelFolder, notes: &mut Vec<String>) -> Result<Metadata> {
    let Some(json) = source.json("tokenizer.json")? else { return Ok(Metadata::new()) };
    let model = match source.file("tokenizer.model")? {
        Some(bytes) => Some(SentencePieceModel::parse(&format!("{}/tokenizer.model", source.name()), &bytes)?),
        None => None,
    };
    let tokenizer = Tokenizer::from_files(source.name(), &|file| source.file(file))?;
    let config = source.config().text();
    let parts = Parts {
        name: source.name(),
        tokenizer: &tokenizer,
        json: &Json::Object(json),
        model: model.as_ref(),
        rows: config.vocab_size,
    };
    let Written { mut vocabulary, foreign_merges } = parts.vocabulary()?;
    vocabulary.bos_token_id = vocabulary.bos_token_id.or(config.bos_token_id);
    let ends = source.eos_token_ids()?;
    vocabulary.eos_token_id = vocabulary.eos_token_id.or(ends.first().copied());
    vocabulary.padding_token_id = vocabulary.padding_token_id.or(config.pad_token_id);
    vocabulary.chat_template = ChatTemplate::source(source.name(), &|name| source.file(name))?;
    if foreign_merges > 0 {
        notes.push(format!(
            "{foreign_merges} merges stand in tokenizer.json or follow from the scores, not both: llama.cpp may cut a \
             few texts into other tokens"
        ));
    }
    if vocabulary.legacy == Some(false) {
        notes.push("llama.cpp puts a space after every special token; this model has one at the start alone".into());
    }
    let mut metadata = vocabulary::metadata(&vocabulary);
    if let Some(&end) = ends.iter().find(|&&id| Some(id) != vocabulary.eos_token_id) {
        metadata.push(("tokenizer.ggml.eot_token_id".to_owned(), Value::U32(end)));
    }
    Ok(metadata)
}

fn seeing_metadata(
    source: &ModelFolder,
    llava: &LlavaConfig,
    name: &str,
    file_type: FileType,
    notes: &mut Vec<String>,
) -> Result<Metadata> {
    let size = u32::try_from(llava.vision_config.image_size).unwrap_or(u32::MAX);
    let processor = match source.preprocessor_config()? {
        Some(config) => {
            let file = format!("{}/preprocessor_config.json", source.name());
            ImageProcessor::from_config(&Json::Object(config), &file, size)?
        }
        None => ImageProcessor::clip(size),
    };
    let [mean, std] = processor.mean_and_std().map(|channels| channels.map(|value| value as f32));
    let mut metadata = mmproj_metadata(llava, name, file_type, mean, std)?;
    let aspect = if processor.pad_to_square { "pad" } else { "square" };
    metadata.push((ASPECT_RATIO_KEY.to_owned(), aspect.into()));
    if !processor.pad_to_square {
        notes.push("llama.cpp pads every picture to a square; this model's are cropped".into());
    }
    Ok(metadata)
}
