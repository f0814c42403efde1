//! A part of what trains: weights in arenas, gradients, and the moments and masters of what is updated here.

use std::ops::Range;

use super::{
    AdamW, Keep, Update,
    arenas::{Entry, Group, Placed, Places, arena, clamp},
};
use crate::{
    error::Result,
    gpu::{Account, Gpu},
    models::streaming::AtRest,
    nn::Parameters,
    ops::{
        adamw::{self, Draw, Weights},
        adamw_8bit::{self, Moments},
        cast, elementwise, reduce,
    },
    tensor::{Downloading, Tensor},
};

/// Owned neighbours that are updated alike, and where what is kept of them here lies.
pub(super) struct Piece {
    pub group: Group,
    pub kept: Kept,
}

/// Places in the arenas of what is owned, in elements; where an arena holds nothing of it, any number.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Kept {
    pub master: usize,
    pub moments: usize,
    pub moments_8bit: usize,
}

/// Where gradients are.
pub(super) enum Gradients {
    /// All of the shard's.
    Whole(Tensor),
    /// The owned ones, once they are added up; what the backward makes is elsewhere, and leaves.
    Owned(Tensor),
}

/// Weights, gradients and moments of a part of what trains.
pub(super) struct Shard {
    settings: AdamW,
    /// Elements in 16 bits of all shards before: draws are numbered through all of them.
    drawn_before: usize,
    groups: Vec<Group>,
    pieces: Vec<Piece>,
    /// In arena order.
    pub entries: Vec<Entry>,
    pub end: Places,
    /// f32 weights that the model reads, or that go to rest for it.
    values: Tensor,
    /// 16 bits.
    copies: Option<Tensor>,
    /// The first gradient whose weight they hold.
    first: usize,
    masters: Option<Tensor>,
    gradients: Gradients,
    pub owned: Range<usize>,
    /// f32, first and second.
    pub moments: [Tensor; 2],
    pub moments_8bit: Option<Moments>,
}

/// The owned parts of groups.
fn pieces(groups: &[Group], owned: &Range<usize>, keep: Keep) -> (Vec<Piece>, Kept) {
    let (mut pieces, mut next) = (Vec::new(), Kept::default());
    for group in groups.iter().filter_map(|group| group.within(owned)) {
        let (count, class) = (group.count, group.class);
        pieces.push(Piece { group, kept: next });
        next.master += if class.packed && matches!(keep, Keep::Master(_)) { count } else { 0 };
        *(if class.eight_bits { &mut next.moments_8bit } else { &mut next.moments }) += count;
    }
    (pieces, next)
}

impl Shard {
    /// Gives what was [`Placed`] its place for gradients, and what is owned of it its moments. `homes` has where the
    /// gradient of each entry is made, where gradients pass; `drawn_before` counts the elements in 16 bits of all
    /// shards before this one.
    pub fn new(
        parameters: &mut Parameters,
        placed: Placed,
        settings: AdamW,
        drawn_before: usize,
        homes: Option<Vec<Tensor>>,
    ) -> Self {
        let Placed { gpu, groups, entries, ids, end, values, copies, first, masters, owned } = placed;
        let (pieces, kept) = pieces(&groups, &owned, settings.keep);
        let gradients = match &homes {
            None => Gradients::Whole(arena(&gpu, Account::Gradients, end.gradient)),
            Some(_) => Gradients::Owned(arena(&gpu, Account::Gradients, owned.len())),
        };
        let moments = [(); 2].map(|()| arena(&gpu, Account::Optimizer, kept.moments));
        let _optimizer = gpu.account(Account::Optimizer);
        let moments_8bit = (kept.moments_8bit > 0).then(|| Moments::new(&gpu, kept.moments_8bit));
        for (index, (id, entry)) in ids.into_iter().zip(&entries).enumerate() {
            let value = parameters.get(id).value.clone();
            let gradient = match (&gradients, &homes) {
                (_, Some(homes)) => homes[index].clone(),
                (Gradients::Whole(all) | Gradients::Owned(all), None) => all.part(entry.places.gradient, &entry.shape),
            };
            parameters.place(id, value, Some(gradient));
        }
        Self {
            settings,
            drawn_before,
            groups,
            pieces,
            entries,
            end,
            values,
            copies,
            first,
            masters,
            gradients,
            owned,
            moments,
            moments_8bit,
        }
    }

