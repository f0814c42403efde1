//! `offload`: the host's memory holds masters and moments of all that trains, and the host's cores make the updates, once
//! for all devices. These get the weights that follow, as their models read them.

use std::{sync::Arc, time::Instant};

use rayon::prelude::*;

use super::{
    AdamW, Keep, Optimizer, Update,
    arenas::{Entry, Group},
    buckets::{Bucket, Parcel},
    pieces::Piece,
    state::{MOMENTS, Place, Reader, Remembers, State, Stored},
};
use crate::{
    error::{Error, Result},
    formats::safetensors::Dtype,
    models::streaming::AtRest,
    ops::adamw,
    tensor,
};

/// Weights that a core narrows at a time.
const CHUNK: usize = 1 << 16;

/// Weights, gradients and moments of a part of what trains, in the order of the devices' gradients.
struct HostShard {
    groups: Vec<Group>,
    entries: Vec<HostEntry>,
    /// Weights or masters, then both moments.
    kept: [Vec<f32>; 3],
    gradients: Vec<f32>,
}

struct HostEntry {
    name: String,
    shape: Vec<usize>,
    /// Among the gradients.
    first: usize,
    at_rest: Option<Arc<AtRest>>,
}

/// All that trains, updated by the host.
pub struct HostOptimizer {
    shards: Vec<HostShard>,
    buckets: Arc<[Bucket]>,
    parcels: Arc<[Parcel]>,
    pieces: Arc<[Vec<Piece>]>,
    settings: AdamW,
}

impl HostOptimizer {
    /// Of what `first`, a device's optimizer under `offload`, was made from; it gives away what it began with.
    pub fn new(first: &mut Optimizer, settings: AdamW) -> Self {
        let begin = std::mem::take(&mut first.begin_on_host);
        let shards = first.shards.iter().zip(begin).map(|(shard, values)| {
            let count = values.len();
            let entry = |Entry { name, shape, places, at_rest, .. }: &Entry| HostEntry {
                name: name.clone(),
                shape: shape.clone(),
                first: places.gradient,
                at_rest: at_rest.clone(),
            };
            HostShard {
                groups: shard.groups().to_vec(),
                entries: shard.entries.iter().map(entry).collect(),
                kept: [values, vec![0.0; count], vec![0.0; count]],
                gradients: vec![0.0; count],
            }
        });
        let Optimizer { buckets, parcels, pieces, .. } = &*first;
        let (buckets, parcels, pieces) = (buckets.clone(), parcels.clone(), pieces.clone());
        Self { shards: shards.collect(), buckets, parcels, pieces, settings }
    }

    /// Takes a parcel's sum.
    pub fn take_sum(&mut self, parcel: usize, values: &[f32]) {
        let Parcel { bucket, range } = &self.parcels[parcel];
        for (span, values) in self.buckets[*bucket].split(range.start, values) {
            self.shards[span.shard].gradients[span.first..span.first + span.count].copy_from_slice(values);
        }
    }

    /// One update; where the gradients' square sum is not finite nothing changes.
    pub fn step(&mut self, update: &Update, square_sum: f64) {
        for HostShard { groups, kept: [values, first, second], gradients, .. } in &mut self.shards {
            for group in groups.iter().filter(|group| update.pictures || !group.of_pictures) {
                let range = group.places.gradient..group.places.gradient + group.count;
                adamw::step_on_host(
                    &mut values[range.clone()],
                    &gradients[range.clone()],
                    &mut first[range.clone()],
                    &mut second[range],
                    square_sum as f32,
                    &self.settings.step(group, update),
                );
            }
        }
    }

    /// Brings layers that take turns on the devices to where they rest.
    pub fn rest(&self) {
        for HostShard { entries, kept: [values, ..], .. } in &self.shards {
            for HostEntry { shape, first, at_rest, .. } in entries {
                let Some(at_rest) = at_rest else { continue };
                let values = &values[*first..first + shape.iter().product::<usize>()];
                let chunks = values.par_chunks(CHUNK).enumerate();
                chunks.for_each(|(at, values)| at_rest.write(at * CHUNK, &at_rest.dtype().narrow(values)));
            }
        }
    }

    /// All other weights as models read them: piece by piece, as [`Optimizer::write_weights`] takes them.
    pub fn weights(&self) -> impl Iterator<Item = Vec<u8>> {
        self.pieces.iter().flatten().map(|Piece { shard, range, .. }| {
            let HostShard { groups, kept: [values, ..], .. } = &self.shards[*shard];
            let packed = groups.iter().any(|group| group.class.packed && group.within(range).is_some());
            let dtype = match self.settings.keep {
                Keep::Master(dtype) if packed => dtype,
                _ => tensor::Dtype::F32,
            };
            let mut bytes = vec![0; range.len() * dtype.bytes()];
            let chunks = bytes.par_chunks_mut(CHUNK * dtype.bytes()).zip(values[range.clone()].par_chunks(CHUNK));
            chunks.for_each(|(bytes, values)| dtype.narrow_into(values, bytes));
            bytes
        })
    }
}

impl Remembers for HostOptimizer {
    fn states(&self) -> Vec<State> {
        let mut states = Vec::new();
        for (shard, HostShard { entries, .. }) in self.shards.iter().enumerate() {
            for HostEntry { name, shape, first, .. } in entries {
                for (which, suffix) in [None].into_iter().chain(MOMENTS.map(Some)).enumerate() {
                    let name = suffix.map_or_else(|| name.clone(), |suffix| format!("{name}.{suffix}"));
                    let (shape, part) = (shape.clone(), 0..shape.iter().product());
                    states.push(State {
                        name,
                        dtype: Dtype::F32,
                        shape,
                        part,
                        shard,
                        place: Place::Host { which, first: *first },
                    });
                }
            }
        }
        states
    }

    fn reader(&self) -> Result<Reader<'_>> {
        Ok(Box::new(|state| {
            let Place::Host { which, first } = state.place else { return Err(foreign(state)) };
            let values = &self.shards[state.shard].kept[which][first..first + state.part.len()];
            Ok(bytemuck::cast_slice(values).to_vec())
        }))
    }

    fn restore<'b>(&mut self, get: Stored<'_, 'b>) -> Result<()> {
        for state in self.states() {
            let bytes = get(&state)?;
            let Place::Host { which, first } = state.place else { return Err(foreign(&state)) };
            let values = &mut self.shards[state.shard].kept[which][first..first + state.part.len()];
            if bytes.len() != values.len() * 4 {
                return Err(foreign(&state));
            }
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Ok(())
    }
}

/// Numbers that this machine updates in a second.
pub fn updating_rate() -> f64 {
    const ELEMENTS: usize = 1 << 22;
    let [mut values, gradients, mut first, mut second] = [(); 4].map(|()| vec![1e-3; ELEMENTS]);
    let mut update =
        || adamw::step_on_host(&mut values, &gradients, &mut first, &mut second, 1.0, &adamw::Step::usual());
    let seconds = (0..4).map(|_| {
        let begun = Instant::now();
        update();
        begun.elapsed().as_secs_f64()
    });
    ELEMENTS as f64 / seconds.fold(f64::INFINITY, f64::min)
}

fn foreign(state: &State) -> Error {
    Error::failed(format!("{} is no state of the host's", state.name))
}
