//! What trains of a model whose layers lie on several devices: each shard is on one of them, and the square sums of the
//! gradients, of which the clip factor follows, meet on the host.

use super::{Optimizer, Trainable, Update};
use crate::{error::Result, gpu::Gpu, nn::Parameters, ops::elementwise, tensor::Tensor};

/// The devices of tensors that train, in the order in which these come.
pub(super) fn devices(parameters: &Parameters, trainables: &[Trainable]) -> Vec<Gpu> {
    distinct(trainables.iter().map(|trainable| parameters.get(trainable.id).value.gpu()))
}

fn distinct<'a>(all: impl Iterator<Item = &'a Gpu>) -> Vec<Gpu> {
    let mut gpus: Vec<Gpu> = Vec::new();
    for gpu in all {
        if !gpus.iter().any(|known| known.is(gpu)) {
            gpus.push(gpu.clone());
        }
    }
    gpus
}

impl Optimizer {
    /// As [`Optimizer::step`], of shards on several devices; gives the square sum of all gradients.
    ///
    /// # Errors
    /// Whatever has failed on one of the devices so far.
    pub fn step_apart(&self, update: &Update) -> Result<f64> {
        let gpus = distinct(self.shards.iter().map(|shard| shard.gpu()));
        let sums: Vec<Tensor> = gpus.iter().map(|gpu| elementwise::zeros(gpu, &[1])).collect();
        let on_its_device = || {
            let sum = |gpu: &Gpu| sums.iter().find(|sum| sum.gpu().is(gpu));
            self.shards.iter().filter_map(move |shard| Some((shard, sum(shard.gpu())?)))
        };
        on_its_device().for_each(|(shard, sum)| shard.add_square_sum(sum, 0));
        let mut square_sum = 0.0;
        for sum in &sums {
            square_sum += f64::from(sum.to_vec()?[0]);
        }
        let square_sum = square_sum as f32;
        sums.iter().for_each(|sum| sum.write(&[square_sum]));
        on_its_device().for_each(|(shard, sum)| shard.step(update, sum));
        // As the updates have read it: what overflowed there must be seen.
        Ok(square_sum.into())
    }
}
