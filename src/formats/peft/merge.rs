//! Folding an adapter into a model's weights, on the host, a range of rows at a time.
//!
//! W' = W + scale · B·A, with DoRA's W' = m ⊙ (W + scale · B·A) / ‖W + scale · B·A‖ by rows. Products and norms are
//! summed in f64 and rounded once to f32, so what comes out is within half a unit of the last place of f32 of the exact
//! value; PyTorch's merge_and_unload sums in f32 and is further from it. The caller rounds once more, to the type that
//! he writes.
//!
//! What the base is kept as:
//!
//! * Rows come as f32, whatever the file has. A base in 16 bits that is kept in 16 bits loses what of the change is below
//!   its last place; the report's largest change, beside the weights' size, tells whether that matters.
//! * A quantised base (NF4, GGUF's block types) is dequantised first and should not be quantised again: that loses more
//!   than most adapters change. Write f32 or 16 bits. An adapter trained on a quantised base fits the dequantised
//!   weights; the original ones in 16 bits are common practice, and not what it was trained on.
//! * Tensors that no adapter touches ([`Merge::touches`]) need no arithmetic: where the output has their type, their
//!   bytes pass.
//! * A tied model whose head and embeddings part ([`Adapter::unties_head`]) has a head of its own after merging:
//!   [`Merge::config`] says so, and the head's rows, before merging, are those of the embeddings.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::{Adapter, LoraWeights};
use crate::{
    error::{Error, Result},
    models::{config::ModelConfig, names},
};

/// Columns summed at a time: an accumulator of this many f64 stays in the nearest cache.
const TILE: usize = 512;

impl LoraWeights {
    /// Folds the adapter into rows of its weight `[out, in]`, from row `first` on, in place; gives the largest change of
    /// an element.
    ///
    /// Panics if `rows` is not whole rows of the weight: a mistake of the caller, since shapes were checked on reading.
    pub fn merge_rows(&self, first: usize, rows: &mut [f32]) -> f64 {
        let (rank, inputs) = (self.rank(), self.lora_a.shape[1]);
        let count = rows.len() / inputs;
        assert!(rows.len() == count * inputs && first + count <= self.lora_b.shape[0], "whole rows of the weight");
        let row = |(index, row): (usize, &mut [f32])| {
            let b = &self.lora_b.data[(first + index) * rank..][..rank];
            self.merge_row(b, self.magnitude.as_ref().map(|magnitude| f64::from(magnitude.data[first + index])), row)
        };
        rows.par_chunks_mut(inputs).enumerate().map(row).reduce(|| 0.0, larger)
    }

    /// Adds lora_B's bias to elements of the linear's own, from `first` on; gives the largest change.
    pub fn merge_bias(&self, first: usize, values: &mut [f32]) -> f64 {
        let Some(bias) = &self.bias else { return 0.0 };
        let merged: Vec<f64> =
            values.iter().zip(&bias.data[first..]).map(|(&x, &b)| f64::from(x) + self.scale * f64::from(b)).collect();
        replace(values, &merged, 1.0)
    }

    fn merge_row(&self, b: &[f32], magnitude: Option<f64>, row: &mut [f32]) -> f64 {
        let inputs = row.len();
        // The row in f64 is kept where its length is asked for before it is written.
        let mut merged = vec![0.0f64; if magnitude.is_some() { inputs } else { TILE.min(inputs) }];
        let (mut largest, mut squares) = (0.0, 0.0);
        for from in (0..inputs).step_by(TILE) {
            let width = TILE.min(inputs - from);
            let at = if magnitude.is_some() { from } else { 0 };
            let sums = &mut merged[at..at + width];
            let row = &mut row[from..from + width];
            sums.fill(0.0);
            self.add_products(b, from, sums);
            sums.iter_mut().zip(row.iter()).for_each(|(sum, &w)| *sum = f64::from(w) + self.scale * *sum);
            match magnitude {
                Some(_) => squares += sums.iter().map(|x| x * x).sum::<f64>(),
                None => largest = larger(largest, replace(row, sums, 1.0)),
            }
        }
        match magnitude {
            // A row of zeros has no direction to give a length to.
            Some(_) if squares == 0.0 => replace(row, &merged, 0.0),
            Some(magnitude) => replace(row, &merged, magnitude / squares.sqrt()),
            None => largest,
        }
    }
}

