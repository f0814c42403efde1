//! Frozen layers of the decoder that take turns on the device: their weights rest in the host's memory, once for all of
//! its devices, and each comes in while the layer before it computes. Memory for two layers is enough for all.
//!
//! A device does what it is told in order, so a layer may be written over as soon as what reads it has been recorded.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::names;
use crate::{error::Result, tensor::Tensor};

/// Layers whose weights are on the device at once.
const TURNS: usize = 2;

/// The weights at rest, by name.
#[derive(Default)]
pub struct Resting {
    weights: Mutex<HashMap<String, Arc<Weight>>>,
}

/// One weight at rest.
struct Weight {
    contents: Vec<Vec<u8>>,
    /// Of nested factors.
    offset: f32,
}

/// What waits for its turn in a tensor's memory.
struct Waiting {
    place: Vec<Tensor>,
    weight: Arc<Weight>,
}

/// One device's layers.
pub struct Streaming {
    layers: Vec<Vec<Waiting>>,
    /// The layer that each turn's memory holds.
    there: Mutex<[Option<usize>; TURNS]>,
}

/// Makes [`Streaming`] while a model is loaded.
pub struct Arriving<'a> {
    resting: &'a Resting,
    layers: Vec<Vec<Waiting>>,
    turns: HashMap<(usize, String), Tensor>,
}

impl Resting {
    fn weights(&self) -> MutexGuard<'_, HashMap<String, Arc<Weight>>> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> Arriving<'a> {
    pub fn new(resting: &'a Resting) -> Self {
        Self { resting, layers: Vec::new(), turns: HashMap::new() }
    }

    /// The weight of a decoder layer, which `load` brings to the device: it is given the memory that its layer takes
    /// turns in, and its content goes to rest, unless another device has brought it there. Other weights stay.
    ///
    /// # Errors
    /// Those of `load`; whatever has failed on the device.
    pub fn take(&mut self, name: &str, load: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let within = name.strip_prefix(names::DECODER_LAYERS).and_then(|rest| rest.split_once('.'));
        let Some((layer, part)) = within.and_then(|(layer, part)| Some((layer.parse::<usize>().ok()?, part))) else {
            return load();
        };
        let turn = (layer % TURNS, part.to_owned());
        let known = self.resting.weights().get(name).cloned();
        let (place, weight) = match (self.turns.get(&turn), known) {
            (Some(place), Some(weight)) => (place.clone(), weight),
            (place, _) => {
                let loaded = load()?;
                let contents = if loaded.gpu().only_counts() {
                    Vec::new()
                } else {
                    loaded.contents().iter().map(Tensor::to_bytes).collect::<Result<_>>()?
                };
                let weight = Arc::new(Weight { contents, offset: loaded.factors_offset() });
                let place = place.filter(|place| place.is_like(&loaded)).cloned().unwrap_or(loaded);
                (place, weight)
            }
        };
        let weight = self.resting.weights().entry(name.to_owned()).or_insert(weight).clone();
        self.turns.entry(turn).or_insert_with(|| place.clone());
        self.layers.resize_with(self.layers.len().max(layer + 1), Vec::new);
        self.layers[layer].push(Waiting { place: place.contents(), weight: weight.clone() });
        Ok(place.with_factors_offset(weight.offset))
    }

    /// All layers are known.
    pub fn finish(self) -> Streaming {
        Streaming { layers: self.layers, there: Mutex::default() }
    }
}

impl Streaming {
    /// Of all layers.
    pub fn bytes(&self) -> u64 {
        let places = self.layers.iter().flatten().flat_map(|waiting| &waiting.place);
        places.map(|place| (place.len() * place.dtype().bytes()) as u64).sum()
    }

    /// Brings in a layer that is about to be computed, and the one that comes after it.
    pub fn bring(&self, layer: usize, next: Option<usize>) {
        let there = &mut *self.there.lock().unwrap_or_else(PoisonError::into_inner);
        for layer in [Some(layer), next].into_iter().flatten().filter(|&layer| layer < self.layers.len()) {
            if there[layer % TURNS].replace(layer) == Some(layer) {
                continue;
            }
            for Waiting { place, weight } in &self.layers[layer] {
                place.iter().zip(&weight.contents).for_each(|(place, bytes)| place.write_bytes(bytes));
            }
        }
    }
}
