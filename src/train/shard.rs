//! A part of what trains, in arenas: weights, gradients and moments of many tensors, each in one buffer, so that a step is
//! a few dispatches whatever their number.

use super::optimizer::{AdamW, Keep, Trainable, Update};
use crate::{
    gpu::{Account, Gpu},
    models::names,
    nn::{Id, Parameters},
    ops::{
        adamw::{self, Draw, Weights},
        adamw_8bit::{self, Moments},
        cast, elementwise, reduce,
    },
    tensor::{ALIGNMENT, Dtype, Tensor},
};

/// What kind of weights and moments a tensor has. Those of one kind lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Class {
    /// 16 bits: a copy, or all there is.
    pub packed: bool,
    pub eight_bits: bool,
}

impl Class {
    /// Blocks of eight-bit moments begin with their tensor; so does what can be bound in 16 bits.
    fn alignment(self) -> usize {
        match self {
            Self { eight_bits: true, .. } => adamw_8bit::BLOCK,
            Self { packed: true, .. } => Dtype::Bf16.alignment(),
            _ => ALIGNMENT,
        }
    }
}

/// Where a tensor lies in each arena, in elements; where an arena holds nothing of it, any number.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Places {
    pub gradient: usize,
    pub value: usize,
    pub copy: usize,
    pub moments: usize,
    pub moments_8bit: usize,
}

impl Places {
    /// Goes behind a tensor of this class with `size` elements, padding included.
    fn pass(&mut self, class: Class, keep: Keep, size: usize) {
        self.gradient += size;
        self.value += if class.packed && keep == Keep::Stochastic { 0 } else { size };
        self.copy += if class.packed { size } else { 0 };
        *(if class.eight_bits { &mut self.moments_8bit } else { &mut self.moments }) += size;
    }
}

/// One tensor in the arenas.
pub(super) struct Entry {
    pub name: String,
    pub shape: Vec<usize>,
    pub class: Class,
    pub places: Places,
}

/// A run of neighbouring tensors of one class with equal rates: `count` elements from `places` on.
struct Group {
    class: Class,
    places: Places,
    count: usize,
    learning_rate: f64,
    weight_decay: f64,
    of_pictures: bool,
}

impl Group {
    fn updates_like(&self, other: &Self) -> bool {
        let key = |group: &Self| (group.class, group.learning_rate, group.weight_decay, group.of_pictures);
        key(self) == key(other)
    }
}

/// Weights in their arenas; what they were loaded to can go before there are gradients and moments.
pub(super) struct Placed {
    gpu: Gpu,
    groups: Vec<Group>,
    entries: Vec<Entry>,
    ids: Vec<Id>,
    /// Where each arena ends.
    end: Places,
    values: Tensor,
    copies: Option<Tensor>,
}

fn arena(gpu: &Gpu, account: Account, elements: usize) -> Tensor {
    let _account = gpu.account(account);
    elementwise::zeros(gpu, &[elements.max(ALIGNMENT)])
}

/// How a tensor that trains is kept.
fn class(parameters: &Parameters, id: Id, settings: &AdamW) -> Class {
    let parameter = parameters.get(id);
    // Only what products and look-ups read may be packed.
    let matrix = parameter.value.shape().len() > 1 && parameter.name != names::POSITION_EMBEDDING;
    Class {
        packed: settings.keep != Keep::Full && matrix,
        eight_bits: settings.moments_8bit && parameter.value.len() >= adamw_8bit::LEAST,
    }
}

/// Brings tensors that are kept and updated alike together, and cuts what trains into parts of at most `most` elements,
/// or one tensor.
pub(super) fn parts(
    parameters: &Parameters,
    mut trainables: Vec<Trainable>,
    settings: &AdamW,
    most: usize,
) -> Vec<Vec<Trainable>> {
    trainables.sort_by_key(|t| {
        let Class { packed, eight_bits } = class(parameters, t.id, settings);
        (!eight_bits, !packed, t.of_pictures, t.learning_rate.to_bits(), t.weight_decay.to_bits(), t.id)
    });
    let (mut parts, mut elements): (Vec<Vec<Trainable>>, usize) = (Vec::new(), 0);
    for trainable in trainables {
        // Blocks of eight-bit moments are the widest alignment.
        let count = parameters.get(trainable.id).value.len().next_multiple_of(adamw_8bit::BLOCK);
        match parts.last_mut() {
            Some(last) if elements + count <= most => last.push(trainable),
            _ => {
                elements = 0;
                parts.push(vec![trainable]);
            }
        }
        elements += count;
    }
    parts
}

