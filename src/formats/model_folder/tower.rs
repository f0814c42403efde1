//! A CLIP vision tower in a folder of its own: `CLIPVisionModel`, or the seeing half of a whole CLIP.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Files, ModelFolder};
use crate::{
    error::{Error, Result},
    formats::weights::Weights,
    models::{config::ClipVisionConfig, names},
};

/// A tower whose weights have not been looked at yet.
pub struct Tower {
    pub name: String,
    pub config: ClipVisionConfig,
    files: Files,
    folder: PathBuf,
}

impl Tower {
    /// # Errors
    /// `Data`: no folder, no config of a CLIP.
    pub fn open(folder: &Path) -> Result<Self> {
        let name = folder.display().to_string();
        let missing = |what: &str| {
            Error::data(format!("{name} {what}"))
                .hint("the folder of a CLIP vision model is expected as the vision tower")
        };
        if !folder.is_dir() {
            return Err(missing("is not a folder"));
        }
        let files = Files::on_disk(folder);
        let config = files.read("config.json")?.ok_or_else(|| missing("holds no config.json"))?;
        let config = ClipVisionConfig::parse(&format!("{name}/config.json"), &config)?;
        Ok(Self { config, files, folder: folder.to_owned(), name })
    }

    /// The preprocessor config beside it, where there is one.
    pub fn preprocessor_config(&self) -> Result<Option<Value>> {
        Ok(self.files.json(&self.name, "preprocessor_config.json")?.map(Value::Object))
    }
}

impl ModelFolder {
    /// Takes a tower's weights in, and its picture processing.
    pub(super) fn add_tower(&mut self, tower: &Tower) -> Result<()> {
        self.add_processing(tower)?;
        self.add_part(Weights::open(&tower.folder)?, names::canonical_of_tower)
    }

    /// Takes the picture processing of a tower, where the model has none of its own.
    pub(super) fn add_processing(&mut self, tower: &Tower) -> Result<()> {
        if self.preprocessor_config()?.is_none()
            && let Some(config) = tower.preprocessor_config()?
        {
            self.files.put_json("preprocessor_config.json", &config);
        }
        Ok(())
    }
}