impl LoraWeights {
    /// Adds a row of B times A, in the columns from `from` on. Four rows of A at a time: the sums are what it costs to
    /// load and store.
    fn add_products(&self, b: &[f32], from: usize, sums: &mut [f64]) {
        let (inputs, width) = (self.lora_a.shape[1], sums.len());
        let a = |row: usize| &self.lora_a.data[row * inputs + from..][..width];
        let (quads, rest) = b.as_chunks::<4>();
        for (quad, b) in quads.iter().enumerate() {
            let [b0, b1, b2, b3] = b.map(f64::from);
            let [a0, a1, a2, a3] = [0, 1, 2, 3].map(|row| a(quad * 4 + row));
            for (j, sum) in sums.iter_mut().enumerate() {
                let first = b0 * f64::from(a0[j]) + b1 * f64::from(a1[j]);
                *sum += first + (b2 * f64::from(a2[j]) + b3 * f64::from(a3[j]));
            }
        }
        for (row, &b) in rest.iter().enumerate() {
            let b = f64::from(b);
            sums.iter_mut().zip(a(quads.len() * 4 + row)).for_each(|(sum, &a)| *sum += b * f64::from(a));
        }
    }
}

/// Writes `factor` times the values over the row; the largest change.
fn replace(row: &mut [f32], values: &[f64], factor: f64) -> f64 {
    let write = |(old, value): (&mut f32, &f64)| {
        let (before, value) = (f64::from(*old), factor * value);
        *old = value as f32;
        (value - before).abs()
    };
    row.iter_mut().zip(values).map(write).fold(0.0, larger)
}

/// The larger, and NaN where one is: a broken adapter must show in the report.
fn larger(a: f64, b: f64) -> f64 {
    if a >= b || a.is_nan() { a } else { b }
}

/// An adapter on its way into a model, tensor by tensor. What it does not meet it misses at the end.
///
/// ```no_run
/// # use wgpu_llava::{error::Result, formats::peft::{Adapter, Merge}, models::config::ModelConfig};
/// # fn f(adapter: &Adapter, config: &ModelConfig, tensors: Vec<(String, Vec<f32>)>) -> Result<()> {
/// let mut merge = Merge::new(adapter, config)?;
/// for (name, mut values) in tensors {
///     if merge.touches(&name) {
///         merge.apply(&name, 0, &mut values)?;
///     }
/// }
/// println!("{:?}", merge.finish()?.largest);
/// # Ok(())
/// # }
/// ```
pub struct Merge<'a> {
    adapter: &'a Adapter,
    config: ModelConfig,
    /// Elements that each touched tensor still has to come.
    missing: BTreeMap<String, usize>,
    report: MergeReport,
}

/// What merging has changed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MergeReport {
    /// How many tensors.
    pub tensors: usize,
    /// The largest change of an element, and the canonical name of the tensor where it happened.
    pub largest: Option<(String, f64)>,
}

impl<'a> Merge<'a> {
    /// `config` is the base model's.
    ///
    /// # Errors
    /// `Data`: the adapter has a bias for a linear that has none.
    pub fn new(adapter: &'a Adapter, config: &ModelConfig) -> Result<Self> {
        let mut config = config.clone();
        if adapter.unties_head {
            config.text_mut().tie_word_embeddings = false;
        }
        let all = names::expected_tensors(&config).into_iter().chain(names::unused_vision_tensors(&config));
        let elements: BTreeMap<String, usize> = all.map(|(name, shape)| (name, shape.iter().product())).collect();
        let mut missing = BTreeMap::new();
        for (module, weights) in &adapter.modules {
            missing.insert(format!("{module}.weight"), weights.lora_a.shape[1] * weights.lora_b.shape[0]);
            if let Some(bias) = &weights.bias {
                missing.insert(format!("{module}.bias"), bias.len());
            }
        }
        missing.extend(adapter.saved.iter().map(|(name, tensor)| (name.clone(), tensor.len())));
        if let Some((name, _)) = missing.iter().find(|(name, count)| elements.get(*name) != Some(count)) {
            let message = format!("the adapter changes {name}, which the model does not have in that size");
            let error = Error::data(message).hint("the adapter was made for another model");
            return Err(match name.ends_with(".bias") {
                true => error.hint("an adapter with `lora_bias` on a linear without a bias cannot be merged"),
                false => error,
            });
        }
        Ok(Self { adapter, config, missing, report: MergeReport::default() })
    }