    pub fn gpu(&self) -> &Gpu {
        self.values.gpu()
    }

    /// How many numbers train here.
    pub fn elements(&self) -> usize {
        self.entries.iter().map(Entry::len).sum()
    }

    pub fn zero_gradients(&self) {
        if let Gradients::Whole(gradients) = &self.gradients {
            elementwise::fill(gradients, 0.0);
        }
    }

    /// A run of gradients that are made here; none where they pass.
    pub fn gradient_part(&self, first: usize, count: usize) -> Option<Tensor> {
        match &self.gradients {
            Gradients::Whole(all) => Some(all.part(first, &[count])),
            Gradients::Owned(_) => None,
        }
    }

    /// Puts the owned ones of gradients that were added up elsewhere, from `first` on, into their place. Gives how
    /// many these are.
    pub fn take_sum(&self, first: usize, values: &[f32]) -> usize {
        let owned = clamp(first..first + values.len(), &self.owned);
        if !owned.is_empty() {
            self.owned_gradient(owned.start, owned.len()).write(&values[owned.start - first..owned.end - first]);
        }
        owned.len()
    }

    fn owned_gradient(&self, first: usize, count: usize) -> Tensor {
        match &self.gradients {
            Gradients::Whole(all) => all.part(first, &[count]),
            Gradients::Owned(owned) => owned.part(first - self.owned.start, &[count]),
        }
    }

    /// Whether its layers take turns on the device.
    pub fn takes_turns(&self) -> bool {
        self.entries.iter().any(|entry| entry.at_rest.is_some())
    }

    /// The weights that the model reads of the gradients in `range`, in arena order.
    pub fn weights(&self, range: &Range<usize>) -> Vec<Tensor> {
        let part = |group: Group| match self.copy(&group) {
            Some(copy) => copy,
            None => self.value(&group),
        };
        self.groups.iter().filter_map(|group| group.within(range)).map(part).collect()
    }

    /// Weights in 16 bits, of a group that has them.
    fn copy(&self, Group { class, places, count, .. }: &Group) -> Option<Tensor> {
        let copies = self.copies.as_ref().filter(|_| class.packed)?;
        Some(copies.part(places.copy - self.first, &[*count]))
    }

    /// Weights in f32, of a group without copies.
    fn value(&self, Group { places, count, .. }: &Group) -> Tensor {
        self.values.part(places.value - self.first, &[*count])
    }

