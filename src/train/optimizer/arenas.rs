//! What trains, in arenas: the weights of many tensors in one buffer each, so that a step is a few dispatches whatever
//! their number. Where each tensor lies, and which neighbours are updated alike.

use std::{ops::Range, sync::Arc};

use super::{AdamW, Keep, Sharing, Trainable, apart};
use crate::{
    error::Result,
    gpu::{Account, Gpu},
    models::{
        names,
        streaming::{AtRest, Streaming},
    },
    nn::{Id, Parameter, Parameters},
    ops::{adamw_8bit, cast, elementwise},
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
    pub fn alignment(self) -> usize {
        match self {
            Self { eight_bits: true, .. } => adamw_8bit::BLOCK,
            Self { packed: true, .. } => Dtype::Bf16.alignment(),
            _ => ALIGNMENT,
        }
    }
}

/// Where a tensor lies in the arenas, in elements; where an arena holds nothing of it, any number.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Places {
    /// Among all gradients of the shard, wherever these are: what owners and buckets are told by.
    pub gradient: usize,
    /// f32 weights that the model reads.
    pub value: usize,
    /// Weights in 16 bits.
    pub copy: usize,
}

impl Places {
    /// Goes behind `size` elements of this class.
    pub fn pass(&mut self, class: Class, size: usize) {
        self.gradient += size;
        *(if class.packed { &mut self.copy } else { &mut self.value }) += size;
    }
}

/// One tensor in the arenas.
pub(super) struct Entry {
    pub name: String,
    pub shape: Vec<usize>,
    pub class: Class,
    pub places: Places,
    /// Where its layer takes turns on the device: then only the owned part of it lies in the arenas.
    pub at_rest: Option<Arc<AtRest>>,
}

impl Entry {
    /// Elements, without padding.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its elements that are among these gradients.
    pub fn elements_in(&self, gradients: &Range<usize>) -> Range<usize> {
        let first = self.places.gradient;
        let found = clamp(first..first + self.len(), gradients);
        found.start - first..found.end - first
    }
}

/// A run of neighbouring tensors of one class with equal rates: `count` elements from `places` on.
#[derive(Clone)]
pub(super) struct Group {
    pub class: Class,
    pub places: Places,
    pub count: usize,
    pub learning_rate: f64,
    pub weight_decay: f64,
    pub of_pictures: bool,
}

impl Group {
    fn updates_like(&self, other: &Self) -> bool {
        let key = |group: &Self| (group.class, group.learning_rate, group.weight_decay, group.of_pictures);
        key(self) == key(other)
    }

    /// What of it lies among these gradients; none where nothing does.
    pub fn within(&self, gradients: &Range<usize>) -> Option<Self> {
        let first = self.places.gradient;
        let range = clamp(first..first + self.count, gradients);
        let mut places = self.places;
        places.pass(self.class, range.start - first);
        (!range.is_empty()).then(|| Self { places, count: range.len(), ..self.clone() })
    }
}

/// Weights in their arenas; what they were loaded to can go before there are gradients and moments.
pub(super) struct Placed {
    pub gpu: Gpu,
    pub groups: Vec<Group>,
    pub entries: Vec<Entry>,
    pub ids: Vec<Id>,
    /// Where each arena ends, if it holds all.
    pub end: Places,
    /// f32.
    pub values: Tensor,
    /// 16 bits.
    pub copies: Option<Tensor>,
    /// The first gradient whose weight they hold.
    pub first: usize,
    /// f32, of the packed tensors' owned elements, in their order.
    pub masters: Option<Tensor>,
    /// The gradients whose updates are made here.
    pub owned: Range<usize>,
}

pub(super) fn arena(gpu: &Gpu, account: Account, elements: usize) -> Tensor {
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
/// or one tensor, each on one device.
///
/// Those of layers that take turns are by themselves.
pub(super) fn parts(
    parameters: &Parameters,
    mut trainables: Vec<Trainable>,
    settings: &AdamW,
    most: usize,
    streaming: Option<&Streaming>,
) -> Vec<Vec<Trainable>> {
    let takes_turns = |t: &Trainable| at_rest(streaming, &parameters.get(t.id).name).is_some();
    let devices = apart::devices(parameters, &trainables);
    let device = |t: &Trainable| devices.iter().position(|gpu| gpu.is(parameters.get(t.id).value.gpu()));
    let place = |t: &Trainable| (device(t), takes_turns(t));
    trainables.sort_by_key(|t| {
        let Class { packed, eight_bits } = class(parameters, t.id, settings);
        let alike = (!eight_bits, !packed, t.of_pictures, t.learning_rate.to_bits(), t.weight_decay.to_bits());
        (place(t), alike, t.id)
    });
    let (mut parts, mut elements): (Vec<Vec<Trainable>>, usize) = (Vec::new(), 0);
    for trainable in trainables {
        // Blocks of eight-bit moments are the widest alignment.
        let count = parameters.get(trainable.id).value.len().next_multiple_of(adamw_8bit::BLOCK);
        match parts.last_mut() {
            Some(last) if elements + count <= most && place(&last[0]) == place(&trainable) => last.push(trainable),
            _ => {
                elements = 0;
                parts.push(vec![trainable]);
            }
        }
        elements += count;
    }
    parts
}

fn at_rest<'a>(streaming: Option<&'a Streaming>, name: &str) -> Option<&'a Arc<AtRest>> {
    streaming.and_then(|streaming| streaming.trained(name))
}

