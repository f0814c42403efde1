//! Answers, token by token: prompts packed through the decoder once, then one row a sequence and step, earlier keys and
//! values kept on the device.

mod sampling;

use std::ops::ControlFlow;

use crate::{
    autograd::{Tape, Var, functions},
    data::IGNORE_INDEX,
    error::{Error, Result},
    models::{
        batch::PackedBatch,
        llama::{KvCache, Places, Span},
        llava::{Llava, Pictures},
    },
    nn::Forward,
    ops::attention::Ranges,
    rng::Rng,
    tensor::Tensor,
};

/// How tokens are chosen and when to stop.
#[derive(Clone, Debug)]
pub struct Options {
    pub max_new_tokens: usize,
    /// 0: always the likeliest token.
    pub temperature: f32,
    pub top_p: f32,
    pub seed: u64,
    /// Any of these ends an answer.
    pub stop_ids: Vec<u32>,
}

impl Options {
    /// The likeliest token every time.
    pub fn greedy(max_new_tokens: usize, stop_ids: Vec<u32>) -> Self {
        Self { max_new_tokens, temperature: 0.0, top_p: 1.0, seed: 0, stop_ids }
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
    rng: Rng,
    done: bool,
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
        if length == 0 {
            return Err(Error::usage("the prompt is empty").hint("give it at least a word"));
        }
        if length > limit {
            let message = format!("the prompt has {length} positions, the model has {limit}");
            return Err(Error::usage(message).hint("shorten the prompt, or give fewer pictures"));
        }
        let room = options.max_new_tokens.min(limit - length);
        sequences.push(Sequence {
            base,
            prompt: length,
            room,
            tokens: Vec::new(),
            rng: Rng::new(options.seed, index as u64),
            done: room == 0,
        });
        // Rows for what is to come. With several sequences they are computed once like a prompt: a kernel that walks
        // two neighbours at once gives the other's rows the weight 0, which an unwritten NaN would survive.
        let to_come = vec![0; room.saturating_sub(1)];
        batch.push(&to_come, &vec![IGNORE_INDEX; to_come.len()], 0);
    }
    let given = match &pictures {
        Pictures::Features(features) => features.rows() / model.image_tokens().max(1),
        Pictures::Pixels(pixels) => pixels.len(),
    };
    if batch.images > 0 && given != batch.images {
        return Err(Error::usage(format!("{} places for pictures, and {given} pictures", batch.images)));
    }
    let cache = KvCache::new(model.gpu(), model.config.text(), batch.tokens());
    let mut decoder = Decoder { model, cache };
    let logits = decoder.prefill(batch, pictures, &sequences)?;
    let mut active: Vec<usize> = (0..sequences.len()).collect();
    let mut rows = logits;
    loop {
        for (row, &index) in active.iter().enumerate() {
            let sequence = &mut sequences[index];
            if sequence.done {
                continue;
            }
            if rows[row].iter().any(|logit| logit.is_nan()) {
                return Err(Error::failed("the model's answer is not a number")
                    .hint("the weights hold infinities or NaN, or overflow on this prompt"));
            }
            let token = choose(&rows[row], options, &mut sequence.rng);
            sequence.tokens.push(token);
            let told = on_token(index, token);
            sequence.done =
                told.is_break() || options.stop_ids.contains(&token) || sequence.tokens.len() >= sequence.room;
        }
        active.retain(|&index| !sequences[index].done);
        if active.is_empty() {
            break;
        }
        rows = decoder.step(active.iter().map(|&index| &sequences[index]))?;
    }
    let finished = |sequence: Sequence| Generated { token_ids: sequence.tokens, prompt_tokens: sequence.prompt };
    Ok(sequences.into_iter().map(finished).collect())
}

fn choose(logits: &[f32], options: &Options, rng: &mut Rng) -> u32 {
    if options.temperature > 0.0 {
        sampling::sample(logits, options.temperature, options.top_p, rng)
    } else {
        sampling::greedy(logits)
    }
}

/// A model with the keys and values of what it has read.
struct Decoder<'a> {
    model: &'a Llava,
    cache: KvCache,
}

