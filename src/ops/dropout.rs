//! y = x * keep / (1 - p), where keep is 0 with probability p. PyTorch: `torch.nn.functional.dropout(training=True)`.
//!
//! Nothing is stored: element i of (seed, stream, step) is kept when word i % 4 of Philox 4x32-10, at the counter
//! (i / 4, step, stream, 0) and the key (seed, 0), is at least p * 2^32. The same call on dy is the backward, and a
//! recomputed or resumed step draws what it drew before, on every device.

use super::{
    Case, Comparison, Cost, Op, Random, Shapes, THREADS, case::floats, elementwise::bindable_elements, groups_for,
};
use crate::{error::Result, gpu::Gpu, rng::philox, tensor::Tensor};

/// What a dropout draws: the same key always gives the same mask.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// p, in [0, 1).
    pub probability: f64,
    pub seed: u32,
    /// Tells apart the places of a model that draw.
    pub stream: u32,
    /// Tells apart the draws of one place.
    pub step: u32,
}

/// Drops elements of x, of any shape. With p = 0 the result is x itself, sharing its memory.
pub fn apply(x: &Tensor, key: Key) -> Tensor {
    if key.probability == 0.0 {
        return x.clone();
    }
    let y = Tensor::empty(x.gpu(), x.shape());
    launch("dropout.apply", x, &y, key, [kept(key.probability), 0.0]);
    y
}

/// y += apply(x), for y of x's size.
pub fn add_to(x: &Tensor, key: Key, y: &Tensor) {
    launch("dropout.apply.add", x, y, key, [kept(key.probability), 0.0]);
}

/// x - apply(x): the dropped elements whole, and what is missing of those kept.
pub fn rest(x: &Tensor, key: Key) -> Tensor {
    let y = Tensor::empty(x.gpu(), x.shape());
    launch("dropout.apply", x, &y, key, [1.0 - kept(key.probability), 1.0]);
    y
}

/// `factors`: of what is kept, of what is dropped.
fn launch(kernel: &str, x: &Tensor, y: &Tensor, key: Key, factors: [f64; 2]) {
    assert_eq!(x.len(), y.len(), "dropout of {x:?} into {y:?}");
    let [kept, dropped] = factors.map(|factor| (factor as f32).to_bits());
    for (first, count) in bindable_elements(x.gpu(), x.len()) {
        // Parts start at whole quads.
        let quad = (first / 4) as u32;
        let quads = count.div_ceil(4);
        let params = [quads as u32, threshold(key.probability), kept, key.seed, key.stream, key.step, quad, dropped];
        let bindings = [x.range(first, count), y.range(first, count)];
        x.gpu().dispatch(kernel, &bindings, &params, groups_for(quads, 2 * THREADS));
    }
}

/// The least word that keeps an element.
fn threshold(p: f64) -> u32 {
    assert!((0.0..1.0).contains(&p), "a dropout probability of {p}");
    (p * 4_294_967_296.0).round() as u32
}

fn kept(p: f64) -> f64 {
    1.0 / (1.0 - p)
}

/// [`apply`] on the host.
pub fn reference(x: &[f32], key: Key) -> Vec<f64> {
    let (threshold, kept) = (threshold(key.probability), kept(key.probability));
    let quads = x.chunks(4).enumerate().flat_map(|(quad, values)| {
        let words = philox([quad as u32, key.step, key.stream, 0], [key.seed, 0]);
        let keep = move |word: u32, x: f32| if word >= threshold { f64::from(x) * kept } else { 0.0 };
        values.iter().zip(words).map(move |(&x, word)| keep(word, x))
    });
    quads.collect()
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut random = Random::new(n as u64);
    let [(x, tx), (dy, tdy), (before, ty)] = [(); 3].map(|()| random.tensor(gpu, &[n, n + 2]));
    let key = Key { probability: 0.3, seed: 0xDEAD_BEEF, stream: 7, step: n as u32 };
    let [none, most] = [0.0, 0.95].map(|probability| Key { probability, stream: 8, ..key });
    let (y, dx, nothing, few) = (apply(&tx, key), apply(&tdy, key), apply(&tx, none), apply(&tx, most));
    let rest = rest(&tx, key);
    add_to(&tdy, key, &ty);
    let wide = super::testing::wide;
    let pairs = |a: &[f64], b: &[f64], f: fn(f64, f64) -> f64| a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect();
    let (want_y, want_dx) = (reference(&x, key), reference(&dy, key));
    Ok(vec![
        Comparison::new("y", y.to_vec()?, want_y.clone(), 1e-6),
        Comparison::new("dx", dx.to_vec()?, want_dx.clone(), 1e-6),
        Comparison::new("rest", rest.to_vec()?, pairs(&wide(&x), &want_y, |x, y| x - y), 1e-6),
        Comparison::new("added", ty.to_vec()?, pairs(&wide(&before), &want_dx, |y, dx| y + dx), 1e-6),
        Comparison::new("p = 0", nothing.to_vec()?, wide(&x), 1e-9),
        Comparison::new("p = 0.95", few.to_vec()?, reference(&x, most), 1e-6),
    ])
}

fn cases(shapes: &Shapes) -> Vec<Case> {
    let size = [shapes.tokens, shapes.hidden];
    let key = Key { probability: 0.05, seed: 1, stream: 2, step: 3 };
    let case =
        |pass, bytes| Case::of(pass, format!("{}x{}", size[0], size[1]), Cost::each(size[0] * size[1], 1, bytes));
    vec![
        case("forward", 8).run(move |gpu| {
            let x = floats(gpu, &size);
            move || apply(&x, key)
        }),
        case("backward", 12).run(move |gpu| {
            let (dy, dx) = (floats(gpu, &size), floats(gpu, &size));
            move || add_to(&dy, key, &dx)
        }),
    ]
}

pub const OP: Op = Op {
    name: "dropout",
    check,
    cases,
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
            let y = reference(&vec![1.0; n], Key { probability: p, seed: 3, stream: 0, step: 1 });
            let dropped = y.iter().filter(|&&y| y == 0.0).count() as f64 / n as f64;
            // Five standard deviations.
            assert!((dropped - p).abs() < 5.0 * (p * (1.0 - p) / n as f64).sqrt(), "{dropped} for {p}");
        }
    }

    #[test]
    fn seed_stream_and_step_each_change_the_draw() {
        let draw = |seed, stream, step| reference(&[1.0; 256], Key { probability: 0.5, seed, stream, step });
        let first = draw(1, 1, 1);
        assert_eq!(first, draw(1, 1, 1));
        assert!([draw(2, 1, 1), draw(1, 2, 1), draw(1, 1, 2)].iter().all(|other| *other != first));
    }
}
