//! The layout of the original LLaVA authors (`LlavaLlamaForCausalLM`): LLaMA's names, `model.mm_projector.*`, and a
//! vision tower that is mostly somewhere else, under the name that `mm_vision_tower` gives.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Files, ModelFolder, Tower, canonical_of_model};
use crate::{
    error::{Error, Result},
    formats::{processor_files, weights::Weights},
    models::{
        config::{ClipVisionConfig, ModelConfig},
        names,
    },
};

/// Opens such a folder. `named` is its `mm_vision_tower`, `given` the tower's folder where somebody said it.
pub(super) fn open(
    name: String,
    files: Files,
    file: &str,
    config: &[u8],
    named: &str,
    given: Option<&Path>,
) -> Result<ModelFolder> {
    let path = files.folder.clone().unwrap_or_default();
    let weights = Weights::open(&path)?;
    let inside = weights.names()?.iter().any(|stored| names::canonical(stored).starts_with(names::VISION_TOWER));
    let tower = match (given, find(&path, named)) {
        (Some(folder), _) => Some(Tower::open(folder)?),
        (None, Some(folder)) => Some(Tower::open(&folder)?),
        (None, None) => None,
    };
    let vision = match &tower {
        Some(tower) => tower.config.clone(),
        None => ClipVisionConfig::released(named).filter(|_| inside).ok_or_else(|| {
            let leaf = named.rsplit('/').next().unwrap_or(named);
            Error::data(format!("{file}: mm_vision_tower is `{named}`, and there is no such folder"))
                .hint(format!("put the tower's folder beside the model's, as {leaf}, or name it with --vision-tower (in a config: vision_tower)"))
        })?,
    };
    let mut folder = ModelFolder::empty(name, files, ModelConfig::parse_original(file, config, vision)?);
    folder.original = true;
    folder.add_part(weights, canonical_of_model)?;
    match tower {
        // A tower that was trained along is in the model itself.
        Some(tower) if inside => folder.add_processing(&tower)?,
        Some(tower) => folder.add_tower(&tower)?,
        None => {}
    }
    folder.pad_where_trained_so(config)?;
    folder.find_image_token()?;
    folder.checked()
}

/// The folder of a tower by the name in a config: as it stands, beside the model, or in the model's folder.
fn find(model: &Path, named: &str) -> Option<PathBuf> {
    let leaf = named.rsplit('/').next().unwrap_or(named);
    let beside = model.parent().unwrap_or(Path::new(""));
    let places = [model.join(named), model.join(leaf), beside.join(named), beside.join(leaf), PathBuf::from(named)];
    places.into_iter().find(|place| place.join("config.json").is_file() && place != model)
}

impl ModelFolder {
    /// `image_aspect_ratio` of the config says how the model's pictures were processed in training: `do_pad` says the
    /// same to transformers and to the processor here.
    fn pad_where_trained_so(&mut self, config: &[u8]) -> Result<()> {
        let config: Value = serde_json::from_slice(config).unwrap_or(Value::Null);
        if config["image_aspect_ratio"] != "pad" {
            return Ok(());
        }
        let Some(llava) = self.config.llava() else { return Ok(()) };
        let processing = processor_files::preprocessor_config(self.preprocessor_config()?, &llava.vision_config);
        self.files.put_json("preprocessor_config.json", &processor_files::padded(processing));
        Ok(())
    }

    /// Original checkpoints mark pictures by a number that is no token. One that has a token for them keeps it.
    fn find_image_token(&mut self) -> Result<()> {
        let tokens = self.json("tokenizer.json")?.and_then(|mut map| map.remove("added_tokens"));
        let added = self.json("added_tokens.json")?.unwrap_or_default();
        let listed = tokens.as_ref().and_then(Value::as_array).into_iter().flatten();
        let listed = listed.filter(|token| token["content"] == crate::data::IMAGE_PLACEHOLDER);
        let id = listed.map(|token| &token["id"]).chain(added.get(crate::data::IMAGE_PLACEHOLDER)).next();
        let id = id.and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        if let (Some(id), ModelConfig::Llava(llava)) = (id, &mut self.config) {
            llava.image_token_index = id;
        }
        Ok(())
    }
}