impl Placed {
    /// Moves tensors that train into arenas, in the order of [`parts`]; of those of layers that take turns what is owned.
    pub fn new(
        gpu: &Gpu,
        parameters: &mut Parameters,
        trainables: &[Trainable],
        settings: &AdamW,
        sharing: &Sharing,
        streaming: Option<&Streaming>,
    ) -> Self {
        let (mut groups, mut entries, mut end): (Vec<Group>, Vec<Entry>, _) =
            (Vec::new(), Vec::new(), Places::default());
        for trainable in trainables {
            let (parameter, places) = (parameters.get(trainable.id), end);
            let class = class(parameters, trainable.id, settings);
            let count = parameter.value.len().next_multiple_of(class.alignment());
            end.pass(class, count);
            let (name, shape) = (parameter.name.clone(), parameter.value.shape().to_vec());
            let at_rest = at_rest(streaming, &name).cloned();
            entries.push(Entry { name, shape, class, places, at_rest });
            let Trainable { learning_rate, weight_decay, of_pictures, .. } = *trainable;
            let group = Group { class, places, count, learning_rate, weight_decay, of_pictures };
            match groups.last_mut() {
                Some(last) if last.updates_like(&group) => last.count += count,
                _ => groups.push(group),
            }
        }
        let owned = sharing.owned(end.gradient);
        // Tensors of layers that take turns are of one kind, so that all places in their part are the gradients'.
        let takes_turns = entries.iter().any(|entry| entry.at_rest.is_some());
        let (first, held) = if takes_turns { (owned.start, owned.len()) } else { (0, usize::MAX) };
        let values = arena(gpu, Account::Trained, end.value.min(held));
        let copies = (end.copy > 0).then(|| {
            let dtype = if let Keep::Master(dtype) = settings.keep { dtype } else { Dtype::Bf16 };
            arena(gpu, Account::Trained, end.copy.min(held) / 2).reinterpreted(dtype)
        });
        let has_master = |group: &Group| group.class.packed && matches!(settings.keep, Keep::Master(_));
        let owned_groups = groups.iter().filter_map(|group| group.within(&owned));
        let masters: usize = owned_groups.filter(has_master).map(|group| group.count).sum();
        let masters = (masters > 0).then(|| arena(gpu, Account::Trained, masters));
        let ids = trainables.iter().map(|trainable| trainable.id).collect();
        let placed = Self { gpu: gpu.clone(), groups, entries, ids, end, values, copies, first, masters, owned };
        if takes_turns {
            placed.write_owned();
        } else {
            placed.move_all(parameters);
        }
        placed
    }

    /// Moves what was loaded, and says where the model finds it now.
    fn move_all(&self, parameters: &mut Parameters) {
        let Self { entries, ids, values, copies, masters, owned, .. } = self;
        let mut next_master = 0;
        for (&id, entry) in ids.iter().zip(entries) {
            let loaded = &parameters.get(id).value;
            let read = match copies.as_ref().filter(|_| entry.class.packed) {
                None => {
                    let value = values.part(entry.places.value, &entry.shape);
                    value.copy_from(loaded);
                    value
                }
                Some(copies) => {
                    let copy = copies.arena_part(entry.places.copy, &entry.shape);
                    if loaded.dtype() == copy.dtype() {
                        copy.copy_from(loaded);
                    } else {
                        cast::cast_into(loaded, 0, &copy, 0, loaded.len());
                    }
                    if let Some(masters) = masters {
                        let first = entry.places.gradient;
                        let padded = entry.len().next_multiple_of(entry.class.alignment());
                        let all = clamp(first..first + padded, owned);
                        let real = clamp(first..first + entry.len(), owned);
                        if !real.is_empty() {
                            masters.copy_elements(next_master, loaded, real.start - first, real.len());
                        }
                        next_master += all.len();
                    }
                    copy
                }
            };
            parameters.place(id, read, None);
        }
    }

    /// Copies what is owned of layers at rest.
    fn write_owned(&self) {
        for entry in &self.entries {
            let elements = entry.elements_in(&self.owned);
            let Some(at_rest) = entry.at_rest.as_ref().filter(|_| !elements.is_empty() && !self.gpu.only_counts())
            else {
                continue;
            };
            let (place, count) = (entry.places.gradient + elements.start - self.first, [elements.len()]);
            match &self.copies {
                None => self.values.part(place, &count).write(&at_rest.loaded(elements)),
                Some(copies) => {
                    copies.arena_part(place, &count).write_bytes(&at_rest.read(elements.clone()));
                    if let Some(masters) = &self.masters {
                        masters.part(place, &count).write(&at_rest.loaded(elements));
                    }
                }
            }
        }
    }
}

/// The f32 weights of tensors that train, as they were loaded, in arena order.
///
/// # Errors
/// Whatever has failed on the device so far.
pub(super) fn on_host(
    parameters: &Parameters,
    trainables: &[Trainable],
    settings: &AdamW,
    streaming: Option<&Streaming>,
) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    for trainable in trainables {
        let class = class(parameters, trainable.id, settings);
        let Parameter { name, value, .. } = parameters.get(trainable.id);
        match at_rest(streaming, name) {
            Some(at_rest) => values.extend(at_rest.loaded(0..value.len())),
            None => values.extend(value.to_vec()?),
        }
        values.resize(values.len().next_multiple_of(class.alignment()), 0.0);
    }
    Ok(values)
}

/// The part of `range` that lies in `within`; empty, and somewhere in `range`, where there is none.
pub(super) fn clamp(range: Range<usize>, within: &Range<usize>) -> Range<usize> {
    let start = range.start.max(within.start).min(range.end);
    start..range.end.min(within.end).max(start)
}
