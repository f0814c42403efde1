//! Weights that go from whoever updates them to all other devices: in pieces, and those first that a forward reads first.

use std::{collections::VecDeque, ops::Range};

use super::{
    Optimizer, SHARED_ARENAS, Update,
    buckets::{layers, milestone},
    shard::Shard,
};
use crate::{
    error::Result,
    tensor::{ALIGNMENT, Downloading, Tensor},
};

/// Bytes of weights that leave a device together at most, or one piece; where arenas are small, a part of all.
const LEAVING_BYTES: usize = 16 << 20;

/// Weights that are sent at once: neighbours in the arenas that are updated alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub shard: usize,
    /// Their gradients.
    pub range: Range<usize>,
    /// The decoder's milestone behind which a forward reads the first of them; none: before all of them.
    pub milestone: Option<usize>,
}

/// What stays on the devices of the gradients that are `owned` of so many, in pieces of at most `most` elements.
pub(super) fn pieces(shards: &[Shard], owned: impl Fn(usize) -> Range<usize>, most: usize) -> Vec<Piece> {
    let most = most.next_multiple_of(ALIGNMENT);
    let layers = layers(shards.iter().flat_map(|shard| &shard.entries).map(|entry| entry.name.as_str()));
    let mut pieces = Vec::new();
    for (number, shard) in shards.iter().enumerate().filter(|(_, shard)| !shard.takes_turns()) {
        let owned = owned(shard.end.gradient);
        for group in shard.groups().iter().filter_map(|group| group.within(&owned)) {
            let end = group.places.gradient + group.count;
            for first in (group.places.gradient..end).step_by(most) {
                let range = first..end.min(first + most);
                let within = shard.entries.iter().filter(|entry| !entry.elements_in(&range).is_empty());
                let milestone = within.map(|entry| milestone(&entry.name, layers)).min().flatten();
                pieces.push(Piece { shard: number, range, milestone });
            }
        }
    }
    // Of one milestone in the order of the arenas.
    pieces.sort_by_key(|piece| piece.milestone);
    pieces
}

impl Optimizer {
    /// The weights that a device updates, or the host, in the order in which they are sent. None where none return.
    pub fn pieces(&self, owner: Option<usize>) -> &[Piece] {
        self.pieces.get(owner.unwrap_or(0)).map_or(&[], Vec::as_slice)
    }

    /// Bytes of the weights that return, as the model reads them: of all, or of what a device updates.
    pub fn weight_bytes(&self, owner: Option<usize>) -> u64 {
        let of = |pieces: &[Piece]| pieces.iter().map(|piece| bytes_of(&self.weights(piece)) as u64).sum::<u64>();
        owner.map_or_else(|| self.pieces.iter().map(|pieces| of(pieces)).sum(), |owner| of(self.pieces(Some(owner))))
    }

    /// One update, as [`Optimizer::step`] makes it. Of the [`Optimizer::pieces`] that it renews each goes to `send`, with its
    /// number: the first ones leave while the last ones are updated.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn step_and_send(
        &self,
        update: &Update,
        square_sum: &Tensor,
        send: &mut dyn FnMut(usize, Vec<u8>),
    ) -> Result<()> {
        let mut waiting: Vec<Option<&Shard>> = self.shards.iter().map(Some).collect();
        let renew = |shard: &Shard| shard.step(update, square_sum);
        self.send_weights(&mut |shard| waiting[shard].take().into_iter().for_each(renew), send)?;
        waiting.into_iter().flatten().for_each(renew);
        Ok(())
    }

    /// The [`Optimizer::pieces`] that this device updates, as they are.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn owned_weights(&self) -> Result<Vec<Vec<u8>>> {
        let mut all = Vec::new();
        self.send_weights(&mut |_| (), &mut |_, bytes| all.push(bytes))?;
        Ok(all)
    }

    /// Sends pieces, some at a time; before each `renew` gets the number of its shard.
    fn send_weights(&self, renew: &mut dyn FnMut(usize), send: &mut dyn FnMut(usize, Vec<u8>)) -> Result<()> {
        // Those of the host are none of a device's.
        let pieces = if self.sharing.offload { &[][..] } else { self.pieces(Some(self.sharing.device)) };
        let weights: Vec<Tensor> = pieces.iter().map(|piece| self.weights(piece)).collect();
        let all: usize = weights.iter().map(bytes_of).sum();
        let most = LEAVING_BYTES.min(all / SHARED_ARENAS);
        let mut arrived = |(pieces, downloading): (Range<usize>, Downloading)| -> Result<()> {
            let bytes = downloading.bytes()?;
            let mut rest = &bytes[..];
            for piece in pieces {
                let (these, others) = rest.split_at(bytes_of(&weights[piece]));
                send(piece, these.to_vec());
                rest = others;
            }
            Ok(())
        };
        let mut underway = VecDeque::new();
        let mut first = 0;
        while first < pieces.len() {
            let (mut end, mut bytes) = (first, 0);
            while end < pieces.len() && (end == first || bytes + bytes_of(&weights[end]) <= most) {
                renew(pieces[end].shard);
                bytes += bytes_of(&weights[end]);
                end += 1;
            }
            underway.push_back((first..end, Downloading::of(&self.gpu, &weights[first..end])));
            first = end;
            if underway.len() > 1 {
                underway.pop_front().map_or(Ok(()), &mut arrived)?;
            }
        }
        underway.into_iter().try_for_each(arrived)
    }

    /// Puts weights that were updated elsewhere into their place: by another device, or by the host. They are whole
    /// pieces, from a `first` one on: these are given back.
    pub fn write_weights(&self, owner: Option<usize>, first: usize, mut bytes: &[u8]) -> &[Piece] {
        let pieces = &self.pieces(owner)[first..];
        let mut count = 0;
        while let Some(piece) = pieces.get(count).filter(|_| !bytes.is_empty()) {
            let weights = self.weights(piece);
            let (these, rest) = bytes.split_at(bytes_of(&weights));
            weights.write_bytes(these);
            (bytes, count) = (rest, count + 1);
        }
        &pieces[..count]
    }

    /// As the model reads them.
    fn weights(&self, piece: &Piece) -> Tensor {
        let mut of_groups = self.shards[piece.shard].weights(&piece.range);
        match (of_groups.pop(), of_groups.is_empty()) {
            (Some(weights), true) => weights,
            _ => unreachable!("a piece lies in one group"),
        }
    }
}

