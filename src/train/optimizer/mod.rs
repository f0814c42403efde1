//! AdamW over flat arenas ([`Shard`]): everything that trains lies in a few buffers, its gradients and moments in others
//! beside them, so that zeroing, the gradient norm and the update are a few dispatches whatever the number of tensors.
//!
//! Weights are f32; or f32 masters with copies in 16 bits, which the model reads; or bfloat16 alone, rounded at random.
//! Moments are f32, or with `adamw_8bit` those of tensors that are not small in eight bits. Gradients are f32.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

mod apart;
mod arenas;
mod buckets;
mod host;
mod pieces;
mod shard;
mod sharing;
mod state;

pub use buckets::{Bucket, Parcel, Span};
pub use host::{HostOptimizer, updating_rate};
pub use pieces::Piece;
pub use sharing::Sharing;
pub use state::{Reader, Remembers, State, Stored};

/// What trains of a small model, on a device that only counts.
#[cfg(test)]
pub use pieces::tests::optimizer as small_optimizer;

use arenas::{Entry, Placed, arena, parts};
use buckets::{buckets, parcels};
use pieces::bytes_of;
use shard::Shard;

use crate::{
    error::Result,
    gpu::{Account, Gpu},
    models::streaming::Streaming,
    nn::{Id, Parameters},
    ops::elementwise,
    tensor::{Downloading, Dtype, Tensor},
};

/// Bytes of an arena at most, or of one tensor: devices refuse larger buffers.
const ARENA_BYTES: u64 = 1 << 30;

/// Arenas at least where weights return: every device updates a part of each, so that what a forward reads first comes
/// over the links of all.
const SHARED_ARENAS: usize = 8;

/// One tensor that trains.
#[derive(Clone, Debug)]
pub struct Trainable {
    pub id: Id,
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// Projector or tower: a step without pictures gives it no gradient.
    pub of_pictures: bool,
}

/// How many updates each kind of tensor has had. As in PyTorch, a tensor that a step gives no gradient is not
/// touched by it, neither by momentum nor by decay, and does not count it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Updates {
    pub language: u64,
    pub pictures: u64,
}

/// What of a matrix that trains is on the device. Norms, biases and position embeddings are f32 in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// f32.
    Full,
    /// f32, and a copy in this type, rounded to nearest even: the model reads the copy.
    Master(Dtype),
    /// bfloat16, rounded at random.
    Stochastic,
}

impl Keep {
    /// The type of copies beside masters.
    pub fn copies(self) -> Option<Dtype> {
        match self {
            Self::Master(dtype) => Some(dtype),
            Self::Full | Self::Stochastic => None,
        }
    }
}

/// What AdamW needs besides the gradient; `torch.optim.AdamW`'s names.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// 0: no clipping.
    pub max_grad_norm: f64,
    /// `adamw_8bit`.
    pub moments_8bit: bool,
    pub keep: Keep,
    /// Of rounding at random.
    pub seed: u64,
}

/// One update.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// The schedule's.
    pub factor: f64,
    /// With this one.
    pub updates: Updates,
    /// Without pictures what belongs to them stays.
    pub pictures: bool,
    /// What the loss was multiplied with.
    pub loss_scale: f64,
    /// Of the run, for rounding at random.
    pub step: u64,
}

/// Parameters, gradients and moments of all that trains, as far as they are on one device.
pub struct Optimizer {
    gpu: Gpu,
    shards: Vec<Shard>,
    sharing: Sharing,
    buckets: Arc<[Bucket]>,
    parcels: Arc<[Parcel]>,
    /// Weights that return, by who updates them.
    pieces: Arc<[Vec<Piece>]>,
    /// Where the gradients of each bucket are made, where they pass; buckets take turns.
    homes: Vec<Tensor>,
    /// What the host updates begins with, by shard.
    pub(super) begin_on_host: Vec<Vec<f32>>,
}

