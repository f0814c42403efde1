//! The order in which entries are taken, and how they fall into optimizer steps and micro-batches.
//!
//! What a step takes depends on its number alone, so a run resumes without going through the data again.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::rng::Rng;

/// Streams of the seed, one for each use.
const STREAM_EPOCH: u64 = 0x6570_6f63_6800_0000;
const STREAM_MEGABATCH: u64 = 0x6d65_6761_0000_0000;

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Duration {
    /// Times through the data; the last batch of each may be short.
    Epochs(f64),
    /// Optimizer steps, each with a whole batch; the data wraps round.
    Steps(u64),
}

/// The order of entries within an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// As the files have them.
    File,
    /// A new permutation each epoch.
    Shuffled,
    /// LLaVA's `group_by_modality_length`: a global batch is all pictures or all text, and of similar length.
    /// One length an entry, negative without pictures, none zero.
    Grouped(Arc<[i64]>),
}

/// Which entries each optimizer step takes.
#[derive(Debug)]
pub struct Plan {
    entries: usize,
    micro_batch: usize,
    micro_batches: usize,
    duration: Duration,
    order: Order,
    seed: u64,
    total_steps: u64,
    /// The order of the epoch last asked for.
    cached: Mutex<Option<(u64, Arc<[usize]>)>>,
}

impl Plan {
    /// A plan for `entries` entries in micro-batches of `micro_batch`; a step takes `accumulation` of them (times the
    /// number of devices, where there are several).
    ///
    /// Errors (Usage): a count of zero, a duration that is not positive; (Data) no entries.
    pub fn new(
        entries: usize,
        micro_batch: usize,
        accumulation: usize,
        duration: Duration,
        order: Order,
        seed: u64,
    ) -> Result<Self> {
        if entries == 0 {
            return Err(Error::data("the data set is empty"));
        }
        for (key, value) in
            [("per_device_train_batch_size", micro_batch), ("gradient_accumulation_steps", accumulation)]
        {
            if value == 0 {
                return Err(Error::usage(format!("`{key}` is 0")).hint("it is at least 1"));
            }
        }
        let batch = micro_batch.checked_mul(accumulation).ok_or_else(|| Error::usage("the batch is too large"))?;
        let total_steps = match duration {
            Duration::Steps(0) => return Err(Error::usage("`max_steps` is 0").hint("it is at least 1")),
            Duration::Steps(steps) => steps,
            Duration::Epochs(epochs) if epochs.is_finite() && epochs > 0.0 => {
                (entries.div_ceil(batch) as f64 * epochs).ceil() as u64
            }
            Duration::Epochs(epochs) => return Err(Error::usage(format!("`num_train_epochs` is {epochs}"))),
        };
        let cached = Mutex::new(None);
        Ok(Self { entries, micro_batch, micro_batches: accumulation, duration, order, seed, total_steps, cached })
    }

    /// Optimizer steps of the whole run. Under epochs: ceil(entries / batch) for each, rounded up where `Epochs` is
    /// no whole number.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Entries that a whole step takes.
    pub fn batch(&self) -> usize {
        self.micro_batch * self.micro_batches
    }

    /// Micro-batches that a whole step takes.
    pub fn micro_batches(&self) -> usize {
        self.micro_batches
    }

    /// The micro-batches of step `step` (from 0), as indices of entries. Only the last step of an epoch, under
    /// [`Duration::Epochs`], may hold fewer or shorter ones; none is empty.
    pub fn step(&self, step: u64) -> Vec<Vec<usize>> {
        let (batch, entries) = (self.batch() as u64, self.entries as u64);
        let taken: Vec<usize> = match self.duration {
            Duration::Epochs(_) => {
                let steps = entries.div_ceil(batch);
                let order = self.epoch_order(step / steps);
                let from = (step % steps * batch) as usize;
                order[from..order.len().min(from + self.batch())].to_vec()
            }
            Duration::Steps(_) => {
                let first = step * batch;
                (first..first + batch).map(|at| self.epoch_order(at / entries)[(at % entries) as usize]).collect()
            }
        };
        taken.chunks(self.micro_batch).map(<[usize]>::to_vec).collect()
    }

