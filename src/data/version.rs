//! What makes prompts of conversations, as the config's `version` names it: one of LLaVA's templates, or `chat`, the
//! model's own.
//!
//! The named ones are tokenised as LLaVA's code does it, picture by picture. The model's own is tokenised as
//! transformers does it: the text as it was rendered, at once, and no BOS but the one it writes. Only a LLaVA's
//! processor adds one where the template has none.

use std::{borrow::Cow, sync::Arc};

use super::{chat_template::ChatTemplate, record::Turn, template::Template, tokenizer::Tokenizer};
use crate::error::{Error, Result};

/// The name that stands for the model's own template.
pub const CHAT: &str = "chat";

/// Gives the bytes of a file of a model, or none where it has no such file.
pub type FileReader<'a> = &'a dyn Fn(&str) -> Result<Option<Cow<'static, [u8]>>>;

/// What makes prompts of conversations.
#[derive(Clone, Debug)]
pub enum Version {
    Named(&'static Template),
    Chat(Arc<ChatTemplate>),
}

impl Version {
    /// Whether there can be a version of this name, before a model is looked at.
    ///
    /// # Errors
    /// `Usage`, with the nearest known name.
    pub fn check(name: &str) -> Result<()> {
        if name == CHAT { Ok(()) } else { Template::named(name).map(|_| ()) }
    }

    /// The version of a name for a model, which messages call `model`, and whose files `read` gives.
    ///
    /// # Errors
    /// `Usage`: an unknown name, or a model without a template of its own. `Data`: a template that cannot be read.
    pub fn open(name: &str, model: &str, read: FileReader<'_>, tokenizer: &Tokenizer) -> Result<Self> {
        if name != CHAT {
            return Template::named(name).map(Self::Named);
        }
        let template = ChatTemplate::from_files(model, read)?.ok_or_else(|| {
            let message = format!(
                "{model} has no chat template: no chat_template.jinja, and no `chat_template` in chat_template.json \
                 or tokenizer_config.json"
            );
            let names: Vec<&str> = Template::names().collect();
            Error::usage(message).hint(format!("choose one of the named templates: {}", names.join(", ")))
        })?;
        Ok(Self::Chat(Arc::new(template.ended_by(|text| tokenizer.first_added(text)))))
    }

    /// The name that [`Version::open`] takes.
    pub fn name(&self) -> &str {
        match self {
            Self::Named(template) => template.name,
            Self::Chat(_) => CHAT,
        }
    }

    /// True for `plain`, which takes the first turn's pictures and the first answer only.
    pub fn is_plain(&self) -> bool {
        matches!(self, Self::Named(template) if template.is_plain())
    }

    /// The text that ends an answer, or nothing; where it is a single token of the vocabulary, generation stops at it.
    pub fn stop(&self) -> &str {
        match self {
            Self::Named(template) => template.stop(),
            Self::Chat(template) => template.end_mark().unwrap_or_default(),
        }
    }

    /// Ids and labels of turns for training: human first, by turns, an answer last. `system` replaces the template's
    /// own text. `sees`: the model is a LLaVA.
    ///
    /// # Errors
    /// `Data`: what the model's own template raises; text that cannot be tokenised.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        turns: &[Turn],
        system: Option<&str>,
        sees: bool,
    ) -> Result<(Vec<i32>, Vec<i32>)> {
        match self {
            Self::Named(template) => tokenizer.encode_parts(&template.training(turns, system)),
            Self::Chat(template) => {
                let parts = template.training(turns, system)?;
                tokenizer.encode_whole(&parts, sees && !template.begins_with_bos(&parts))
            }
        }
    }

    /// The ids of a question: `turns` end with a human's, and the assistant's is left open.
    ///
    /// # Errors
    /// As [`Version::encode`].
    pub fn prompt(&self, tokenizer: &Tokenizer, turns: &[Turn], system: Option<&str>, sees: bool) -> Result<Vec<i32>> {
        let encoded = match self {
            Self::Named(template) => tokenizer.encode_parts(&template.prompt(turns, system)),
            Self::Chat(template) => {
                let parts = template.prompt(turns, system)?;
                tokenizer.encode_whole(&parts, sees && !template.begins_with_bos(&parts))
            }
        };
        Ok(encoded?.0)
    }
}