impl Placed {
    /// Moves tensors that train into arenas, in the order of [`parts`].
    pub fn new(gpu: &Gpu, parameters: &mut Parameters, trainables: &[Trainable], settings: &AdamW) -> Self {
        let (mut groups, mut entries, mut end): (Vec<Group>, Vec<Entry>, _) =
            (Vec::new(), Vec::new(), Places::default());
        for trainable in trainables {
            let (parameter, places) = (parameters.get(trainable.id), end);
            let class = class(parameters, trainable.id, settings);
            let count = parameter.value.len().next_multiple_of(class.alignment());
            end.pass(class, settings.keep, count);
            let (name, shape) = (parameter.name.clone(), parameter.value.shape().to_vec());
            entries.push(Entry { name, shape, class, places });
            let Trainable { learning_rate, weight_decay, of_pictures, .. } = *trainable;
            let group = Group { class, places, count, learning_rate, weight_decay, of_pictures };
            match groups.last_mut() {
                Some(last) if last.updates_like(&group) => last.count += count,
                _ => groups.push(group),
            }
        }
        let values = arena(gpu, Account::Trained, end.value);
        let copies = (end.copy > 0).then(|| {
            let dtype = if let Keep::Master(dtype) = settings.keep { dtype } else { Dtype::Bf16 };
            arena(gpu, Account::Trained, end.copy / 2).reinterpreted(dtype)
        });
        for (trainable, entry) in trainables.iter().zip(&entries) {
            let loaded = &parameters.get(trainable.id).value;
            let copy = copies.as_ref().filter(|_| entry.class.packed);
            let copy = copy.map(|copies| copies.arena_part(entry.places.copy, &entry.shape));
            if let Some(copy) = &copy {
                if loaded.dtype() == copy.dtype() {
                    copy.copy_from(loaded);
                } else {
                    cast::cast_into(loaded, 0, copy, 0, loaded.len());
                }
            }
            let master = (copy.is_none() || settings.keep != Keep::Stochastic).then(|| {
                let master = values.part(entry.places.value, &entry.shape);
                master.copy_from(loaded);
                master
            });
            let Some(read) = copy.or(master) else { unreachable!("a tensor is f32 or packed") };
            parameters.place(trainable.id, read, None);
        }
        let ids = trainables.iter().map(|trainable| trainable.id).collect();
        Self { gpu: gpu.clone(), groups, entries, ids, end, values, copies }
    }
}

/// Weights, gradients and moments of a part of what trains.
pub(super) struct Shard {
    settings: AdamW,
    groups: Vec<Group>,
    /// In arena order.
    pub(super) entries: Vec<Entry>,
    /// f32: weights, or masters.
    pub(super) values: Tensor,
    /// 16 bits.
    pub(super) copies: Option<Tensor>,
    gradients: Tensor,
    gradient_end: usize,
    /// f32, first and second.
    pub(super) moments: [Tensor; 2],
    pub(super) moments_8bit: Option<Moments>,
}

impl Shard {
    /// Gives what was [`Placed`] its place for gradients, and its moments.
    pub fn new(parameters: &mut Parameters, placed: Placed, settings: AdamW) -> Self {
        let Placed { gpu, groups, entries, ids, end, values, copies } = placed;
        let gradients = arena(&gpu, Account::Gradients, end.gradient);
        let moments = [(); 2].map(|()| arena(&gpu, Account::Optimizer, end.moments));
        let _optimizer = gpu.account(Account::Optimizer);
        let moments_8bit = (end.moments_8bit > 0).then(|| Moments::new(&gpu, end.moments_8bit));
        for (id, entry) in ids.into_iter().zip(&entries) {
            let value = parameters.get(id).value.clone();
            parameters.place(id, value, Some(gradients.part(entry.places.gradient, &entry.shape)));
        }
        let gradient_end = end.gradient;
        Self { settings, groups, entries, values, copies, gradients, gradient_end, moments, moments_8bit }
    }