    /// How many times the data has been gone through once `steps` steps are done.
    pub fn epoch_at(&self, steps: u64) -> f64 {
        let (batch, entries) = (self.batch() as u64, self.entries as u64);
        match self.duration {
            Duration::Epochs(_) => {
                let of_epoch = entries.div_ceil(batch);
                (steps / of_epoch) as f64 + (steps % of_epoch * batch) as f64 / entries as f64
            }
            Duration::Steps(_) => (steps * batch) as f64 / entries as f64,
        }
    }

    /// The order of one epoch, every entry once.
    pub fn epoch_order(&self, epoch: u64) -> Arc<[usize]> {
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, order)) = &*cached
            && *of == epoch
        {
            return order.clone();
        }
        let order: Arc<[usize]> = match &self.order {
            Order::File => (0..self.entries).collect(),
            Order::Shuffled => Rng::new(self.seed, STREAM_EPOCH + epoch).permutation(self.entries).into(),
            Order::Grouped(lengths) => self.grouped(lengths, epoch).into(),
        };
        *cached = Some((epoch, order.clone()));
        order
    }

    fn grouped(&self, lengths: &[i64], epoch: u64) -> Vec<usize> {
        let mut inner = Rng::new(self.seed, STREAM_EPOCH + epoch);
        let mut outer = Rng::new(self.seed, STREAM_MEGABATCH + epoch);
        group_by_modality_length(lengths, self.micro_batch, self.micro_batches, &mut inner, &mut outer)
    }
}

/// LLaVA's order by modality and length: `inner` shuffles within a modality, `outer` the order of the megabatches.
fn group_by_modality_length(
    lengths: &[i64],
    size: usize,
    world: usize,
    inner: &mut Rng,
    outer: &mut Rng,
) -> Vec<usize> {
    let (pictures, texts): (Vec<usize>, Vec<usize>) = (0..lengths.len()).partition(|&index| lengths[index] > 0);
    if pictures.is_empty() || texts.is_empty() {
        return group_by_length((0..lengths.len()).collect(), lengths, size, world, inner).concat();
    }
    let mut pictures = group_by_length(pictures, lengths, size, world, inner);
    let mut texts = group_by_length(texts, lengths, size, world, inner);
    // The last of each may be short: they go to the end, together.
    let mut last: Vec<usize> = [pictures.pop(), texts.pop()].into_iter().flatten().flatten().collect();
    last.sort_unstable();
    let mut batches = pictures;
    batches.append(&mut texts);
    outer.shuffle(&mut batches);
    batches.push(last);
    batches.concat()
}

/// Megabatches of `size` * `world` entries drawn at random, each sorted from long to short and dealt to `world` lists of
/// about equal length in words.
fn group_by_length(
    mut indices: Vec<usize>,
    lengths: &[i64],
    size: usize,
    world: usize,
    rng: &mut Rng,
) -> Vec<Vec<usize>> {
    rng.shuffle(&mut indices);
    let megabatch = |chunk: &[usize]| {
        let mut chunk = chunk.to_vec();
        chunk.sort_by_key(|&index| std::cmp::Reverse(lengths[index].unsigned_abs()));
        split_evenly(&chunk, lengths, world)
    };
    indices.chunks(size * world).map(megabatch).collect()
}

