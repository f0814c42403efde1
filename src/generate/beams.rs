//! Beam search as transformers 5 does it (`GenerationMixin._beam_search` with `early_stopping = False`).

use super::decoder::{Decoder, Row};
use super::{Generated, Options, check_length, check_logits, check_pictures, sampling, words};
use crate::{
    data::IGNORE_INDEX,
    error::Result,
    models::{
        batch::PackedBatch,
        llama::KvCache,
        llava::{Llava, Pictures},
    },
};

/// A continuation of the prompt, its log-probability so far.
#[derive(Clone, Debug)]
struct Beam {
    tokens: Vec<u32>,
    score: f32,
}

/// Continues one prompt (as [`super::generate`]) with `beams` beams; a finished answer counts its log-probability
/// divided by its length to the power of `length_penalty`. Sampling options are not used.
///
/// # Errors
/// As [`super::generate`].
pub fn search(
    model: &Llava,
    prompt: &[i32],
    pictures: Pictures<'_>,
    options: &Options,
    beams: usize,
    length_penalty: f32,
) -> Result<Generated> {
    let mut batch = PackedBatch::default();
    batch.push(prompt, &vec![IGNORE_INDEX; prompt.len()], model.image_tokens());
    let length = batch.tokens();
    let limit = model.config.text().positions();
    check_length(length, limit)?;
    check_pictures(model, &pictures, batch.images)?;
    let room = options.max_new_tokens.min(limit - length);
    if room == 0 {
        return Ok(Generated { token_ids: Vec::new(), prompt_tokens: length });
    }
    let prompt_words = words(prompt);

    // Each beam has rows of its own; a second cache takes the rows of the beams that go on.
    let capacity = length + room;
    let rows = beams * capacity;
    let zeros = || KvCache::zeros(&model.language, &model.parameters, rows);
    let mut decoder = Decoder { model, cache: zeros() };
    let mut spare = zeros();
    let first = decoder.prefill(&batch, pictures, &[length], &[length])?;
    for beam in 0..beams {
        decoder.cache.copy_rows(&spare, 0, beam * capacity, length);
    }
    for beam in 1..beams {
        spare.copy_rows(&decoder.cache, 0, beam * capacity, length);
    }

    let mut logits = first;
    let mut running = vec![Beam { tokens: Vec::new(), score: 0.0 }];
    let mut finished: Vec<Beam> = Vec::new();
    let normalised = |score: f32, length: usize| score / (length as f32).powf(length_penalty);
    // Enough candidates that `beams` are left should every end mark be among them.
    let wanted = (1 + options.stop_ids.len()).max(2) * beams;
    for step in 1..=room {
        let candidates = candidates(&mut logits, &running, &prompt_words, options.repetition_penalty, wanted)?;
        let ends = |token: u32| step == room || options.stop_ids.contains(&token);
        for (rank, &(parent, token, score)) in candidates.iter().enumerate() {
            if ends(token) && rank < beams {
                finished.push(Beam { tokens: extended(&running[parent], token), score: normalised(score, step) });
            }
        }
        finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        finished.truncate(beams);
        let going: Vec<(usize, u32, f32)> =
            candidates.into_iter().filter(|&(_, token, _)| !ends(token)).take(beams).collect();
        // What runs can at best end with the score it has now.
        let Some(&(_, _, best)) = going.first() else { break };
        let worst = finished.get(beams - 1).map(|beam| beam.score);
        if worst.is_some_and(|worst| normalised(best, step) <= worst) {
            break;
        }
        for (beam, &(parent, _, _)) in going.iter().enumerate() {
            decoder.cache.copy_rows(&spare, parent * capacity + length, beam * capacity + length, step - 1);
        }
        std::mem::swap(&mut decoder.cache, &mut spare);
        running = going
            .iter()
            .map(|&(parent, token, score)| Beam { tokens: extended(&running[parent], token), score })
            .collect();
        let ids: Vec<u32> = going.iter().map(|&(_, token, _)| token).collect();
        let places: Vec<Row> =
            (0..ids.len()).map(|beam| Row { base: beam * capacity, position: length + step - 1 }).collect();
        logits = decoder.step(&ids, &places)?;
    }
    let token_ids = finished.into_iter().next().map(|beam| beam.tokens).unwrap_or_default();
    Ok(Generated { token_ids, prompt_tokens: length })
}

fn extended(beam: &Beam, token: u32) -> Vec<u32> {
    beam.tokens.iter().copied().chain([token]).collect()
}

/// The best continuations (beam, token, score) of all beams by one token, best first.
fn candidates(
    logits: &mut [Vec<f32>],
    running: &[Beam],
    prompt: &[u32],
    penalty: f32,
    wanted: usize,
) -> Result<Vec<(usize, u32, f32)>> {
    let mut all = Vec::new();
    for (index, (row, beam)) in logits.iter_mut().zip(running).enumerate() {
        check_logits(row)?;
        log_softmax(row);
        let seen: Vec<u32> = prompt.iter().chain(&beam.tokens).copied().collect();
        sampling::penalise(row, &seen, penalty);
        all.extend(row.iter().zip(0..).map(|(&score, token)| (index, token, beam.score + score)));
    }
    let better = |a: &(usize, u32, f32), b: &(usize, u32, f32)| b.2.total_cmp(&a.2).then((a.0, a.1).cmp(&(b.0, b.1)));
    if all.len() > wanted {
        all.select_nth_unstable_by(wanted - 1, better);
        all.truncate(wanted);
    }
    all.sort_by(better);
    Ok(all)
}

fn log_softmax(row: &mut [f32]) {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    let shift = largest + sum.ln() as f32;
    row.iter_mut().for_each(|logit| *logit -= shift);
}
