//! What a checkpoint holds of the optimizer: for each tensor that trains its weights (`NAME`; the masters where there
//! are any) and moments (`NAME.exp_avg`, `NAME.exp_avg_sq`), those of eight bits as indices beside the largest size of
//! each block (`NAME.exp_avg.absmax`, `NAME.exp_avg_sq.absmax`).

use std::ops::Range;

use super::{arenas::Entry, shard::Shard};
use crate::{
    error::{Error, Result},
    formats::safetensors::Dtype,
    ops::adamw_8bit::{BLOCK, Moments, ZERO},
    tensor::{self, Tensor},
};

pub(super) const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// One tensor of a checkpoint, or a part of it.
pub struct State {
    pub name: String,
    pub dtype: Dtype,
    /// Of the whole tensor.
    pub shape: Vec<usize>,
    /// The elements that are remembered here.
    pub part: Range<usize>,
    /// Which part of the optimizer has it.
    pub(super) shard: usize,
    pub(super) place: Place,
}

impl State {
    /// The part's bytes among those of the whole tensor.
    pub fn bytes(&self) -> Range<usize> {
        let size = |elements: usize| elements * self.dtype.bitsize() / 8;
        size(self.part.start)..size(self.part.end)
    }
}

/// Gives a state's content, little-endian.
pub type Reader<'a> = Box<dyn Fn(&State) -> Result<Vec<u8>> + 'a>;

/// Gives all bytes of the tensor that a state is of, or of which it is a part.
pub type Stored<'a, 'b> = &'a mut dyn FnMut(&State) -> Result<&'b [u8]>;

/// Whoever remembers states: a device, or the host.
pub trait Remembers {
    fn states(&self) -> Vec<State>;

    /// # Errors
    /// Whatever has failed on the device so far.
    fn reader(&self) -> Result<Reader<'_>>;

    /// Puts back what `get` gives for every state.
    ///
    /// # Errors
    /// Those of `get`.
    fn restore<'b>(&mut self, get: Stored<'_, 'b>) -> Result<()>;
}

pub(super) enum Place {
    /// Little-endian, as it lies on the device.
    Whole(Tensor),
    /// Indices of the first (0) or second (1) moment: `count` from element `first` of the arena on.
    Indices { which: usize, first: usize, count: usize },
    /// Of the first or second moment, in blocks.
    Absmax { which: usize, first: usize, count: usize },
    /// Of the host's weights (0) or moments (1 and 2).
    Host { which: usize, first: usize },
}

/// The eight-bit moments' indices as words, of either kind.
fn words(moments: &Moments, which: usize) -> &Tensor {
    if which == 0 { &moments.first } else { &moments.second }
}

fn lacking() -> Error {
    Error::failed("moments of eight bits, where the optimizer has none")
}

impl Shard {
    /// Every tensor that must be remembered, or the part of it that is owned.
    pub fn states(&self, shard: usize) -> Vec<State> {
        self.entries.iter().flat_map(|entry| self.states_of(entry, shard)).collect()
    }

    fn states_of(&self, entry: &Entry, shard: usize) -> Vec<State> {
        let Entry { name, shape, class, .. } = entry;
        let mut states = Vec::new();
        for (piece, first, part) in self.owned_parts(entry) {
            let count = part.len();
            let whole = |name: String, tensor: Tensor| {
                let dtype = if tensor.dtype() == tensor::Dtype::Bf16 { Dtype::BF16 } else { Dtype::F32 };
                State { name, dtype, shape: shape.clone(), part: part.clone(), shard, place: Place::Whole(tensor) }
            };
            states.push(whole(name.clone(), self.remembered(piece, first, count)));
            for (which, suffix) in MOMENTS.into_iter().enumerate() {
                let name = format!("{name}.{suffix}");
                if !class.eight_bits {
                    states.push(whole(name, self.moments[which].part(piece.kept.moments + first, &[count])));
                    continue;
                }
                let first = piece.kept.moments_8bit + first;
                let blocks = count.div_ceil(BLOCK);
                let begin = part.start / BLOCK;
                states.push(State {
                    name: format!("{name}.absmax"),
                    dtype: Dtype::F32,
                    shape: vec![entry.len().div_ceil(BLOCK)],
                    part: begin..begin + blocks,
                    shard,
                    place: Place::Absmax { which, first: first / BLOCK, count: blocks },
                });
                let place = Place::Indices { which, first, count };
                states.push(State { name, dtype: Dtype::U8, shape: shape.clone(), part: part.clone(), shard, place });
            }
        }
        states
    }

    /// The largest sizes of all blocks: what [`Shard::read`] needs of them at every call.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn absmax(&self) -> Result<Vec<f32>> {
        self.moments_8bit.as_ref().map_or(Ok(Vec::new()), |moments| moments.absmax.to_vec())
    }

    /// The content of a state, little-endian.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn read(&self, state: &State, absmax: &[f32]) -> Result<Vec<u8>> {
        match &state.place {
            Place::Whole(tensor) => tensor.to_bytes(),
            Place::Indices { which, first, count } => {
                let moments = self.moments_8bit.as_ref().ok_or_else(lacking)?;
                let words = words(moments, *which).part(first / 4, &[count.div_ceil(4)]);
                let mut bytes = words.to_bytes()?;
                bytes.truncate(*count);
                Ok(bytes)
            }
            Place::Host { .. } => Err(lacking()),
            Place::Absmax { which, first, count } => {
                let pairs = absmax.as_chunks::<2>().0.get(*first..first + count).ok_or_else(lacking)?;
                Ok(pairs.iter().flat_map(|pair| pair[*which].to_le_bytes()).collect())
            }
        }
    }

    /// Puts back what `get` gives for every state: the bytes of all the tensor.
    ///
    /// # Errors
    /// Those of `get`.
    pub fn restore<'a>(&self, shard: usize, get: &mut dyn FnMut(&State) -> Result<&'a [u8]>) -> Result<()> {
        let mut absmax = self.absmax()?;
        for state in self.states(shard) {
            let bytes = get(&state)?
                .get(state.bytes())
                .ok_or_else(|| Error::data(format!("{} is shorter than its shape {:?}", state.name, state.shape)))?;
            match &state.place {
                Place::Whole(tensor) => tensor.write_bytes(bytes),
                Place::Indices { which, first, count } => {
                    let moments = self.moments_8bit.as_ref().ok_or_else(lacking)?;
                    // Zeros behind the tensor must stay zeros, or the last block would grow.
                    let mut whole = bytes.to_vec();
                    whole.resize(count.next_multiple_of(BLOCK), if *which == 0 { ZERO } else { 0 });
                    words(moments, *which).part(first / 4, &[whole.len() / 4]).write_bytes(&whole);
                }
                Place::Host { .. } => return Err(lacking()),
                Place::Absmax { which, first, count } => {
                    let pairs = absmax.as_chunks_mut::<2>().0.get_mut(*first..first + count).ok_or_else(lacking)?;
                    for (pair, value) in pairs.iter_mut().zip(bytes.as_chunks().0) {
                        pair[*which] = f32::from_le_bytes(*value);
                    }
                }
            }
        }
        if let Some(moments) = &self.moments_8bit {
            moments.absmax.write(&absmax);
        }
        self.refresh_copies();
        Ok(())
    }
}
