//! A conversation's answers one after another: keys and values of what was read before are kept, and of a new prompt
//! only what differs from that is read.

use std::{ops::ControlFlow, sync::Arc};

use super::{
    Generated, Options, Sequence, check_length, check_pictures,
    decoder::{Decoder, Row},
    words,
};
use crate::{
    data::{IGNORE_INDEX, IMAGE_TOKEN_INDEX},
    error::Result,
    models::{
        batch::PackedBatch,
        llama::KvCache,
        llava::{Llava, Pictures},
    },
};

/// The cache grows by so many rows at least.
const ROWS: usize = 256;

/// A picture's processed pixels, as [`Pictures::Pixels`] has them.
pub type Pixels = Arc<[f32]>;

/// A model with what it has read of a conversation.
pub struct Session<'a> {
    decoder: Decoder<'a>,
    /// Rows of the cache.
    capacity: usize,
    /// What stands in the cache from row 0 on, [`IMAGE_TOKEN_INDEX`] for each picture, and these pictures.
    read: Vec<i32>,
    pictures: Vec<Pixels>,
    /// Keys were rotated for the length that the sequence had, and fit no other.
    of_one_length: bool,
    kept: usize,
}

impl<'a> Session<'a> {
    pub fn new(model: &'a Llava) -> Self {
        let decoder = Decoder { model, cache: KvCache::zeros(&model.language, &model.parameters, 1) };
        Self { decoder, capacity: 1, read: Vec::new(), pictures: Vec::new(), of_one_length: false, kept: 0 }
    }

    /// Positions of the last prompt that had been read before.
    pub fn kept(&self) -> usize {
        self.kept
    }

    /// Continues a prompt (ids, `IMAGE_TOKEN_INDEX` for each of `pictures`), as [`super::generate`] does with it alone.
    ///
    /// # Errors
    /// As [`super::generate`]; the session can go on after any but a failure of the device.
    pub fn answer(
        &mut self,
        prompt: &[i32],
        pictures: &[Pixels],
        options: &Options,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generated> {
        let model = self.decoder.model;
        let limit = model.config.text().positions();
        let places = prompt.iter().filter(|&&id| id == IMAGE_TOKEN_INDEX).count();
        let length = prompt.len() - places + places * model.image_tokens();
        self.kept = 0;
        check_length(length, limit)?;
        let views: Vec<&[f32]> = pictures.iter().map(|pixels| &**pixels).collect();
        check_pictures(model, &Pictures::Pixels(&views), places)?;
        let room = options.max_new_tokens.min(limit - length);
        let mut sequence = Sequence::new(0, length, room, words(prompt), options, 0);
        if sequence.done {
            return Ok(sequence.finished());
        }

        let follows_length = model.language.rotates_by_length(length);
        let common = if follows_length || self.of_one_length { 0 } else { self.common(prompt, pictures) };
        let (before, after) = prompt.split_at(common);
        let seen = before.iter().filter(|&&id| id == IMAGE_TOKEN_INDEX).count();
        let kept = common - seen + seen * model.image_tokens();
        let mut batch = PackedBatch::default();
        batch.push(after, &vec![IGNORE_INDEX; after.len()], model.image_tokens());
        // Until all is read, the cache holds no more than what stays.
        self.read.truncate(common);
        self.pictures.truncate(seen);
        self.reserve(length + room - 1, kept);
        let new = Pictures::Pixels(views.get(seen..).unwrap_or_default());
        let mut logits = if kept == 0 {
            self.decoder.prefill(&batch, new, &[length], &[length])?
        } else {
            self.decoder.extend(&batch, new, kept)?
        };
        self.kept = kept;
        self.read = prompt.to_vec();
        self.pictures = pictures.to_vec();
        self.of_one_length = follows_length;
        while let Some(row) = logits.first_mut() {
            let token = sequence.next(row, options, on_token)?;
            if sequence.done {
                break;
            }
            let row = Row { base: 0, position: length + sequence.tokens.len() - 1 };
            logits = self.decoder.step(&[token], &[row])?;
            self.read.push(token as i32);
            self.of_one_length |= model.language.rotates_by_length(row.position + 1);
        }
        Ok(sequence.finished())
    }

    /// How much of a prompt stands in the cache; never all of it, since what follows is told by its last row.
    fn common(&self, prompt: &[i32], pictures: &[Pixels]) -> usize {
        let mut picture = 0;
        let same = self.read.iter().zip(prompt).take_while(|&(old, new)| {
            if *new != IMAGE_TOKEN_INDEX || old != new {
                return old == new;
            }
            picture += 1;
            match (self.pictures.get(picture - 1), pictures.get(picture - 1)) {
                (Some(old), Some(new)) => Arc::ptr_eq(old, new) || old == new,
                _ => false,
            }
        });
        same.count().min(prompt.len() - 1)
    }

    /// Room for `rows` rows, of which the first `kept` stay as they are.
    fn reserve(&mut self, rows: usize, kept: usize) {
        if rows <= self.capacity {
            return;
        }
        let model = self.decoder.model;
        let capacity = rows.next_multiple_of(ROWS).max((self.capacity * 3 / 2).min(model.config.text().positions()));
        // Zeros: a kernel that reads rows which are not written yet gives them the weight 0, which a NaN would survive.
        let cache = KvCache::zeros(&model.language, &model.parameters, capacity);
        self.decoder.cache.copy_rows(&cache, 0, 0, kept);
        self.decoder.cache = cache;
        self.capacity = capacity;
    }
}
