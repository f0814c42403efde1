//! A data set: records from one or several files, and their samples, made when they are asked for or all at once.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use rayon::prelude::*;

use super::{
    image::ImageSource,
    record::{Content, Record, Repairs, read_records},
    sample::{Encoder, Sample},
};
use crate::{
    error::{Error, Result},
    rng::Rng,
};

/// Samples are kept after a first pass as long as they hold no more tokens than this (about half a GiB).
const KEPT_TOKENS: usize = 1 << 26;

/// A file of records, or records that are here already, and how much of them is used.
#[derive(Clone, Debug)]
pub struct Source {
    pub path: PathBuf,
    /// Relative picture paths begin here; the file's own folder if absent.
    pub image_folder: Option<PathBuf>,
    /// How often the file is used in one epoch: 2 is twice, 0.5 a half of it, drawn once by the seed. 1 is as it is.
    pub weight: f64,
    /// Only the first so many records.
    pub limit: Option<usize>,
    /// The records themselves, where they are in no file: `path` is their name then.
    pub records: Option<Vec<Record>>,
}

impl Source {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), image_folder: None, weight: 1.0, limit: None, records: None }
    }
}

/// What a data set holds, for the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Entries of one epoch; a record that is used twice counts twice.
    pub records: usize,
    pub with_images: usize,
    pub images: usize,
    /// Positions after splicing and cutting, and those of them that are predicted.
    pub tokens: usize,
    pub target_tokens: usize,
    pub longest: usize,
    /// Records that lost their tail, and the positions lost.
    pub truncated_records: usize,
    pub truncated_tokens: usize,
    /// Records with nothing left to learn, and those of them that were not even cut.
    pub fully_masked: usize,
    pub fully_masked_whole: usize,
    /// Turns that the template `plain` has no use for.
    pub ignored_turns: usize,
    pub repairs: Repairs,
}

/// Records, in the order of the sources, and what tokenises them.
pub struct Dataset {
    records: Vec<Record>,
    /// The records of one epoch, by index; some may stand here twice, or not at all.
    entries: Vec<u32>,
    encoder: Encoder,
    /// The samples of `records`, once they were all made.
    samples: Vec<Sample>,
}

impl Dataset {
    /// Reads every source. `seed` draws the part of a source whose weight is no whole number.
    ///
    /// Errors: a source that cannot be read (Data), a weight that is negative or no number (Usage), nothing left (Data).
    pub fn open(sources: impl IntoIterator<Item = Source>, encoder: Encoder, seed: u64) -> Result<Self> {
        let mut records = Vec::new();
        let mut entries = Vec::new();
        for (number, source) in sources.into_iter().enumerate() {
            if !(0.0..=1000.0).contains(&source.weight) {
                return Err(Error::usage(format!(
                    "data_path: the weight of {} is {}",
                    source.path.display(),
                    source.weight
                ))
                .hint("a weight says how often a file is used in an epoch: 0 to 1000"));
            }
            let beside = source.path.parent().unwrap_or(Path::new(""));
            let folder = source.image_folder.as_deref().unwrap_or(beside);
            let read = match source.records {
                Some(mut records) => {
                    records.truncate(source.limit.unwrap_or(usize::MAX));
                    records
                }
                None => read_records(&source.path, folder, source.limit)?,
            };
            entries.extend(used(records.len(), read.len(), source.weight, &mut Rng::new(seed, number as u64)));
            records.extend(read);
        }
        if entries.is_empty() {
            return Err(
                Error::data("the data set is empty").hint("check `data_path`, and the weights and limits in it")
            );
        }
        Ok(Self { records, entries, encoder, samples: Vec::new() })
    }

    /// Entries of one epoch.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// The record of an entry; `index` is below [`Self::len`].
    pub fn record(&self, index: usize) -> &Record {
        &self.records[self.entries[index] as usize]
    }

    /// The sample of an entry, kept or made now; `index` is below [`Self::len`].
    pub fn sample(&self, index: usize) -> Result<Sample> {
        let record = self.entries[index] as usize;
        match self.samples.get(record) {
            Some(sample) => Ok(sample.clone()),
            None => self.encoder.encode(&self.records[record]),
        }
    }

