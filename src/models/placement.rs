//! Where a model lies: on one device, or the decoder's layers in contiguous parts, each on a device of its own. The first
//! one then has what comes before the layers too, the last one what comes behind them.

use super::names;
use crate::gpu::Gpu;

/// Which device has which tensor.
#[derive(Clone)]
pub struct Placement {
    /// At least one.
    gpus: Vec<Gpu>,
    /// The first layer of each but the first.
    begins: Vec<usize>,
}

impl From<&Gpu> for Placement {
    fn from(gpu: &Gpu) -> Self {
        Self { gpus: vec![gpu.clone()], begins: Vec::new() }
    }
}

impl Placement {
    /// So many decoder layers over these devices, of which there are no more: as many to each, so that none waits for
    /// another, or where they tell that their memory is unlike, in proportion to it.
    pub fn split(gpus: &[Gpu], layers: usize) -> Self {
        let memory: Option<Vec<u64>> = gpus.iter().map(|gpu| gpu.facts().memory.filter(|&bytes| bytes > 0)).collect();
        let weights = memory.unwrap_or_else(|| vec![1; gpus.len()]);
        let mut end = 0;
        let ends = deal(layers, &weights).into_iter().map(|count| {
            end += count;
            end
        });
        let begins = ends.take(gpus.len() - 1).collect();
        Self { gpus: gpus.to_vec(), begins }
    }

    /// In the order of the parts.
    pub fn gpus(&self) -> &[Gpu] {
        &self.gpus
    }

    /// The device of the tensor of a canonical name.
    pub fn gpu_of(&self, name: &str) -> &Gpu {
        let last = &self.gpus[self.gpus.len() - 1];
        match names::decoder_layer(name) {
            Some(layer) => &self.gpus[self.begins.iter().filter(|&&begin| begin <= layer).count()],
            None if [names::FINAL_NORM, names::LM_HEAD].contains(&name) => last,
            None => &self.gpus[0],
        }
    }
}

/// How many of `count` things each gets, at least one, as nearly in proportion to the weights as whole ones can be.
fn deal(count: usize, weights: &[u64]) -> Vec<usize> {
    let mut dealt = vec![1_usize; weights.len()];
    for _ in weights.len()..count {
        // The next one goes to who would be the least full with it.
        let fullness = |at: usize| (dealt[at] + 1) as f64 / weights[at] as f64;
        let next = (0..weights.len()).min_by(|&a, &b| fullness(a).total_cmp(&fullness(b)));
        dealt[next.unwrap_or(0)] += 1;
    }
    dealt
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::AdapterFacts;

    fn device(memory: Option<u64>) -> Gpu {
        Gpu::counting(AdapterFacts { memory, ..AdapterFacts::of_a_usual_gpu() })
    }

    #[test]
    fn layers_are_dealt_in_proportion_and_all_of_them() {
        assert_eq!(deal(4, &[1, 1]), [2, 2]);
        assert_eq!(deal(5, &[1, 1, 1]), [2, 2, 1]);
        assert_eq!(deal(3, &[1, 1, 1]), [1, 1, 1]);
        assert_eq!(deal(12, &[8, 16]), [4, 8]);
        assert_eq!(deal(10, &[1, 1000]), [1, 9]);
        assert_eq!(deal(80, &[24, 24, 80, 80]), [9, 9, 31, 31]);
    }

    #[test]
    fn what_comes_before_the_layers_is_on_the_first_device_and_what_comes_behind_on_the_last() {
        for memory in [None, Some(8 << 30)] {
            let gpus: Vec<Gpu> = (0..3).map(|_| device(memory)).collect();
            let placement = Placement::split(&gpus, 5);
            let at = |name: &str| gpus.iter().position(|gpu| gpu.is(placement.gpu_of(name)));
            let layers: Vec<_> =
                (0..5).map(|layer| at(&format!("{}{layer}.mlp.up_proj.weight", names::DECODER_LAYERS))).collect();
            assert_eq!(layers, [Some(0), Some(0), Some(1), Some(1), Some(2)]);
            assert_eq!(
                (at(names::EMBED_TOKENS), at(names::LM_HEAD), at(names::FINAL_NORM)),
                (Some(0), Some(2), Some(2))
            );
            assert_eq!(at("multi_modal_projector.linear_1.weight"), Some(0));
        }
        let unlike = Placement::split(&[device(Some(8 << 30)), device(Some(16 << 30))], 12);
        assert_eq!(unlike.begins, [4]);
    }
}