impl Optimizer {
    /// Moves what trains into arenas, and gives each its place for gradients. Of layers that take turns it takes what
    /// this device updates.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn new(
        parameters: &mut Parameters,
        trainables: Vec<Trainable>,
        settings: AdamW,
        sharing: Sharing,
        streaming: Option<&Streaming>,
    ) -> Result<Self> {
        let gpu = match trainables.first() {
            Some(first) => parameters.get(first.id).value.gpu().clone(),
            None => unreachable!("trainable.rs refuses a stage in which nothing trains"),
        };
        let limits = trainables.iter().map(|t| parameters.get(t.id).value.gpu().facts().limits.max_buffer_size);
        let most = (limits.fold(ARENA_BYTES, u64::min) / 4) as usize;
        let elements: usize = trainables.iter().map(|t| parameters.get(t.id).value.len()).sum();
        let in_arena = match sharing.weights_return() && !sharing.offload {
            true => most.min(elements / SHARED_ARENAS),
            false => most,
        };
        let mut placed = Vec::new();
        let mut begin_on_host = Vec::new();
        for part in parts(parameters, trainables, &settings, in_arena, streaming) {
            if sharing.offload && sharing.first_of_host && !gpu.only_counts() {
                begin_on_host.push(arenas::on_host(parameters, &part, &settings, streaming)?);
            }
            // A part is on one device.
            let gpu = parameters.get(part[0].id).value.gpu().clone();
            placed.push(Placed::new(&gpu, parameters, &part, &settings, &sharing, streaming));
            // What the weights were loaded to goes before there is more than the weights.
            gpu.trim();
        }
        let buckets = match sharing.is_alone() {
            true => Vec::new(),
            false => self::buckets(gradients(&placed), sharing.bucket_elements, most),
        };
        let homes = if sharing.gradients_pass() { homes(&gpu, &buckets) } else { Vec::new() };
        let home = |shard: usize, entry: &Entry| {
            let first = entry.places.gradient;
            let found = buckets.iter().zip(&homes).find_map(|(bucket, home)| Some((bucket.place(shard, first)?, home)));
            let Some((place, home)) = found else { unreachable!("every gradient is in a bucket") };
            home.part(place, &entry.shape)
        };
        let (mut shards, mut drawn) = (Vec::new(), 0);
        for (index, placed) in placed.into_iter().enumerate() {
            let drawn_before = drawn;
            drawn += placed.end.copy;
            let passing = sharing.gradients_pass();
            let homes = passing.then(|| placed.entries.iter().map(|entry| home(index, entry)).collect());
            shards.push(Shard::new(parameters, placed, settings, drawn_before, homes));
        }
        let parcels = parcels(&buckets, sharing.bucket_elements).into();
        let owners = if sharing.offload { 1 } else { sharing.devices };
        let owners = if sharing.weights_return() { 0..owners } else { 0..0 };
        let of = |owner: usize| {
            let owned = |end| if sharing.offload { 0..end } else { sharing.owned_by(owner, end) };
            pieces::pieces(&shards, owned, sharing.bucket_elements)
        };
        let pieces = owners.map(of).collect();
        Ok(Self { gpu, shards, sharing, buckets: buckets.into(), parcels, pieces, homes, begin_on_host })
    }

    /// How many numbers train.
    pub fn elements(&self) -> usize {
        self.shards.iter().map(Shard::elements).sum()
    }

    /// The device of all that trains, or the first of several.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub fn sharing(&self) -> &Sharing {
        &self.sharing
    }

    /// What leaves together, in the order in which a backward finishes it.
    pub fn buckets(&self) -> &Arc<[Bucket]> {
        &self.buckets
    }

    /// What of it is added up at once, in the same order.
    pub fn parcels(&self) -> &Arc<[Parcel]> {
        &self.parcels
    }

    pub fn zero_gradients(&self) {
        self.shards.iter().for_each(Shard::zero_gradients);
        self.homes.iter().for_each(|home| elementwise::fill(home, 0.0));
    }

    /// Begins to send a bucket's gradients to the host. Where gradients pass, the next bucket may be made in their place.
    pub fn download(&self, bucket: usize) -> Downloading {
        if let Some(home) = self.homes.get(bucket) {
            let downloading = Downloading::of(&self.gpu, std::slice::from_ref(home));
            elementwise::fill(home, 0.0);
            return downloading;
        }
        let part = |span: &Span| self.shards[span.shard].gradient_part(span.first, span.count);
        Downloading::of(&self.gpu, &self.buckets[bucket].spans.iter().filter_map(part).collect::<Vec<_>>())
    }

    /// Takes what is updated here out of a parcel's sum: how many elements.
    pub fn take_sum(&self, parcel: usize, values: &[f32]) -> usize {
        let Parcel { bucket, range } = &self.parcels[parcel];
        let parts = self.buckets[*bucket].split(range.start, values);
        parts.map(|(span, values)| self.shards[span.shard].take_sum(span.first, values)).sum()
    }

    /// Brings what this device has updated of layers that take turns to where they rest.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn rest(&self) -> Result<()> {
        self.shards.iter().try_for_each(Shard::rest)
    }

    /// Bytes of that.
    pub fn rested_bytes(&self) -> u64 {
        let owned = |shard: &Shard| shard.weights(&shard.owned).iter().map(|part| bytes_of(part) as u64).sum::<u64>();
        self.shards.iter().filter(|shard| shard.takes_turns()).map(owned).sum()
    }

    /// The parts of the optimizer whose layers take turns, by number.
    pub fn resting_shards(&self) -> Vec<usize> {
        (0..self.shards.len()).filter(|&number| self.shards[number].takes_turns()).collect()
    }

    /// What a device has updated of a part whose layers take turns, from where it rests.
    pub fn read_rested(&self, number: usize, owner: usize) -> Vec<u8> {
        let shard = &self.shards[number];
        shard.read_rested(&self.sharing.owned_by(owner, shard.end.gradient))
    }

    /// Puts it there.
    pub fn write_rested(&self, number: usize, owner: usize, bytes: &[u8]) {
        let shard = &self.shards[number];
        shard.write_rested(&self.sharing.owned_by(owner, shard.end.gradient), bytes);
    }

    /// Adds the gradients' square sum to `out[slot]`, where the device has all of them.
    pub fn add_square_sum(&self, out: &Tensor, slot: usize) {
        self.shards.iter().for_each(|shard| shard.add_square_sum(out, slot));
    }

    /// One update. `square_sum` [1] holds the gradients' square sum: the clip factor never leaves the device, and where
    /// it is not finite nothing changes.
    pub fn step(&self, update: &Update, square_sum: &Tensor) {
        self.shards.iter().for_each(|shard| shard.step(update, square_sum));
    }
}

