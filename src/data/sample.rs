//! From a record to tokens, labels and pictures.

use std::sync::Arc;

use super::{
    IGNORE_INDEX, IMAGE_TOKEN_INDEX,
    image::ImageSource,
    record::{Content, Record, Turn},
    tokenizer::Tokenizer,
    version::Version,
};
use crate::error::{Error, Result};

/// One tokenised record.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub id: String,
    /// Ids, [`IMAGE_TOKEN_INDEX`] for each picture.
    pub tokens: Vec<i32>,
    /// As long as `tokens`: [`IGNORE_INDEX`], or the id.
    pub labels: Vec<i32>,
    /// One for each picture among the tokens, in order.
    pub images: Vec<ImageSource>,
    /// Spliced positions lost to the length limit.
    pub truncated: usize,
}

impl Sample {
    /// Positions that are predicted: supervised ones, but not the first of the sequence, which nothing comes before.
    pub fn target_tokens(&self) -> usize {
        self.labels.iter().skip(1).filter(|&&label| label != IGNORE_INDEX).count()
    }

    /// Positions after splicing, a picture taking `image_tokens` of them.
    pub fn spliced_length(&self, image_tokens: usize) -> usize {
        spliced_length(&self.tokens, image_tokens)
    }
}

fn spliced_length(tokens: &[i32], image_tokens: usize) -> usize {
    tokens.iter().map(|&token| if token == IMAGE_TOKEN_INDEX { image_tokens } else { 1 }).sum()
}

/// All that is needed to tokenise a record.
#[derive(Clone, Debug)]
pub struct Encoder {
    pub tokenizer: Arc<Tokenizer>,
    pub version: Version,
    /// Instead of the template's system text; a record's own goes before both.
    pub system: Option<String>,
    /// Positions that a picture takes after splicing.
    pub image_tokens: usize,
    /// The longest sequence, in spliced positions.
    pub max_length: Option<usize>,
}

impl Encoder {
    /// Tokenises a record for training or scoring, cut to `max_length`.
    pub fn encode(&self, record: &Record) -> Result<Sample> {
        let (tokens, labels) = match &record.content {
            Content::Text(text) => {
                let tokens = self.tokenizer.encode(text, true)?;
                let mut labels = tokens.clone();
                labels.iter_mut().take(1).for_each(|label| *label = IGNORE_INDEX);
                (tokens, labels)
            }
            Content::Conversation(turns) => {
                let system = record.system.as_deref().or(self.system.as_deref());
                let encoded = self.version.encode(&self.tokenizer, turns, system, self.image_tokens > 0);
                encoded
                    .map_err(|error| Error { message: format!("record {:?}: {}", record.id, error.message), ..error })?
            }
        };
        let mut sample = Sample { id: record.id.clone(), tokens, labels, images: record.images.clone(), truncated: 0 };
        self.truncate(&mut sample);
        Ok(sample)
    }

    /// The ids of a question: `turns` end with a human's, and the assistant's is left open.
    pub fn prompt(&self, turns: &[Turn]) -> Result<Vec<i32>> {
        self.version.prompt(&self.tokenizer, turns, self.system.as_deref(), self.image_tokens > 0)
    }

    /// Cuts the tail; a picture that would be cut goes as a whole.
    fn truncate(&self, sample: &mut Sample) {
        let before = spliced_length(&sample.tokens, self.image_tokens);
        if let Some(limit) = self.max_length.filter(|&limit| limit < before) {
            let mut length = 0;
            let kept = sample.tokens.iter().take_while(|&&token| {
                length += if token == IMAGE_TOKEN_INDEX { self.image_tokens } else { 1 };
                length <= limit
            });
            let kept = kept.count();
            sample.tokens.truncate(kept);
            sample.labels.truncate(kept);
            sample.truncated = before - spliced_length(&sample.tokens, self.image_tokens);
        }
        // One picture for each that is left; `plain` has no place for those of later turns.
        let placed = sample.tokens.iter().filter(|&&token| token == IMAGE_TOKEN_INDEX).count();
        sample.images.truncate(placed);
    }
}
