//! Answers, token by token: prompts packed through the decoder once, then one row a sequence and step, earlier keys and
//! values kept on the device; in a [`Session`] from answer to answer.

mod beams;
mod decoder;
mod sampling;
pub mod session;

use std::ops::ControlFlow;

use crate::{
    data::IGNORE_INDEX,
    error::{Error, Result},
    models::{
        batch::PackedBatch,
        llama::KvCache,
        llava::{Llava, Pictures},
    },
    rng::Rng,
};
pub use beams::search as beam_search;
use decoder::{Decoder, Row};
pub use session::Session;

/// How tokens are chosen and when to stop.
#[derive(Clone, Debug)]
pub struct Options {
    pub max_new_tokens: usize,
    /// 0: always the likeliest token.
    pub temperature: f32,
    /// Of the likeliest tokens, the fewest that together have this probability.
    pub top_p: f32,
    /// So many of the likeliest tokens; 0: all.
    pub top_k: usize,
    /// Divides positive and multiplies negative logits of tokens that the prompt or the answer holds; 1: off.
    pub repetition_penalty: f32,
    pub seed: u64,
    /// Any of these ends an answer.
    pub stop_ids: Vec<u32>,
}

impl Options {
    /// The likeliest token every time.
    pub fn greedy(max_new_tokens: usize, stop_ids: Vec<u32>) -> Self {
        let (top_p, top_k, repetition_penalty) = (1.0, 0, 1.0);
        Self { max_new_tokens, temperature: 0.0, top_p, top_k, repetition_penalty, seed: 0, stop_ids }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, the end mark included when it was produced.
    pub token_ids: Vec<u32>,
    /// Positions of the prompt, pictures included.
    pub prompt_tokens: usize,
}

/// One sequence: its rows in the cache, and where it stands.
struct Sequence {
    /// Its first row.
    base: usize,
    prompt: usize,
    /// New tokens that fit.
    room: usize,
    tokens: Vec<u32>,
    /// Prompt and answer, for the repetition penalty.
    seen: Vec<u32>,
    rng: Rng,
    done: bool,
}

impl Sequence {
    /// `prompt` positions from row `base` on, and `room` for the answer.
    fn new(base: usize, prompt: usize, room: usize, seen: Vec<u32>, options: &Options, stream: u64) -> Self {
        let rng = Rng::new(options.seed, stream);
        Self { base, prompt, room, tokens: Vec::new(), seen, rng, done: room == 0 }
    }