    /// The merged model's config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether the tensor of this canonical name changes.
    pub fn touches(&self, name: &str) -> bool {
        let module = name.rsplit_once('.').and_then(|(module, _)| self.adapter.modules.get(module));
        let adapted = module.is_some_and(|weights| name.ends_with(".weight") || weights.bias.is_some());
        adapted || self.adapter.saved.contains_key(name)
    }

    /// Changes a part of the tensor of this canonical name, whole rows from row `first` on (of a bias: elements), in
    /// place. Each part comes once, in any order.
    ///
    /// # Errors
    /// `Failed`: the part does not lie within the tensor, or comes twice.
    pub fn apply(&mut self, name: &str, first: usize, rows: &mut [f32]) -> Result<()> {
        if !self.touches(name) {
            return Ok(());
        }
        let wrong =
            || Error::failed(format!("{name}: {} elements from row {first} on are not a part of it", rows.len()));
        let left = self.missing.get_mut(name).ok_or_else(wrong)?;
        *left = left.checked_sub(rows.len()).ok_or_else(wrong)?;
        let saved = self.adapter.saved.get(name);
        let module = name.rsplit_once('.').and_then(|(module, part)| Some((self.adapter.modules.get(module)?, part)));
        let shape = match (saved, &module) {
            (Some(saved), _) => saved.shape.clone(),
            (None, Some((weights, "weight"))) => vec![weights.lora_b.shape[0], weights.lora_a.shape[1]],
            (None, Some((weights, _))) => vec![weights.lora_b.shape[0]],
            (None, None) => return Ok(()),
        };
        let width: usize = shape.iter().skip(1).product();
        let fits = width > 0 && rows.len().is_multiple_of(width) && first + rows.len() / width <= shape[0];
        if !fits {
            return Err(wrong());
        }
        let before = saved.map(|_| rows.to_vec());
        if let Some(saved) = saved {
            rows.copy_from_slice(&saved.data[first * width..][..rows.len()]);
        }
        let folded = match module {
            Some((weights, "weight")) => weights.merge_rows(first, rows),
            Some((weights, _)) => weights.merge_bias(first, rows),
            None => 0.0,
        };
        let differences = |before: Vec<f32>| {
            let pairs = rows.iter().zip(before).map(|(a, b)| (f64::from(*a) - f64::from(b)).abs());
            pairs.fold(0.0, larger)
        };
        let change = before.map_or(folded, differences);
        match &self.report.largest {
            Some((_, largest)) if larger(*largest, change) == *largest || largest.is_nan() => {}
            _ => self.report.largest = Some((name.to_owned(), change)),
        }
        Ok(())
    }

    /// What has changed.
    ///
    /// # Errors
    /// `Failed`: a tensor that the adapter changes never came, or not whole. `Data`: a merged weight is not finite.
    pub fn finish(self) -> Result<MergeReport> {
        if let Some((name, left)) = self.missing.iter().find(|(_, left)| **left > 0) {
            return Err(Error::failed(format!("the adapter changes {name}, of which {left} elements were not merged")));
        }
        match &self.report.largest {
            Some((name, change)) if !change.is_finite() => {
                Err(Error::data(format!("the adapter makes {name} infinite or not a number"))
                    .hint("the adapter is broken: its training diverged"))
            }
            _ => Ok(MergeReport { tensors: self.missing.len(), ..self.report }),
        }
    }
}