impl Decoder<'_> {
    /// Reads the prompts; the logits behind each one's last token.
    fn prefill(
        &mut self,
        mut batch: PackedBatch,
        pictures: Pictures<'_>,
        sequences: &[Sequence],
    ) -> Result<Vec<Vec<f32>>> {
        if let [only] = sequences {
            batch.ids.truncate(only.prompt);
        }
        let mut places = Vec::new();
        let ends = sequences.iter().skip(1).map(|next| next.base).chain([batch.tokens()]);
        for (sequence, end) in sequences.iter().zip(ends.clone()) {
            places.extend((0..end - sequence.base).map(|position| (sequence.base, position)));
        }
        let last: Vec<u32> = sequences.iter().map(|sequence| (sequence.base + sequence.prompt - 1) as u32).collect();
        let model = self.model;
        // Rows stand in the cache as they stand in the batch.
        let lengths: Vec<usize> = ends.zip(sequences).map(|(end, sequence)| end - sequence.base).collect();
        let ranges = Ranges::packed(model.gpu(), &lengths, model.language.mask());
        let spans = |sequence: &Sequence, &count: &usize| Span { first: 0, count, length: sequence.prompt };
        let spans: Vec<Span> = sequences.iter().zip(&lengths).map(|(sequence, count)| spans(sequence, count)).collect();
        self.run(&places, &spans, ranges, &last, |forward| model.embed(forward, &batch, pictures))
    }

    /// Reads the last token of each sequence; the logits behind it.
    fn step<'s>(&mut self, sequences: impl Iterator<Item = &'s Sequence>) -> Result<Vec<Vec<f32>>> {
        let (mut ids, mut places) = (Vec::new(), Vec::new());
        for sequence in sequences {
            ids.extend(sequence.tokens.last());
            places.push((sequence.base, sequence.prompt + sequence.tokens.len() - 1));
        }
        let last: Vec<u32> = (0..ids.len() as u32).collect();
        let model = self.model;
        let mask = model.language.mask();
        let spans: Vec<Span> = places.iter().map(|&(_, first)| Span { first, count: 1, length: first + 1 }).collect();
        let ranges = places
            .iter()
            .flat_map(|&(base, position)| [(base + mask.first_key(position)) as u32, (base + position + 1) as u32]);
        let ranges: Vec<u32> = ranges.collect();
        let ranges = Ranges::cached(Tensor::from_u32(model.gpu(), &ranges, &[places.len(), 2]));
        self.run(&places, &spans, ranges, &last, |forward| Ok(model.language.embed(forward, &ids)))
    }

    /// Runs rows at `places` (first row of the sequence, position in it; `spans` are the same in runs), which see
    /// `ranges`, through the decoder, and the rows `last` through the head.
    fn run(
        &mut self,
        places: &[(usize, usize)],
        spans: &[Span],
        ranges: Ranges,
        last: &[u32],
        embed: impl FnOnce(&mut Forward<'_>) -> Result<Var>,
    ) -> Result<Vec<Vec<f32>>> {
        let (model, gpu) = (self.model, self.model.gpu());
        let upload = |words: Vec<u32>, shape: &[usize]| Tensor::from_u32(gpu, &words, shape);
        let rows = places.iter().map(|&(base, position)| (base + position) as u32).collect();
        let count = places.len();
        let places = Places {
            rotary: model.language.rotary(gpu, spans),
            ranges,
            cache: Some((&self.cache, upload(rows, &[count]))),
        };
        let mut tape = Tape::silent();
        let mut forward = Forward { tape: &mut tape, parameters: &model.parameters, dropout: None };
        let embeddings = embed(&mut forward)?;
        let hidden = model.language.forward(&mut forward, &embeddings, &places);
        let hidden = functions::pick_rows(forward.tape, &hidden, &upload(last.to_vec(), &[last.len()]));
        let head = forward.parameters.weight(model.language.lm_head());
        let logits = functions::linear(forward.tape, &hidden, &head, None);
        let width = logits.value.cols();
        Ok(logits.value.to_vec()?.chunks_exact(width).map(<[f32]>::to_vec).collect())
    }
}
