//! out[slot] += sum of x, or of x^2: for the loss, and for the gradients' norm. PyTorch: `x.sum()`, `x.square().sum()`.
//!
//! Two levels: up to [`partials`] workgroups each sum a stride of x, then one adds their sums. The order is fixed by
//! the size, so that a run repeats to the bit on one device.

use super::{
    Case, Comparison, Cost, Op, Random, Shapes, THREADS,
    case::floats,
    elementwise::{bindable_elements, zeros},
};
use crate::{error::Result, gpu::Gpu, tensor::Tensor};

/// Most sums that the first level leaves to the second: enough workgroups to fill a GPU several times.
fn partials(gpu: &Gpu) -> usize {
    if gpu.is_cpu() { 256 } else { 2048 }
}

/// out[slot] += sum of the squares of x, of any shape.
pub fn add_square_sum(x: &Tensor, out: &Tensor, slot: usize) {
    launch(x, out, slot, true);
}

/// out[slot] += sum of x, of any shape.
pub fn add_sum(x: &Tensor, out: &Tensor, slot: usize) {
    launch(x, out, slot, false);
}

fn launch(x: &Tensor, out: &Tensor, slot: usize, square: bool) {
    assert!(slot < out.len(), "slot {slot} of {out:?}");
    let gpu = x.gpu();
    let partial = Tensor::empty(gpu, &[partials(gpu)]);
    for (first, count) in bindable_elements(gpu, x.len()) {
        // Sixteen elements a thread; whole vec4s of sums.
        let partials = count.div_ceil(16 * THREADS).next_multiple_of(4).min(partials(gpu)) as u32;
        let params = [count as u32, partials, slot as u32, u32::from(square)];
        let bindings = [x.range(first, count), partial.binding()];
        gpu.dispatch("reduce.square_sum", &bindings, &params, [partials, 1, 1]);
        gpu.dispatch("reduce.finish", &[partial.binding(), out.binding()], &params, [1, 1, 1]);
    }
}

/// The sum, or the sum of squares, on the host.
pub fn reference(x: &[f32], square: bool) -> f64 {
    x.iter().map(|&x| if square { f64::from(x).powi(2) } else { f64::from(x) }).sum()
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut random = Random::new(n as u64);
    // At 577, on a GPU at 2,000, more elements than the first level takes at once.
    let (x, tx) = random.tensor(gpu, &[n, 7 * n + 1]);
    let (square, plain) = (zeros(gpu, &[3]), zeros(gpu, &[2]));
    add_square_sum(&tx, &square, 1);
    add_square_sum(&tx, &square, 1);
    add_square_sum(&tx, &square, 2);
    add_sum(&tx, &plain, 0);
    let (want_square, want_plain) = (reference(&x, true), reference(&x, false));
    Ok(vec![
        Comparison::new("sums of squares", square.to_vec()?, vec![0.0, 2.0 * want_square, want_square], 1e-6),
        // Of both signs: the error is that of the larger sums on the way.
        Comparison::new("sum", plain.to_vec()?, vec![want_plain, 0.0], 1e-5),
    ])
}

fn cases(shapes: &Shapes) -> Vec<Case> {
    let size = [shapes.intermediate, shapes.hidden];
    let cost = Cost::each(size[0] * size[1], 2, 4);
    let case = Case::of("forward", format!("{}x{}", size[0], size[1]), cost).run(move |gpu| {
        let (x, out) = (floats(gpu, &size), zeros(gpu, &[1]));
        move || add_square_sum(&x, &out, 0)
    });
    vec![case]
}

pub const OP: Op = Op {
    name: "reduce.square_sum",
    check,
    cases,
    cost: |n| {
        let elements = (n * (7 * n + 1)) as u64;
        Cost { flops: 2 * elements, bytes: 4 * elements }
    },
};