    /// Tokenises everything, on all cores, and says what is in it; `progress` gets (done, total) now and then. Samples
    /// are kept, unless they are very many.
    pub fn prepare(&mut self, progress: impl Fn(usize, usize) + Sync) -> Result<Statistics> {
        let total = self.records.len();
        let done = AtomicUsize::new(0);
        let kept_tokens = AtomicUsize::new(0);
        let reporting = Mutex::new(());
        let samples: Vec<(Option<Sample>, Measure)> = self
            .records
            .par_iter()
            .map(|record| {
                let sample = self.encoder.encode(record)?;
                let measure = Measure::of(record, &sample, &self.encoder);
                let count = done.fetch_add(1, Ordering::Relaxed) + 1;
                if count.is_multiple_of(1000) || count == total {
                    let _one_at_a_time = reporting.lock();
                    progress(count, total);
                }
                let kept = kept_tokens.fetch_add(sample.tokens.len(), Ordering::Relaxed) < KEPT_TOKENS;
                Ok((kept.then_some(sample), measure))
            })
            .collect::<Result<_>>()?;
        let mut statistics = Statistics { records: self.entries.len(), ..Statistics::default() };
        for &entry in &self.entries {
            samples[entry as usize].1.add_to(&mut statistics);
        }
        self.samples = samples.into_iter().map_while(|(sample, _)| sample).collect();
        if self.samples.len() < total {
            self.samples = Vec::new();
        }
        Ok(statistics)
    }

    /// Each entry's words, negative for entries without pictures: what `group_by_modality_length` sorts by.
    ///
    /// Error (Data): an entry without a word.
    pub fn modality_lengths(&self) -> Result<Vec<i64>> {
        let length = |&entry: &u32| {
            let record = &self.records[entry as usize];
            match record.modality_length() {
                0 => Err(Error::data(format!("record {:?} holds no word", record.id))
                    .hint("`group_by_modality_length` needs words to count: remove the record, or turn it off")),
                length => Ok(length),
            }
        };
        self.entries.iter().map(length).collect()
    }

    /// Every picture of the data set, once each, in the order in which it is first used.
    pub fn images(&self) -> Vec<ImageSource> {
        let mut seen = HashSet::new();
        let of = |&entry: &u32| self.records[entry as usize].images.iter();
        self.entries.iter().flat_map(of).filter(|image| seen.insert(*image)).cloned().collect()
    }

    /// As [`check_images`], of every record.
    pub fn check_images(&self) -> Result<()> {
        check_images(&self.records)
    }
}

/// Looks for every picture file, without reading it. Error (Data): names the record of the first that is missing, and
/// how many there are.
pub fn check_images(records: &[Record]) -> Result<()> {
    let mut seen = HashSet::new();
    let mut missing = Vec::new();
    for record in records {
        for image in &record.images {
            if let ImageSource::File(path) = image
                && seen.insert(path)
                && !path.is_file()
            {
                missing.push((&record.id, path));
            }
        }
    }
    let Some((id, path)) = missing.first() else { return Ok(()) };
    Err(Error::data(format!("record {id:?}: `image`: there is no file {}", path.display()))
        .hint(format!("picture files missing in all: {}; `image_folder` says where they are", missing.len())))
}

/// The entries of a source whose `count` records begin at `first`: all of it, as often as `weight` has whole ones, then
/// a drawn part, in file order.
fn used(first: usize, count: usize, weight: f64, rng: &mut Rng) -> Vec<u32> {
    let all = first as u32..(first + count) as u32;
    let mut entries = Vec::new();
    (0..weight as usize).for_each(|_| entries.extend(all.clone()));
    let mut part = rng.permutation(count);
    part.truncate((weight.fract() * count as f64).round() as usize);
    part.sort_unstable();
    entries.extend(part.into_iter().map(|index| (first + index) as u32));
    entries
}

/// `1 record`, `2 records`.
pub fn counted(records: usize) -> String {
    format!("{records} record{}", if records == 1 { "" } else { "s" })
}

/// What one record adds to the statistics.
struct Measure {
    images: usize,
    tokens: usize,
    targets: usize,
    truncated: usize,
    ignored_turns: usize,
    repairs: Repairs,
}

