//! A fresh LLaVA out of a language model and a vision tower: the start of stage 1. Its projector is still to be made.

use serde_json::{Map, Value, json};

use super::{ModelFolder, Tower, growth};
use crate::{
    data::IMAGE_PLACEHOLDER,
    error::{Error, Result},
    models::{
        config::{LlavaConfig, ModelConfig, ProjectorType},
        names,
    },
};

pub(in crate::formats) const PAD: &str = "<pad>";
/// Vocabularies grow to a multiple of this, as the released models' did: 32,000 to 32,064.
const MULTIPLE: usize = 64;
/// Tokens that a tokenizer may have beyond the embeddings, at most.
const MOST_NEW: usize = 4096;

impl ModelFolder {
    /// Joins a language model with a tower. The token `<image>` is added, and `<pad>`, and the embeddings grow to a
    /// multiple of 64 rows; `seed` is for these.
    ///
    /// # Errors
    /// `Usage`: the model is a LLaVA already. `Data`: the tower's weights do not fit its config.
    pub fn joined(mut self, tower: Tower, projector: ProjectorType, seed: u64) -> Result<Self> {
        let ModelConfig::Llama(text) = &self.config else {
            return Err(Error::usage(format!("{} has a vision tower already", self.name))
                .hint("leave vision_tower out, or start from a language model"));
        };
        let vocabulary = u32::try_from(text.vocab_size).unwrap_or(u32::MAX);
        self.config = ModelConfig::Llava(LlavaConfig::new(text.clone(), tower.config.clone(), projector, vocabulary));
        self.name = format!("{} with {}", self.name, tower.name);
        self.add_tower(&tower)?;
        self.with_image_token(seed)?.checked()
    }

    /// Gives pictures a token, where the model has none: transformers marks their places by one.
    ///
    /// # Errors
    /// Whatever is wrong with tokenizer.json or the embeddings.
    pub fn with_image_token(mut self, seed: u64) -> Result<Self> {
        let rows = self.config.text().vocab_size;
        if self.config.llava().is_none_or(|llava| (llava.image_token_index as usize) < rows) {
            return Ok(self);
        }
        let mut next = match self.json("tokenizer.json")? {
            Some(tokenizer) => token_count(&tokenizer),
            None => rows,
        };
        let mut ids = [0; 2];
        for (id, text) in ids.iter_mut().zip([IMAGE_PLACEHOLDER, PAD]) {
            let known = self.json("tokenizer.json")?.and_then(|tokenizer| token_id(&tokenizer, text));
            *id = known.unwrap_or(next);
            if known.is_none() {
                self.add_token(text, next)?;
                next = next.saturating_add(1);
            }
        }
        self.edit_json("tokenizer_config.json", |config| config["pad_token"] = json!(PAD))?;
        self.edit_json("special_tokens_map.json", |map| map["pad_token"] = json!(PAD))?;
        let needed = ids.into_iter().max().unwrap_or(0).saturating_add(1);
        if needed > rows + MOST_NEW {
            let message =
                format!("{}: tokenizer.json has ids up to {}, the model {rows} embeddings", self.name, needed - 1);
            return Err(Error::data(message).hint("tokenizer and weights are of different models: fetch both afresh"));
        }
        if needed > rows {
            self.grow(needed.next_multiple_of(MULTIPLE) - rows, seed)?;
        }
        let id = |id: usize| u32::try_from(id).unwrap_or(u32::MAX);
        if let ModelConfig::Llava(llava) = &mut self.config {
            llava.image_token_index = id(ids[0]);
            llava.text_config.pad_token_id = Some(id(ids[1]));
        }
        Ok(self)
    }

    /// Adds rows to the embeddings, and to the head where it is not the same.
    fn grow(&mut self, rows: usize, seed: u64) -> Result<()> {
        let tied = self.config.text().tie_word_embeddings;
        for name in [names::EMBED_TOKENS, names::LM_HEAD].into_iter().filter(|name| !tied || *name != names::LM_HEAD) {
            let new = growth::new_rows(&self.stored(name)?, rows, seed, name)?;
            self.grown.insert(name.to_owned(), new);
        }
        self.config.text_mut().vocab_size += rows;
        Ok(())
    }

    /// Adds a special token to every file that lists tokens.
    fn add_token(&mut self, text: &str, id: usize) -> Result<()> {
        let flags = json!({"content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true});
        self.edit_json("tokenizer.json", |tokenizer| {
            let mut token = Map::from_iter([("id".to_owned(), json!(id))]);
            token.extend(flags.as_object().cloned().unwrap_or_default());
            match &mut tokenizer["added_tokens"] {
                Value::Array(tokens) => tokens.push(Value::Object(token)),
                other => *other = json!([token]),
            }
        })?;
        self.edit_json("tokenizer_config.json", |config| {
            if let Some(Value::Object(tokens)) = config.get_mut("added_tokens_decoder") {
                tokens.insert(id.to_string(), flags.clone());
            }
        })?;
        self.edit_json("added_tokens.json", |tokens| tokens[text] = json!(id))
    }
}

/// One more than the highest id of a tokenizer.json.
fn token_count(tokenizer: &Map<String, Value>) -> usize {
    let added = tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    let added = added.filter_map(|token| token["id"].as_u64());
    let vocabulary = tokenizer.get("model").and_then(|model| model.get("vocab"));
    let listed = vocabulary.and_then(Value::as_array).map_or(0, Vec::len) as u64;
    let ids = vocabulary.and_then(Value::as_object).into_iter().flatten().filter_map(|(_, id)| id.as_u64());
    let highest = added.chain(ids).map(|id| id.saturating_add(1)).max().unwrap_or(0).max(listed);
    usize::try_from(highest).unwrap_or(0)
}

/// The id of an added token.
fn token_id(tokenizer: &Map<String, Value>, text: &str) -> Option<usize> {
    let added = tokenizer.get("added_tokens")?.as_array()?;
    let token = added.iter().find(|token| token["content"] == text)?;
    token["id"].as_u64().and_then(|id| usize::try_from(id).ok())
}