    /// Chooses the next token by the logits behind the last one, and tells it.
    fn next(
        &mut self,
        logits: &mut [f32],
        options: &Options,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<u32> {
        check_logits(logits)?;
        sampling::penalise(logits, &self.seen, options.repetition_penalty);
        let token = choose(logits, options, &mut self.rng);
        self.tokens.push(token);
        self.seen.push(token);
        let told = on_token(token);
        self.done = told.is_break() || options.stop_ids.contains(&token) || self.tokens.len() >= self.room;
        Ok(token)
    }

    fn finished(self) -> Generated {
        Generated { token_ids: self.tokens, prompt_tokens: self.prompt }
    }
}

/// The words of a prompt; the marks of pictures are none.
fn words(prompt: &[i32]) -> Vec<u32> {
    prompt.iter().filter_map(|&id| u32::try_from(id).ok()).collect()
}

/// Refuses a prompt that is empty or longer than the model's `limit` of positions.
fn check_length(length: usize, limit: usize) -> Result<()> {
    if length == 0 {
        return Err(Error::usage("the prompt is empty").hint("give it at least a word"));
    }
    if length > limit {
        let message = format!("the prompt has {length} positions, the model has {limit}");
        return Err(Error::usage(message).hint("shorten the prompt, or give fewer pictures"));
    }
    Ok(())
}

/// Refuses pictures that are not as many as the places for them.
fn check_pictures(model: &Llava, pictures: &Pictures<'_>, places: usize) -> Result<()> {
    let given = match pictures {
        Pictures::Features(features) => features.rows() / model.image_tokens().max(1),
        Pictures::Pixels(pixels) => pixels.len(),
    };
    if places > 0 && given != places {
        return Err(Error::usage(format!("{places} places for pictures, and {given} pictures")));
    }
    Ok(())
}

fn check_logits(logits: &[f32]) -> Result<()> {
    if logits.iter().any(|logit| logit.is_nan()) {
        return Err(Error::failed("the model's answer is not a number")
            .hint("the weights hold infinities or NaN, or overflow on this prompt"));
    }
    Ok(())
}

/// Continues every prompt (ids, `IMAGE_TOKEN_INDEX` for each picture; the pictures of all prompts in order).
/// `on_token` hears of every new token, by the prompt's index, and may end that answer. An answer also ends where the
/// model has no more positions.
///
/// # Errors
/// `Usage`: a prompt is empty or has more positions than the model, or the pictures are not as many as their marks.
pub fn generate(
    model: &Llava,
    prompts: &[Vec<i32>],
    pictures: Pictures<'_>,
    options: &Options,
    on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Generated>> {
    let limit = model.config.text().positions();
    let (mut batch, mut sequences) = (PackedBatch::default(), Vec::new());
    for (index, prompt) in prompts.iter().enumerate() {
        let base = batch.tokens();
        batch.push(prompt, &vec![IGNORE_INDEX; prompt.len()], model.image_tokens());
        let length = batch.tokens() - base;
        check_length(length, limit)?;
        let room = options.max_new_tokens.min(limit - length);
        sequences.push(Sequence::new(base, length, room, words(prompt), options, index as u64));
        // Rows for what is to come. With several sequences they are computed once like a prompt: a kernel that walks
        // two neighbours at once gives the other's rows the weight 0, which an unwritten NaN would survive.
        let to_come = vec![0; room.saturating_sub(1)];
        batch.push(&to_come, &vec![IGNORE_INDEX; to_come.len()], 0);
    }
    check_pictures(model, &pictures, batch.images)?;
    let decoder = Decoder { model, cache: KvCache::new(&model.language, &model.parameters, batch.tokens()) };
    if let [only] = &sequences[..] {
        batch.ids.truncate(only.prompt);
    }
    let ends = sequences.iter().skip(1).map(|next| next.base).chain([batch.tokens()]);
    let lengths: Vec<usize> = sequences.iter().zip(ends).map(|(sequence, end)| end - sequence.base).collect();
    let known: Vec<usize> = sequences.iter().map(|sequence| sequence.prompt).collect();
    let logits = decoder.prefill(&batch, pictures, &lengths, &known)?;
    let mut active: Vec<usize> = (0..sequences.len()).collect();
    let mut rows = logits;
    loop {
        for (row, &index) in active.iter().enumerate() {
            let sequence = &mut sequences[index];
            if !sequence.done {
                sequence.next(&mut rows[row], options, &mut |token| on_token(index, token))?;
            }
        }
        active.retain(|&index| !sequences[index].done);
        if active.is_empty() {
            break;
        }
        let last = |sequence: &Sequence| {
            let row = Row { base: sequence.base, position: sequence.prompt + sequence.tokens.len() - 1 };
            Some((*sequence.tokens.last()?, row))
        };
        let (ids, places): (Vec<u32>, Vec<Row>) = active.iter().filter_map(|&index| last(&sequences[index])).unzip();
        rows = decoder.step(&ids, &places)?;
    }
    Ok(sequences.into_iter().map(Sequence::finished).collect())
}

fn choose(logits: &[f32], options: &Options, rng: &mut Rng) -> u32 {
    if options.temperature > 0.0 {
        sampling::sample(logits, options.temperature, options.top_k, options.top_p, rng)
    } else {
        sampling::greedy(logits)
    }
}