pub(super) fn bytes_of(part: &Tensor) -> usize {
    part.len() * part.dtype().bytes()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        gpu::{AdapterFacts, Gpu},
        models::names,
        nn::Parameters,
        tensor::Dtype,
        train::optimizer::{AdamW, Keep, Sharing, Trainable},
    };

    const NAMES: [(&str, [usize; 2]); 5] = [
        (names::EMBED_TOKENS, [8, 256]),
        ("language_model.model.layers.0.mlp.up_proj.weight", [8, 256]),
        ("language_model.model.layers.1.mlp.up_proj.weight", [8, 256]),
        (names::LM_HEAD, [8, 256]),
        ("multi_modal_projector.linear_1.weight", [8, 256]),
    ];

    /// Norms are not packed, so that they lie behind all matrices.
    pub fn optimizer(sharing: Sharing) -> Optimizer {
        let gpu = Gpu::counting(AdapterFacts::of_a_usual_gpu());
        let mut parameters = Parameters::default();
        let mut trainables = Vec::new();
        let norm = "language_model.model.layers.0.input_layernorm.weight";
        let tensors = NAMES.map(|(name, shape)| (name, shape.to_vec())).into_iter().chain([(norm, vec![256])]);
        for (name, shape) in tensors {
            let id = parameters.insert(name, Tensor::empty(&gpu, &shape));
            let of_pictures = name.starts_with(names::PROJECTOR);
            trainables.push(Trainable { id, learning_rate: 1.0, weight_decay: 0.0, of_pictures });
        }
        let settings = AdamW {
            beta1: 0.9,
            beta2: 0.9,
            epsilon: 1e-8,
            max_grad_norm: 0.0,
            moments_8bit: false,
            keep: Keep::Master(Dtype::Bf16),
            seed: 0,
        };
        Optimizer::new(&mut parameters, trainables, settings, sharing, None).unwrap()
    }

    #[test]
    fn pieces_come_in_the_order_of_the_forward_and_are_all_there_is() {
        let two = |device| Sharing { zero_stage: 1, device, devices: 2, bucket_elements: 1024, ..Sharing::ALONE };
        let optimizer = optimizer(two(1));
        let milestones =
            |owner| optimizer.pieces(owner).iter().map(|piece| piece.milestone).collect::<Vec<Option<usize>>>();
        // Half of every matrix, and of what is too small for halves the last one has all: a layer's norm.
        assert_eq!(milestones(Some(0)), [None, None, Some(0), Some(1), Some(2)]);
        assert_eq!(milestones(Some(1)), [None, None, Some(0), Some(0), Some(1), Some(2)]);
        let mut pieces: Vec<_> = (0..2).flat_map(|owner| optimizer.pieces(Some(owner))).collect();
        pieces.sort_by_key(|piece| (piece.shard, piece.range.start));
        let follows = |[one, next]: &[&Piece; 2]| match one.shard == next.shard {
            true => one.range.end == next.range.start,
            false => next.range.start == 0,
        };
        assert!(pieces.array_windows().all(follows));
        let bytes = (5 * 8 * 2 + 4) * 256;
        assert_eq!(optimizer.weight_bytes(None), bytes);
        assert_eq!(optimizer.weight_bytes(Some(0)) + optimizer.weight_bytes(Some(1)), bytes);
        let sent: Vec<_> = optimizer.owned_weights().unwrap();
        assert_eq!(sent.iter().map(Vec::len).sum::<usize>() as u64, optimizer.weight_bytes(Some(1)));
        assert_eq!(optimizer.write_weights(Some(1), 1, &sent[1..4].concat()), &optimizer.pieces(Some(1))[1..4]);
    }

    #[test]
    fn the_host_sends_all_and_nobody_where_none_return() {
        let offload = optimizer(Sharing { offload: true, bucket_elements: 1 << 20, ..Sharing::ALONE });
        let milestones: Vec<_> = offload.pieces(None).iter().map(|piece| piece.milestone).collect();
        assert_eq!(milestones, [None, None, Some(0)]);
        let all = optimizer(Sharing { devices: 2, ..Sharing::ALONE });
        assert!(all.pieces(None).is_empty() && all.weight_bytes(None) == 0);
    }
}
