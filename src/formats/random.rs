//! Weights that are in no file: random values made when a row is asked for, so that a model of any size can be opened,
//! checked and run without its 130 GB.

use std::{collections::BTreeMap, ops::Range};

use rayon::prelude::*;

use super::{
    safetensors::Dtype,
    stored::{StoredTensor, rounded},
};
use crate::{
    models::{config::ModelConfig, names},
    rng::Rng,
};

/// LLaMA's `initializer_range`.
const DEVIATION: f32 = 0.02;

/// Every tensor of a config by its canonical name.
pub struct RandomWeights {
    shapes: BTreeMap<String, Vec<usize>>,
    dtype: Dtype,
    seed: u64,
}

/// How the values of one tensor are made.
#[derive(Clone, Copy, Debug)]
pub(super) struct RandomTensor {
    pub dtype: Dtype,
    seed: u64,
    /// Of the tensor's name.
    stream: u64,
    /// Norm weights are ones, biases zeros; none: random.
    constant: Option<f32>,
}

impl RandomWeights {
    /// `dtype` is one that weights are kept in: F32, F16 or BF16.
    pub fn new(config: &ModelConfig, dtype: Dtype, seed: u64) -> Self {
        let mut shapes: BTreeMap<_, _> = names::expected_tensors(config).into_iter().collect();
        shapes.extend(names::unused_vision_tensors(config));
        Self { shapes, dtype, seed }
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shapes.keys().map(String::as_str)
    }

    pub fn get(&self, name: &str) -> Option<StoredTensor<'_>> {
        let (name, shape) = self.shapes.get_key_value(name)?;
        let constant = match shape.len() {
            1 if name.ends_with(".bias") => Some(0.0),
            1 if name.ends_with(".weight") => Some(1.0),
            _ => None,
        };
        let stream = Rng::named(self.seed, name).next_u64();
        let tensor = RandomTensor { dtype: self.dtype, seed: self.seed, stream, constant };
        Some(StoredTensor::random(name, "random weights", shape.clone(), tensor))
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
}

impl RandomTensor {
    /// A row's values depend on the tensor's name and the row's number alone.
    pub fn bytes(&self, rows: Range<usize>, columns: usize) -> Vec<u8> {
        // Uniform, with the deviation of the usual normal start.
        let bound = DEVIATION * 3f32.sqrt();
        let row = |row: usize| {
            let mut rng = Rng::new(self.seed, self.stream.wrapping_add(row as u64));
            let values: Vec<_> = (0..columns).map(|_| self.constant.unwrap_or_else(|| rng.uniform(bound))).collect();
            rounded(self.dtype, &values)
        };
        rows.into_par_iter().map(row).collect::<Vec<_>>().concat()
    }
}
