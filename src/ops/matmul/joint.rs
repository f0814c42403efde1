//! Products of one left side with several weights W_w [N_w, K], Y_w = X W_w^T, in one dispatch: where a token costs more
//! launches than work. PyTorch: `F.linear` of the weights one behind the other, `F.silu(F.linear(x, g)) * F.linear(x, u)`.
//!
//! One dispatch serves a few rows of X on GPUs, and weights of one type in 16 or 32 bits, whose rows are whole vectors.
//! Elsewhere each weight has a product of its own. Either way sums run in the same order.

use super::{
    Layout, product, reference, typed,
    ways::{ROWS_KERNEL_MOST, vector_of},
};
use crate::{
    error::Result,
    gpu::Gpu,
    ops::{
        Case, Comparison, Cost, Op, Random, Shapes, activation,
        case::{floats, random},
        testing::wide,
    },
    tensor::{ALIGNMENT, Dtype, Tensor},
};

/// X W_w^T [M, N_w] of several weights; three of them, query, key and value, can be one dispatch.
pub fn joint<const N: usize>(x: &Tensor, weights: [&Tensor; N]) -> [Tensor; N] {
    if N != 3 || !one_serves(x, &weights) {
        return weights.map(|weight| product(Layout::Nt, x, weight));
    }
    let results = weights.map(|weight| Tensor::empty(x.gpu(), &[x.rows(), weight.rows()]));
    let columns = weights.iter().map(|weight| weight.rows()).sum();
    launch("joint3", x, &weights, &results, columns);
    results
}

/// silu(X W_g^T) * (X W_u^T) [M, N] of two weights [N, K].
pub fn gated(x: &Tensor, gate: &Tensor, up: &Tensor) -> Tensor {
    let weights = [gate, up];
    assert_eq!(gate.shape(), up.shape(), "{gate:?} gates {up:?}");
    if !one_serves(x, &weights) {
        let [gate, up] = joint(x, weights);
        return activation::swiglu(&gate, &up);
    }
    let y = Tensor::empty(x.gpu(), &[x.rows(), gate.rows()]);
    launch("gated", x, &weights, std::slice::from_ref(&y), gate.rows());
    y
}

/// Whether one dispatch serves: as `matmul.rows` would serve each.
fn one_serves(x: &Tensor, weights: &[&Tensor]) -> bool {
    let gpu = x.gpu();
    let (dtype, most) = (weights[0].dtype(), gpu.max_binding() as usize);
    // What a binding may begin earlier than a weight is bound with it.
    let bindable = |tensor: &Tensor| tensor.len() * tensor.dtype().bytes() + 4 * ALIGNMENT <= most;
    let fits = |weight: &&Tensor| {
        weight.dtype() == dtype
            && weight.binding_before(0).is_multiple_of(vector_of(dtype))
            && bindable(weight)
            && 4 * ROWS_KERNEL_MOST * weight.rows() <= most
            && !weight.is_empty()
    };
    !gpu.is_cpu()
        && (1..=ROWS_KERNEL_MOST).contains(&x.rows())
        && (dtype == Dtype::F32 || dtype.is_packed())
        && x.cols().is_multiple_of(vector_of(dtype))
        && bindable(x)
        && weights.iter().all(fits)
}

