//! AdamW over flat arenas ([`Shard`]): everything that trains lies in a few buffers, its gradients and moments in others
//! beside them, so that zeroing, the gradient norm and the update are a few dispatches whatever the number of tensors.
//!
//! Weights are f32; or f32 masters with copies in 16 bits, which the model reads; or bfloat16 alone, rounded at random.
//! Moments are f32, or with `adamw_8bit` those of tensors that are not small in eight bits. Gradients are f32.

use serde::{Deserialize, Serialize};

use super::{
    optimizer_state::State,
    shard::{Placed, Shard, parts},
};
use crate::{
    error::Result,
    nn::{Id, Parameters},
    tensor::{Downloading, Dtype, Tensor},
};

/// Bytes of an arena at most, or of one tensor: devices refuse larger buffers.
const ARENA_BYTES: u64 = 1 << 30;

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

/// A run of gradients: `count` elements of the shard's arena, from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub shard: usize,
    pub first: usize,
    pub count: usize,
}

/// Parameters, gradients and moments of all that trains.
pub struct Optimizer {
    shards: Vec<Shard>,
}

impl Optimizer {
    /// Moves what trains into arenas, and gives each its place for gradients.
    pub fn new(parameters: &mut Parameters, trainables: Vec<Trainable>, settings: AdamW) -> Self {
        let gpu = match trainables.first() {
            Some(first) => parameters.get(first.id).value.gpu().clone(),
            None => unreachable!("trainable.rs refuses a stage in which nothing trains"),
        };
        let most = ARENA_BYTES.min(gpu.facts().limits.max_buffer_size) / 4;
        let mut placed = Vec::new();
        for part in parts(parameters, trainables, &settings, most as usize) {
            placed.push(Placed::new(&gpu, parameters, &part, &settings));
            // What the weights were loaded to goes before there is more than the weights.
            gpu.trim();
        }
        // Other draws for each.
        let seeded = |index: usize| AdamW { seed: settings.seed ^ (index as u64) << 20, ..settings };
        let shards = placed.into_iter().enumerate();
        Self { shards: shards.map(|(index, placed)| Shard::new(parameters, placed, seeded(index))).collect() }
    }

    /// How many numbers train.
    pub fn elements(&self) -> usize {
        self.shards.iter().map(Shard::elements).sum()
    }

    pub fn zero_gradients(&self) {
        self.shards.iter().for_each(Shard::zero_gradients);
    }

    /// Every tensor that trains, and where its gradient lies.
    pub fn gradients(&self) -> impl Iterator<Item = (&str, Span)> {
        self.shards.iter().enumerate().flat_map(|(shard, of)| {
            of.gradients().map(move |(name, first, end)| (name, Span { shard, first, count: end - first }))
        })
    }

    /// Begins to send gradients to the host.
    pub fn download(&self, spans: &[Span]) -> Downloading {
        let parts: Vec<Tensor> = spans.iter().map(|span| self.part(span)).collect();
        Downloading::of(&parts)
    }

    /// Replaces gradients, given one span behind the other.
    pub fn write_gradients(&self, spans: &[Span], mut values: &[f32]) {
        for span in spans {
            let (these, rest) = values.split_at(span.count);
            self.part(span).write(these);
            values = rest;
        }
    }

    fn part(&self, span: &Span) -> Tensor {
        self.shards[span.shard].gradient_part(span.first, span.count)
    }

    /// Adds the gradients' square sum to `out[slot]`.
    pub fn add_square_sum(&self, out: &Tensor, slot: usize) {
        self.shards.iter().for_each(|shard| shard.add_square_sum(out, slot));
    }

    /// One update. `square_sum` [1] holds the gradients' square sum: the clip factor never leaves the device, and where
    /// it is not finite nothing changes.
    pub fn step(&self, update: &Update, square_sum: &Tensor) {
        self.shards.iter().for_each(|shard| shard.step(update, square_sum));
    }

    /// Every tensor that must be remembered.
    pub fn states(&self) -> Vec<State> {
        let of = |(index, shard): (usize, &Shard)| shard.states(index);
        self.shards.iter().enumerate().flat_map(of).collect()
    }

    /// The largest sizes of all blocks, by shard: what [`Optimizer::read`] needs of them at every call.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn absmax(&self) -> Result<Vec<Vec<f32>>> {
        self.shards.iter().map(Shard::absmax).collect()
    }

    /// The content of a state, little-endian.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn read(&self, state: &State, absmax: &[Vec<f32>]) -> Result<Vec<u8>> {
        self.shards[state.shard].read(state, &absmax[state.shard])
    }

    /// Puts back what `get` gives for every state: as many bytes as it has.
    ///
    /// # Errors
    /// Those of `get`.
    pub fn restore<'a>(&self, mut get: impl FnMut(&State) -> Result<&'a [u8]>) -> Result<()> {
        self.shards.iter().enumerate().try_for_each(|(index, shard)| shard.restore(index, &mut get))
    }
}
