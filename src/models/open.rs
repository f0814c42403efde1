//! A model ready to be asked: weights on the device, an adapter on them, tokenizer and picture processing beside.

use std::{path::Path, sync::Arc};

use rayon::prelude::*;
use serde_json::Value;

use super::{adapter, config::ModelConfig, llava::Llava, loading::Loading, names, placement::Placement};
use crate::{
    data::{Encoder, ImageProcessor, ImageSource, Tokenizer, Version},
    embedded,
    error::{Error, Result},
    formats::{HostTensor, model_folder::ModelFolder, peft::Adapter},
    gpu::Gpu,
};

/// Where a model is.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// In the program, by its name.
    Embedded(&'a str),
    /// A folder of one of the layouts that are read, or a GGUF file; and the folder of its vision tower, where that is
    /// elsewhere.
    Folder(&'a Path, Option<&'a Path>),
}

impl<'a> Place<'a> {
    /// `embedded:NAME`, or a path.
    pub fn parse(text: &'a str) -> Self {
        if text.starts_with(embedded::PREFIX) { Self::Embedded(text) } else { Self::Folder(Path::new(text), None) }
    }

    /// Opens the folder; a LLaVA may lack its projector.
    pub fn folder(self) -> Result<ModelFolder> {
        let folder = match self {
            Self::Embedded(name) => embedded::model(name),
            Self::Folder(path, tower) => ModelFolder::open_with_tower(path, tower),
        };
        sized(folder?, None)
    }
}

pub struct Opened {
    pub model: Llava,
    pub tokenizer: Arc<Tokenizer>,
    /// None for a plain LLaMA.
    pub processor: Option<ImageProcessor>,
    pub folder: ModelFolder,
}

/// Opens a model for inference, with an adapter on it if there is one; its layers in parts, where there are several
/// devices.
pub fn open(gpus: &[Gpu], place: Place<'_>, adapter: Option<&Path>) -> Result<Opened> {
    let folder = place.folder()?;
    let adapter = adapter.map(|path| Adapter::read(path, folder.config())).transpose()?;
    load(gpus, folder, adapter.as_ref(), &mut Loading::of_frozen(None, &mut |_, _| ()))
}

/// Nothing on this machine has that name, and it may be one of the Hub's.
pub fn no_folder(name: &str) -> Error {
    Error::data(format!("there is no model folder {name}")).hint("name a folder with config.json and model.safetensors")
}

/// Brings an opened folder to the device, or its layers to several devices, of which there is one at least.
///
/// A LLaVA whose projector is neither in its folder nor in the adapter answers text alone: its `projector` is `None`.
pub fn load(gpus: &[Gpu], folder: ModelFolder, adapter: Option<&Adapter>, loading: &mut Loading<'_>) -> Result<Opened> {
    let tokenizer = tokenizer(&folder)?;
    let processor = processor(&folder, false)?;
    let saved = |name: &str| adapter.and_then(|adapter| adapter.saved.get(name));
    let mut projector =
        |name: &str, shape: &[usize]| Ok(saved(name).cloned().unwrap_or_else(|| HostTensor::zeros(shape)));
    let layers = folder.config().text().num_hidden_layers;
    let placement = Placement::split(&gpus[..gpus.len().min(layers)], layers);
    let mut model = Llava::load_with(placement, &folder, folder.config().clone(), false, &mut projector, loading)?;
    let tensors = folder.config().llava().map(names::projector_tensors).unwrap_or_default();
    if !folder.has_projector() && !tensors.iter().all(|(name, _)| saved(name).is_some()) {
        model.projector = None;
    }
    if let Some(adapter) = adapter {
        adapter::attach(&mut model, adapter, 0.0)?;
    }
    model.copy_head();
    Ok(Opened { model, tokenizer: Arc::new(tokenizer), processor, folder })
}

/// The tokenizer of a model.
///
/// # Errors
/// `Data`: it is missing or unreadable, or knows ids that the model has no embedding for.
pub fn tokenizer(folder: &ModelFolder) -> Result<Tokenizer> {
    let tokenizer = Tokenizer::from_files(folder.name(), &|name| folder.file(name))?;
    let (known, embedded) = (tokenizer.vocabulary_size(), folder.config().text().vocab_size);
    if known > embedded {
        let message =
            format!("{}: the tokenizer has {known} tokens, the model's vocab_size is {embedded}", folder.name());
        return Err(Error::data(message).hint("tokenizer and weights are of different models: fetch both afresh"));
    }
    Ok(tokenizer)
}

