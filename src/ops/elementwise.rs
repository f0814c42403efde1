//! Add, scale, fill, and the sum of rows (a bias's gradient).

use super::{Case, Comparison, Cost, MAX_GROUPS, Op, Random, Shapes, THREADS, case::floats, groups_for};
use crate::{
    error::Result,
    gpu::Gpu,
    tensor::{ALIGNMENT, Tensor},
};

/// Cuts `count` elements into parts that can be bound and dispatched: `(first, count)`.
pub(super) fn bindable_elements(gpu: &Gpu, count: usize) -> impl Iterator<Item = (usize, usize)> {
    let most = (gpu.max_binding() as usize / 4).min(MAX_GROUPS * MAX_GROUPS / 4) / ALIGNMENT * ALIGNMENT;
    let step = most.max(ALIGNMENT);
    (0..count).step_by(step).map(move |first| (first, step.min(count - first)))
}

fn launch(name: &str, tensors: &[&Tensor], value: f32) {
    let gpu = tensors[0].gpu();
    for (first, count) in bindable_elements(gpu, tensors[0].len()) {
        let bindings: Vec<_> = tensors.iter().map(|tensor| tensor.range(first, count)).collect();
        let quads = count.div_ceil(4);
        gpu.dispatch(name, &bindings, &[quads as u32, value.to_bits(), 0], groups_for(quads, 4 * THREADS));
    }
}

/// a + b in a new tensor. PyTorch: `a + b`.
pub fn add(a: &Tensor, b: &Tensor) -> Tensor {
    let y = Tensor::empty(a.gpu(), a.shape());
    add_to(a, b, &y);
    y
}

/// y = a + b; y may be a.
pub fn add_to(a: &Tensor, b: &Tensor, y: &Tensor) {
    assert!(a.len() == b.len() && a.len() == y.len(), "{a:?} + {b:?} into {y:?}");
    launch("elementwise.add", &[a, b, y], 0.0);
}

/// y += a
pub fn add_in_place(a: &Tensor, y: &Tensor) {
    assert_eq!(a.len(), y.len(), "{a:?} added to {y:?}");
    launch("elementwise.add_in_place", &[a, y], 0.0);
}

/// y = value
pub fn fill(y: &Tensor, value: f32) {
    if value.to_bits() == 0 {
        return y.clear();
    }
    launch("elementwise.fill", &[y], value);
}

/// A new tensor of zeros.
pub fn zeros(gpu: &Gpu, shape: &[usize]) -> Tensor {
    let y = Tensor::empty(gpu, shape);
    fill(&y, 0.0);
    y
}

/// y *= value
pub fn scale(y: &Tensor, value: f32) {
    launch("elementwise.scale", &[y], value);
}

/// out[D] += sum over the rows of x [N, D].
pub fn add_rows(x: &Tensor, out: &Tensor) {
    assert_eq!(x.cols(), out.len(), "rows of {x:?} into {out:?}");
    for (first, rows) in super::bindable_rows(x.gpu(), x.rows(), x.cols()) {
        let params = [rows as u32, 0, x.cols() as u32];
        let bindings = [x.range(first * x.cols(), rows * x.cols()), out.binding()];
        let (kernel, groups) = super::column_sums(x, ["elementwise.add_rows", "elementwise.add_rows_wide"]);
        x.gpu().dispatch(kernel, &bindings, &params, groups);
    }
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut random = Random::new(n as u64);
    let (a, ta) = random.tensor(gpu, &[n, n + 1]);
    let (b, tb) = random.tensor(gpu, &[n, n + 1]);
    let sum = add(&ta, &tb);
    let rows = zeros(gpu, &[n + 1]);
    add_rows(&sum, &rows);
    let want: Vec<f64> = a.iter().zip(&b).map(|(a, b)| f64::from(*a) + f64::from(*b)).collect();
    let want_rows = (0..=n).map(|col| want.iter().skip(col).step_by(n + 1).sum()).collect();
    let got = sum.to_vec()?;
    add_in_place(&tb, &ta);
    let in_place = ta.to_vec()?;
    scale(&sum, -0.5);
    Ok(vec![
        Comparison::new("a + b", got, want.clone(), 1e-7),
        Comparison::new("a += b", in_place, want.clone(), 1e-7),
        Comparison::new("sum of rows", rows.to_vec()?, want_rows, 1e-6),
        Comparison::new("scaled", sum.to_vec()?, want.iter().map(|x| -0.5 * x).collect(), 1e-7),
    ])
}

fn cases(shapes: &Shapes) -> Vec<Case> {
    let (t, d) = (shapes.tokens, shapes.hidden);
    let case = |pass, flops, bytes| Case::of(pass, format!("{t}x{d}"), Cost::each(t * d, flops, bytes));
    vec![
        case("add", 1, 12).run(move |gpu| {
            let (a, b) = (floats(gpu, &[t, d]), floats(gpu, &[t, d]));
            move || add(&a, &b)
        }),
        case("add in place", 1, 12).run(move |gpu| {
            let (a, y) = (floats(gpu, &[t, d]), floats(gpu, &[t, d]));
            move || add_in_place(&a, &y)
        }),
        case("sum of rows", 1, 4).run(move |gpu| {
            let (x, out) = (floats(gpu, &[t, d]), zeros(gpu, &[d]));
            move || add_rows(&x, &out)
        }),
        case("fill", 0, 4).run(move |gpu| {
            let y = floats(gpu, &[t, d]);
            move || fill(&y, 0.5)
        }),
    ]
}

pub const OP: Op = Op {
    name: "elementwise.add",
    check,
    cases,
    cost: |n| Cost { flops: (n * (n + 1)) as u64, bytes: 12 * (n * (n + 1)) as u64 },
};
