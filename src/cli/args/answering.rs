//! What is typed to be answered: `generate` and `chat`.

use std::path::PathBuf;

use clap::Args;

use super::{ModelArgs, TuneArgs, at_least_one, number};
use crate::generate::Options;

/// How the tokens of an answer are chosen.
#[derive(Clone, Debug, Args)]
pub struct SamplingArgs {
    /// An answer ends after so many tokens, or where the model ends it
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least_one())]
    pub max_new_tokens: usize,
    /// 0: always the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    pub temperature: f32,
    /// Sample only from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability)]
    pub top_p: f32,
    /// Sample only from so many of the likeliest tokens; 0: all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Above 1: tokens that were used before are less likely
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = above_zero)]
    pub repetition_penalty: f32,
    /// Of the draws at a temperature above 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

impl SamplingArgs {
    /// As the generator takes them.
    pub fn options(&self, stop_ids: Vec<u32>) -> Options {
        Options {
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
            stop_ids,
        }
    }
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub tune: TuneArgs,
    /// A picture, put before the prompt; may be given several times
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// What to ask
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// Instead of the template's own system sentence
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Conversation template; `chat`: the model's own
    #[arg(long, value_name = "T", default_value = "v1")]
    pub version: String,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Beams to search with; the best answer of all is given
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one())]
    pub num_beams: usize,
    /// Of beam search: above 0 favours long answers, below short ones
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    pub length_penalty: f32,
    /// The answer ends before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub tune: TuneArgs,
    /// A picture for the first message; may be given several times
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// Instead of the template's own system sentence
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Conversation template; `chat`: the model's own [default: v1 for a LLaVA, else the model's own if it has one]
    #[arg(long, value_name = "T")]
    pub version: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

fn temperature(text: &str) -> Result<f32, String> {
    number(text, |value| value >= 0.0, "a number of at least 0")
}

fn above_zero(text: &str) -> Result<f32, String> {
    number(text, |value| value > 0.0, "a number above 0")
}

fn probability(text: &str) -> Result<f32, String> {
    number(text, |value| value > 0.0 && value <= 1.0, "a number above 0 and at most 1")
}