/// Deals entries, longest first, to the list with the fewest words that is not full; strided where they do not divide.
fn split_evenly(indices: &[usize], lengths: &[i64], lists: usize) -> Vec<usize> {
    if !indices.len().is_multiple_of(lists) {
        return (0..lists).flat_map(|first| indices.iter().skip(first).step_by(lists).copied()).collect();
    }
    let quota = indices.len() / lists;
    let mut dealt = vec![Vec::with_capacity(quota); lists];
    let mut sums = vec![0_u64; lists];
    for &index in indices {
        let Some(to) = (0..lists).min_by_key(|&list| sums[list]) else { break };
        dealt[to].push(index);
        sums[to] += lengths[index].unsigned_abs();
        if dealt[to].len() == quota {
            sums[to] = u64::MAX;
        }
    }
    dealt.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(entries: usize, duration: Duration, order: Order) -> Plan {
        Plan::new(entries, 2, 2, duration, order, 5).unwrap()
    }

    #[test]
    fn epochs_keep_their_short_last_batch() {
        let plan = plan(10, Duration::Epochs(2.0), Order::File);
        assert_eq!((plan.total_steps(), plan.batch()), (6, 4));
        assert_eq!(plan.step(0), [[0, 1], [2, 3]]);
        assert_eq!(plan.step(2), [[8, 9]]);
        assert_eq!(plan.step(3), plan.step(0));
        assert_eq!((plan.epoch_at(0), plan.epoch_at(2), plan.epoch_at(3), plan.epoch_at(6)), (0.0, 0.8, 1.0, 2.0));
        assert_eq!(Plan::new(7, 2, 2, Duration::Epochs(1.0), Order::File, 0).unwrap().step(1), [vec![4, 5], vec![6]]);
        assert_eq!(Plan::new(10, 2, 2, Duration::Epochs(0.5), Order::File, 0).unwrap().total_steps(), 2);
    }

    #[test]
    fn steps_wrap_round() {
        let wrapped = plan(3, Duration::Steps(4), Order::File);
        assert_eq!(wrapped.step(0), [[0, 1], [2, 0]]);
        assert_eq!(wrapped.step(1), [[1, 2], [0, 1]]);
        assert_eq!(wrapped.epoch_at(3), 4.0);
        let shuffled = plan(10, Duration::Steps(5), Order::Shuffled);
        let all: Vec<usize> = (0..5).flat_map(|step| shuffled.step(step).concat()).collect();
        for epoch in all.chunks(10) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(all[..10], all[10..]);
    }

    #[test]
    fn a_step_depends_on_its_number_alone() {
        let first = plan(100, Duration::Epochs(3.0), Order::Shuffled);
        let straight: Vec<_> = (0..first.total_steps()).map(|step| first.step(step)).collect();
        let again = plan(100, Duration::Epochs(3.0), Order::Shuffled);
        assert_eq!(again.step(60), straight[60]);
        assert_eq!(again.step(7), straight[7]);
        assert_ne!(first.epoch_order(0), first.epoch_order(1));
    }

    #[test]
    fn groups_hold_one_modality() {
        let lengths: Vec<i64> = (0..101).map(|index| if index % 3 == 0 { -(index + 1) } else { index + 1 }).collect();
        let plan = plan(lengths.len(), Duration::Epochs(1.0), Order::Grouped(lengths.clone().into()));
        let order = plan.epoch_order(0);
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..101).collect::<Vec<_>>());
        // 67 with pictures: 16 whole megabatches of 4 and 3 over; 34 without: 8 and 2 over. The last whole ones are
        // not set aside, only the last of each list.
        let whole = (16 + 8) * 4;
        for batch in order[..whole].chunks(4) {
            assert!(batch.iter().all(|&index| (lengths[index] > 0) == (lengths[batch[0]] > 0)), "{batch:?}");
        }
        assert!(order[whole..].is_sorted());
        assert_ne!(plan.epoch_order(1), order);
    }

    #[test]
    fn one_modality_is_grouped_by_length() {
        let lengths: Vec<i64> = (1..=16).map(|index| -index).collect();
        let order = group_by_modality_length(&lengths, 2, 2, &mut Rng::new(1, 0), &mut Rng::new(1, 1));
        for megabatch in order.chunks(4) {
            // The longest and the shortest go together.
            let mut by_length = megabatch.to_vec();
            by_length.sort_by_key(|&index| lengths[index]);
            assert_eq!(megabatch, [by_length[0], by_length[3], by_length[1], by_length[2]]);
        }
    }

    #[test]
    fn dealing_is_even_or_strided() {
        let lengths = [9, 7, 6, 5, 2, 1];
        assert_eq!(split_evenly(&[0, 1, 2, 3, 4, 5], &lengths, 2), [0, 3, 5, 1, 2, 4]);
        assert_eq!(split_evenly(&[0, 1, 2, 3, 4], &lengths, 2), [0, 2, 4, 1, 3]);
    }

    #[test]
    fn wrong_counts_are_errors() {
        assert!(Plan::new(0, 1, 1, Duration::Steps(1), Order::File, 0).is_err());
        assert!(Plan::new(1, 0, 1, Duration::Steps(1), Order::File, 0).is_err());
        assert!(Plan::new(1, 1, 1, Duration::Steps(0), Order::File, 0).is_err());
        assert!(Plan::new(1, 1, 1, Duration::Epochs(f64::NAN), Order::File, 0).is_err());
    }
}
