//! loss[i] = logsumexp(logits[i]) - logits[i, target[i]], one per row, and its gradient softmax - onehot.
//! PyTorch: `torch.nn.functional.cross_entropy(reduction="none")`.
//!
//! Rows without a target do not come here: the caller takes the supervised positions before the vocabulary product.

use super::{Case, Comparison, Cost, Op, Random, Shapes, bindable_rows, by_rows, case::floats, groups_for};
use crate::{error::Result, gpu::Gpu, tensor::Tensor};

/// The losses [N] of logits [N, V] at targets (u32 [N], each below V).
pub fn loss(logits: &Tensor, targets: &Tensor) -> Tensor {
    launch(["cross_entropy.loss", "cross_entropy.loss.wide"], logits, targets, 0.0)
}

/// The same losses [N]; the logits become their gradient (softmax - onehot) * scale in place.
pub fn loss_and_gradient(logits: &Tensor, targets: &Tensor, scale: f32) -> Tensor {
    launch(["cross_entropy.loss_and_gradient", "cross_entropy.loss_and_gradient.wide"], logits, targets, scale)
}

fn launch(kernels: [&str; 2], logits: &Tensor, targets: &Tensor, scale: f32) -> Tensor {
    let (gpu, vocab_size) = (logits.gpu(), logits.cols());
    assert_eq!(logits.rows(), targets.len(), "{logits:?} at targets {targets:?}");
    let kernel = by_rows(gpu, vocab_size, kernels);
    let losses = Tensor::empty(gpu, &[targets.len()]);
    for (first, rows) in bindable_rows(gpu, targets.len(), vocab_size) {
        let bindings = [
            logits.range(first * vocab_size, rows * vocab_size),
            targets.range(first, rows),
            losses.range(first, rows),
        ];
        gpu.dispatch(kernel, &bindings, &[rows as u32, vocab_size as u32, scale.to_bits()], groups_for(rows, 1));
    }
    losses
}

/// Losses [N] and the gradient [N, V] on the host.
pub fn reference(logits: &[f32], targets: &[u32], scale: f64) -> [Vec<f64>; 2] {
    let vocab_size = logits.len() / targets.len().max(1);
    let (mut losses, mut gradient) = (Vec::new(), Vec::new());
    for (row, &target) in logits.chunks(vocab_size.max(1)).zip(targets) {
        let largest = row.iter().fold(f64::MIN, |largest, &x| largest.max(f64::from(x)));
        let sum: f64 = row.iter().map(|&x| (f64::from(x) - largest).exp()).sum();
        losses.push(sum.ln() + largest - f64::from(row[target as usize]));
        gradient.extend(row.iter().enumerate().map(|(i, &x)| {
            let onehot = f64::from(u8::from(i == target as usize));
            ((f64::from(x) - largest).exp() / sum - onehot) * scale
        }));
    }
    [losses, gradient]
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut random = Random::new(n as u64);
    let (rows, vocab_size) = (n + 1, 3 * n + 1);
    // Differences between logits reach 16; the last row lies far from zero, where a plain exponential overflows.
    let mut logits: Vec<f32> = random.values(rows * vocab_size).iter().map(|x| 8.0 * x).collect();
    logits[n * vocab_size..].iter_mut().for_each(|x| *x += 100.0);
    let targets = random.indices(rows, vocab_size);
    let (tlogits, ttargets) =
        (Tensor::from_f32(gpu, &logits, &[rows, vocab_size]), Tensor::from_u32(gpu, &targets, &[rows]));
    let scale = 1.0 / 3.0;
    let losses = loss(&tlogits, &ttargets);
    let untouched = tlogits.to_vec()?;
    let again = loss_and_gradient(&tlogits, &ttargets, scale);
    let [want, want_gradient] = reference(&logits, &targets, f64::from(scale));
    Ok(vec![
        Comparison::new("losses", losses.to_vec()?, want.clone(), 3e-6),
        Comparison::new("logits after the losses alone", untouched, super::testing::wide(&logits), 1e-9),
        Comparison::new("losses beside the gradient", again.to_vec()?, want, 3e-6),
        Comparison::new("dlogits", tlogits.to_vec()?, want_gradient, 1e-5),
    ])
}

fn cases(shapes: &Shapes) -> Vec<Case> {
    let (n, v) = (shapes.targets, shapes.vocab);
    let case = |pass, flops, bytes| Case::of(pass, format!("{n}x{v}"), Cost::each(n * v, flops, bytes));
    let inputs = move |gpu: &Gpu| (floats(gpu, &[n, v]), Tensor::from_u32(gpu, &Random::new(1).indices(n, v), &[n]));
    vec![
        case("forward", 4, 4).run(move |gpu| {
            let (logits, targets) = inputs(gpu);
            move || loss(&logits, &targets)
        }),
        case("forward and backward", 7, 8).run(move |gpu| {
            let (logits, targets) = inputs(gpu);
            move || loss_and_gradient(&logits, &targets, 1.0)
        }),
    ]
}

pub const OP: Op = Op {
    name: "cross_entropy",
    check,
    cases,
    cost: |n| {
        let elements = ((n + 1) * (3 * n + 1)) as u64;
        Cost { flops: 4 * elements, bytes: 4 * elements }
    },
};
