//! DoRA's y = magnitude / norm * x + bias by columns, with norm the lengths of the adapted weight's rows, which the
//! backward takes as constants. PEFT: `peft.tuners.lora.dora.DoraLinearLayer`.
//!
//! A norm of 0 (a row of zeros, which has no direction) counts as a factor of 0, where PEFT divides by it.

use super::{
    Case, Comparison, Cost, Op, Random, Shapes, THREADS, bindable_rows, by_columns, by_rows, case::floats, column_sums,
    elementwise, groups_for,
};
use crate::{
    error::Result,
    gpu::{Binding, Gpu},
    tensor::Tensor,
};

/// Writes the lengths of the rows of w [N, K] to `norm` [N].
pub fn row_norms(w: &Tensor, norm: &Tensor) {
    assert_eq!(w.rows(), norm.len(), "norms of {w:?} into {norm:?}");
    for (first, rows) in bindable_rows(w.gpu(), w.rows(), w.cols()) {
        let bindings = [w.range(first * w.cols(), rows * w.cols()), norm.range(first, rows)];
        let kernel = by_rows(w.gpu(), w.cols(), ["dora.row_norms", "dora.row_norms.wide"]);
        w.gpu().dispatch(kernel, &bindings, &[rows as u32, w.cols() as u32], groups_for(rows, 1));
    }
}

/// y = magnitude / norm * x + bias, for x [T, N] and the others [N], in a new tensor.
pub fn scale_columns(x: &Tensor, magnitude: &Tensor, norm: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let n = x.cols();
    assert!(magnitude.len() == n && norm.len() == n, "columns of {x:?} by {magnitude:?} and {norm:?}");
    let y = Tensor::empty(x.gpu(), x.shape());
    for (first, rows) in bindable_rows(x.gpu(), x.rows(), n) {
        let (start, count) = (first * n, rows * n);
        let mut bindings = vec![x.range(start, count), magnitude.binding(), norm.binding(), y.range(start, count)];
        bindings.extend(bias.map(Tensor::binding));
        let kernels =
            if bias.is_some() { ["dora.scale.bias", "dora.scale.vec_bias"] } else { ["dora.scale", "dora.scale.vec"] };
        scale(kernels, &bindings, x.gpu(), [rows, n]);
    }
    y
}

/// w [N, K] *= magnitude / norm by rows, these [N]: a merged weight.
pub fn scale_rows(w: &Tensor, magnitude: &Tensor, norm: &Tensor) {
    assert!(magnitude.len() == w.rows() && norm.len() == w.rows(), "rows of {w:?} by {magnitude:?} and {norm:?}");
    for (first, rows) in bindable_rows(w.gpu(), w.rows(), w.cols()) {
        let part = w.range(first * w.cols(), rows * w.cols());
        let bindings = [part, magnitude.range(first, rows), norm.range(first, rows), part];
        scale(["dora.scale.rows", "dora.scale.vec_rows"], &bindings, w.gpu(), [rows, w.cols()]);
    }
}