/// The model for pictures of `size` pixels a side: where nobody asks for one, of the size that its
/// preprocessor_config.json makes, else the tower's own.
///
/// # Errors
/// As [`ModelFolder::with_image_size`]; `Data`: preprocessor_config.json makes no pictures of one square size.
pub fn sized(folder: ModelFolder, size: Option<usize>) -> Result<ModelFolder> {
    let Some(llava) = folder.config().llava() else { return Ok(folder) };
    let own = llava.vision_config.image_size;
    if let Some(size) = size {
        return folder.with_image_size(size);
    }
    match own_processor(&folder, own)?.output_size() {
        Some((height, width)) if height == width => folder.with_image_size(height as usize),
        other => {
            let made =
                other.map_or("pictures of any size".into(), |(height, width)| format!("{width}x{height} pixels"));
            let message =
                format!("{}: preprocessor_config.json gives {made}, the vision tower takes {own}x{own}", folder.name());
            Err(Error::data(message).hint("set its `crop_size` to the `image_size` of vision_config in config.json"))
        }
    }
}

/// How pictures are brought to the tower, with `pad` squared first; none for a plain LLaMA.
///
/// # Errors
/// `Data`: preprocessor_config.json says what is not built.
pub fn processor(folder: &ModelFolder, pad: bool) -> Result<Option<ImageProcessor>> {
    let ModelConfig::Llava(llava) = folder.config() else { return Ok(None) };
    let size = llava.vision_config.image_size;
    let mut processor = own_processor(folder, size)?;
    if processor.output_size() != Some((size as u32, size as u32)) {
        processor = processor.with_size(size as u32);
    }
    Ok(Some(if pad { processor.with_pad(true) } else { processor }))
}

fn own_processor(folder: &ModelFolder, size: usize) -> Result<ImageProcessor> {
    match folder.preprocessor_config()? {
        Some(config) => {
            let file = format!("{}/preprocessor_config.json", folder.name());
            ImageProcessor::from_config(&Value::Object(config), &file, size as u32)
        }
        None => Ok(ImageProcessor::clip(size as u32)),
    }
}

/// Pixel values [3, S, S] of every picture, on all cores. Errors name the picture.
pub fn pixels(processor: &ImageProcessor, pictures: &[ImageSource]) -> Result<Vec<Vec<f32>>> {
    let process = |picture: &ImageSource| {
        let values = processor
            .process(&picture.load()?)
            .map_err(|error| Error { message: format!("{}: {}", picture.name(), error.message), ..error })?;
        Ok(values.data)
    };
    pictures.par_iter().map(process).collect()
}

impl Opened {
    /// What tokenises for this model, in the template of a name; records longer than the model's positions are cut.
    pub fn encoder(&self, version: &str, system: Option<String>) -> Result<Encoder> {
        Ok(Encoder {
            tokenizer: self.tokenizer.clone(),
            version: open_version(version, &self.folder, &self.tokenizer)?,
            system,
            image_tokens: self.model.image_tokens(),
            max_length: Some(self.model.config.text().positions()),
        })
    }

    /// Pixel values of pictures.
    ///
    /// # Errors
    /// `Usage` when there are pictures and the model has no eyes.
    pub fn pixels(&self, pictures: &[ImageSource]) -> Result<Vec<Vec<f32>>> {
        match &self.processor {
            _ if pictures.is_empty() => Ok(Vec::new()),
            Some(processor) => pixels(processor, pictures),
            None => {
                let name = self.folder.name();
                let error = Error::usage(format!("{name} is a language model, it cannot see pictures"))
                    .hint("leave the pictures out, or name a LLaVA");
                let gguf = name.ends_with(".gguf");
                Err(if gguf { error.hint("with an mmproj file beside it: --vision-tower MMPROJ.gguf") } else { error })
            }
        }
    }

    /// The ids that end an answer: the model's, and the template's end mark where that is one token.
    pub fn stop_ids(&self, version: &Version) -> Result<Vec<u32>> {
        stop_ids(&self.folder, &self.tokenizer, version)
    }
}

/// The version of a name, `chat` being the folder's own template.
///
/// # Errors
/// As [`Version::open`].
pub fn open_version(name: &str, folder: &ModelFolder, tokenizer: &Tokenizer) -> Result<Version> {
    Version::open(name, folder.name(), &|file| folder.file(file), tokenizer)
}

/// The ids that end an answer: the model's, and the template's end mark where that is one token.
pub fn stop_ids(folder: &ModelFolder, tokenizer: &Tokenizer, version: &Version) -> Result<Vec<u32>> {
    let mut ids = folder.eos_token_ids()?;
    ids.extend(tokenizer.token_to_id(version.stop()));
    if matches!(version, Version::Chat(_)) {
        ids.extend(tokenizer.eos_id);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}
