//! Layers of the decoder that take turns on the device: the weights of their linears rest in the host's memory, once for
//! all of its devices, and each layer's come in while the layer before it computes. Memory for two layers is enough for
//! all. What is small beside them, norms and biases, stays.
//!
//! A device does what it is told in order, so a layer may be written over as soon as what reads it has been recorded.
//! Layers that train are written at rest by who updates them, and come in anew.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use super::names;
use crate::{
    error::Result,
    ops::cast,
    tensor::{Dtype, Tensor},
};

/// Layers whose weights are on the device at once.
const TURNS: usize = 2;

/// The weights at rest, by name.
#[derive(Default)]
pub struct Resting {
    weights: Mutex<HashMap<String, Arc<AtRest>>>,
    trained: Option<Trained>,
}

/// How layers that train are read.
#[derive(Clone, Copy, Debug)]
struct Trained {
    /// Rounded to this type from f32 masters; none: as they were loaded.
    copies: Option<Dtype>,
}

/// One weight at rest.
pub struct AtRest {
    /// As the model reads it.
    contents: RwLock<Vec<Vec<u8>>>,
    /// The f32 that it was rounded from, until whoever updates it has it.
    masters: Mutex<Option<Vec<f32>>>,
    likeness: Likeness,
    /// Of nested factors.
    offset: f32,
}

/// Type and shape, and those of what a tensor is made of: what fits into one fits into all that are like it.
type Likeness = (Dtype, Vec<usize>, Vec<(Dtype, usize)>);

/// What waits for its turn in a tensor's memory.
struct Waiting {
    place: Vec<Tensor>,
    weight: Arc<AtRest>,
}

/// One device's layers.
pub struct Streaming {
    layers: Vec<Vec<Waiting>>,
    /// Those that train, by name.
    trained: HashMap<String, Arc<AtRest>>,
    /// The layer that each turn's memory holds.
    there: Mutex<[Option<usize>; TURNS]>,
    /// See [`Streaming::take_moved`].
    moved: AtomicU64,
}

/// Makes [`Streaming`] while a model is loaded.
pub struct Arriving<'a> {
    resting: &'a Resting,
    layers: Vec<Vec<Waiting>>,
    trained: HashMap<String, Arc<AtRest>>,
    turns: HashMap<(usize, String), Tensor>,
}

impl Resting {
    /// For layers that train too, whose matrices the model reads rounded to `copies`, where it is given.
    pub fn of_trained(copies: Option<Dtype>) -> Self {
        Self { trained: Some(Trained { copies }), ..Self::default() }
    }

    /// Whoever makes updates has what they begin with.
    pub fn forget_masters(&self) {
        self.weights().values().for_each(|weight| *weight.masters() = None);
    }

    fn weights(&self) -> MutexGuard<'_, HashMap<String, Arc<AtRest>>> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AtRest {
    /// # Errors
    /// Whatever has failed on the device so far.
    fn of(read: &Tensor, loaded: Option<&Tensor>) -> Result<Self> {
        let (mut contents, mut masters) = (Vec::new(), None);
        if !read.gpu().only_counts() {
            contents = read.contents().iter().map(Tensor::to_bytes).collect::<Result<_>>()?;
            masters = loaded.map(Tensor::to_vec).transpose()?;
        }
        let (likeness, offset) = (likeness(read), read.factors_offset());
        Ok(Self { contents: RwLock::new(contents), masters: Mutex::new(masters), likeness, offset })
    }

    fn masters(&self) -> MutexGuard<'_, Option<Vec<f32>>> {
        self.masters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As the model reads it.
    pub fn dtype(&self) -> Dtype {
        self.likeness.0
    }

    /// The bytes of some elements of a weight that trains.
    pub fn read(&self, elements: Range<usize>) -> Vec<u8> {
        let size = self.dtype().bytes();
        let contents = self.contents.read().unwrap_or_else(PoisonError::into_inner);
        contents[0][elements.start * size..elements.end * size].to_vec()
    }

    /// Writes elements of a weight that trains, from `first` on.
    pub fn write(&self, first: usize, bytes: &[u8]) {
        let first = first * self.dtype().bytes();
        let mut contents = self.contents.write().unwrap_or_else(PoisonError::into_inner);
        contents[0][first..first + bytes.len()].copy_from_slice(bytes);
    }

    /// Some elements of a weight that trains, as they were loaded.
    pub fn loaded(&self, elements: Range<usize>) -> Vec<f32> {
        match &*self.masters() {
            Some(masters) => masters[elements].to_vec(),
            None => self.dtype().widen(&self.read(elements)),
        }
    }
}

