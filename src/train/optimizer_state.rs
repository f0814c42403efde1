//! What a checkpoint holds of the optimizer: for each tensor that trains its weights (`NAME`; the masters where there
//! are any) and moments (`NAME.exp_avg`, `NAME.exp_avg_sq`), those of eight bits as indices beside the largest size of
//! each block (`NAME.exp_avg.absmax`, `NAME.exp_avg_sq.absmax`).

use super::shard::{Entry, Shard};
use crate::{
    error::{Error, Result},
    formats::safetensors::Dtype,
    ops::adamw_8bit::{BLOCK, Moments, ZERO},
    tensor::{self, Tensor},
};

const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// One tensor of a checkpoint.
pub struct State {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Which part of the optimizer has it.
    pub(super) shard: usize,
    place: Place,
}

enum Place {
    /// Little-endian, as it lies on the device.
    Whole(Tensor),
    /// Indices of the first (0) or second (1) moment: `count` from element `first` of the arena on.
    Indices { which: usize, first: usize, count: usize },
    /// Of the first or second moment, in blocks.
    Absmax { which: usize, first: usize, count: usize },
}

/// The eight-bit moments' indices as words, of either kind.
fn words(moments: &Moments, which: usize) -> &Tensor {
    if which == 0 { &moments.first } else { &moments.second }
}

fn lacking() -> Error {
    Error::failed("moments of eight bits, where the optimizer has none")
}

impl Shard {
    /// Every tensor that must be remembered.
    pub fn states(&self, shard: usize) -> Vec<State> {
        self.entries.iter().flat_map(|entry| self.states_of(entry, shard)).collect()
    }

    fn states_of(&self, entry: &Entry, shard: usize) -> Vec<State> {
        let Entry { name, shape, class, places } = entry;
        let whole = |name: String, tensor: Tensor| {
            let dtype = if tensor.dtype() == tensor::Dtype::Bf16 { Dtype::BF16 } else { Dtype::F32 };
            State { name, dtype, shape: shape.clone(), shard, place: Place::Whole(tensor) }
        };
        let mut states = vec![whole(name.clone(), self.value(entry))];
        for (which, suffix) in MOMENTS.into_iter().enumerate() {
            let name = format!("{name}.{suffix}");
            if class.eight_bits {
                let (first, count) = (places.moments_8bit, shape.iter().product::<usize>());
                let absmax = Place::Absmax { which, first: first / BLOCK, count: count.div_ceil(BLOCK) };
                let (dtype, blocks) = (Dtype::F32, vec![count.div_ceil(BLOCK)]);
                states.push(State { name: format!("{name}.absmax"), dtype, shape: blocks, shard, place: absmax });
                let place = Place::Indices { which, first, count };
                states.push(State { name, dtype: Dtype::U8, shape: shape.clone(), shard, place });
            } else {
                states.push(whole(name, self.moments[which].part(places.moments, shape)));
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
            Place::Absmax { which, first, count } => {
                let pairs = absmax.as_chunks::<2>().0.get(*first..first + count).ok_or_else(lacking)?;
                Ok(pairs.iter().flat_map(|pair| pair[*which].to_le_bytes()).collect())
            }
        }
    }

    /// Puts back what `get` gives for every state: as many bytes as it has.
    ///
    /// # Errors
    /// Those of `get`.
    pub fn restore<'a>(&self, shard: usize, get: &mut dyn FnMut(&State) -> Result<&'a [u8]>) -> Result<()> {
        let mut absmax = self.absmax()?;
        for state in self.states(shard) {
            let bytes = get(&state)?;
            match &state.place {
                Place::Whole(tensor) => tensor.write_bytes(bytes),
                Place::Indices { which, first, count } => {
                    let moments = self.moments_8bit.as_ref().ok_or_else(lacking)?;
                    // Zeros behind the tensor must stay zeros, or the last block would grow.
                    let mut whole = bytes.to_vec();
                    whole.resize(count.next_multiple_of(BLOCK), if *which == 0 { ZERO } else { 0 });
                    words(moments, *which).part(first / 4, &[whole.len() / 4]).write_bytes(&whole);
                }
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