/// Launches the second kernel where rows are whole vec4s, else the first.
fn scale(kernels: [&str; 2], bindings: &[Binding<'_>], gpu: &Gpu, [rows, cols]: [usize; 2]) {
    let (kernel, width) = by_columns(kernels, cols);
    gpu.dispatch(kernel, bindings, &[rows as u32, cols as u32], groups_for(rows * cols / width, 2 * THREADS));
}

/// dmagnitude [N] += its gradient, from x and dy [T, N]. The gradient of x is [`scale_columns`] of dy.
pub fn backward_magnitude(x: &Tensor, norm: &Tensor, dy: &Tensor, dmagnitude: &Tensor) {
    let n = x.cols();
    for (first, rows) in bindable_rows(x.gpu(), x.rows(), n) {
        let (start, count) = (first * n, rows * n);
        let bindings = [x.range(start, count), dy.range(start, count), norm.binding(), dmagnitude.binding()];
        let (kernel, groups) = column_sums(x, ["dora.backward_magnitude", "dora.backward_magnitude_wide"]);
        x.gpu().dispatch(kernel, &bindings, &[rows as u32, n as u32], groups);
    }
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut random = Random::new(n as u64);
    let (t, k) = (n / 2 + 1, n + 3);
    let ((mut w, _), (m, tm), (bias, tbias)) =
        (random.tensor(gpu, &[n, k]), random.tensor(gpu, &[n]), random.tensor(gpu, &[n]));
    let ((x, tx), (dy, tdy)) = (random.tensor(gpu, &[t, n]), random.tensor(gpu, &[t, n]));
    // The last row has no direction.
    if n > 1 {
        w[(n - 1) * k..].fill(0.0);
    }
    let tw = Tensor::from_f32(gpu, &w, &[n, k]);
    let norm = Tensor::empty(gpu, &[n]);
    row_norms(&tw, &norm);
    let y = scale_columns(&tx, &tm, &norm, Some(&tbias));
    let dx = scale_columns(&tdy, &tm, &norm, None);
    let dm = elementwise::zeros(gpu, &[n]);
    backward_magnitude(&tx, &norm, &tdy, &dm);
    backward_magnitude(&tx, &norm, &tdy, &dm);
    scale_rows(&tw, &tm, &norm);

    let want_norm: Vec<f64> =
        w.chunks(k).map(|row| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()).collect();
    let over_norm = |column: usize, x: f64| if want_norm[column] > 0.0 { x / want_norm[column] } else { 0.0 };
    let factor = |column: usize| over_norm(column, f64::from(m[column]));
    let scaled = |x: &[f32], bias: &[f32]| -> Vec<f64> {
        let bias = |column: usize| bias.get(column).map_or(0.0, |&bias| f64::from(bias));
        x.iter().enumerate().map(|(i, &x)| factor(i % n) * f64::from(x) + bias(i % n)).collect()
    };
    let dot = |column: usize| (0..t).map(|row| f64::from(x[row * n + column]) * f64::from(dy[row * n + column])).sum();
    let want_dm = (0..n).map(|column| 2.0 * over_norm(column, dot(column))).collect();
    let want_w = w.iter().enumerate().map(|(i, &x)| factor(i / k) * f64::from(x)).collect();
    Ok(vec![
        Comparison::new("norms", norm.to_vec()?, want_norm.clone(), 1e-6),
        Comparison::new("y", y.to_vec()?, scaled(&x, &bias), 2e-6),
        Comparison::new("dx", dx.to_vec()?, scaled(&dy, &[]), 2e-6),
        Comparison::new("dmagnitude", dm.to_vec()?, want_dm, 1e-5),
        Comparison::new("rows scaled", tw.to_vec()?, want_w, 2e-6),
    ])
}

fn cases(shapes: &Shapes) -> Vec<Case> {
    let (t, d) = (shapes.tokens, shapes.hidden);
    let case =
        |pass, rows: usize, flops, bytes| Case::of(pass, format!("{rows}x{d}"), Cost::each(rows * d, flops, bytes));
    vec![
        case("norms of rows", d, 2, 4).run(move |gpu| {
            let (w, norm) = (floats(gpu, &[d, d]), floats(gpu, &[d]));
            move || row_norms(&w, &norm)
        }),
        case("forward", t, 2, 8).run(move |gpu| {
            let (x, magnitude, norm) = (floats(gpu, &[t, d]), floats(gpu, &[d]), floats(gpu, &[d]));
            move || scale_columns(&x, &magnitude, &norm, None)
        }),
        case("backward magnitude", t, 2, 8).run(move |gpu| {
            let (x, dy, norm) = (floats(gpu, &[t, d]), floats(gpu, &[t, d]), floats(gpu, &[d]));
            let dmagnitude = elementwise::zeros(gpu, &[d]);
            move || backward_magnitude(&x, &norm, &dy, &dmagnitude)
        }),
    ]
}

pub const OP: Op = Op {
    name: "dora.scale_columns",
    check,
    cases,
    cost: |n| {
        let elements = ((n / 2 + 1) * n) as u64;
        Cost { flops: 2 * elements, bytes: 8 * elements + 12 * n as u64 }
    },
};