    /// How many numbers train here.
    pub fn elements(&self) -> usize {
        self.entries.iter().map(|entry| entry.shape.iter().product::<usize>()).sum()
    }

    pub fn zero_gradients(&self) {
        elementwise::fill(&self.gradients, 0.0);
    }

    /// The names of its tensors, and where the gradient of each begins and ends, padding included.
    pub fn gradients(&self) -> impl Iterator<Item = (&str, usize, usize)> {
        let ends = self.entries.iter().skip(1).map(|next| next.places.gradient).chain([self.gradient_end]);
        self.entries.iter().zip(ends).map(|(entry, end)| (entry.name.as_str(), entry.places.gradient, end))
    }

    /// `count` elements of the gradients, from `first` on.
    pub fn gradient_part(&self, first: usize, count: usize) -> Tensor {
        self.gradients.part(first, &[count])
    }

    /// Adds the gradients' square sum to `out[slot]`.
    pub fn add_square_sum(&self, out: &Tensor, slot: usize) {
        reduce::add_square_sum(&self.gradients, out, slot);
    }

    /// One update. `square_sum` [1] holds the gradients' square sum: the clip factor never leaves the device, and where
    /// it is not finite nothing changes.
    pub fn step(&self, update: &Update, square_sum: &Tensor) {
        for group in self.groups.iter().filter(|group| update.pictures || !group.of_pictures) {
            let (count, places) = ([group.count], &group.places);
            let step = adamw::Step {
                learning_rate: group.learning_rate * update.factor,
                beta1: self.settings.beta1,
                beta2: self.settings.beta2,
                epsilon: self.settings.epsilon,
                weight_decay: group.weight_decay,
                max_norm: self.settings.max_grad_norm,
                gradient_scale: 1.0 / update.loss_scale,
                t: if group.of_pictures { update.updates.pictures } else { update.updates.language },
            };
            let gradient = self.gradients.part(places.gradient, &count);
            let value = || self.values.part(places.value, &count);
            let (master, copy);
            let weights = match self.copies.as_ref().filter(|_| group.class.packed) {
                None => {
                    master = value();
                    Weights::Full(&master)
                }
                Some(copies) => {
                    copy = copies.part(places.copy, &count);
                    if self.settings.keep == Keep::Stochastic {
                        let (seed, step) = (self.settings.seed as u32, update.step as u32);
                        Weights::Stochastic(&copy, Draw { seed, step, first: places.copy })
                    } else {
                        master = value();
                        Weights::Master(&master, &copy)
                    }
                }
            };
            match self.moments_8bit.as_ref().filter(|_| group.class.eight_bits) {
                Some(moments) => {
                    let block = places.moments_8bit / adamw_8bit::BLOCK;
                    adamw_8bit::step(weights, &gradient, moments, block, square_sum, &step);
                }
                None => {
                    let [first, second] = self.moments.each_ref().map(|moments| moments.part(places.moments, &count));
                    adamw::step(weights, &gradient, &first, &second, square_sum, &step);
                }
            }
        }
    }

    /// Makes the copies in 16 bits again from their masters.
    pub(super) fn refresh_copies(&self) {
        let Some(copies) = self.copies.as_ref().filter(|_| self.settings.keep != Keep::Stochastic) else { return };
        for entry in self.entries.iter().filter(|entry| entry.class.packed) {
            let (master, copy) = (self.value(entry), copies.arena_part(entry.places.copy, &entry.shape));
            cast::cast_into(&master, 0, &copy, 0, master.len());
        }
    }

    /// What of a tensor's weights must be remembered.
    pub(super) fn value(&self, entry: &Entry) -> Tensor {
        match &self.copies {
            Some(copies) if entry.class.packed && self.settings.keep == Keep::Stochastic => {
                copies.arena_part(entry.places.copy, &entry.shape)
            }
            _ => self.values.part(entry.places.value, &entry.shape),
        }
    }
}