fn launch(kind: &str, x: &Tensor, weights: &[&Tensor], results: &[Tensor], columns: usize) {
    let (gpu, k, dtype) = (x.gpu(), x.cols(), weights[0].dtype());
    let mut bindings = vec![x.binding()];
    let (mut rows, mut offsets) = ([0; 3], [0; 3]);
    for (w, weight) in weights.iter().enumerate() {
        assert_eq!(weight.cols(), k, "product of {x:?} and {weight:?}");
        gpu.add_flops(2 * (x.rows() * weight.rows() * k) as u64);
        let (binding, before) =
            if dtype.is_packed() { weight.packed_range(0, weight.len()) } else { (weight.binding(), 0) };
        bindings.push(binding);
        (rows[w], offsets[w]) = (weight.rows() as u32, before as u32);
    }
    bindings.extend(results.iter().map(Tensor::binding));
    let (m, k) = (x.rows() as u32, k as u32);
    let mut params = [0; 18];
    params[..5].copy_from_slice(&[m, rows[0], k, k, k]);
    params[7] = offsets[0];
    params[14..].copy_from_slice(&[rows[1], rows[2], offsets[1], offsets[2]]);
    let groups = [columns.min(32_768) as u32, 1, columns.div_ceil(32_768) as u32];
    let f16 = if gpu.facts().unpacks_f16 { "_f16_unpacked" } else { "_f16" };
    let dtype = typed(dtype, ["", "_bf16", f16]);
    let rows = if x.rows() == 1 { "_one" } else { "" };
    gpu.dispatch(&format!("matmul.rows.{kind}{dtype}{rows}"), &bindings, &params, groups);
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut out = Vec::new();
    let whole = n.next_multiple_of(8);
    for (dtype, m, k) in [
        (Dtype::F32, 1, whole + 4),
        (Dtype::F32, 3, whole),
        (Dtype::Bf16, 1, whole),
        (Dtype::Bf16, 1, n + 1),
        (Dtype::F16, 1, whole),
        (Dtype::F16, 4, whole + 1024),
        (Dtype::Bf16, 9, n + 9),
    ] {
        let rows = [n + 2, n / 3 + 1, n];
        let mut random = Random::new((m * 31 + n * 7) as u64);
        let (x, tx) = random.tensor(gpu, &[m, k]);
        let mut weight = |rows: usize| {
            let bytes = dtype.narrow(&random.values(rows * k));
            (wide(&dtype.widen(&bytes)), Tensor::from_bytes(gpu, dtype, &bytes, &[rows, k]))
        };
        let weights = rows.map(&mut weight);
        let (up, tup) = weight(rows[0]);
        let plain = |weight: &[f64]| reference(Layout::Nt, &wide(&x), weight, [m, weight.len() / k, k]);
        let tolerance = 2e-6 * (k as f64).sqrt().max(2.0);
        let three = joint(&tx, weights.each_ref().map(|(_, weight)| weight));
        let two = joint(&tx, [&weights[1].1, &tup]);
        let others = [&weights[0], &weights[1], &weights[2], &weights[1], &(up.clone(), tup.clone())];
        for (y, (host, device)) in three.iter().chain(&two).zip(others) {
            let y = y.to_vec()?;
            let alone = wide(&product(Layout::Nt, &tx, device).to_vec()?);
            out.push(Comparison::new("x W^T of several", y.clone(), plain(host), tolerance));
            out.push(Comparison::new("x W^T of several, and of one", y, alone, 0.0));
        }
        let y = gated(&tx, &weights[0].1, &tup).to_vec()?;
        let want = plain(&weights[0].0).iter().zip(plain(&up)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        out.push(Comparison::new("silu(x G^T) * (x U^T)", y, want, 4.0 * tolerance));
    }
    Ok(out)
}

/// Decoding: a layer's products that read one input.
fn cases(shapes: &Shapes) -> Vec<Case> {
    let (d, f) = (shapes.hidden, shapes.intermediate);
    let mut all = Vec::new();
    for (dtype, qkv, mlp) in [
        (Dtype::F32, "q, k, v, decode", "SwiGLU of gate, up, decode"),
        (Dtype::Bf16, "q, k, v in bf16, decode", "SwiGLU of gate, up in bf16, decode"),
    ] {
        let case = |pass, weights: usize, n: usize, results: usize| {
            let cost = Cost {
                flops: (2 * weights * n * d) as u64,
                bytes: (4 * (d + results * n) + dtype.bytes() * weights * n * d) as u64,
            };
            Case::of(pass, format!("1x{d} by {weights} of {n}x{d}"), cost)
        };
        all.push(case(qkv, 3, d, 3).run(move |gpu| {
            let (x, weights) = (floats(gpu, &[1, d]), [(); 3].map(|()| random(gpu, dtype, &[d, d])));
            move || <(Tensor, Tensor, Tensor)>::from(joint(&x, weights.each_ref()))
        }));
        all.push(case(mlp, 2, f, 1).run(move |gpu| {
            let (x, [gate, up]) = (floats(gpu, &[1, d]), [(); 2].map(|()| random(gpu, dtype, &[f, d])));
            move || gated(&x, &gate, &up)
        }));
    }
    all
}

pub const JOINT: Op = Op {
    name: "matmul.joint",
    check,
    cases,
    cost: |n| Cost {
        flops: (2 * (n + 1) * (2 * n + 3 + n / 3)) as u64,
        bytes: (4 * (n + 1) * (2 * n + 3 + n / 3)) as u64,
    },
};
