//! y = x * keep / (1 - p), where keep is 0 with probability p. PyTorch: `torch.nn.functional.dropout(training=True)`.
//!
//! Nothing is stored: element i of (seed, stream, step) is kept when word i % 4 of Philox 4x32-10, at the counter
//! (i / 4, step, stream, 0) and the key (seed, 0), is at least p * 2^32. The same call on dy is the backward, and a
//! recomputed or resumed step draws what it drew before, on every device.

use super::{Comparison, Cost, Op, Random, THREADS, elementwise::bindable_elements, groups_for};
use crate::{error::Result, gpu::Gpu, rng::philox, tensor::Tensor};

/// Drops elements of x, of any shape, with probability `p` in [0, 1). `stream` tells apart the places of a model that
/// draw, `step` the draws of one place. With p = 0 the result is x itself, sharing its memory.
pub fn apply(x: &Tensor, p: f64, seed: u32, stream: u32, step: u32) -> Tensor {
    if p == 0.0 {
        return x.clone();
    }
    let (gpu, y) = (x.gpu(), Tensor::empty(x.gpu(), x.shape()));
    let (threshold, scale) = threshold_and_scale(p);
    for (first, count) in bindable_elements(gpu, x.len()) {
        // Parts start at whole quads.
        let params = [count as u32, threshold, scale.to_bits(), seed, stream, step, (first / 4) as u32];
        let bindings = [x.range(first, count), y.range(first, count)];
        gpu.dispatch("dropout.apply", &bindings, &params, groups_for(count.div_ceil(4), THREADS));
    }
    y
}

/// The least word that keeps an element, and 1 / (1 - p).
fn threshold_and_scale(p: f64) -> (u32, f32) {
    assert!((0.0..1.0).contains(&p), "a dropout probability of {p}");
    ((p * 4_294_967_296.0).round() as u32, (1.0 / (1.0 - p)) as f32)
}

/// [`apply`] on the host.
pub fn reference(x: &[f32], p: f64, seed: u32, stream: u32, step: u32) -> Vec<f64> {
    let (threshold, _) = threshold_and_scale(p);
    let quads = x.chunks(4).enumerate().flat_map(|(quad, values)| {
        let words = philox([quad as u32, step, stream, 0], [seed, 0]);
        let keep = move |word: u32, x: f32| if word >= threshold { f64::from(x) / (1.0 - p) } else { 0.0 };
        values.iter().zip(words).map(move |(&x, word)| keep(word, x))
    });
    quads.collect()
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut random = Random::new(n as u64);
    let ((x, tx), (dy, tdy)) = (random.tensor(gpu, &[n, n + 2]), random.tensor(gpu, &[n, n + 2]));
    let (seed, stream, step) = (0xDEAD_BEEF, 7, n as u32);
    let (y, dx) = (apply(&tx, 0.3, seed, stream, step), apply(&tdy, 0.3, seed, stream, step));
    let (nothing, most) = (apply(&tx, 0.0, seed, stream, step), apply(&tx, 0.95, seed, stream + 1, step));
    Ok(vec![
        Comparison::new("y", y.to_vec()?, reference(&x, 0.3, seed, stream, step), 1e-6),
        Comparison::new("dx", dx.to_vec()?, reference(&dy, 0.3, seed, stream, step), 1e-6),
        Comparison::new("p = 0", nothing.to_vec()?, super::testing::wide(&x), 1e-9),
        Comparison::new("p = 0.95", most.to_vec()?, reference(&x, 0.95, seed, stream + 1, step), 1e-6),
    ])
}

pub const OP: Op = Op {
    name: "dropout",
    check,
    cost: |n| {
        let elements = (n * (n + 2)) as u64;
        Cost { flops: elements, bytes: 8 * elements }
    },
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_dropped_elements_is_p() {
        let n = 40_000;
        for p in [0.05, 0.5] {
            let y = reference(&vec![1.0; n], p, 3, 0, 1);
            let dropped = y.iter().filter(|&&y| y == 0.0).count() as f64 / n as f64;
            // Five standard deviations.
            assert!((dropped - p).abs() < 5.0 * (p * (1.0 - p) / n as f64).sqrt(), "{dropped} for {p}");
        }
    }

    #[test]
    fn seed_stream_and_step_each_change_the_draw() {
        let draw = |seed, stream, step| reference(&[1.0; 256], 0.5, seed, stream, step);
        let first = draw(1, 1, 1);
        assert_eq!(first, draw(1, 1, 1));
        assert!([draw(2, 1, 1), draw(1, 2, 1), draw(1, 1, 2)].iter().all(|other| *other != first));
    }
}