impl Remembers for Optimizer {
    /// Every tensor that this device must remember, or its part of it.
    fn states(&self) -> Vec<State> {
        let of = |(index, shard): (usize, &Shard)| shard.states(index);
        self.shards.iter().enumerate().flat_map(of).collect()
    }

    fn reader(&self) -> Result<Reader<'_>> {
        let absmax: Vec<Vec<f32>> = self.shards.iter().map(Shard::absmax).collect::<Result<_>>()?;
        Ok(Box::new(move |state| self.shards[state.shard].read(state, &absmax[state.shard])))
    }

    fn restore<'b>(&mut self, get: Stored<'_, 'b>) -> Result<()> {
        self.shards.iter().enumerate().try_for_each(|(index, shard)| shard.restore(index, get))
    }
}

/// Every tensor that trains, and where its gradient is, padding included.
fn gradients(placed: &[Placed]) -> impl Iterator<Item = (&str, Span)> + Clone {
    placed.iter().enumerate().flat_map(|(shard, placed)| {
        let ends = placed.entries.iter().skip(1).map(|next| next.places.gradient).chain([placed.end.gradient]);
        placed.entries.iter().zip(ends).map(move |(entry, end)| {
            let first = entry.places.gradient;
            (entry.name.as_str(), Span { shard, first, count: end - first })
        })
    })
}

/// Places for the gradients of each bucket: two that take turns, because one leaves while the next is made, and one of
/// its own for what is whole only at the end.
fn homes(gpu: &Gpu, buckets: &[Bucket]) -> Vec<Tensor> {
    let place = |bucket: &Bucket| (bucket.milestone.map(|_| bucket.turn % 2), bucket.part);
    let mut sizes: BTreeMap<_, usize> = BTreeMap::new();
    for bucket in buckets {
        let size = sizes.entry(place(bucket)).or_default();
        *size = bucket.elements().max(*size);
    }
    let homes: BTreeMap<_, Tensor> =
        sizes.into_iter().map(|(place, size)| (place, arena(gpu, Account::Gradients, size))).collect();
    buckets.iter().map(|bucket| homes[&place(bucket)].part(0, &[bucket.elements()])).collect()
}
