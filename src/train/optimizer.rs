//! AdamW over flat arenas: everything that trains lies in one buffer, its gradients in a second, the moments in two
//! more, so that zeroing, the gradient norm and the update are a few dispatches whatever the number of tensors.

use serde::{Deserialize, Serialize};

use crate::{
    gpu::Account,
    nn::{Id, Parameters},
    ops::{adamw, elementwise, reduce},
    tensor::{ALIGNMENT, Tensor},
};

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

/// What AdamW needs besides the gradient; `torch.optim.AdamW`'s names.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// 0: no clipping.
    pub max_grad_norm: f64,
}

/// A run of neighbouring tensors with equal rates: `start..end` in elements of the arenas.
struct Group {
    start: usize,
    end: usize,
    learning_rate: f64,
    weight_decay: f64,
    of_pictures: bool,
}

impl Group {
    fn updates_like(&self, other: &Self) -> bool {
        let key = |group: &Self| (group.learning_rate, group.weight_decay, group.of_pictures);
        key(self) == key(other)
    }
}

/// Parameters, gradients and moments of all that trains.
pub struct Optimizer {
    settings: AdamW,
    groups: Vec<Group>,
    /// Name, place and shape of each tensor, in arena order.
    entries: Vec<(String, usize, Vec<usize>)>,
    values: Tensor,
    gradients: Tensor,
    first_moments: Tensor,
    second_moments: Tensor,
}

impl Optimizer {
    /// Moves what trains into arenas, and gives each its place for gradients.
    pub fn new(parameters: &mut Parameters, mut trainables: Vec<Trainable>, settings: AdamW) -> Self {
        let key = |t: &Trainable| (t.of_pictures, t.learning_rate.to_bits(), t.weight_decay.to_bits());
        trainables.sort_by_key(|trainable| (key(trainable), trainable.id));
        let (mut groups, mut entries, mut end): (Vec<Group>, _, _) = (Vec::new(), Vec::new(), 0);
        for trainable in &trainables {
            let parameter = parameters.get(trainable.id);
            let (start, shape) = (end, parameter.value.shape().to_vec());
            end = (start + parameter.value.len()).next_multiple_of(ALIGNMENT);
            entries.push((parameter.name.clone(), start, shape));
            let Trainable { learning_rate, weight_decay, of_pictures, .. } = *trainable;
            let group = Group { start, end, learning_rate, weight_decay, of_pictures };
            match groups.last_mut() {
                Some(last) if last.updates_like(&group) => last.end = end,
                _ => groups.push(group),
            }
        }
        let gpu = match trainables.first() {
            Some(first) => parameters.get(first.id).value.gpu().clone(),
            None => unreachable!("trainable.rs refuses a stage in which nothing trains"),
        };
        let accounts = [Account::Trained, Account::Gradients, Account::Optimizer, Account::Optimizer];
        let [values, gradients, first_moments, second_moments] = accounts.map(|account| {
            let _account = gpu.account(account);
            elementwise::zeros(&gpu, &[end])
        });
        for (trainable, (_, start, shape)) in trainables.iter().zip(&entries) {
            let value = values.part(*start, shape);
            value.copy_from(&parameters.get(trainable.id).value);
            parameters.place(trainable.id, value, Some(gradients.part(*start, shape)));
        }
        Self { settings, groups, entries, values, gradients, first_moments, second_moments }
    }

    /// How many numbers train.
    pub fn elements(&self) -> usize {
        self.entries.iter().map(|(_, _, shape)| shape.iter().product::<usize>()).sum()
    }

    pub fn zero_gradients(&self) {
        elementwise::fill(&self.gradients, 0.0);
    }

    /// Adds the gradients' square sum to `out[slot]`.
    pub fn add_square_sum(&self, out: &Tensor, slot: usize) {
        reduce::add_square_sum(&self.gradients, out, slot);
    }

    /// One update. `factor` is the schedule's, `updates` counts this one; without `pictures` what belongs to them
    /// stays. `square_sum` [1] holds the gradients' square sum: the clip factor never leaves the device, and where it
    /// is not finite nothing changes.
    pub fn step(&self, factor: f64, updates: Updates, pictures: bool, square_sum: &Tensor) {
        for group in self.groups.iter().filter(|group| pictures || !group.of_pictures) {
            let count = group.end - group.start;
            let [value, gradient, first, second] =
                [&self.values, &self.gradients, &self.first_moments, &self.second_moments]
                    .map(|arena| arena.part(group.start, &[count]));
            let step = adamw::Step {
                learning_rate: group.learning_rate * factor,
                beta1: self.settings.beta1,
                beta2: self.settings.beta2,
                epsilon: self.settings.epsilon,
                weight_decay: group.weight_decay,
                max_norm: self.settings.max_grad_norm,
                t: if group.of_pictures { updates.pictures } else { updates.language },
            };
            adamw::step(&value, &gradient, &first, &second, square_sum, &step);
        }
    }

    /// Name, shape, value and both moments of each tensor that trains.
    pub fn states(&self) -> impl Iterator<Item = (&str, &[usize], [Tensor; 3])> {
        self.entries.iter().map(|(name, start, shape)| {
            let parts =
                [&self.values, &self.first_moments, &self.second_moments].map(|arena| arena.part(*start, shape));
            (name.as_str(), shape.as_slice(), parts)
        })
    }
}
