//! y = (x - mean) / sqrt(var + eps) * w + b over the last dimension, biased variance, in f32.
//! PyTorch: `torch.nn.functional.layer_norm`.

use super::{
    Case, Comparison, Cost, Op, Random, Shapes, bindable_rows, by_rows, case::floats, column_sums, elementwise,
    groups_for,
};
use crate::{error::Result, gpu::Gpu, tensor::Tensor};

/// Normalises the rows of x [T, D]: y [T, D], and mean and reciprocal deviation of each row [T, 2].
pub fn forward(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> (Tensor, Tensor) {
    let (gpu, d) = (x.gpu(), x.cols());
    let (y, stats) = (Tensor::empty(gpu, x.shape()), Tensor::empty(gpu, &[x.rows(), 2]));
    for (first, rows) in bindable_rows(gpu, x.rows(), d) {
        let (start, count) = (first * d, rows * d);
        let bindings = [
            x.range(start, count),
            weight.binding(),
            bias.binding(),
            y.range(start, count),
            stats.range(first * 2, rows * 2),
        ];
        let kernel = by_rows(gpu, d, ["layer_norm.forward", "layer_norm.forward.wide"]);
        gpu.dispatch(kernel, &bindings, &[rows as u32, d as u32, eps.to_bits()], groups_for(rows, 1));
    }
    (y, stats)
}

/// The gradient of x from dy [T, D].
pub fn backward_x(x: &Tensor, weight: &Tensor, stats: &Tensor, dy: &Tensor) -> Tensor {
    let (gpu, d) = (x.gpu(), x.cols());
    let dx = Tensor::empty(gpu, x.shape());
    for (first, rows) in bindable_rows(gpu, x.rows(), d) {
        let (start, count) = (first * d, rows * d);
        let bindings = [
            x.range(start, count),
            weight.binding(),
            stats.range(first * 2, rows * 2),
            dy.range(start, count),
            dx.range(start, count),
        ];
        let kernel = by_rows(gpu, d, ["layer_norm.backward_x", "layer_norm.backward_x.wide"]);
        gpu.dispatch(kernel, &bindings, &[rows as u32, d as u32, 0], groups_for(rows, 1));
    }
    dx
}

/// dweight [D] and dbias [D] += their gradients.
pub fn backward_weight(x: &Tensor, stats: &Tensor, dy: &Tensor, dweight: &Tensor, dbias: &Tensor) {
    let (gpu, d) = (x.gpu(), x.cols());
    for (first, rows) in bindable_rows(gpu, x.rows(), d) {
        let (start, count) = (first * d, rows * d);
        let bindings = [
            x.range(start, count),
            stats.range(first * 2, rows * 2),
            dy.range(start, count),
            dweight.binding(),
            dbias.binding(),
        ];
        let (kernel, groups) = column_sums(x, ["layer_norm.backward_weight", "layer_norm.backward_weight_wide"]);
        gpu.dispatch(kernel, &bindings, &[rows as u32, d as u32, 0], groups);
    }
}

/// y, dx, dweight and dbias on the host.
pub fn reference(x: &[f32], weight: &[f32], bias: &[f32], dy: &[f32], eps: f64) -> [Vec<f64>; 4] {
    let d = weight.len();
    let (mut y, mut dx, mut dweight, mut dbias) = (Vec::new(), Vec::new(), vec![0.0; d], vec![0.0; d]);
    for (x, dy) in x.chunks(d).zip(dy.chunks(d)) {
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / d as f64;
        let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / d as f64;
        let rstd = 1.0 / (variance + eps).sqrt();
        let n: Vec<f64> = x.iter().map(|&x| (f64::from(x) - mean) * rstd).collect();
        let g: Vec<f64> = dy.iter().zip(weight).map(|(dy, w)| f64::from(*dy) * f64::from(*w)).collect();
        let mean_g = g.iter().sum::<f64>() / d as f64;
        let mean_gn = g.iter().zip(&n).map(|(g, n)| g * n).sum::<f64>() / d as f64;
        for i in 0..d {
            y.push(n[i] * f64::from(weight[i]) + f64::from(bias[i]));
            dx.push(rstd * (g[i] - mean_g - n[i] * mean_gn));
            dweight[i] += f64::from(dy[i]) * n[i];
            dbias[i] += f64::from(dy[i]);
        }
    }
    [y, dx, dweight, dbias]
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut random = Random::new(n as u64);
    let shape = [n / 2 + 1, n];
    let ((x, tx), (dy, tdy)) = (random.tensor(gpu, &shape), random.tensor(gpu, &shape));
    let ((w, tw), (b, tb)) = (random.tensor(gpu, &[n]), random.tensor(gpu, &[n]));
    // One element has no variance: a larger eps keeps its gradient comparable.
    let eps = if n < 8 { 0.1 } else { 1e-5 };
    let (y, stats) = forward(&tx, &tw, &tb, eps);
    let (dweight, dbias) = (elementwise::zeros(gpu, &[n]), elementwise::zeros(gpu, &[n]));
    backward_weight(&tx, &stats, &tdy, &dweight, &dbias);
    let dx = backward_x(&tx, &tw, &stats, &tdy);
    // Of one element's gradient nothing is left but the rounding of dy * w, where a device fuses that with the difference:
    // 2^-24 times rstd, over the least scale.
    let of_dx = if n == 1 { 2e-4 } else { 2e-5 };
    let [want_y, want_dx, want_dweight, want_dbias] = reference(&x, &w, &b, &dy, f64::from(eps));
    Ok(vec![
        Comparison::new("y", y.to_vec()?, want_y, 3e-6),
        Comparison::new("dx", dx.to_vec()?, want_dx, of_dx),
        Comparison::new("dweight", dweight.to_vec()?, want_dweight, 1e-5),
        Comparison::new("dbias", dbias.to_vec()?, want_dbias, 1e-5),
    ])
}

fn cases(shapes: &Shapes) -> Vec<Case> {
    let (t, d) = (shapes.patches + 1, shapes.vision_hidden);
    let case = |pass, flops, bytes| Case::of(pass, format!("{t}x{d}"), Cost::each(t * d, flops, bytes));
    let inputs = move |gpu: &Gpu| (floats(gpu, &[t, d]), floats(gpu, &[d]), floats(gpu, &[t, d]));
    vec![
        case("forward", 8, 8).run(move |gpu| {
            let (x, weight, _) = inputs(gpu);
            move || forward(&x, &weight, &weight, 1e-5)
        }),
        case("backward x", 12, 12).run(move |gpu| {
            let (x, weight, dy) = inputs(gpu);
            let (_, stats) = forward(&x, &weight, &weight, 1e-5);
            move || backward_x(&x, &weight, &stats, &dy)
        }),
        case("backward weight", 5, 8).run(move |gpu| {
            let (x, weight, dy) = inputs(gpu);
            let (_, stats) = forward(&x, &weight, &weight, 1e-5);
            let (dweight, dbias) = (elementwise::zeros(gpu, &[d]), elementwise::zeros(gpu, &[d]));
            move || backward_weight(&x, &stats, &dy, &dweight, &dbias)
        }),
    ]
}

pub const OP: Op = Op {
    name: "layer_norm",
    check,
    cases,
    cost: |n| {
        let elements = ((n / 2 + 1) * n) as u64;
        Cost { flops: 8 * elements, bytes: 8 * elements }
    },
};
