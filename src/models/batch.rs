//! A micro-batch as the device sees it: sequences packed one behind the other, pictures spliced in, no padding.

use crate::data::{IGNORE_INDEX, IMAGE_TOKEN_INDEX, Sample};

/// Packed sequences, on the host.
#[derive(Clone, Debug, Default)]
pub struct PackedBatch {
    /// Spliced length of each sequence.
    pub lengths: Vec<usize>,
    /// [T]: token ids; `u32::MAX` where a picture's row goes.
    pub ids: Vec<u32>,
    /// The rows of picture features, picture by picture in order.
    pub image_rows: Vec<u32>,
    /// How many pictures.
    pub images: usize,
    /// Rows whose hidden state predicts a supervised token, and that token.
    pub predicting_rows: Vec<u32>,
    pub targets: Vec<u32>,
    /// How many targets each sequence has.
    pub targets_per_sequence: Vec<usize>,
}

impl PackedBatch {
    /// Splices `image_tokens` rows in place of every picture mark and aligns labels: row t predicts label t + 1.
    pub fn new<'a>(samples: impl IntoIterator<Item = &'a Sample>, image_tokens: usize) -> Self {
        let mut batch = Self::default();
        for sample in samples {
            batch.push(&sample.tokens, &sample.labels, image_tokens);
        }
        batch
    }

    /// Adds one sequence.
    pub fn push(&mut self, tokens: &[i32], labels: &[i32], image_tokens: usize) {
        let (start, before) = (self.ids.len(), self.targets.len());
        for (&token, &label) in tokens.iter().zip(labels) {
            if token == IMAGE_TOKEN_INDEX {
                let first = self.ids.len() as u32;
                self.image_rows.extend(first..first + image_tokens as u32);
                self.ids.extend(std::iter::repeat_n(u32::MAX, image_tokens));
                self.images += 1;
                continue;
            }
            // The first token of a sequence has nothing before it that could predict it.
            if label != IGNORE_INDEX && self.ids.len() > start {
                self.predicting_rows.push(self.ids.len() as u32 - 1);
                self.targets.push(label as u32);
            }
            self.ids.push(token as u32);
        }
        self.lengths.push(self.ids.len() - start);
        self.targets_per_sequence.push(self.targets.len() - before);
    }

    /// T
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splices_pictures_and_shifts_labels() {
        let mut batch = PackedBatch::default();
        batch.push(&[1, IMAGE_TOKEN_INDEX, 5, 6], &[-100, -100, 5, 6], 3);
        batch.push(&[9, 8], &[9, 8], 3);
        assert_eq!(batch.ids, [1, u32::MAX, u32::MAX, u32::MAX, 5, 6, 9, 8]);
        assert_eq!(batch.image_rows, [1, 2, 3]);
        assert_eq!((batch.predicting_rows, batch.targets), (vec![3, 4, 6], vec![5, 6, 8]));
        assert_eq!((batch.lengths, batch.targets_per_sequence), (vec![6, 2], vec![2, 1]));
    }
}
