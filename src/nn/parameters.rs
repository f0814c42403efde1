//! A model's tensors by their checkpoint names, and the arenas that hold what trains.

use std::{collections::HashMap, sync::Arc};

use crate::{autograd::Weight, tensor::Tensor};

/// Index of a parameter in its [`Parameters`].
pub type Id = usize;

#[derive(Clone, Debug)]
pub struct Parameter {
    /// As in the checkpoint, in the canonical layout (`models::names`).
    pub name: String,
    pub value: Tensor,
    /// Where the gradient is added, when the parameter trains.
    pub grad: Option<Tensor>,
}

/// Clones share what they hold until one of them changes.
#[derive(Clone, Default)]
pub struct Parameters {
    list: Arc<Vec<Parameter>>,
    by_name: Arc<HashMap<String, Id>>,
}

impl Parameters {
    /// Adds a frozen parameter.
    pub fn insert(&mut self, name: impl Into<String>, value: Tensor) -> Id {
        let name = name.into();
        let id = self.list.len();
        Arc::make_mut(&mut self.by_name).insert(name.clone(), id);
        Arc::make_mut(&mut self.list).push(Parameter { name, value, grad: None });
        id
    }

    pub fn find(&self, name: &str) -> Option<Id> {
        self.by_name.get(name).copied()
    }

    pub fn get(&self, id: Id) -> &Parameter {
        &self.list[id]
    }

    pub fn iter(&self) -> impl Iterator<Item = &Parameter> {
        self.list.iter()
    }

    /// The parameter as the tape's functions take it.
    pub fn weight(&self, id: Id) -> Weight {
        let parameter = &self.list[id];
        Weight { value: parameter.value.clone(), grad: parameter.grad.clone() }
    }

    /// Moves a parameter to where the trainer keeps it, and says where its gradient goes.
    pub fn place(&mut self, id: Id, value: Tensor, grad: Option<Tensor>) {
        let parameter = &mut Arc::make_mut(&mut self.list)[id];
        assert_eq!(parameter.value.shape(), value.shape(), "{} keeps its shape", parameter.name);
        parameter.value = value;
        parameter.grad = grad;
    }

    /// Number of elements of all parameters.
    pub fn elements(&self) -> usize {
        self.list.iter().map(|parameter| parameter.value.len()).sum()
    }
}
