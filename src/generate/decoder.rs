//! A model with a cache: rows in, logits out.

use crate::{
    autograd::{Tape, Var, functions},
    error::Result,
    gpu::Gpu,
    models::{
        batch::PackedBatch,
        llama::{KvCache, Places, Span},
        llava::{Llava, Pictures},
    },
    nn::Forward,
    ops::attention::Ranges,
    tensor::Tensor,
};

/// A token about to be read: where its sequence begins in the cache, and its position in the sequence.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub base: usize,
    pub position: usize,
}

/// A model with the keys and values of what it has read.
pub struct Decoder<'a> {
    pub model: &'a Llava,
    pub cache: KvCache,
}

impl Decoder<'_> {
    /// Reads packed sequences, which stand in the cache as they stand in the batch; the logits behind the `known`-th
    /// token of each (what follows is read too, and written over later).
    pub fn prefill(
        &self,
        batch: &PackedBatch,
        pictures: Pictures<'_>,
        lengths: &[usize],
        known: &[usize],
    ) -> Result<Vec<Vec<f32>>> {
        let (mut rows, mut last, mut spans, mut base) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for (&count, &known) in lengths.iter().zip(known) {
            rows.extend((0..count).map(|position| Row { base, position }));
            spans.push(Span { first: 0, count, length: known });
            last.push((base + known - 1) as u32);
            base += count;
        }
        let model = self.model;
        let ranges = |gpu: &Gpu| Ranges::packed(gpu, lengths, model.language.mask());
        self.run(&rows, &spans, &ranges, &last, |forward| model.embed(forward, batch, pictures))
    }

    /// Reads what follows `first` positions of the one sequence that is in the cache; the logits behind its last token.
    pub fn extend(&self, batch: &PackedBatch, pictures: Pictures<'_>, first: usize) -> Result<Vec<Vec<f32>>> {
        let (model, count) = (self.model, batch.tokens());
        let rows: Vec<Row> = (first..first + count).map(|position| Row { base: 0, position }).collect();
        let spans = [Span { first, count, length: first + count }];
        let last = [count.saturating_sub(1) as u32];
        self.run(&rows, &spans, &|gpu| self.ranges(gpu, &rows), &last, |forward| model.embed(forward, batch, pictures))
    }

    /// What each row sees of its sequence in the cache.
    fn ranges(&self, gpu: &Gpu, rows: &[Row]) -> Ranges {
        let mask = self.model.language.mask();
        let ranges = rows
            .iter()
            .flat_map(|row| [(row.base + mask.first_key(row.position)) as u32, (row.base + row.position + 1) as u32]);
        let ranges: Vec<u32> = ranges.collect();
        Ranges::cached(gpu, &ranges)
    }

    /// Reads one token of each sequence; the logits behind it.
    pub fn step(&self, ids: &[u32], rows: &[Row]) -> Result<Vec<Vec<f32>>> {
        let model = self.model;
        let spans: Vec<Span> =
            rows.iter().map(|row| Span { first: row.position, count: 1, length: row.position + 1 }).collect();
        let last: Vec<u32> = (0..ids.len() as u32).collect();
        self.run(rows, &spans, &|gpu| self.ranges(gpu, rows), &last, |forward| Ok(model.language.embed(forward, ids)))
    }

    /// Runs rows, of which `spans` are neighbours and which see `ranges`, through the decoder, and the rows `last`
    /// through the head.
    fn run(
        &self,
        rows: &[Row],
        spans: &[Span],
        ranges: &dyn Fn(&Gpu) -> Ranges,
        last: &[u32],
        embed: impl FnOnce(&mut Forward<'_>) -> Result<Var>,
    ) -> Result<Vec<Vec<f32>>> {
        let model = self.model;
        let upload = |gpu: &Gpu, words: &[u32]| Tensor::from_u32(gpu, words, &[words.len()]);
        let cached: Vec<u32> = rows.iter().map(|row| (row.base + row.position) as u32).collect();
        let places_on = |gpu: &Gpu| Places {
            rotary: model.language.rotary(gpu, spans),
            ranges: ranges(gpu),
            cache: Some((&self.cache, upload(gpu, &cached))),
        };
        let mut tape = Tape::silent();
        let mut forward = Forward { tape: &mut tape, parameters: &model.parameters, dropout: None, before: None };
        let embeddings = embed(&mut forward)?;
        let hidden = model.language.forward(&mut forward, embeddings, &places_on);
        let hidden = functions::pick_rows(forward.tape, &hidden, &upload(hidden.value.gpu(), last));
        let head = model.language.head(forward.parameters);
        let hidden = functions::to_device(forward.tape, hidden, head.value.gpu());
        let logits = functions::linear(forward.tape, &hidden, &head, None);
        let width = logits.value.cols();
        Ok(logits.value.to_vec()?.chunks_exact(width).map(<[f32]>::to_vec).collect())
    }
}