impl<'a> Arriving<'a> {
    pub fn new(resting: &'a Resting) -> Self {
        Self { resting, layers: Vec::new(), trained: HashMap::new(), turns: HashMap::new() }
    }

    /// A weight of the model, which `load` brings to the device: one of a decoder layer is given the memory that its
    /// layer takes turns in, and its content goes to rest, unless another device has brought it there. Others stay.
    ///
    /// # Errors
    /// Those of `load`; whatever has failed on the device.
    pub fn take(&mut self, name: &str, trains: bool, load: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let within = name.strip_prefix(names::DECODER_LAYERS).and_then(|rest| rest.split_once('.'));
        let within = within.filter(|(_, part)| part.ends_with("_proj.weight"));
        let within = within.filter(|_| !trains || self.resting.trained.is_some());
        let Some((layer, part)) = within.and_then(|(layer, part)| Some((layer.parse::<usize>().ok()?, part))) else {
            return load();
        };
        let turn = (layer % TURNS, part.to_owned());
        let known = self.resting.weights().get(name).cloned();
        let (place, weight) = match (self.turns.get(&turn), known) {
            (Some(place), Some(weight)) if weight.likeness == likeness(place) => (place.clone(), weight),
            (place, _) => {
                let loaded = load()?;
                let copies = self.resting.trained.filter(|_| trains).and_then(|trained| trained.copies);
                let (read, loaded) = match copies {
                    Some(dtype) => (rounded(&loaded, dtype), Some(loaded)),
                    None => (loaded, None),
                };
                let weight = Arc::new(AtRest::of(&read, loaded.as_ref())?);
                (place.filter(|place| likeness(place) == likeness(&read)).cloned().unwrap_or(read), weight)
            }
        };
        let weight = self.resting.weights().entry(name.to_owned()).or_insert(weight).clone();
        self.turns.entry(turn).or_insert_with(|| place.clone());
        self.layers.resize_with(self.layers.len().max(layer + 1), Vec::new);
        self.layers[layer].push(Waiting { place: place.contents(), weight: weight.clone() });
        let offset = weight.offset;
        if trains {
            self.trained.insert(name.to_owned(), weight);
        }
        Ok(place.with_factors_offset(offset))
    }

    /// All layers are known.
    pub fn finish(self) -> Streaming {
        Streaming { layers: self.layers, trained: self.trained, there: Mutex::default(), moved: AtomicU64::default() }
    }
}

fn likeness(tensor: &Tensor) -> Likeness {
    let contents = tensor.contents().iter().map(|part| (part.dtype(), part.len())).collect();
    (tensor.dtype(), tensor.shape().to_vec(), contents)
}

/// A copy in another type, rounded to nearest even.
fn rounded(tensor: &Tensor, dtype: Dtype) -> Tensor {
    let copy = Tensor::empty_of(tensor.gpu(), dtype, tensor.shape());
    cast::cast_into(tensor, 0, &copy, 0, tensor.len());
    copy
}

impl Streaming {
    /// Of all layers.
    pub fn bytes(&self) -> u64 {
        let places = self.layers.iter().flatten().flat_map(|waiting| &waiting.place);
        places.map(|place| (place.len() * place.dtype().bytes()) as u64).sum()
    }

    /// A weight that trains, where it rests.
    pub fn trained(&self, name: &str) -> Option<&Arc<AtRest>> {
        self.trained.get(name)
    }

    /// Brings in a layer that is about to be computed, and the one that comes after it.
    pub fn bring(&self, layer: usize, next: Option<usize>) {
        let there = &mut *self.there();
        for layer in [Some(layer), next].into_iter().flatten().filter(|&layer| layer < self.layers.len()) {
            if there[layer % TURNS].replace(layer) == Some(layer) {
                continue;
            }
            for Waiting { place, weight } in &self.layers[layer] {
                let contents = weight.contents.read().unwrap_or_else(PoisonError::into_inner);
                self.moved.fetch_add(contents.iter().map(|bytes| bytes.len() as u64).sum(), Ordering::Relaxed);
                place.iter().zip(&*contents).for_each(|(place, bytes)| place.write_bytes(bytes));
            }
        }
    }

    /// What trains has been written at rest: nothing is there any more.
    pub fn renew(&self) {
        if !self.trained.is_empty() {
            *self.there() = Default::default();
        }
    }

    /// Bytes that have come in since this was asked last.
    pub fn take_moved(&self) -> u64 {
        self.moved.swap(0, Ordering::Relaxed)
    }

    fn there(&self) -> MutexGuard<'_, [Option<usize>; TURNS]> {
        self.there.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