impl Measure {
    fn of(record: &Record, sample: &Sample, encoder: &Encoder) -> Self {
        let turns = if let Content::Conversation(turns) = &record.content { turns.len() } else { 0 };
        Self {
            images: sample.images.len(),
            tokens: sample.spliced_length(encoder.image_tokens),
            targets: sample.target_tokens(),
            truncated: sample.truncated,
            ignored_turns: if encoder.version.is_plain() { turns.saturating_sub(2) } else { 0 },
            repairs: record.repairs,
        }
    }

    fn add_to(&self, all: &mut Statistics) {
        all.with_images += usize::from(self.images > 0);
        all.images += self.images;
        all.tokens += self.tokens;
        all.target_tokens += self.targets;
        all.longest = all.longest.max(self.tokens);
        all.truncated_records += usize::from(self.truncated > 0);
        all.truncated_tokens += self.truncated;
        all.fully_masked += usize::from(self.targets == 0);
        all.fully_masked_whole += usize::from(self.targets == 0 && self.truncated == 0);
        all.ignored_turns += self.ignored_turns;
        all.repairs.dropped_turns += self.repairs.dropped_turns;
        all.repairs.merged_placeholders += self.repairs.merged_placeholders;
        all.repairs.unplaced_images += self.repairs.unplaced_images;
        all.repairs.literal_placeholders += self.repairs.literal_placeholders;
    }
}

impl Statistics {
    /// Refuses a data set that has nothing to learn, or in which more than one record in a hundred has nothing although
    /// it was not cut.
    pub fn check(&self) -> Result<()> {
        if self.target_tokens == 0 {
            return Err(Error::data("no record has anything left to learn")
                .hint("raise `model_max_length`, and look whether the answers are empty"));
        }
        if self.fully_masked_whole * 100 > self.records {
            return Err(Error::data(format!(
                "{} of {} records have nothing to learn",
                self.fully_masked_whole, self.records
            ))
            .hint("look whether their answers are empty, and whether `version` fits the data"));
        }
        Ok(())
    }

    /// One line for each thing that a person should know; nothing where there is nothing to say.
    pub fn notes(&self, max_length: Option<usize>) -> Vec<String> {
        let limit = max_length.map_or_else(String::new, |limit| format!(" of {limit}"));
        let repairs = &self.repairs;
        let lost = format!("records longer than model_max_length{limit} ({} positions lost)", self.truncated_tokens);
        [
            (self.truncated_records, lost.as_str()),
            (self.fully_masked, "records with nothing to learn"),
            (self.ignored_turns, "further turns, ignored by the template `plain`"),
            (repairs.dropped_turns, "turns dropped before the first question or after the last answer"),
            (repairs.unplaced_images, "pictures unused, with no `<image>` in the text of their records"),
            (repairs.merged_placeholders, "repeated `<image>` taken as one (one picture, several in one turn)"),
            (repairs.literal_placeholders, "`<image>` without a picture, taken as ordinary text"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{what}: {count}"))
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_repeat_and_draw() {
        let draw = |weight| used(10, 8, weight, &mut Rng::new(0, 0));
        assert_eq!(draw(1.0), (10..18).collect::<Vec<_>>());
        assert_eq!(draw(2.0).len(), 16);
        assert!(draw(0.0).is_empty());
        let half = draw(0.5);
        assert_eq!(half.len(), 4);
        assert!(half.is_sorted() && half.iter().all(|entry| (10..18).contains(entry)));
        assert_eq!(half, draw(0.5));
        assert_eq!(draw(1.25)[..8], draw(1.0));
        assert_eq!(draw(1.25).len(), 10);
    }

    #[test]
    fn statistics_are_checked_and_told() {
        let mut statistics =
            Statistics { records: 100, target_tokens: 5, fully_masked_whole: 1, ..Statistics::default() };
        assert!(statistics.check().is_ok());
        assert!(statistics.notes(None).is_empty());
        statistics.fully_masked_whole = 2;
        assert_eq!(statistics.check().unwrap_err().message, "2 of 100 records have nothing to learn");
        statistics = Statistics { truncated_records: 2, truncated_tokens: 9, ..Statistics::default() };
        assert_eq!(statistics.notes(Some(64)), ["records longer than model_max_length of 64 (9 positions lost): 2"]);
    }
}