    /// Brings what is owned to where it rests.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn rest(&self) -> Result<()> {
        if self.takes_turns() && !self.gpu().only_counts() {
            self.write_rested(&self.owned, &Downloading::of(self.gpu(), &self.weights(&self.owned)).bytes()?);
        }
        Ok(())
    }

    /// Writes the weights of the gradients in `range` to where they rest, as the model reads them.
    pub fn write_rested(&self, range: &Range<usize>, bytes: &[u8]) {
        let size = bytes.len().checked_div(range.len()).unwrap_or(0);
        for (entry, at_rest, elements) in self.at_rest(range) {
            let first = entry.places.gradient + elements.start - range.start;
            at_rest.write(elements.start, &bytes[first * size..(first + elements.len()) * size]);
        }
    }

    /// What [`Shard::write_rested`] takes.
    pub fn read_rested(&self, range: &Range<usize>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (entry, at_rest, elements) in self.at_rest(range) {
            let size = at_rest.dtype().bytes();
            bytes.resize((entry.places.gradient + elements.start - range.start) * size, 0);
            bytes.extend(at_rest.read(elements));
            bytes.resize(bytes.len().next_multiple_of(size * entry.class.alignment()).min(range.len() * size), 0);
        }
        bytes
    }

    fn at_rest(&self, range: &Range<usize>) -> impl Iterator<Item = (&Entry, &AtRest, Range<usize>)> {
        self.entries.iter().filter_map(move |entry| {
            let elements = entry.elements_in(range);
            Some((entry, entry.at_rest.as_deref()?, elements)).filter(|(.., elements)| !elements.is_empty())
        })
    }

    /// Adds the gradients' square sum to `out[slot]`.
    pub fn add_square_sum(&self, out: &Tensor, slot: usize) {
        if let Gradients::Whole(gradients) = &self.gradients {
            reduce::add_square_sum(gradients, out, slot);
        }
    }

    /// One update of what is owned. `square_sum` [1] holds the square sum of all gradients: the clip factor never leaves
    /// the device, and where it is not finite nothing changes.
    pub fn step(&self, update: &Update, square_sum: &Tensor) {
        for Piece { group, kept } in self.pieces.iter().filter(|piece| update.pictures || !piece.group.of_pictures) {
            let (count, places) = ([group.count], &group.places);
            let step = self.settings.step(group, update);
            let gradient = self.owned_gradient(places.gradient, group.count);
            let (value, copy, master);
            let weights = match self.copy(group) {
                None => {
                    value = self.value(group);
                    Weights::Full(&value)
                }
                Some(found) => {
                    copy = found;
                    match &self.masters {
                        None => {
                            let (seed, step) = (self.settings.seed as u32, update.step as u32);
                            Weights::Stochastic(&copy, Draw { seed, step, first: self.drawn_before + places.copy })
                        }
                        Some(masters) => {
                            master = masters.part(kept.master, &count);
                            Weights::Master(&master, &copy)
                        }
                    }
                }
            };
            match self.moments_8bit.as_ref().filter(|_| group.class.eight_bits) {
                Some(moments) => {
                    let block = kept.moments_8bit / adamw_8bit::BLOCK;
                    adamw_8bit::step(weights, &gradient, moments, block, square_sum, &step);
                }
                None => {
                    let [first, second] = self.moments.each_ref().map(|moments| moments.part(kept.moments, &count));
                    adamw::step(weights, &gradient, &first, &second, square_sum, &step);
                }
            }
        }
    }

    /// Makes the owned copies in 16 bits again from their masters.
    pub fn refresh_copies(&self) {
        let Some(masters) = &self.masters else { return };
        for Piece { group, kept } in &self.pieces {
            if let Some(copy) = self.copy(group) {
                cast::cast_into(&masters.part(kept.master, &[group.count]), 0, &copy, 0, group.count);
            }
        }
    }

    /// The owned parts of a tensor: the piece, the first element in the piece, and the elements of the tensor.
    pub fn owned_parts<'a>(&'a self, entry: &'a Entry) -> impl Iterator<Item = (&'a Piece, usize, Range<usize>)> {
        let first = entry.places.gradient;
        self.pieces.iter().filter_map(move |piece| {
            let start = piece.group.places.gradient;
            let range = clamp(first..first + entry.len(), &(start..start + piece.group.count));
            (!range.is_empty()).then(|| (piece, range.start - start, range.start - first..range.end - first))
        })
    }

    /// What must be remembered of a piece's weights, from element `first` of it on.
    pub fn remembered(&self, piece: &Piece, first: usize, count: usize) -> Tensor {
        let Piece { group: Group { class, places, .. }, kept } = piece;
        match (&self.copies, &self.masters) {
            (Some(_), Some(masters)) if class.packed => masters.part(kept.master + first, &[count]),
            (Some(copies), None) if class.packed => copies.arena_part(places.copy - self.first + first, &[count]),
            _ => self.values.part(places.value - self.first + first, &[count]),
        }
    }

    pub fn groups(&self) -> &[Group] {
        &self.groups
    }
}

impl AdamW {
    /// The constants of a group's update.
    pub(super) fn step(&self, group: &Group, update: &Update) -> adamw::Step {
        adamw::Step {
            learning_rate: group.learning_rate * update.factor,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay: group.weight_decay,
            max_norm: self.max_grad_norm,
            gradient_scale: 1.0 / update.loss_scale,
            t: if group.of_pictures { update.updates.pictures } else { update.updates.language },
        }
    }
}
